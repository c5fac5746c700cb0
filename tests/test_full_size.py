"""The paper's architectures at full size with random weights: one small image through every step (about a minute, 7 GB)."""

import gc
import math

import pytest
import torch

from fmbseg import files
from fmbseg.data import collections, label_spaces
from fmbseg.runs import cache, evaluate, label, train
from fmbseg.schemas import EvaluateRun, TrainRun

MODELS = {"clip": "random:ViT-L-14-quickgelu", "sam": "random:sam_vith", "encoder": "random:dinov2_vitl14"}
SMALL = {"short_side": 224, "crop_size": 224, "crop_stride": 112, "image_size": 224, "points_per_side": 1, "points": 1}
SMALL |= {"segment_short_side": 224, "window": 224, "window_stride": 224, "methods": ["dense", "stage1", "fmbseg"], "eval_limit": 1}


@pytest.fixture
def few_models():
    """No model of another test beside these, and none of these beside the next test's."""

    def empty():
        for load in (cache._kept_clip, cache._kept_sam, cache._kept_encoder, cache._texts, evaluate._dense, evaluate._aligned_at):
            load.cache_clear()
        gc.collect()

    empty()
    yield
    empty()


@pytest.mark.minutes
def test_one_image_through_every_step(few_models, smoke, own_home, tmp_path):
    values = MODELS | SMALL | {"results_dir": str(tmp_path), "vocabulary": "voc20", "profile": "smoke", "reference_images": 0}
    p = smoke(TrainRun, **values)
    models = cache.Models.of(p)
    model = models.sam.model  # its images are 1024 px, which ViT-H needs minutes for: here 224
    model.image_encoder.pos_embed = torch.nn.Parameter(model.image_encoder.pos_embed[:, :14, :14].detach(), requires_grad=False)
    model.image_encoder.img_size = 224
    model.prompt_encoder.image_embedding_size, model.prompt_encoder.input_image_size = (14, 14), (224, 224)
    models.sam._predictor.transform.target_length = 224

    (sample,) = collections.load_collection("drawn")[:1]
    features = cache.clip_features(sample.image, models, p)
    assert features.map.shape == (768, 16, 20) and features.tokens.shape == (2, 768)  # 224 x 280 px, patches of 14
    found = cache.queries(sample.image, label_spaces.vocabulary("voc20"), models, p)
    assert found and found[0].masks.shape == (3, 128, 160)
    store, _ = label.label([sample], p)
    assert store.read(sample).shape == (128, 160)
    result = train.train([sample], store, p, tmp_path / "module.safetensors")
    assert math.isfinite(result.steps[0]["loss"]) and result.alignment.mean.shape == (1024,)
    q = smoke(EvaluateRun, **values)
    frame = evaluate.evaluate(evaluate.find_benchmarks(q.benchmarks), q, tmp_path / "module.safetensors")
    assert set(frame["method"]) == {"dense", "stage1", "fmbseg"} and (frame["images"] == 1).all() and frame["failed"].sum() == 0
    for record in (tmp_path / "smoke/records/main").iterdir():
        used = files.read_json(record)["weights"]
        assert used["clip"] == MODELS["clip"] and ("sam" in used) == ("dense" not in record.name)
