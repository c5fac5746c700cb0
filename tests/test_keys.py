"""Every kept product against every input: what changes it changes its key, and what does not matter does not.

A product is what a cache keeps under a key. Its parameters are those of its schemas, found by introspection: a parameter
that is new in a schema is in the table by itself. No model is loaded; a model's key is its name, its weights and its precision.
"""

import dataclasses
import functools
import shutil
from types import SimpleNamespace
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image

from fmbseg import files
from fmbseg.data import fetch, label_spaces
from fmbseg.data.images import read_mask
from fmbseg.data.samples import Sample
from fmbseg.models import clip, encoders, sam
from fmbseg.models.precision import precision_key
from fmbseg.params import (
    NAMES_OTHERS,
    SEVERAL_ONLY,
    SPEED_ONLY,
    AlignParams,
    DetectParams,
    FeatureParams,
    LabelParams,
    MaskParams,
    ModuleParams,
    PatchParams,
    PrealignParams,
    QueryParams,
    SegmentParams,
    make,
    protocols,
)
from fmbseg.runs import cache, evaluate, label, modules, train
from fmbseg.runs.evaluate import Method
from fmbseg.runs.label import LabelStore
from fmbseg.schemas import EvaluateRun, TrainRun
from fmbseg.stage1.pseudo_labels import PseudoLabel
from fmbseg.stage2.alignment import Alignment


class Everything(TrainRun, EvaluateRun):
    """Every parameter of every product."""


def of(*schemas, less=()):
    """The parameters of schemas, less those that say how fast, and others."""
    return {name for schema in schemas for name in schema.model_fields} - SPEED_ONLY - SEVERAL_ONLY - set(less)


CROPS = {"short_side", "long_limit", "crop_size", "crop_stride", "crop_input"}
IMAGES = {"collection", "data_root", "limit", "eval_limit"}
TEXTS = {"templates", "text_average"}
WORDS = {"words"}  # where the words themselves are inputs
WINDOWS = of(SegmentParams, less=["background_words", "protocol"])  # a protocol is the values that it sets
STAGE = of(FeatureParams, QueryParams) | TEXTS
CLIP, SAM, ENCODER = {"clip's weights"}, {"SAM's weights"}, {"the encoder's weights"}
COUNTED = {"image", "truth", "words", "background", "version of counts"}
VOTES = {"reference image", "version of votes"}
STAGED = COUNTED | CLIP | SAM | {f"version of {name}" for name in ("clip", "sam", "votes", "queries", "masks", "labels")}


@dataclasses.dataclass(frozen=True)
class Product:
    """parameters, inputs: all that its key must change with; wider: parameters that change it though they need not, and why."""

    parameters: set
    inputs: set
    wider: set = frozenset()


PRODUCTS = {
    "clip": Product(of(FeatureParams), {"image", "version of clip"} | CLIP),
    "sam": Product({"sam", "precision"}, {"image", "version of sam"} | SAM),
    "votes": Product(of(FeatureParams) | {"reference_images"}, {"version of clip"} | CLIP | VOTES, {"collection", "data_root"}),  # by name
    "queries": Product(
        STAGE | of(DetectParams, less=WORDS),
        {"image", "words", "version of queries", "version of clip", "version of sam"} | VOTES | CLIP | SAM,
        WORDS,
    ),
    "queries given": Product(
        STAGE,
        {"image", "words", "given", "version of queries", "version of clip", "version of sam", "version of votes"} | CLIP | SAM,
        of(DetectParams, less=[*TEXTS, "reference_images"]),  # no detection
    ),
    "masks": Product(of(MaskParams) | {"sam"}, {"image", "version of masks", "version of sam"} | SAM),
    "encoder": Product({"encoder", "image_size", "precision"}, {"image", "version of encoder"} | ENCODER),
    "labels": Product(
        of(LabelParams, less=IMAGES), {"image", "words", "names"} | STAGED - {"truth", "background", "version of counts"} | VOTES
    ),
    "dense": Product(WINDOWS | TEXTS | of(FeatureParams, less=CROPS) | {"dense_enlarge"}, COUNTED | CLIP | {"version of clip"}),
    "dense_high_resolution": Product(of(FeatureParams) | TEXTS | {"interpolation", "word_maximum"}, COUNTED | CLIP | {"version of clip"}),
    "stage1.1": Product(STAGE | of(DetectParams, less=WORDS), STAGED | VOTES),
    "stage1.2": Product(
        STAGE | of(DetectParams, MaskParams, less=WORDS), STAGED | VOTES
    ),  # the masks' queries are made, and only detection used
    "stage1": Product(STAGE | of(DetectParams, MaskParams, less=WORDS) | {"overlap"}, STAGED | VOTES),
    "stage1+labels": Product(STAGE | of(MaskParams) | {"overlap"}, STAGED),
    "fmbseg": Product(WINDOWS | TEXTS, COUNTED | CLIP | ENCODER | {"module file", "version of encoder"}),
    "module": Product(
        of(AlignParams, less=PrealignParams.model_fields) | TEXTS | {"dense_weight", "seed", "clip"},
        {"image", "words", "label map", "initial module", "version of module", "version of encoder", "version of clip"} | CLIP | ENCODER,
        of(PrealignParams, less=["dense_weight"]),  # the pre-aligned module is an input
    ),
    "module with anchor": Product(
        of(AlignParams, FeatureParams, less=PrealignParams.model_fields) | TEXTS | {"dense_weight", "seed"},
        {"image", "words", "label map", "initial module", "version of module", "version of encoder", "version of clip"} | CLIP | ENCODER,
        of(PrealignParams, less=["dense_weight"]),
    ),
    "prealigned module": Product(
        of(PatchParams, ModuleParams, FeatureParams, less=["min_labelled"]) | {"prealign_limit", "prealign_ridge", "prealign_norm", "seed"},
        {"reference image", "version of module", "version of encoder", "version of clip"} | CLIP | ENCODER,
        {"min_labelled", "prealign", "dense_weight"},  # of the schemas that it shares with training
    ),
}


class Found(Exception):
    """Raised with a key in place of what would be computed under it."""


@pytest.fixture
def world(tmp_path, own_home, monkeypatch):
    """Small files of every kind, weights as names and numbers, and the key of every product: world.key(product, **changed)."""
    hashes = {}
    monkeypatch.setattr(fetch, "key", lambda name: hashes.get(name, "0"))
    monkeypatch.setattr(fetch, "is_here", lambda weight: True)
    monkeypatch.setattr(cache, "VERSIONS", dict(cache.VERSIONS))
    monkeypatch.setattr(cache, "_crop_tokens", lambda path, models, params: torch.zeros(1, 3))
    for name, weights_key in (("clip", clip.weights_key), ("sam", sam.weights_key), ("encoder", encoders.weights_key)):
        monkeypatch.setattr(cache, f"_kept_{name}", functools.partial(_model, weights_key))
    folder, image, mask = tmp_path / "images", tmp_path / "image.png", tmp_path / "mask.png"
    folder.mkdir()
    for i, path in enumerate([image, mask, *(folder / f"{i}.png" for i in range(4))]):
        Image.fromarray(np.full((32, 48), i, np.uint8)).save(path)
    names = files.write_json(tmp_path / "names.json", {"image": ["red"]})
    metadata = {"encoder": "dinov2_vits14", "clip": "clip_vitb16"}
    torch.manual_seed(0)
    modules.save(tmp_path / "module.safetensors", Alignment(8, 4, ModuleParams(module="linear")), metadata)
    shutil.copy(tmp_path / "module.safetensors", tmp_path / "initial.safetensors")
    values = {"clip": "clip_vitb16", "sam": "sam_vitb", "encoder": "dinov2_vits14", "collection": str(folder), "reference_images": 2}
    values |= {"vocabulary": "voc20", "image_level_names": ""}
    return SimpleNamespace(
        tmp=tmp_path, image=image, mask=mask, folder=folder, hashes=hashes, names=names, values=values, patch=monkeypatch,
        space=label_spaces.own_words(["red", "green"]), given=(0,), store=None,
    )  # fmt: skip


def _model(weights_key, name, device, *rest):
    return SimpleNamespace(key=precision_key(weights_key(name), rest[-1]), patch=8)


def key_of(product, world, **changed):
    """The key that a product is kept under, without computing it."""
    params, image = make(Everything, world.values | {"dense_weight": float("anchor" in product)} | changed), world.image
    models, sample = cache.Models.of(params), Sample("image", world.image, functools.partial(read_mask, world.mask))
    cache.prepare_votes(params)  # as every run does first
    if product == "votes":
        return str(cache._reference_path(params)), cache.vote_content(params)
    if product == "labels":
        words = label_spaces.vocabulary(params.vocabulary, params.words)
        words = dataclasses.replace(words, names=(*words.names, *world.space.names), prompts=(*words.prompts, *world.space.prompts))
        store = LabelStore(world.tmp / files.digest(label.content(params), words.prompts), words, params)
        if not store.has(sample):
            store.write(sample, PseudoLabel(np.zeros((32, 48), np.uint8), [], [], []))
        return store.key, files.read_json(store.folder / "image.json")["sha256"]

    def stop(key):
        raise Found(key)

    real = cache.Cache

    def stopping(*given):
        find = lambda path, *_: stop(real(*given).path(path))  # noqa: E731
        return SimpleNamespace(path=find, read=find)

    with world.patch.context() as patch:
        for module in (cache, evaluate):
            patch.setattr(module, "Cache", stopping)
        patch.setattr(train, "_read", lambda path, key: stop(key))
        try:
            if product == "clip":
                cache.clip_features(image, models, params)
            elif product == "sam":
                cache._set_image(image, models, params.model_copy(update={"keep_embeddings": True}))
            elif product.startswith("queries"):
                cache.queries(image, world.space, models, params, world.given if "given" in product else None)
            elif product == "masks":
                cache.automatic_masks(image, models, params)
            elif product == "encoder":
                cache.encoder_patches(image, models, params)
            elif product == "prealigned module":
                train.prealign(params)
            elif product.startswith("module"):
                label_map = lambda sample: files.sha256_of(world.mask)  # noqa: E731
                store = SimpleNamespace(sha256=label_map, has=lambda sample: True, space=world.space, notes=())
                train.fit([sample], store, params, world.tmp / "made.safetensors", world.tmp / "initial.safetensors")
            else:
                method = Method(product, str(world.tmp / "module.safetensors") if product == "fmbseg" else "")
                task = evaluate.Task(image, ((0, sample),))
                evaluate._count(task, [(method, method.key(params))], [world.space], params, models)
        except Found as found:
            return str(found)
    raise AssertionError(product)


def other(world, name, value):
    """Another value of a parameter that its schema accepts."""
    names = {"clip": "clip_vitl14", "sam": "sam_vitl", "encoder": "dinov2_vitb14", "vocabulary": "ade150", "device": "cuda"}
    if name == "collection":  # another folder of the same images
        return shutil.copytree(world.folder, world.tmp / "again").as_posix()
    if name == "image_level_names":
        return str(world.names)
    if name == "heads":
        return 4
    annotation = Everything.model_fields[name].annotation
    if get_origin(annotation) is Literal:
        return next(choice for choice in get_args(annotation) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value + 1
    if isinstance(value, float):
        return value / 2 + 0.01
    if name == "benchmarks":  # known ones, whose images are left out of what is trained on
        return ("drawn",)
    if isinstance(value, tuple) or name == "background_words":
        return ("another",)
    return names.get(name, "another") if isinstance(value, str) else (64 if name in ("crop_input",) else 3)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_key_changes_with_every_parameter_of_its_product_and_with_no_other(product, world):
    before = key_of(product, world)
    assert key_of(product, world) == before
    params = make(Everything, world.values)
    changed = {
        name
        for name in set(Everything.model_fields) - NAMES_OTHERS
        if key_of(product, world, **{name: other(world, name, getattr(params, name))}) != before
    }
    assert changed == PRODUCTS[product].parameters | PRODUCTS[product].wider


def test_a_protocol_is_no_part_of_a_key_but_what_it_sets_is(world):
    named, typed = {"protocol": "sclip"}, protocols()["sclip"]
    for product in PRODUCTS:
        assert key_of(product, world, **named) == key_of(product, world, **typed) == key_of(product, world, **typed | named)
    assert key_of("dense", world, **named) != key_of("dense", world)


def repaint(path):
    Image.fromarray(np.full((32, 48), 77, np.uint8)).save(path)


def retrain(path):
    alignment, metadata = modules.load(path)
    alignment.mean += 1
    modules.save(path, alignment, metadata)


INPUTS = {
    "image": lambda w: repaint(w.image),
    "truth": lambda w: repaint(w.mask),
    "label map": lambda w: repaint(w.mask),
    "reference image": lambda w: repaint(w.folder / "0.png"),
    "words": lambda w: setattr(w, "space", label_spaces.own_words(["red", "grey"])),
    "background": lambda w: setattr(w, "space", dataclasses.replace(w.space, background=True)),
    "given": lambda w: setattr(w, "given", (1,)),
    "names": lambda w: files.write_json(w.names, {"image": ["green"]}),
    "clip's weights": lambda w: w.hashes.update(clip_vitb16="1"),
    "SAM's weights": lambda w: w.hashes.update(sam_vitb="1"),
    "the encoder's weights": lambda w: w.hashes.update(dinov2_vits14="1"),
    "module file": lambda w: retrain(w.tmp / "module.safetensors"),
    "initial module": lambda w: retrain(w.tmp / "initial.safetensors"),
    **{f"version of {name}": lambda w, name=name: cache.VERSIONS.update({name: 99}) for name in cache.VERSIONS},
}
ONE_MASK = {"truth": "label map", "label map": "truth"}  # of one file here: counts read the truth, training the label map


@pytest.mark.parametrize("changed", INPUTS)
def test_a_key_changes_with_every_input_of_its_product_and_with_no_other(changed, world):
    world.values["image_level_names"] = str(world.names) if changed == "names" else ""
    before = {product: key_of(product, world) for product in PRODUCTS}
    INPUTS[changed](world)
    anew = {product for product in PRODUCTS if key_of(product, world) != before[product]}
    assert anew == {p for p, known in PRODUCTS.items() if {changed, ONE_MASK.get(changed)} & known.inputs}


def test_every_version_is_of_a_product():
    assert set(cache.VERSIONS) == {"clip", "sam", "votes", "queries", "masks", "encoder", "labels", "counts", "module"}
    for product, parts in cache.MADE_FROM.items():
        assert {product, *parts} <= set(cache.VERSIONS)
