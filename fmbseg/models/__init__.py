"""The frozen models by name: CLIP, SAM and the encoder that is aligned."""

from fmbseg.models import _torchvision

_torchvision.ensure()
