"""A segmenter as an ONNX file: onnxruntime alone gives what torch gives."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from fmbseg import cli
from fmbseg.data import images
from fmbseg.errors import DataError, ParameterError
from fmbseg.models import encoders
from fmbseg.params import ModuleParams, SegmentParams
from fmbseg.runs import modules
from fmbseg.stage2.alignment import Alignment
from fmbseg.stage2.segmenter import AlignedEncoder, words_space
from fmbseg.tools import deploy

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLASSES, BACKGROUND = "sandwich=sandwich|burger, cup, person=person|man|woman", "table, wall"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, real_image):
    """The command's file of the module of the repository, beside a square and a wide image of the windows' size."""
    folder = tmp_path_factory.mktemp("onnx")
    options = ["--classes", CLASSES, "--background", BACKGROUND, "--module", str(modules.SHIPPED), "--out", str(folder / "model.onnx")]
    assert cli.main(["onnx", *options]) == 0
    Image.fromarray(images.resize(real_image, (448, 448))).save(folder / "photo.png")
    return folder


@pytest.mark.embedded
def test_the_lines_of_the_documentation_need_no_torch(exported):
    (code,) = re.findall(r"```python\n(import json\n.*?)```", (ROOT / "docs" / "tools.md").read_text(), re.DOTALL)
    assert "photo.jpg" in code
    blocked = "import sys\nsys.modules['torch'] = sys.modules['fmbseg'] = None\n"
    code = blocked + code.replace("photo.jpg", "photo.png") + "\nnp.savez('out.npz', labels=labels, similarities=similarities)"
    run = subprocess.run([sys.executable, "-c", code], cwd=exported, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    made, image = np.load(exported / "out.npz"), images.read_image(exported / "photo.png")
    segmenter = modules.Segmenter.load(modules.SHIPPED)
    expected = segmenter.segment(image, CLASSES, BACKGROUND)
    assert made["labels"].shape == (1, 448, 448) and made["labels"].dtype == expected.labels.dtype
    assert (made["labels"][0] == expected.labels).mean() >= 0.999 and len(np.unique(expected.labels)) > 1
    np.testing.assert_allclose(made["similarities"][0], expected.placed.patches, atol=deploy.CLOSE)
    names = [expected.space.names[k] for k in np.unique(expected.labels)]
    assert run.stdout.strip() == str(names)


@pytest.mark.embedded
def test_it_says_what_it_is_and_names_no_place(exported):
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    said = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    space = words_space(CLASSES, BACKGROUND)
    assert tuple(said["names"]) == space.names and said["background"] and said["words"] == [list(words) for words in space.prompts]
    assert any("not annotation-free" in note for note in said["notes"]) and said["templates"] == "one"
    assert said["licences"].keys() == {"fmbseg", "efficientnet_lite2", "all_minilm_l6_v2"} and len(said["module_sha256"]) == 64
    assert "efficientnet_lite2@" in said["encoder"]
    assert str(ROOT).encode() not in (exported / "model.onnx").read_bytes()


@pytest.fixture
def vit(monkeypatch):
    """vit(kind of module) -> a segmenter of a small random vision transformer, DINOv2's architecture."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)
    encoder = encoders.Transformer("random:vit", encoders.VITS["dinov2_vits14"], Dinov2Model(config)).eval().requires_grad_(False)
    stand_in = modules.Segmenter.load(modules.SHIPPED)

    def make(module="transformer", **params):
        embedder = AlignedEncoder(encoder, Alignment(32, 384, ModuleParams(module=module, heads=2)), "random")
        made = modules.Segmenter(embedder, stand_in.clip, SegmentParams(**params))
        made.path, made.described = stand_in.path, {"encoder": "random:vit", "clip": "lit-efficientnet-lite2-minilm"}
        return made

    return make


@pytest.mark.embedded
@pytest.mark.parametrize("module", ["transformer", "mlp"])
def test_vision_transformers_any_number_of_images(vit, module, tmp_path, real_image):
    segmenter = vit(module, segment_short_side=70, window=140, window_stride=70, interpolation="bicubic")
    path = deploy.to_onnx(segmenter, {"cat": ["cat", "kitten"], "dog": ["dog"]}, tmp_path / "vit.onnx", size=(70, 112))
    several = np.stack([images.resize(part, (70, 112)) for part in (real_image, real_image[:100], real_image[:, 100:])])
    labels, similarities = onnxruntime.InferenceSession(path).run(None, {"pixels": several})
    for k, image in enumerate(several):
        expected = segmenter.segment(image, {"cat": ["cat", "kitten"], "dog": ["dog"]})
        np.testing.assert_allclose(similarities[k], expected.placed.patches, atol=deploy.CLOSE)
        assert (labels[k] == expected.labels).mean() >= 0.999
    assert labels.shape == (3, 70, 112) and np.ptp(similarities) > 0.01


@pytest.mark.embedded
def test_what_cannot_be_exported_says_why(vit, tmp_path, monkeypatch):
    for made, size, sentence in (
        (vit(), (70, 100), "70 x 100: both sides must be multiples of the encoder's patch, 14 pixels"),
        (vit(word_maximum="after"), (70, 70), "word_maximum = before"),
    ):
        with pytest.raises(ParameterError, match=re.escape(sentence)):
            deploy.to_onnx(made, "cat, dog", tmp_path / "no.onnx", size=size)
    monkeypatch.setattr(deploy, "CLOSE", -1.0)
    with pytest.raises(DataError, match="nothing was written"):
        deploy.to_onnx(vit("linear"), "cat, dog", tmp_path / "no.onnx", size=(28, 28))
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ParameterError, match=r'pip install .*"fmbseg\[onnx\]"'):
        deploy.to_onnx(vit(), "cat, dog", tmp_path / "no.onnx")
