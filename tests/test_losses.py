"""`ticketlab.losses`: against torch's own losses, loops over examples, and dense derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, vjp, vmap
from torch.nn import functional as F

from ticketlab.losses import (
    CROSS_ENTROPY,
    IGNORED,
    LOSSES,
    SQUARED_ERROR,
    check_labels,
    cross_entropy,
    mean_cross_entropy,
    squared_error,
)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(*shape: int, classes: int = 4) -> torch.Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(1))


def tokens() -> torch.Tensor:
    """Labels [5, 3], of which no example counts all alike."""
    y = labels(5, 3)
    y[0, 1:] = IGNORED
    y[3, 2] = IGNORED
    return y


# -------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_has_the_bits_of_torch(dtype):
    z, y = draw(60, 10, dtype=dtype).requires_grad_(), labels(60, classes=10)
    mean, expected = CROSS_ENTROPY.mean(z, y), F.cross_entropy(z, y)
    assert torch.equal(mean, expected)
    assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in (mean, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mapped_mean_has_the_gradient_of_each_network_alone(dtype):
    """What a stack in training relies on: a sum of means over replicas mixes no gradients, to the bit."""
    z, y = draw(3, 37, 10, dtype=dtype).requires_grad_(), labels(3, 37, classes=10)
    (stacked,) = torch.autograd.grad(vmap(CROSS_ENTROPY.mean)(z, y).sum(), z)
    for r in range(3):
        one = z[r].detach().requires_grad_()
        assert torch.equal(stacked[r], torch.autograd.grad(F.cross_entropy(one, y[r]), one)[0])


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_behind_any_replica_axes(lead, smoothing):
    z, y = draw(*lead, 5, 4), labels(5)
    loss, error = cross_entropy(z, y, smoothing)
    assert loss.shape == error.shape == (*lead, 5)
    flat = z.reshape(-1, 5, 4)
    for r, one in enumerate(flat):
        expected = F.cross_entropy(one, y, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(loss.reshape(-1, 5)[r], expected)
        assert torch.equal(error.reshape(-1, 5)[r], (one.argmax(1) != y).double())


def test_each_is_the_formula_of_evaluation_to_the_bit():
    z, y = draw(3, 50, 4, dtype=torch.float32), labels(50)
    targets = y.expand(3, 50)
    assert torch.equal(cross_entropy(z, y).loss, -z.log_softmax(-1).gather(-1, targets[..., None])[..., 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_tokens_are_averaged_over_those_that_count(smoothing):
    z, y = draw(2, 5, 3, 4), tokens()
    loss, error = cross_entropy(z, y, smoothing)
    for r in range(2):
        for i in range(5):
            kept = y[i] != IGNORED
            expected = F.cross_entropy(z[r, i, kept], y[i, kept], label_smoothing=smoothing)
            torch.testing.assert_close(loss[r, i], expected)
            assert error[r, i] == (z[r, i, kept].argmax(1) != y[i, kept]).double().mean()
    torch.testing.assert_close(mean_cross_entropy(z[0], y, smoothing), loss[0].mean())
    every = labels(5, 3)
    torch.testing.assert_close(mean_cross_entropy(z[0], every), F.cross_entropy(z[0].flatten(0, 1), every.flatten()))


def test_an_ignored_token_has_no_gradient():
    z, y = draw(5, 3, 4).requires_grad_(), tokens()
    (slope,) = torch.autograd.grad(cross_entropy(z, y).loss.sum(), z)
    assert not slope[y == IGNORED].any() and slope[y != IGNORED].any(-1).all()


def test_a_row_of_nan_is_wrong():
    z = torch.tensor([[torch.nan, 0.0, 0.0], [0.0, torch.nan, 0.0], [1.0, 0.0, torch.inf], [2.0, 0.0, 0.0]])
    loss, error = cross_entropy(z, torch.tensor([0, 0, 2, 0]))
    assert error.tolist() == [1, 1, 0, 0]
    assert loss.isnan().tolist() == [True, True, True, False]
    assert cross_entropy(torch.full((1, 2, 3), torch.nan), torch.zeros(1, 2, dtype=torch.int64)).error.item() == 1


def test_labels_of_any_integer_dtype():
    z, y = draw(5, 4), labels(5)
    for dtype in (torch.uint8, torch.int32):
        assert torch.equal(cross_entropy(z, y.to(dtype)).loss, cross_entropy(z, y).loss)
        assert torch.equal(mean_cross_entropy(z, y.to(dtype)), F.cross_entropy(z, y))


@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 2, 3)])
def test_squared_error(shape):
    z, y = draw(*shape), draw(*shape, seed=1)
    loss, error = squared_error(z, y)
    torch.testing.assert_close(loss, torch.stack([F.mse_loss(a, b) for a, b in zip(z, y, strict=True)]))
    assert error.shape == (5,) and error.isnan().all()
    assert torch.equal(SQUARED_ERROR.mean(z, y), F.mse_loss(z, y))
    assert torch.equal(squared_error(torch.stack([z, y]), y).loss, torch.stack([loss, torch.zeros(5).double()]))


# --------------------------------------------------------------------------------------------- derivatives


CASES = {
    "labels": (CROSS_ENTROPY, draw(5, 4), labels(5)),
    "smoothed": (CROSS_ENTROPY.smoothed(0.2), draw(5, 4), labels(5)),
    "tokens": (CROSS_ENTROPY, draw(5, 3, 4), tokens()),
    "values": (SQUARED_ERROR, draw(5, 4), draw(5, 4, seed=1)),
}


@pytest.mark.parametrize("name", CASES)
def test_transforms_agree_with_plain_autograd(name):
    loss, z, y = CASES[name]
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss.mean(leaf, y), leaf)
    torch.testing.assert_close(grad(loss.mean)(z, y), expected)
    torch.testing.assert_close(vjp(lambda w: loss.mean(w, y), z)[1](torch.ones_like(loss.mean(z, y)))[0], expected)
    torch.testing.assert_close(grad(lambda w: loss.each(w, y).loss.mean())(z), expected)
    by_example = vmap(grad(lambda one, target: loss.mean(one[None], target[None])))(z, y)
    torch.testing.assert_close(by_example / 5, expected)
    torch.testing.assert_close(loss.residual(z, y), by_example)
    stack = torch.stack([z, -z])
    torch.testing.assert_close(loss.residual(stack, y), torch.stack([loss.residual(z, y), loss.residual(-z, y)]))


def test_the_residual_is_softmax_minus_one_hot():
    z, y = draw(5, 4), labels(5)
    torch.testing.assert_close(CROSS_ENTROPY.residual(z, y), z.softmax(1) - F.one_hot(y, 4))
    torch.testing.assert_close(SQUARED_ERROR.residual(z, z + 1), torch.full_like(z, -0.5))


@pytest.mark.parametrize("name", ["labels", "smoothed", "values"])
def test_roots_square_to_the_hessian(name):
    loss, z, y = CASES[name]
    roots = loss.roots(z)
    for i in range(5):
        hessian = torch.autograd.functional.hessian(lambda w, i=i: loss.mean(w[None], y[i : i + 1]), z[i])
        torch.testing.assert_close(roots[i].mT @ roots[i], hessian)


@pytest.mark.parametrize("name", CASES)
def test_the_hessian_in_the_outputs_times_a_vector(name):
    loss, z, y = CASES[name]
    along = draw(*z.shape, seed=4)
    whole = torch.autograd.functional.hessian(lambda w: 5 * loss.mean(w, y), z).reshape(z.numel(), -1)
    found = loss.bend(z, y, along)
    torch.testing.assert_close(found.flatten(), whole @ along.flatten())
    stack = torch.stack([z, -z])
    torch.testing.assert_close(loss.bend(stack, y, torch.stack([along, along]))[0], found)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("share", "match"), [(1.0, "got 1.0 for cross_entropy"), (-0.1, r"must lie in \[0, 1\)"), (math.nan, "got nan")]
)
def test_smoothing_out_of_range(share, match):
    with pytest.raises(ValueError, match=match):
        CROSS_ENTROPY.smoothed(share)


def test_smoothing_needs_labels():
    with pytest.raises(ValueError, match=r"needs the cross-entropy: got 0\.1 for squared_error"):
        SQUARED_ERROR.smoothed(0.1)
    assert SQUARED_ERROR.smoothed(0.0) is SQUARED_ERROR
    assert list(LOSSES) == ["cross_entropy", "squared_error"]


Y = labels(5)


@pytest.mark.parametrize(
    ("y", "n", "shape", "match"),
    [
        (Y.double(), 5, (4,), r"must be integer class labels.*got torch.float64. Convert them with .long\(\)"),
        (Y > 0, 5, (4,), "got torch.bool"),
        (Y.tolist(), 5, (4,), "got list"),
        (F.one_hot(Y, 4).double(), 5, (4,), r"got torch.float64. Pass y.argmax\(1\) in place of one-hot"),
        (F.one_hot(Y, 4), 5, (4,), r"must have shape \(5,\) .*got shape \(5, 4\). Pass y.argmax\(1\)"),
        (Y[:, None], 5, (4,), r"got shape \(5, 1\). Pass y\[:, 0\]"),
        (Y[:4], 5, (4,), r"must have shape \(5,\) for logits \(5, 4\): got shape \(4,\)"),
        (Y[:0], 0, (4,), r"one at least: got shape \(0,\)"),
        (Y[:, None, None], 5, (4,), r"got shape \(5, 1, 1\). Pass labels of shape \(5,\)"),
        (Y - 1, 5, (4,), r"must be in 0\.\.3 for 4 classes: got -1\.\."),
        (Y + 1, 5, (4,), r"got 1\.\.4\. Number the classes from 0: pass y - 1"),
        (2 * (Y % 2) - 1, 5, (4,), r"got -1\.\.1\. Pass \(y \+ 1\) // 2"),
        (torch.where(Y == 0, IGNORED, Y), 5, (4,), "Leave out the examples labelled -100"),
        (Y, 5, (1,), r"two classes at least: the model returns \(5, 1\).*two for binary labels"),
        (Y, 5, (), r"the model returns \(5,\)"),
        (Y, 5, (4, 8, 8), r"the model returns \(5, 4, 8, 8\).*flatten"),
        # one number per position, as if positions were replicas
        (Y, 5, (5, 4), r"must have shape \(5, 5\) for logits \(5, 5, 4\).*let the model pool over t"),
        (labels(5, 3), 5, (3, 3), r"must be in 0\.\.2 for 3 classes: got 0\.\.3"),
        (labels(5, 3), 5, (4, 3), r"must have shape \(5, 4\) for logits \(5, 4, 3\).*permute\(0, 2, 1\)"),
        (torch.full((5, 3), IGNORED), 5, (3, 4), "must count a token of every example"),
        (torch.where(tokens() == IGNORED, -1, tokens()), 5, (3, 4), r"got -1\.\.3"),
    ],
)
def test_labels_that_do_not_fit(y, n, shape, match):
    with pytest.raises(ValueError, match=match):
        CROSS_ENTROPY.check(y, n, shape)


@pytest.mark.parametrize(
    ("y", "shape", "match"),
    [
        (Y, (4,), r"squared error must be a floating tensor: got torch.int64. Convert them with .float\(\)"),
        (draw(5), (1,), r"must have the shape of the outputs, \(5, 1\): got \(5,\). Pass y\[:, None\]"),
        (draw(5, 3), (4,), "Give the model as many outputs as targets"),
        (draw(5, 4).log(), (4,), "must be finite"),
        (draw(0, 4), (4,), "one at least"),
    ],
)
def test_targets_that_do_not_fit(y, shape, match):
    with pytest.raises(ValueError, match=match):
        SQUARED_ERROR.check(y, 5, shape)


def test_targets_that_fit():
    CROSS_ENTROPY.check(Y, 5, (4,))
    CROSS_ENTROPY.check(Y.to(torch.uint8), 5, (4,))
    CROSS_ENTROPY.check(tokens(), 5, (3, 4))
    CROSS_ENTROPY.check(torch.tensor([[0, 1]]), 1, (2, 2))  # tokens, not one-hot
    SQUARED_ERROR.check(draw(5, 4), 5, (4,))
    SQUARED_ERROR.check(draw(5, 2, 3), 5, (2, 3))
    check_labels(torch.zeros(1, dtype=torch.int64), 2)
