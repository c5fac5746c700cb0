"""Text features of a list of classes: prompt words, templates, and the prototypes t_k of the loss (Sec. 3.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F

from fmbseg import files
from fmbseg.data.label_spaces import LabelSpace
from fmbseg.errors import ParameterError
from fmbseg.models.clip import ImageText


def templates(name: str) -> tuple[str, ...]:
    """Prompt templates with one {}, by name: a list of ``assets/templates.yaml``, or CLIP's "seven" or "eighty"."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    clips = {"seven": SIMPLE_IMAGENET_TEMPLATES, "eighty": OPENAI_IMAGENET_TEMPLATES}
    lists = files.asset("templates.yaml") | {own: [form("{}") for form in forms] for own, forms in clips.items()}
    if name not in lists:
        raise ParameterError(f"templates = {name!r}: unknown; known are {', '.join(lists)}")
    return tuple(lists[name])


@dataclass(frozen=True)
class ClassTexts:
    """Text features of K classes with P prompt words in all.

    features: (P, D) unit norm; owner: (P,) class of each word, in [0, K); names: K class names.
    """

    features: torch.Tensor
    owner: torch.Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> ClassTexts:
        """The same, on another device."""
        return dataclasses.replace(self, features=self.features.to(device), owner=self.owner.to(device))

    def per_class(self, similarity: torch.Tensor) -> torch.Tensor:
        """(..., P) similarities to words -> (..., K) to classes, each that of its most similar word."""
        if torch.equal(self.owner, torch.arange(len(self.names), device=self.owner.device)):
            return similarity
        out = similarity.new_full((*similarity.shape[:-1], len(self.names)), -torch.inf)
        return out.scatter_reduce(-1, self.owner.expand_as(similarity), similarity, "amax")

    def rows(self, similarity: torch.Tensor, score: float | None = None, apart: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(..., P) similarities to words -> the (..., R) that are compared with each other, and the (R,) class of each.

        apart: R are the words, else the classes (``per_class``); score: similarity of class 0 everywhere, in place of its own.
        """
        rows, owner = similarity, self.owner
        if not apart:
            rows, owner = self.per_class(similarity), torch.arange(len(self.names), device=owner.device)
        if score is None:
            return rows, owner
        others = owner > 0
        constant = rows.new_full((*rows.shape[:-1], 1), score)
        return torch.cat([constant, rows[..., others]], dim=-1), torch.cat([owner.new_zeros(1), owner[others]])

    def prototypes(self) -> torch.Tensor:
        """(K, D) unit-norm mean over each class's words: t_k of the loss."""
        sums = self.features.new_zeros(len(self.names), self.features.shape[1]).index_add(0, self.owner, self.features)
        return F.normalize(sums, dim=-1)

    def closest(self) -> pd.DataFrame:
        """The 100 pairs of classes whose prototypes are most similar (cosine), most similar first."""
        t = self.prototypes()
        rows, columns = torch.triu_indices(len(t), len(t), offset=1)
        values = (t @ t.T)[rows, columns]
        order = values.argsort(descending=True)[:100].tolist()
        found = [(self.names[rows[i]], self.names[columns[i]], float(values[i])) for i in order]
        return pd.DataFrame(found, columns=["class", "other class", "similarity"])


def class_texts(clip: ImageText, space: LabelSpace, template_set: str = "one", average: str = "unit") -> ClassTexts:
    """Text features of a label space on the CPU: every word in every template, averaged over the templates, unit norm.

    average: "unit" averages features of unit norm, as CLIP does; "raw" averages those of the text tower, as TCL does.
    """
    words = [word for prompts in space.prompts for word in prompts]
    owner = [k for k, prompts in enumerate(space.prompts) for _ in prompts]
    forms = templates(template_set)
    prompts = [form.replace("{}", word) for word in words for form in forms]
    encoded = torch.cat([clip.encode_text(prompts[i : i + 256], unit=average == "unit") for i in range(0, len(prompts), 256)]).cpu()
    features = F.normalize(encoded.reshape(len(words), len(forms), -1).mean(dim=1), dim=-1)
    return ClassTexts(features.clone(), torch.tensor(owner), space.names)
