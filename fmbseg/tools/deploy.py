"""``fmbseg onnx``: a segmenter of fixed words as one ONNX file, which onnxruntime runs without torch (Sec. 3.3).

Needs the optional extra: pip install "fmbseg[onnx]".
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fmbseg import files
from fmbseg.data import images
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import DataError, ParameterError
from fmbseg.runs import hub
from fmbseg.runs.modules import Segmenter
from fmbseg.stage2.segmenter import Words, words_space

CLOSE = 1e-4
"""How far the similarities of onnxruntime may be from those of torch."""

INPUT, OUTPUTS = "pixels", ("labels", "similarities")


class FixedWords(nn.Module):
    """Encoder, alignment module and the text features of a label space in one network."""

    def __init__(self, segmenter: Segmenter, space: LabelSpace):
        super().__init__()
        self.encoder, self.alignment = segmenter.embedder.encoder, segmenter.embedder.alignment
        self.interpolation, texts = segmenter.params.interpolation, segmenter.texts(space).to(segmenter.embedder.device)
        self.classes = len(space)
        self.register_buffer("words", texts.features)
        self.register_buffer("owner", texts.owner)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, height, width, 3) ``uint8`` -> (N, height, width) ``int16`` class of every pixel, and (N, K, h, w) cosine similarities
        at the patches, of each class that of its most similar word."""
        z = self.alignment(self.encoder.features(pixels))
        to_words = z.permute(0, 2, 3, 1) @ self.words.T
        lowest = to_words.new_full((*to_words.shape[:-1], self.classes), -torch.inf)
        similarities = lowest.scatter_reduce(-1, self.owner.expand_as(to_words), to_words, "amax").permute(0, 3, 1, 2)
        enlarged = images.resize_map(similarities, (pixels.shape[1], pixels.shape[2]), self.interpolation)
        return enlarged.argmax(dim=1).to(torch.int16), similarities


def to_onnx(
    segmenter: Segmenter,
    classes: Words,
    path: str | Path,
    background: Sequence[str] | str | None = None,
    size: tuple[int, int] | None = None,
) -> Path:
    """Write a segmenter of these words as an ONNX file, if onnxruntime gives the same as torch (``CLOSE``).

    Its input and outputs are those of ``FixedWords``, for any number of images of one size, in float32. Its metadata (``_about``) has
    names, words and models. classes, background: those of ``Segmenter.segment``; size: (height, width) in pixels; None: the
    segmenter's window. Raises ParameterError for a missing package or a size that does not fit, DataError where the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter's language
    except ImportError as error:
        raise ParameterError(f'{error.name} is not installed; run: pip install -c constraints.txt "fmbseg[onnx]"') from None
    space, patch = words_space(classes, background), segmenter.embedder.encoder.patch
    height, width = size or (max(segmenter.params.window // patch, 1) * patch,) * 2
    if min(height, width) < patch or height % patch or width % patch:
        raise ParameterError(f"size = {height} x {width}: both sides must be multiples of the encoder's patch, {patch} pixels")
    if segmenter.embedder.encoder.precision != "fp32" or segmenter.params.word_maximum != "before":
        raise ParameterError("ONNX files are written in fp32 with word_maximum = before; load the segmenter with these parameters")
    network = FixedWords(segmenter, space).eval()
    noise = np.random.RandomState(0).randint(0, 256, (2, height, width, 3), dtype=np.uint8)
    example = torch.from_numpy(noise).to(segmenter.embedder.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        expected = network(example)[1].cpu().numpy()
        program = torch.onnx.export(
            network,
            (example,),
            input_names=[INPUT],
            output_names=OUTPUTS,
            dynamic_shapes={INPUT: {0: torch.export.Dim("images", max=4096)}},
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph:
        node.metadata_props.clear()  # lines of source with the paths of this machine
    program.model.metadata_props.update({name: json.dumps(value, ensure_ascii=False) for name, value in _about(segmenter, space).items()})
    with files.atomic_path(path) as part:
        program.save(part, external_data=False)
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        apart = float(np.abs(session.run(["similarities"], {INPUT: noise})[0] - expected).max())
        if not apart <= CLOSE:
            raise DataError(
                f"{path}: similarities of onnxruntime {onnxruntime.__version__} are up to {apart:.1e} from torch's, more than {CLOSE:g};"
                " nothing was written, so try the versions of constraints.txt"
            )
    return Path(path)


def _about(segmenter: Segmenter, space: LabelSpace) -> dict:
    """The metadata of the file, to be written as JSON."""
    described = segmenter.described
    return {
        "names": space.names,
        "words": space.prompts,
        "background": space.background,
        "input": "uint8 RGB, (images, height, width, 3); its normalisation is in the graph",
        "templates": segmenter.templates,
        "text_average": segmenter.average,
        "module_sha256": files.sha256_of(segmenter.path),
        "encoder": segmenter.embedder.encoder.key,
        "clip": segmenter.clip.key,
        "licences": {weight.name: weight.licence for weight in hub.frozen(described)} | {"fmbseg": "Apache-2.0"},
        "notes": described.get("notes", []),
    }
