"""Parameters of every step: the parts of ``params.py`` that it depends on and its own; and which notebook does which step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from fmbseg.params import (
    AlignParams,
    CollectionParams,
    Count,
    DetectParams,
    EvaluateParams,
    FeatureParams,
    Float,
    LabelParams,
    MaskParams,
    Names,
    Params,
    RunParams,
    SamParams,
    Seeds,
    SegmentParams,
    TileParams,
    UnlabelledParams,
    VideoParams,
    make,
)


class FeaturesRun(RunParams, CollectionParams, FeatureParams, DetectParams):
    """High-resolution features of a collection and the classes detected in it (Sec. 3.1, 3.2)."""

    examples: Count = Field(3, description="images shown")


class LabelRun(RunParams, LabelParams):
    """Pseudo labels of a collection, by either stage or both (Sec. 3.2)."""

    examples: Count = Field(3, description="images shown")


class TrainRun(RunParams, LabelParams, AlignParams):
    """A module trained on the pseudo labels of a collection (Sec. 3.3)."""

    examples: Count = Field(3, description="images shown")


class BenchmarkParams(Params):
    """Which columns are measured."""

    benchmarks: Names = Field(
        ("voc20", "voc21", "context59", "coco_object80", "coco_stuff171", "cityscapes19", "ade150"), description="columns"
    )


class EvaluateRun(RunParams, EvaluateParams, BenchmarkParams):
    """Every method on every benchmark (Table 1)."""

    methods: Names = Field(("dense", "dense_high_resolution", "stage1.1", "stage1.2", "stage1", "fmbseg"), description="rows")
    shard: int = Field(0, ge=0, description="which part of the images this run counts, from 0 ...")
    num_shards: Count = Field(1, description="... to num_shards - 1; when all are counted, a run without shards reads their counts")
    examples: Count = Field(2, description="images shown a benchmark")


class SegmentRun(RunParams, SegmentParams, UnlabelledParams, MaskParams, SamParams, TileParams, VideoParams):
    """Any image into any words, with a trained module (Sec. 3.3)."""


Variants = Annotated[dict[str, dict[str, Any]], Field(description="name: {parameter: value, ...}, one line a variant")]
Baseline = Annotated[str, Field(description="the variant that the others are compared with, seed by seed")]


class CompareRun(RunParams, EvaluateParams, BenchmarkParams):
    """Modules trained on the same pseudo labels for the same number of steps, each with several seeds."""

    variants: Variants
    baseline: Baseline
    seeds: Seeds = Field((0, 1, 2), description="every variant is trained once with each")

    @model_validator(mode="after")
    def _known(self) -> CompareRun:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)}: one is given twice; give different ones")
        allowed = set(AlignParams.model_fields) - {"epochs", "images_per_batch"}
        for name, settings in self.variants.items():
            for key in settings.keys() - allowed:
                raise ValueError(f"variant {name!r} sets {key!r}; a variant may set {', '.join(sorted(allowed))}")
            make(AlignParams, self.part(AlignParams) | settings, f"variant {name!r}")
        if self.baseline not in self.variants:
            raise ValueError(f"baseline = {self.baseline!r} is none of the variants {', '.join(self.variants)}")
        return self


class ArchitectureRun(CompareRun):
    """Modules of several architectures (Table 2, left), and several encoders."""

    variants: Variants = {"linear": {"module": "linear"}, "mlp": {"module": "mlp"}, "transformer": {"module": "transformer"}}
    baseline: Baseline = "transformer"
    encoders: Names = Field((), description="frozen encoders to be compared by the same run")


class LossRun(CompareRun):
    """Modules trained with several losses (Table 2, right)."""

    variants: Variants = {"supcon": {"loss": "supcon"}, "prototype": {"loss": "prototype"}, "tsupcon": {"loss": "tsupcon"}}
    baseline: Baseline = "tsupcon"


class StagesRun(RunParams, EvaluateParams, BenchmarkParams):
    """Modules trained on the pseudo labels of either stage, and of both."""

    examples: Count = Field(2, description="images shown")


class FineTuneRun(RunParams, EvaluateParams, BenchmarkParams):
    """A trained module, trained on with pseudo labels of a target set's own images (the paper's appendix)."""

    target_collection: str = Field("", description="unlabelled images of the target set: a collection's name or a folder")
    target_vocabulary: str = Field("", description="the target's classes: a label space's name, or a text file with a word a line")
    target_limit: int | None = Field(None, ge=1, description="how many of the images, evenly spread; none: all")
    fine_tune_epochs: Count = Field(5, description="ours: the paper's appendix is not at hand")
    fine_tune_rate: Float = Field(0.01, gt=0, description="ours: learning rate, lower than the first training's")


class TablesRun(RunParams):
    """Tables 1 and 2 of what was measured."""


class ExploreRun(RunParams, LabelParams, SegmentParams):
    """Similarities, pseudo labels and segmentation of single images, interactively."""

    words: str = Field("person, tree, sky, road", description="words to begin with, separated by commas")
    background: str = Field("", description="words that together are class 0, background; empty: no background")
    image: str = Field("", description="name of the image to begin with; the first image where there is none of this name")
    max_side: Count = Field(1024, description="long side in pixels to which larger images are scaled down")


@dataclass(frozen=True)
class Step:
    """schema: of its parameters; notebooks: those that do it. Its parameter file, ``params/<profile>/NAME.yaml``, is named after the last."""

    schema: type[RunParams]
    notebooks: tuple[str, ...] = ()

    @property
    def notebook(self) -> str:
        """The notebook whose parameter file belongs to the step; empty where shared.yaml is all it has."""
        return self.notebooks[-1] if self.notebooks else ""


STEPS: dict[str, Step] = {
    "features": Step(FeaturesRun, ("01_feature_extraction",)),
    "label": Step(LabelRun, ("02_stage_1_1_query_sam", "03_stage_1_2_label_masks")),
    "train": Step(TrainRun, ("04_train_alignment",)),
    "evaluate": Step(EvaluateRun, ("05_evaluate",)),
    "segment": Step(SegmentRun),
    "architecture": Step(ArchitectureRun, ("06_ablate_architecture",)),
    "loss": Step(LossRun, ("07_ablate_loss",)),
    "stages": Step(StagesRun, ("10_compare_stages",)),
    "fine_tune": Step(FineTuneRun, ("11_fine_tune",)),
    "tables": Step(TablesRun, ("08_tables",)),
    "explore": Step(ExploreRun, ("09_explore_similarity",)),
}

NOTEBOOKS = {notebook: name for name, step in STEPS.items() for notebook in step.notebooks}
"""Notebook -> its step, in the order in which they are run: the tables come after everything that they show."""
