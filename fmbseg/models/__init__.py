"""The frozen models by name: CLIP, SAM and the encoder that is aligned."""

from fmbseg.models import _memory, _torchvision

_torchvision.ensure()
_memory.keep_freed()
