"""Dense paths by name: each against its equations written out in slow loops, on tiny random towers."""

from typing import get_args

import numpy as np
import open_clip
import pytest
import timm
import torch
from torch import nn

from fmbseg.data import images
from fmbseg.errors import ParameterError
from fmbseg.models import dense_paths
from fmbseg.models.clip import Guide, ImageText, load_clip
from fmbseg.models.dense_paths import Calibration
from fmbseg.params import DensePath, FeatureParams, make
from fmbseg.stage2.segmenter import DenseClip

SIDE, GRID, DEPTH, WIDTH, HEADS = 96, 6, 4, 32, 2
PATHS = get_args(DensePath)


def framed(model, std=0.2):
    for name, parameter in model.visual.named_parameters():
        nn.init.normal_(parameter, mean=float("weight" in name and ("ln_" in name or "norm" in name)), std=std)
    open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5,) * 3, "std": (0.5,) * 3, "size": (SIDE, SIDE)})
    return ImageText(model, None, "tiny")


def own(**vision):
    """open_clip's own ViT: one prefix token, no LayerScale."""
    torch.manual_seed(0)
    vision = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": 16, "image_size": SIDE} | vision
    return framed(open_clip.model.CLIP(24, vision, {"layers": 1, "width": 32, "heads": 2}))


def timms(**options):
    """timm's ViT in open_clip's frame: a class token, a register, LayerScale."""
    torch.manual_seed(0)
    options = {"reg_tokens": 1, "init_values": 0.5, "num_classes": 0, "img_size": SIDE, "patch_size": 16} | options
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": SIDE}
    model = open_clip.model.CustomTextCLIP(24, vision, {"layers": 1, "width": 32, "heads": 2})
    model.visual.trunk = timm.models.vision_transformer.VisionTransformer(embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, **options)
    model.visual.head = nn.Linear(WIDTH, 24)
    return framed(model)


TOWERS = {"open_clip": own, "timm": timms}
tower = pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS)


def crops(count=2, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 255, (count, SIDE, SIDE, 3), dtype=np.uint8))


def guide(pixels, regions=False):
    """Another encoder's patches: the mean colours of the crops' own patches; regions: two masks, and a rest in none."""
    maps = nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2) / 255 - 0.5, SIDE // GRID)
    of = torch.zeros(len(pixels), GRID, GRID, dtype=torch.long)
    of[:, :2, :3], of[:, 3:, 2:] = 1, 2
    return Guide(maps, of if regions else None)


def encode(clip, pixels, path):
    return clip.encode_crops(pixels, path, guide=guide(pixels) if path == "guided" else None)


# ---------------------------------------------------------------- the equations, one token at a time


def softmax(row):
    e = np.exp(row - row.max())
    return e / e.sum()


class Literal:
    """The last block of a tower in float64, one image, one head and one token at a time."""

    def __init__(self, clip):
        block, a = clip.blocks[-1], clip.blocks[-1].attn
        parts = (
            (block.ln_1, a.in_proj_weight, a.in_proj_bias, a.out_proj, block.ls_1)
            if hasattr(block, "ln_1")
            else (block.norm1, a.qkv.weight, a.qkv.bias, a.proj, block.ls1)
        )
        self.norm, weight, bias, self.out, self.scale = parts
        self.weight, self.bias = (t.detach().double().numpy() for t in (weight, bias))
        self.block, self.prefix = block, clip.prefix

    def heads(self, x, which):
        """[head][token] -> d numbers: queries, keys or values of (N, W)."""
        rows, d = slice(which * WIDTH, (which + 1) * WIDTH), WIDTH // HEADS
        normed = self.norm(torch.from_numpy(x).float()).double().numpy()
        made = [self.weight[rows] @ token + self.bias[rows] for token in normed]
        return [[token[h * d : (h + 1) * d] for token in made] for h in range(HEADS)]

    def o(self, tokens):
        return self.scale(self.out(torch.tensor(np.array(tokens)).float())).double().numpy()

    def mixed(self, x, weigh):
        """o(A v), where weigh(head, i) is row i of that head's A."""
        v = self.heads(x, 2)
        return self.o(
            [np.concatenate([sum(w * u for w, u in zip(weigh(h, i), v[h], strict=True)) for h in range(HEADS)]) for i in range(len(x))]
        )

    def scores(self, x, one, other):
        a, b = self.heads(x, one), self.heads(x, other)
        return lambda h, i: np.array([a[h][i] @ b[h][j] / np.sqrt(WIDTH / HEADS) for j in range(len(x))])

    def value(self, x):
        return self.mixed(x, lambda _, i: np.eye(len(x))[i])

    def qq(self, x):
        s = self.scores(x, 0, 0)
        return self.mixed(x, lambda h, i: softmax(s(h, i)))

    def qqkk(self, x):
        q, k = self.scores(x, 0, 0), self.scores(x, 1, 1)
        return self.mixed(x, lambda h, i: softmax(q(h, i)) + softmax(k(h, i)))

    def near(self, i, j):
        i, j = i - self.prefix, j - self.prefix
        if min(i, j) < 0:
            return 0.0
        (r, c), (s, t) = divmod(i, GRID), divmod(j, GRID)
        return np.exp(-((r - s) ** 2 + (c - t) ** 2) / 50)

    def kk(self, x):
        s = self.scores(x, 1, 1)
        return self.mixed(x, lambda h, i: softmax(s(h, i) + [self.near(i, j) for j in range(len(x))]))

    def guided(self, x, features, regions):
        """(P, W): features (P, width) and regions (P,) of the other encoder's patches."""
        similar = literal_cosines(features)
        mean = similar.mean()

        def weigh(_, i):
            row = []
            for j, s in enumerate(similar[i]):
                if regions is None:
                    score, left = 3 * (s - 1.2 * mean), 3 * (s - 1.2 * mean) >= 0
                else:
                    free = regions[i] == 0 or regions[j] == 0
                    score, left = 4 * s, s > mean if free else regions[i] == regions[j]
                row.append(score if left or i == j else -np.inf)
            return softmax(np.array(row))

        return self.mixed(x[self.prefix :], weigh)

    def selfcal(self, states, pre, post, multi, cls):
        x, patches = states[-1], [h[self.prefix :] for h in states]
        bad = literal_outliers(patches[-1], 30, 0.95)
        similar = literal_cosines(literal_mend(patches[pre], bad))
        after = literal_thresholded(literal_cosines(patches[post]))

        def through(t, class_token):
            def weigh(h, i):
                row = [3 * (s - similar.mean()) for s in similar[i]]
                row = np.array([s if s >= 0 or j == i else -np.inf for j, s in enumerate(row)])
                return (softmax(row) + softmax(keys(h, i))) / 2

            keys = self.scores(t, 1, 1)
            return after @ (self.mixed(t, weigh) + cls * class_token)

        summed = sum(states[i] for i in multi)
        first = literal_thresholded(similar) @ literal_mend(patches[-1], bad)
        return through(first, x[0]) + through(summed[self.prefix :], summed[0])


def literal_outliers(patches, neighbours, quantile):
    n, far, close = len(patches), [], []
    for i in range(n):
        away = sorted((float(((patches[i] - patches[j]) ** 2).sum()), j) for j in range(n) if j != i)[:neighbours]
        far.append(away[-1][0])
        close.append([j for _, j in away])
    scores = [far[i] * np.mean([1 / far[j] for j in close[i]]) for i in range(n)]
    return [s > np.quantile(scores, quantile) for s in scores]


def literal_mend(patches, bad):
    mended = patches.copy()
    for i in np.flatnonzero(bad):
        r, c = divmod(i, GRID)
        around = [(r + a) * GRID + c + b for a in (-1, 0, 1) for b in (-1, 0, 1) if 0 <= r + a < GRID and 0 <= c + b < GRID]
        if kept := [patches[j] for j in around if not bad[j]]:
            mended[i] = np.mean(kept, axis=0)
    return mended


def literal_cosines(f):
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in f] for a in f])


def literal_thresholded(cosines):
    kept = np.where(cosines >= 0.4, cosines, 0)
    return np.array([row / (row.sum() + 1e-6) for row in kept])


def block_outputs(clip, pixels):
    """h_0 ... h_{L-1} of one forward pass, as (B, N, W) float64."""
    caught = []
    hooks = [b.register_forward_hook(lambda _, args, out: caught.append(out.double().numpy())) for b in clip.blocks]
    clip.encode_crops(pixels)
    for hook in hooks:
        hook.remove()
    return caught


# ---------------------------------------------------------------- against them


@tower
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("path", ["value", "kk", "qq", "qqkk"])
def test_each_path_of_the_last_block_is_its_equation(tower, path, residual):
    clip, pixels = tower(), crops()
    literal, (*_, states, _) = Literal(clip), block_outputs(clip, pixels)
    made = clip.encode_crops(pixels, path, residual).maps
    for image, x in enumerate(states):
        tokens = torch.from_numpy(getattr(literal, path)(x)).float()
        if residual:
            tokens = torch.from_numpy(x).float() + tokens
            block = literal.block
            tokens = tokens + (
                block.ls_2(block.mlp(block.ln_2(tokens))) if hasattr(block, "ln_1") else block.ls2(block.mlp(block.norm2(tokens)))
            )
        expected = clip._project(tokens[None])[0, clip.prefix :]
        torch.testing.assert_close(made[image].flatten(1).T, expected, atol=1e-4, rtol=1e-3)


@tower
def test_self_calibration_is_its_equation(tower):
    clip, pixels = tower(), crops()
    literal, states = Literal(clip), block_outputs(clip, pixels)[:-1]
    made = clip.encode_crops(pixels, "selfcal").maps
    for image in range(len(pixels)):
        h = [s[image] for s in states]
        cosines = literal_cosines(h[1][clip.prefix :])
        assert (cosines >= 0.4).any() and (cosines < 0.4).any()  # both sides of beta
        expected = clip._project(torch.from_numpy(literal.selfcal(h, pre=2, post=1, multi=(1, 2), cls=0.3)).float()[None])[0]
        torch.testing.assert_close(made[image].flatten(1).T, expected, atol=1e-4, rtol=1e-3)


def test_constants_of_self_calibration_by_the_depth_of_the_tower():
    assert Calibration.of(12) == Calibration(pre=8, post=3, multi=(3, 9), cls=0.3)
    assert Calibration.of(24) == Calibration(pre=16, post=6, multi=(8, 18), cls=0.1)
    assert Calibration.of(32) == Calibration(pre=21, post=8, multi=(11, 24), cls=0.1)  # 24's, times 32 / 24
    for depth in range(2, 49):  # always blocks before the last
        c = Calibration.of(depth)
        assert 0 <= c.post <= c.pre <= depth - 2 and 0 <= c.multi[0] <= c.multi[1] <= depth - 2


@pytest.mark.parametrize("neighbours, quantile", [(3, 0.9), (30, 0.95), (99, 0.5)])
def test_outliers_are_those_further_from_their_neighbours_than_those_from_theirs(neighbours, quantile):
    patches = np.random.RandomState(0).randn(3, 36, 8) * np.array([1, 2, 3])[:, None, None]
    patches[0, 7] += 20
    made = dense_paths.outliers(torch.from_numpy(patches).float(), neighbours, quantile)
    assert made[0, 7] and made.any(dim=1).all()
    for image in range(3):
        assert made[image].tolist() == literal_outliers(patches[image], neighbours, quantile)


def test_mending_takes_the_unmarked_neighbours_and_leaves_an_island():
    patches = np.random.RandomState(0).randn(36, 8)
    bad = np.zeros(36, dtype=bool)
    bad[[0, 1, 6, 7, 16, 35]] = True  # 0 has marked neighbours only; 35 is a corner
    made = dense_paths.mend(torch.from_numpy(patches)[None], torch.from_numpy(bad)[None], (6, 6))[0].numpy()
    np.testing.assert_allclose(made, literal_mend(patches, bad))
    np.testing.assert_array_equal(made[0], patches[0])
    assert not np.allclose(made[16], patches[16])


@tower
@pytest.mark.parametrize("regions", [False, True])
def test_the_guided_path_is_its_equation(tower, regions):
    clip, pixels = tower(), crops()
    literal, (*_, states, _), by = Literal(clip), block_outputs(clip, pixels), guide(crops(), regions)
    made = clip.encode_crops(pixels, "guided", guide=by).maps
    for image, x in enumerate(states):
        features = by.patches[image].flatten(1).T.double().numpy()
        tokens = literal.guided(x, features, by.regions[image].flatten().tolist() if regions else None)
        expected = clip._project(torch.from_numpy(tokens).float()[None])[0]
        torch.testing.assert_close(made[image].flatten(1).T, expected, atol=1e-4, rtol=1e-3)


def test_numbers_of_regions_do_not_matter_and_a_guide_is_for_its_path_alone():
    clip, by = own(), guide(crops(), True)
    renamed = Guide(by.patches, torch.tensor([0, 9, 4])[by.regions])
    made, other = (clip.encode_crops(crops(), "guided", guide=one).maps for one in (by, renamed))
    assert torch.equal(made, other) and not torch.equal(made, encode(clip, crops(), "guided").maps)
    for path, given in (("guided", None), ("kk", by)):
        with pytest.raises(ParameterError, match=f"path = '{path}': guided, and no other path, takes .* give path=selfcal or kk there"):
            clip.encode_crops(crops(), path, guide=given)
    with pytest.raises(ParameterError, match="path = 'guided', residual = True: guided takes no residual"):
        clip.encode_crops(crops(), "guided", residual=True, guide=by)


def test_dense_clip_asks_its_guide_on_the_towers_grid():
    class Colours:
        key, patch = "colours", 8

        def encode(self, pixels):
            assert pixels.shape[1:3] == (GRID * 8, GRID * 8)
            return nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2) / 255 - 0.5, 8)

    clip, colours = own(), Colours()
    dense = DenseClip(clip, "guided", guide=colours)
    small = torch.stack([torch.from_numpy(images.resize(p.numpy(), (GRID * 8, GRID * 8))) for p in crops()])
    expected = clip.encode_crops(crops(), "guided", guide=Guide(colours.encode(small))).maps
    torch.testing.assert_close(dense.embed(crops()), nn.functional.normalize(expected, dim=1))
    assert "guided x1 by colours" in dense.key


# ---------------------------------------------------------------- what holds of all


@tower
@pytest.mark.parametrize("path", PATHS)
def test_a_constant_image_gives_numbers(tower, path):
    clip = tower()
    for level in (0, 127, 255):
        assert encode(clip, torch.full((2, SIDE, SIDE, 3), level, dtype=torch.uint8), path).maps.isfinite().all()


@tower
def test_self_calibration_of_equal_tokens_gives_numbers(tower):
    """Every cosine may round to less than their mean: then a token still looks at itself."""
    block = dense_paths.LastBlock.of(tower().blocks[-1])
    for scale in (0, 1e-6, 1):
        same = scale * torch.randn(300, 1, WIDTH).expand(-1, 1 + GRID * GRID, -1)
        assert dense_paths.selfcal(block, [same] * 3, (GRID, GRID)).isfinite().all()


@tower
def test_self_calibration_is_done_in_float32(tower):
    block = dense_paths.LastBlock.of(tower().blocks[-1])
    states = [torch.randn(2, 1 + GRID * GRID, WIDTH) for _ in range(3)]
    exact = dense_paths.selfcal(block, states, (GRID, GRID))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dense_paths.selfcal(block, states, (GRID, GRID)), exact)


@tower
@pytest.mark.parametrize("path", PATHS)
def test_images_of_a_batch_do_not_meet(tower, path):
    clip, order = tower(), [2, 0, 1]
    made = encode(clip, crops(3), path).maps
    torch.testing.assert_close(encode(clip, crops(3)[order], path).maps, made[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encode(clip, crops(3)[1:2], path).maps, made[1:2], atol=1e-5, rtol=1e-4)


@tower
def test_the_votes_are_the_same_whatever_the_path_and_the_maps_are_not(tower):
    clip = tower()
    made = {path: encode(clip, crops(), path) for path in PATHS}
    for path, out in made.items():
        assert torch.equal(out.tokens, made["value"].tokens)
        assert out.maps.shape == (2, 24, GRID, GRID)
        for other in set(made) - {path}:
            assert (out.maps - made[other].maps).abs().max() > 1e-3, (path, other)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in clip.blocks)


@tower
@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_stays_near(tower, path):
    clip = tower()
    exact = encode(clip, crops(), path).maps
    clip.precision = "bf16"
    near = encode(clip, crops(), path).maps
    assert near.dtype == torch.float32 and torch.nn.functional.cosine_similarity(near, exact, dim=1).median() > 0.9


@pytest.mark.parametrize("path", ["kk", "selfcal"])
def test_dense_clip_hands_the_path_on_and_is_keyed_by_it(path):
    clip = own()
    dense = DenseClip(clip, path)
    torch.testing.assert_close(dense.embed(crops()), nn.functional.normalize(clip.encode_crops(crops(), path).maps, dim=1))
    assert path in dense.key and make(FeatureParams, {"path": path}).path == path


@pytest.mark.parametrize("path", ["kk", "qq", "qqkk", "selfcal"])
def test_a_tower_without_attention_has_one_path(path):
    model = open_clip.model.CustomTextCLIP(
        24,
        {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear", "image_size": SIDE},
        {"layers": 1, "width": 32, "heads": 2},
    )
    clip = framed(model, std=0.05)
    with pytest.raises(ParameterError, match="residual = True: tiny has no attention"):
        clip.encode_crops(crops(), residual=True)
    for given in (lambda: clip.encode_crops(crops(), path), lambda: DenseClip(clip, path).embed(crops())):
        with pytest.raises(ParameterError, match=f"path = '{path}': tiny has no attention; give path=value"):
            given()


def test_what_a_tower_has_not_is_refused():
    for clip in (own(layers=1), timms(class_token=False, reg_tokens=0, global_pool="avg", fc_norm=False)):
        with pytest.raises(ParameterError, match="path = 'selfcal' for tiny.*give path=kk"):
            clip.encode_crops(crops(), "selfcal")
        assert clip.encode_crops(crops(), "kk").maps.isfinite().all()
    with pytest.raises(ParameterError, match="residual = True.*residual=false"):
        own().encode_crops(crops(), "selfcal", residual=True)
    with pytest.raises(ParameterError, match="residual = True: path = 'plain' keeps .* change nothing; leave residual out"):
        own().encode_crops(crops(), "plain", residual=True)
    with pytest.raises(ParameterError, match="path = 'query': no such dense path; known are value, plain"):
        load_clip("random:ViT-S-32").encode_crops(torch.zeros(1, 224, 224, 3, dtype=torch.uint8), "query")
