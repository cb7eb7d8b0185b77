"""Losses against closed-form numpy in float64, and what partial labels must not do."""

import numpy as np
import pytest
import torch

from pgl_ray.model.losses import local_consistency_loss, segmentation_loss

SHAPE = (3, 4, 5)  # D != H != W
SMOOTH = 1e-5


def rng_logits(n, c, seed=0, scale=3.0):
    return torch.randn(n, c, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def rng_target(n, classes, seed=1):
    return torch.randint(0, classes, (n, 1, *SHAPE), generator=torch.Generator().manual_seed(seed))


# -- Eq. 8 -------------------------------------------------------------------------------------------------------------


def test_local_consistency_is_eq_8():
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 7, *SHAPE)), rng.normal(size=(2, 7, *SHAPE))
    total = 0.0
    for n in range(2):
        for d, h, w in np.ndindex(SHAPE):
            a, b = query[n, :, d, h, w], key[n, :, d, h, w]
            total += np.sum((a / np.sqrt(a @ a) - b / np.sqrt(b @ b)) ** 2)
    expected = total / (2 * np.prod(SHAPE))
    assert local_consistency_loss(torch.tensor(query), torch.tensor(key)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factor, expected", [(5.0, 0.0), (-0.1, 4.0)])
def test_local_consistency_sees_directions_only(factor, expected):
    query = torch.randn(2, 8, *SHAPE)
    assert local_consistency_loss(query, factor * query).item() == pytest.approx(expected, abs=1e-6)


def test_key_gets_no_gradient_and_half_precision_is_raised():
    query = torch.randn(2, 64, *SHAPE, requires_grad=True)
    key = torch.randn(2, 64, *SHAPE, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = local_consistency_loss(query * 1, key * 1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(local_consistency_loss(query, key).item(), rel=1e-6)
    loss.backward()
    assert key.grad is None and query.grad.abs().sum() > 0
    large = (query.detach() * 1e4).clamp(-6e4, 6e4).half()  # its norm overflows float16
    assert local_consistency_loss(large, large).item() < 1e-6
    assert local_consistency_loss(large, query.detach()).item() < 1e-2


def test_a_zero_feature_stays_finite():
    query = torch.zeros(1, 4, *SHAPE, requires_grad=True)
    loss = local_consistency_loss(query, torch.randn(1, 4, *SHAPE))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(query.grad).all()


# -- Eq. 11 and 12 -----------------------------------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def dice_term(p, y):
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum() + SMOOTH)


def eq_12(logits, target):
    """(1 / C) sum over classes of Dice loss - E[Y log P], all sums over batch and voxels."""
    p, num = softmax(logits), logits.shape[1]
    total = 0.0
    for c in range(num):
        y = (target[:, 0] == c).astype(float)
        total += dice_term(p[:, c], y) - (y * np.log(p[:, c])).mean()
    return total / num


def eq_11(logit, y):
    p = 1 / (1 + np.exp(-logit))
    return dice_term(p, y) - (y * np.log(p) + (1 - y) * np.log(1 - p)).mean()


@pytest.mark.parametrize("classes", [2, 5])
def test_multiclass_is_eq_12(classes):
    logits, target = rng_logits(3, classes), rng_target(3, classes)
    loss = segmentation_loss(logits, target, "multiclass")
    assert loss.item() == pytest.approx(eq_12(logits.numpy(), target.numpy()), rel=1e-5)
    everything = torch.ones(3, classes, dtype=torch.bool)
    assert segmentation_loss(logits, target, "multiclass", everything).item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("organs", [1, 2])
def test_binary_is_eq_11_and_organ_includes_tumour(organs):
    logits, target = rng_logits(3, organs), rng_target(3, organs + 1)
    parts = [eq_11(logits.numpy()[:, c], (target.numpy()[:, 0] >= c + 1).astype(float)) for c in range(organs)]
    assert segmentation_loss(logits, target, "binary").item() == pytest.approx(np.mean(parts), rel=1e-5)


def test_target_may_be_uint8_and_labelled_may_be_uint8():
    logits, target = rng_logits(2, 3), rng_target(2, 3)
    labelled = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for task, x in (("multiclass", logits), ("binary", logits[:, 1:])):
        expected = segmentation_loss(x, target, task, labelled.bool())
        assert segmentation_loss(x, target.to(torch.uint8), task, labelled.to(torch.uint8)) == expected


# -- partial labels ----------------------------------------------------------------------------------------------------


def test_merged_background_is_the_sum_of_probabilities():
    """Oracle: Eq. 12 on log-probabilities, the unlabelled class' probability added to the background by hand."""
    logits, target = rng_logits(2, 4, scale=1.0), rng_target(2, 4)
    labelled = torch.tensor([[True, True, True, True], [True, True, False, True]])
    target[1][target[1] == 2] = 0  # what an annotator who skips class 2 leaves
    p = softmax(logits.numpy())
    p[1, 0] += p[1, 2]
    p[1, 2] = 0
    total = 0.0
    for c in range(4):
        y = (target.numpy()[:, 0] == c).astype(float)
        with np.errstate(divide="ignore"):
            total += dice_term(p[:, c], y) - np.where(y > 0, np.log(p[:, c]), 0).mean()
    loss = segmentation_loss(logits, target, "multiclass", labelled)
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)


def test_predicting_an_unlabelled_organ_is_no_error():
    """The annotator left class 2 out: predicting it on "background" costs nothing, a labelled class there does."""
    target = torch.zeros(1, 1, *SHAPE, dtype=torch.long)
    target[0, 0, 0] = 1
    known, unknown = torch.tensor([[True, True, True]]), torch.tensor([[True, True, False]])

    def loss(on_background, labelled):
        logits = torch.full((1, 3, *SHAPE), -20.0)
        logits[0, 1, 0] = 20
        logits[0, on_background, 1:] = 20
        return segmentation_loss(logits, target, "multiclass", labelled).item()

    assert loss(2, unknown) == pytest.approx(loss(0, unknown), abs=1e-6)
    assert loss(2, known) > loss(0, known) + 1
    assert loss(1, unknown) > loss(0, unknown) + 1


def test_unlabelled_organ_is_neither_pushed_nor_pulled():
    """Shifting probability between background and the unlabelled organ changes nothing."""
    logits = rng_logits(2, 4).requires_grad_()
    target = rng_target(2, 2)
    labelled = torch.tensor([[True, True, False, True]] * 2)
    segmentation_loss(logits, target, "multiclass", labelled).backward()
    p = logits.detach()[:, [0, 2]].softmax(1)  # the merged logit splits its gradient by these shares
    g = logits.grad[:, [0, 2]]
    assert torch.allclose(g[:, 0] * p[:, 1], g[:, 1] * p[:, 0], atol=1e-9)


def test_binary_ignores_unlabelled_samples():
    logits, target = rng_logits(3, 2).requires_grad_(), rng_target(3, 3)
    labelled = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    loss = segmentation_loss(logits, target, "binary", labelled)
    x, t = logits.detach().numpy(), target.numpy()[:, 0]
    expected = (eq_11(x[:2, 0], (t[:2] >= 1).astype(float)) + eq_11(x[:1, 1], (t[:1] >= 2).astype(float))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert (logits.grad[1:, 1] == 0).all() and (logits.grad[2, 0] == 0).all() and (logits.grad[0] != 0).all()


def test_nothing_labelled_gives_a_zero_gradient():
    logits = rng_logits(2, 1).requires_grad_()
    loss = segmentation_loss(logits, rng_target(2, 2), "binary", torch.tensor([[True, False]] * 2))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_absent_and_contradictory_classes_stay_finite(task):
    logits = (rng_logits(2, 3) * 30).requires_grad_()  # saturated
    target = rng_target(2, 2)  # class 2 (and 3) never occur
    contradictory = torch.tensor([[True, False, True, True]] * 2)[:, : 3 if task == "multiclass" else 4]
    for labelled in (None, contradictory):  # class 1 occurs though it is called unlabelled
        logits.grad = None
        loss = segmentation_loss(logits, target, task, labelled)
        loss.backward()
        assert torch.isfinite(loss) and loss < 100 and torch.isfinite(logits.grad).all()
