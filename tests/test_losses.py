"""Eq. 1-4 against slow transcriptions, written as the paper writes them: one loop a sum."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmbseg.stage2 import losses

SHAPES = [(1, 1, 3), (1, 4, 5), (2, 2, 4), (7, 1, 6), (9, 4, 5), (16, 7, 8)]  # patches, classes, dimensions


def case(n, classes, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = F.normalize(torch.randn(n, width, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
    texts = F.normalize(torch.randn(classes, width, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
    return z, torch.randint(classes, (n,), generator=generator), texts


def dot(a, b, temperature):
    return (a * b).sum() / temperature


def eq3(i, k, z, texts, temperature):
    total = sum(torch.exp(dot(z[i], text, temperature)) for text in texts)
    for j in range(len(z)):
        if j != i:
            total = total + torch.exp(dot(z[i], z[j], temperature))
    return -dot(z[i], texts[k], temperature) + torch.log(total)


def eq2(k, z, labels, texts, temperature):
    terms = [eq3(i, k, z, texts, temperature) for i in range(len(z)) if labels[i] == k]
    return sum(terms) / len(terms) if terms else 0.0


def eq4(i, z, labels, temperature):
    if len(z) == 1:
        return 0 * z.sum()
    denominator = sum(torch.exp(dot(z[i], z[j], temperature)) for j in range(len(z)) if j != i)
    terms = [-dot(z[i], z[m], temperature) + torch.log(denominator) for m in range(len(z)) if labels[m] == labels[i]]
    return sum(terms) / len(terms)


def eq1(z, labels, texts, temperature=1.0):
    text = sum(eq2(k, z, labels, texts, temperature) for k in range(len(texts)))
    image = sum(eq4(i, z, labels, temperature) for i in range(len(z)))
    return (text + image) / (len(z) + len(texts))


def slow_prototype(z, labels, texts, temperature=1.0):
    present = set(labels.tolist())
    return sum(eq2(k, z, labels, texts, temperature) for k in present) / len(present)


def slow_supcon(z, labels, texts, temperature=1.0):
    examples, classes = [*z, *texts], [*labels.tolist(), *range(len(texts))]
    terms = []
    for i in range(len(examples)):
        others = [j for j in range(len(examples)) if j != i]
        denominator = sum(torch.exp(dot(examples[i], examples[j], temperature)) for j in others)
        positives = [j for j in others if classes[j] == classes[i]]
        if positives:
            shares = [torch.log(torch.exp(dot(examples[i], examples[p], temperature)) / denominator) for p in positives]
            terms.append(-sum(shares) / len(positives))
    return sum(terms) / len(terms)


PAIRS = [(losses.tsupcon, eq1), (losses.prototype, slow_prototype), (losses.supcon, slow_supcon)]


@pytest.mark.parametrize("fast, slow", PAIRS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_value_and_gradient_equal_the_transcription(fast, slow, shape, temperature):
    z, labels, texts = case(*shape)
    ours, theirs = fast(z, labels, texts, temperature), slow(z, labels, texts, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad(theirs, (z, texts), allow_unused=True, materialize_grads=True)
    for gradient, wanted in zip(torch.autograd.grad(ours, (z, texts)), expected):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_equation_by_itself(shape):
    z, labels, texts = case(*shape, seed=1)
    per_patch = losses.patch_text_terms(z, labels, texts)
    torch.testing.assert_close(per_patch, torch.stack([eq3(i, labels[i], z, texts, 1.0) for i in range(len(z))]))
    per_class = [float(torch.as_tensor(eq2(k, z, labels, texts, 1.0)).detach()) for k in range(len(texts))]
    assert losses.text_terms(per_patch, labels, len(texts)).tolist() == pytest.approx(per_class)
    image = [eq4(i, z, labels, 1.0).item() for i in range(len(z))]
    assert losses.patch_patch_terms(z, labels).tolist() == pytest.approx(image)


def test_class_without_patches_adds_no_term_but_counts_in_k():
    z, texts = torch.eye(6, dtype=torch.float64)[:4], torch.eye(6, dtype=torch.float64)[:2]
    labels = torch.tensor([0, 0, 1, 1])
    far = -F.normalize(torch.ones(1, 6, dtype=torch.float64), dim=1)
    terms = losses.text_terms(losses.patch_text_terms(z, labels, torch.cat([texts, far])), labels, 3)
    assert terms[2] == 0 and (terms[:2] != 0).all()
    cold = {"temperature": 0.005}  # the far text weighs exp(-80) and less in the sums
    two, three = (losses.tsupcon(z, labels, t, **cold) for t in (texts, torch.cat([texts, far])))
    torch.testing.assert_close(three * (4 + 3), two * (4 + 2))
    torch.testing.assert_close(losses.prototype(z, labels, torch.cat([texts, far]), **cold), losses.prototype(z, labels, texts, **cold))


@pytest.mark.parametrize("loss", [losses.tsupcon, losses.prototype, losses.supcon])
def test_batch_of_one_class_of_many(loss):
    z, _, texts = case(6, 5, 4)
    slow = dict(PAIRS)[loss]
    labels = torch.full((6,), 3)
    torch.testing.assert_close(loss(z, labels, texts), slow(z, labels, texts))


@pytest.mark.parametrize("loss", [losses.tsupcon, losses.prototype, losses.supcon])
def test_single_labelled_patch_is_finite(loss):
    z, labels, texts = case(1, 3, 4)
    value = loss(z, labels, texts)
    gradients = torch.autograd.grad(value, (z, texts))
    assert value.isfinite() and all(g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


def test_weights_weigh_the_two_means():
    z, labels, texts = case(9, 4, 5)
    text = losses.prototype(z, labels, texts)
    image = losses.patch_patch_terms(z, labels).mean()
    torch.testing.assert_close(losses.tsupcon(z, labels, texts, text_weight=0.7, image_weight=0.2), 0.7 * text + 0.2 * image)
    torch.testing.assert_close(losses.tsupcon(z, labels, texts, text_weight=1.0, image_weight=0.0), text)
    torch.testing.assert_close(losses.tsupcon(z, labels, texts, text_weight=0.0, image_weight=1.0), image)
    present = len(labels.unique())
    torch.testing.assert_close(losses.tsupcon(z, labels, texts, text_weight=present / 13), losses.tsupcon(z, labels, texts))
    torch.testing.assert_close(losses.tsupcon(z, labels, texts, image_weight=9 / 13), losses.tsupcon(z, labels, texts))


class Largest(TorchDispatchMode):
    """The most values of any one tensor that is made inside."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.values = max([self.values, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("loss", [losses.tsupcon, losses.prototype, losses.supcon])
@pytest.mark.parametrize("temperature", [1.0, 0.005])
def test_blocks_of_rows_give_the_whole_products_value_and_gradient(loss, temperature, monkeypatch):
    z, labels, texts = case(101, 5, 8)
    wanted = loss(z, labels, texts, temperature)
    gradients = torch.autograd.grad(wanted, (z, texts))
    monkeypatch.setattr(losses, "BLOCK", 7 * 106 + 3)  # 7 rows a block, the last one shorter
    with Largest() as seen:
        made = loss(z, labels, texts, temperature)
        ours = torch.autograd.grad(made, (z, texts))
    assert seen.values <= 8 * 106 < 101 * 101  # the patches and the texts themselves are the largest
    torch.testing.assert_close((made, ours), (wanted, gradients), rtol=1e-10, atol=1e-10)
    monkeypatch.setattr(losses, "BLOCK", 1)  # one row a block
    torch.testing.assert_close(loss(z, labels, texts, temperature), wanted, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_a_weighted_sum_over_other_patches():
    z, _, _ = case(23, 1, 6)
    weights = torch.randn(23, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = torch.logsumexp((z @ z.T / 0.1).fill_diagonal_(-torch.inf), dim=1)
    expected = torch.autograd.grad(plain @ weights, z)
    torch.testing.assert_close(torch.autograd.grad(losses.log_sum_others(z, 0.1) @ weights, z), expected, rtol=1e-10, atol=1e-10)
