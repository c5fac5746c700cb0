"""The frozen models, each loaded by name: image-text (CLIP), SAM and the encoder to be aligned."""
