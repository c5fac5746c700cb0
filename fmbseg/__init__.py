"""Annotation-free semantic segmentation with vision foundation models (FMbSeg).

CLIP finds what is in a picture, SAM outlines it, and the pseudo labels so made train a small module
that aligns a frozen encoder with language. One module a step of the paper; see ``docs/`` for the map.
"""

from fmbseg import _torchvision

_torchvision.ensure()

__version__ = "0.1.0"
