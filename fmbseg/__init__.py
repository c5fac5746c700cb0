"""Annotation-free semantic segmentation with vision foundation models (FMbSeg).

CLIP finds what is in an image, and SAM outlines it. These pseudo labels train a small module, which aligns a frozen
encoder with language.

    stage1/   Sec. 3.1, 3.2: one image in, pseudo labels out        models/  the frozen models by name
    stage2/   Sec. 3.3: the module, its losses, training, use       data/    images, words, benchmarks
    runs/     the same steps over whole collections, on disk        viz/     figures, charts, the explorer

The names below are all that most users need; each is imported when it is first used.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Segmenter": "fmbseg.runs.modules",
    "label_image": "fmbseg.stage1.pseudo_labels",
    "train": "fmbseg.runs.train",
    "evaluate": "fmbseg.runs.evaluate",
    "load_clip": "fmbseg.models.clip",
    "load_sam": "fmbseg.models.sam",
    "load_encoder": "fmbseg.models.encoders",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"fmbseg has no {name!r}; it has {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
