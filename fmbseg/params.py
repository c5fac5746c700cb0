"""One strict schema a step: what may be set, its default, and whether the paper or we chose it.

Defaults are the paper's profile; ``params/<profile>/`` holds what another profile sets differently (``profiles.py``
reads it). An unknown key, a wrong type or a value out of range is refused by one sentence that names the key.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fmbseg import files
from fmbseg.errors import ParameterError


def _number(value: Any) -> Any:
    """YAML 1.1 leaves ``1e-4`` (no dot) a string: read such strings as the numbers they are."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


SPEED_ONLY = {"crop_batch", "window_batch", "points_per_batch", "images_per_pass", "keep_embeddings", "keep_features"}  # how fast, not what
SEVERAL_ONLY = {"negatives"}  # no effect on one device; the training adds it to its key where there are several
COLLECTION_ONLY = {"collection", "data_root", "limit", "eval_limit"}  # which images, not what is made of each
NAMES_OTHERS = {"protocol"}  # sets other parameters, which count

_AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Names = Annotated[tuple[str, ...], _AsTuple]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Share = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
DensePath = Literal["value", "plain", "kk", "qq", "qqkk", "selfcal", "guided"]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], _AsTuple, Field(min_length=1)]


class Params(BaseModel):
    """Base of all schemas: strict types, no unknown keys, read-only once made."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)

    def part(self, schema: type[Params]) -> dict[str, Any]:
        """Only the fields of one inherited schema."""
        return {name: getattr(self, name) for name in schema.model_fields}

    def content(self, *schemas: type[Params]) -> dict[str, Any]:
        """The fields of inherited schemas that change what is computed: what a cache key has to cover."""
        names = {name for schema in schemas for name in schema.model_fields} - SPEED_ONLY - SEVERAL_ONLY - COLLECTION_ONLY - NAMES_OTHERS
        return {name: getattr(self, name) for name in sorted(names)}

    def table(self) -> pd.DataFrame:
        """One row a parameter: its value, the schema's default and what it means."""
        fields = type(self).model_fields
        rows = {k: (getattr(self, k), f.default, f.description) for k, f in fields.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "default", "meaning"])


class DataParams(Params):
    data_root: str = Field("", description="folder of the benchmarks in their official layouts; empty: embedded data only")


class RunParams(DataParams):
    profile: str = Field("paper", description="folder of params/ and results/ this run belongs to")
    run: str = Field(
        "main", pattern=r"^[A-Za-z0-9_-]+$", description="name of the run that records belong to; tables are made of one run's records"
    )
    seed: int = Field(0, ge=0, description="seed of everything random")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?|mps)$", description="where models run: cpu, cuda, cuda:1, mps")
    workers: Count = Field(
        1, description="CPU: processes for work that goes image by image; GPU: threads and processes that read ahead of it"
    )
    checkpoint_seconds: Float = Field(
        60.0, ge=0, description="seconds between two checkpoints, from which a stopped training goes on; 0: one after every step"
    )
    deterministic: bool = Field(False, description="on CUDA: the same seed gives the same module, more slowly; on a CPU it always does")
    results_dir: str = Field(
        "results", description="where records, tables and figures go; relative to the clone, outside one to the working folder"
    )


class ModelParams(Params):
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of the frozen models: float32, or bfloat16 matrix products")


class KeptParams(ModelParams):
    keep_features: bool = Field(
        True,
        description="keep features, masks and encoder patches on disk (4 MB an image), so that they are made once; no: make them again when needed",
    )


class FeatureParams(KeptParams):
    """High-resolution features (Sec. 3.1, 3.2)."""

    clip: str = Field("clip_vitl14", description="image-text model")
    short_side: Count = Field(448, description="ours: the image's short side in pixels before it is cropped")
    long_limit: Count = Field(2048, description="ours: the scaled image's long side in pixels at most")
    crop_size: Count = Field(224, description="ours: side of a crop in pixels of the scaled image")
    crop_stride: Count = Field(112, description="ours: pixels from one crop to the next")
    crop_input: int | None = Field(
        None, ge=32, description="ours: side in pixels to which a crop is scaled for CLIP; none: the model's own"
    )
    path: DensePath = Field(
        "value", description="dense features: the last block's values, its plain tokens, or a path of later work (models/dense_paths.py)"
    )
    residual: bool = Field(False, description="ours: keep the last block's residual and MLP after values or attention")
    crop_batch: Count = Field(16, description="crops that CLIP takes at once")


class TextParams(Params):
    """Text features of the classes (Sec. 3.1)."""

    templates: Literal["one", "one_stop", "plain", "seven", "nine", "eighty"] = Field(
        "one", description="prompt templates whose features are averaged: the paper's, the same with a full stop, the bare word, or a list"
    )
    text_average: Literal["unit", "raw"] = Field(
        "unit",
        description="ours: features are scaled to unit norm before they are averaged over templates (as CLIP does), or not (as TCL does)",
    )
    words: Literal["ours", "verbatim", "sclip"] = Field(
        "ours", description="ours: class names of the benchmarks in plain English, unchanged (as TCL does), or SCLIP's word lists"
    )


class DetectParams(TextParams):
    """Which classes are present (Sec. 3.2)."""

    min_votes: int = Field(1, ge=0, description="ours: a class is present when MORE crops than this vote for it")
    min_vote_share: Share = Field(0.0, description="ours: ... and more than this share of the crops")
    reference_images: int = Field(
        0,
        ge=0,
        description="ours: standardise votes over the crops of this many images of the collection; 0, or a smaller collection: do not",
    )


class SamParams(ModelParams):
    sam: str = Field("sam_vith", description="ours: the paper does not name its SAM")
    keep_embeddings: bool = Field(
        False, description="keep SAM's image embeddings on disk (2 MB each), so that its encoder runs once an image"
    )


class QueryParams(SamParams):
    """Stage 1.1 (Sec. 3.2)."""

    points: Count = Field(5, description="query points a class")
    separate_points: bool = Field(False, description="ours: one query a point, masks joined, instead of one joint query")


class MaskParams(ModelParams):
    """Automatic masks of Stage 1.2 (Sec. 3.2); defaults are the SAM package's own."""

    points_per_side: Count = Field(32, description="the SAM package's grid of points")
    points_per_batch: Count = Field(64, description="points decoded at once")
    predicted_iou: Share = Field(0.88, description="masks of a lower predicted IoU are dropped")
    stability: Share = Field(0.95, description="masks of a lower stability score are dropped")
    box_nms: Share = Field(0.7, description="duplicates over this box IoU are dropped")
    sam_long_side: Count = Field(
        1024, description="ours: masks of a larger image are compared at this long side, and those that are kept are enlarged"
    )
    min_area: Share = Field(0.001, description="ours: masks under this share of the image are dropped")


class CombineParams(Params):
    """Pseudo labels of the whole image (Sec. 3.2, 3.3)."""

    stages: Literal["both", "1.1", "1.2"] = Field("both", description="which stage's masks are painted")
    overlap: Literal["similarity", "query", "agree"] = Field(
        "similarity",
        description="ours: where both stages label a pixel: the more similar class, Stage 1.1's class, or a label only if they agree",
    )
    min_margin: Float | None = Field(
        None,
        description="ours: keep only masks that are more similar to their class than to every other class of the vocabulary by MORE than"
        " this (in standard deviations of the standardised votes; in cosine similarity where reference_images is 0); none, or a collection"
        " smaller than reference_images: keep all masks",
    )


class PatchParams(KeptParams):
    """Encoder patches and their labels (Sec. 3.3)."""

    encoder: str = Field("dinov2_vitl14", description="frozen encoder to be aligned")
    image_size: Count = Field(448, description="ours: side of the encoder's square input in training")
    min_labelled: Share = Field(0.5, description="ours: a patch with a smaller labelled share stays out of the loss")


class ModuleParams(Params):
    """Alignment module M (Sec. 3.3, Table 2 left)."""

    module: Literal["transformer", "mlp", "linear"] = Field("transformer", description="alignment module")
    heads: int | None = Field(None, ge=1, description="ours: attention heads; none: the encoder's width / 64")
    mlp_ratio: Float = Field(4.0, gt=0, description="ours: hidden width of the block's MLP divided by the block's width")
    standardise_images: Count = Field(256, description="ours: images on which the mean and std of the module's input are measured")


class PrealignParams(Params):
    """Pre-alignment on the dense map of the image-text model, and the anchor on it (both ours; off in the paper's profile)."""

    prealign: bool = Field(False, description="ours: M first learns CLIP's dense maps of the collection; this needs no words and no SAM")
    prealign_limit: int | None = Field(None, ge=1, description="ours: how many images of the collection it takes, evenly spread; none: all")
    prealign_ridge: Float = Field(0.1, ge=0, description="ours: ridge penalty of its closed form, on standardised inputs of the last layer")
    prealign_norm: Float = Field(
        30.0, gt=0, description="ours: RMS length of M's output after it; the longer, the less a later step turns z"
    )
    dense_weight: Float = Field(0.0, ge=0, description="ours: weight of the anchor, mean 1 - cos(z, CLIP's dense map), beside the loss")


class CleanParams(Params):
    """Cleaning of pseudo labels over the collection (ours; off in the paper's profile)."""

    clean: Literal["none", "drop", "relabel"] = Field(
        "none",
        description="ours: where the patches of a class in an image are nearer to another class's prototype, drop or relabel them",
    )
    clean_margin: Float = Field(
        0.0, ge=0, description="ours: ... nearer by more than this cosine; prototypes are mean encoder patches of all images"
    )


class LossParams(Params):
    """The loss (Eq. 1-4, Table 2 right)."""

    loss: Literal["tsupcon", "prototype", "supcon"] = Field("tsupcon", description="Eq. 1, Eq. 2 alone, or SupCon alone")
    temperature: Float = Field(1.0, gt=0, description="dot products are divided by it; 1 is Eq. 3 and 4 as written")
    text_weight: Float | None = Field(
        None, ge=0, description="weight of the mean of l_t over the classes present; none: as Eq. 1, K/(BN+K)"
    )
    image_weight: Float | None = Field(None, ge=0, description="weight of the mean of l_im over the patches; none: as Eq. 1, BN/(BN+K)")


class OptimiserParams(Params):
    """Training (Sec. 4.1)."""

    optimiser: Literal["sgd", "adamw"] = Field("sgd", description="the paper: SGD")
    learning_rate: Float = Field(0.05, gt=0, description="ours")
    momentum: Share = Field(0.9, description="ours; SGD only")
    weight_decay: Float = Field(1e-4, ge=0, description="ours")
    epochs: Count = Field(10, description="the paper's")
    start_share: Share = Field(
        0.0, description="ours: share of the initial weights (pre-aligned, or trained before) in the average with the trained weights"
    )
    images_per_batch: Count = Field(5, description="the paper's; of all GPUs together")
    images_per_pass: int | None = Field(
        None,
        ge=1,
        description="ours: images of a batch that a GPU takes at once where all do not fit; loss and gradient stay the batch's; none: all",
    )
    negatives: Literal["batch", "device"] = Field(
        "batch", description="ours, several GPUs only: contrast patches with the whole batch, or with their own GPU's part of it"
    )


def protocols() -> dict[str, dict[str, Any]]:
    """{protocol: {parameter: value}}, as ``assets/protocols.yaml`` holds them."""
    return files.asset("protocols.yaml")


def with_protocol(values: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """The values, and those known parameters that their ``protocol`` sets and they do not."""
    name = values.get("protocol")
    of_protocol = protocols().get(name, {}) if isinstance(name, str) else {}
    return {key: value for key, value in of_protocol.items() if key in known} | dict(values)


class SegmentParams(ModelParams):
    """Deployment (Sec. 3.3) and the evaluation protocol."""

    protocol: Literal["", "tcl", "sclip", "paper"] = Field(
        "",
        description="sets words, templates, background, resize and windows together (assets/protocols.yaml); one that is also given counts instead",
    )
    segment_short_side: Count = Field(448, description="the image's short side, unless the long one would pass the limit")
    segment_long_limit: Count = Field(2048, description="the image's long side at most")
    resize: Literal["pil_bicubic", "cv2_bilinear"] = Field(
        "pil_bicubic", description="ours: how the image is scaled: bicubic with antialiasing, or bilinear without (as TCL does)"
    )
    window: Count = Field(448, description="side of the sliding window in pixels")
    window_stride: Count = Field(224, description="pixels from one window to the next")
    window_batch: Count = Field(1, description="windows that the encoder takes at once")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="of similarities, to the image's own size")
    background_words: Literal["stuff", "name", "tcl", "sclip", "clearclip", "naclip", "proxyclip", "scclip"] | Names = Field(
        "stuff", description="ours: words of class 0 in columns with background: a rule of assets/background.yaml, or a list of words"
    )
    word_maximum: Literal["before", "after"] = Field(
        "before",
        description="ours: the best word of a class is taken before interpolation, in each patch, or after it, at each pixel (as SCLIP does)",
    )
    regions: Literal["none", "sam"] = Field(
        "none",
        description="ours: at test time each of SAM's automatic masks gets the class of the highest mean similarity inside it",
    )

    @model_validator(mode="before")
    @classmethod
    def _of_protocol(cls, values: Any) -> Any:
        return with_protocol(values, cls.model_fields) if isinstance(values, Mapping) else values


class UnlabelledParams(FeatureParams, DetectParams):
    """Pixels that ``segment`` leaves unlabelled, as none of the classes (ours; off by default)."""

    least_similarity: Float | None = Field(None, description="pixels less similar to their class than this are unlabelled; none: no pixel")
    least_margin: Float | None = Field(
        None, description="pixels whose class is nearer than the next one by less than this (cosine) are unlabelled; none: no pixel"
    )
    detected_only: bool = Field(
        False, description="pixels of classes that Stage 1 does not detect in the image are unlabelled; the background is kept"
    )


class TileParams(Params):
    """Images too large for memory (ours)."""

    largest_whole: Count = Field(89_000_000, description="images of more pixels than this are segmented in tiles, as is every GeoTIFF")
    tile: Count = Field(1792, description="side of a tile in pixels; the label map does not depend on it, time and memory do")


class VideoParams(Params):
    """Videos (ours)."""

    every: Count = Field(1, description="every so many-th frame is segmented")
    average: int = Field(0, ge=0, description="similarities are averaged over so many of these frames before and after each; 0: not")


class CollectionParams(DataParams):
    """Unlabelled images and the words looked for in them."""

    collection: str = Field("coco_stuff_train", description="a collection's name or a folder of images")
    limit: int | None = Field(None, ge=1, description="how many of them, evenly spread; none: all")
    vocabulary: str = Field("coco_stuff171", description="a label space's name, several joined by +, or a text file with a word a line")
    image_level_names: str = Field(
        "", description="the paper's semi-supervised variant: a JSON file, image -> its names, in place of detection; empty: none"
    )


class LabelParams(CollectionParams, FeatureParams, DetectParams, QueryParams, MaskParams, CombineParams):
    """Everything Stage 1 depends on."""


class AlignParams(PatchParams, CleanParams, ModuleParams, PrealignParams, LossParams, OptimiserParams):
    """Everything the training depends on, given pseudo labels."""


class EvaluateParams(LabelParams, AlignParams, SegmentParams):
    """Everything a number of Table 1 depends on."""

    eval_limit: int | None = Field(None, ge=1, description="how many images a benchmark, evenly spread; none: all")
    dense_enlarge: Float = Field(
        1.0, gt=0, description="ours: factor by which windows are enlarged for the dense baseline of a convolutional image-text model"
    )


P = TypeVar("P", bound=Params)


def make(schema: type[P], values: Mapping[str, Any], source: str = "parameters") -> P:
    """Values checked against a schema. Raises ParameterError: the first offending key, what was given, what is accepted."""
    try:
        return schema.model_validate({str(key): value for key, value in values.items()})
    except ValidationError as error:
        problem = error.errors()[0]
        if not problem["loc"]:
            raise ParameterError(f"{source}: {problem['msg'].removeprefix('Value error, ')}") from None
        key = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, schema.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(schema.model_fields)}"
            raise ParameterError(f"{source}: unknown parameter {key!r}; {hint}") from None
        raise ParameterError(f"{source}: {key} = {values.get(key)!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}") from None


def check_device(name: str) -> str:
    """The name of a device that this machine has. Raises ParameterError, naming those it has, for any other."""
    if name in ("cpu", "meta"):  # meta: shapes without numbers, for benchmarks/costs.py
        return name
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))]
    here += ["mps"] if torch.backends.mps.is_available() else []
    if name not in here:
        raise ParameterError(f"device = {name!r}: not here; give one of {', '.join(here)}, such as --set device=cpu")
    return name
