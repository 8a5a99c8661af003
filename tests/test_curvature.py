"""Eigenvalues and trace of the loss's curvature: closed forms, dense matrices of plain autograd, and properties."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT_TOLERANCE, blobs, build, half_masks, images, small_conv_bn, small_mlp
from torch import nn
from torch.func import functional_call

import ticketlab as tl
from ticketlab import curvature
from ticketlab.curvature import top_eigenvalues, trace
from ticketlab.losses import CROSS_ENTROPY, IGNORED
from ticketlab.state import stack_states, state

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(n_in=4, n_out=3, bias=False):
    return build(lambda: nn.Linear(n_in, n_out, bias=bias))


def smooth():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


class Tokens(nn.Module):
    """A logit per token and class, [n, t, 4], of tokens embedded in 3 dimensions and mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.output = nn.Embedding(5, 3), nn.Linear(6, 6), nn.Linear(3, 4)

    def forward(self, x):
        h = self.embed(x)
        return self.output(h + self.mix(h.flatten(1)).tanh().view_as(h))


def token_task():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randint(0, top, (40, 2), generator=generator) for top in (5, 4))
    y[::3, 1] = IGNORED
    return tl.Task.from_tensors(x, y, n_classes=4, name="tokens", validation_size=0.2, test_size=0.2)


def values_task(n=50, n_out=3):
    x = draw(n, 4)
    return tl.Task.from_tensors(x, draw(n, n_out, seed=1), loss="squared_error", name="values")


PROBLEMS = {
    "mlp": (smooth, blobs),
    "relu": (small_mlp, blobs),
    "conv_bn": (small_conv_bn, images),
    "tokens": (Tokens, token_task),
}


def problem(kind, seed=0):
    """A network away from the kinks that zero biases make, with running statistics that matter, half of it pruned."""
    factory, task = PROBLEMS[kind]
    model = build(factory, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    masks = {n: m for n, m in half_masks(model, seed).items() if n in tl.masks.ones(model)}
    return model, masks, task().limit(train=20)


def mean_loss(outputs, y):
    """As it is defined: the mean over examples, of a mean over tokens that count."""
    if y.ndim == 1:
        return F.cross_entropy(outputs, y)
    return torch.stack(
        [F.cross_entropy(o[t != IGNORED], t[t != IGNORED]) for o, t in zip(outputs, y, strict=True)]
    ).mean()


def dense(model, masks, task, matrix="hessian"):
    """The matrix in live coordinates from dense derivatives, and which coordinates are live."""
    model, data = copy.deepcopy(model).eval(), task.train
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    live = torch.cat(
        [masks.get(n, torch.ones(s, dtype=torch.bool)).flatten() for n, s in zip(names, shapes, strict=True)]
    )
    point = torch.cat([p.detach().flatten() for p in model.parameters()]) * live

    def outputs(flat):
        parts = flat.split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return functional_call(model, weights, (data.x,))

    if matrix == "hessian":
        whole = torch.autograd.functional.hessian(lambda flat: mean_loss(outputs(flat), data.y), point)
    else:
        z = outputs(point)
        jacobian = torch.autograd.functional.jacobian(outputs, point).flatten(0, -2)
        inner = torch.autograd.functional.hessian(lambda z: mean_loss(z, data.y), z).reshape(z.numel(), -1)
        whole = jacobian.T @ inner @ jacobian
    return whole[live][:, live], live


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_of_linear_regression_it_is_the_second_moment_of_the_inputs(matrix):
    task = values_task()
    x, model = task.train.x, linear()
    expected = torch.linalg.eigvalsh(2 / (len(x) * 3) * x.T @ x).flip(0)
    found = top_eigenvalues(model, state(model), task, k=12, matrix=matrix)
    torch.testing.assert_close(found.values, expected.repeat_interleave(3), **CLOSE)  # once for each output
    assert (found.n, int(found.n_live)) == (len(x), 12) and found.residuals.max() < 1e-12
    least = top_eigenvalues(model, state(model), task, k=3, matrix=matrix, end="smallest")
    torch.testing.assert_close(least.values, expected[-1:].expand(3), **CLOSE)


def test_of_logistic_regression_it_is_that_of_the_probabilities():
    task = blobs()
    model = linear(6, 3)
    x, p = task.train.x, model(task.train.x).detach().softmax(-1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    whole = torch.einsum("nab,ni,nj->aibj", inner, x, x).reshape(18, 18) / len(x)
    for matrix in ("hessian", "gauss_newton"):
        found = top_eigenvalues(model, state(model), task, k=18, matrix=matrix)
        torch.testing.assert_close(found.values, torch.linalg.eigvalsh(whole).flip(0), **CLOSE)
    estimate = trace(model, state(model), task, n_probes=200)
    assert (estimate.value - whole.trace()).abs() < 4 * estimate.standard_error < 0.2 * whole.trace()


def test_the_trace_of_a_diagonal_matrix_is_exact():
    x = torch.eye(4, dtype=torch.float64).repeat(10, 1)
    task = tl.Task.from_tensors(x, x[:, :1], loss="squared_error", name="axes", test_size=4, validation_size=4)
    model = linear(4, 1)
    expected = 2 * task.train.x.square().sum() / len(task.train)
    found = trace(model, state(model), task, n_probes=3)
    torch.testing.assert_close(found.value, expected, **CLOSE)
    assert found.standard_error < 1e-12 and found.n == len(task.train)


# ---------------------------------------------------------------------------------------- dense derivatives


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_both_ends_are_those_of_the_dense_matrix(kind, matrix):
    model, masks, task = problem(kind)
    whole, live = dense(model, masks, task, matrix)
    expected = torch.linalg.eigvalsh(whole).flip(0)
    top = top_eigenvalues(model, state(model), task, k=5, matrix=matrix, masks=masks, vectors=True)
    torch.testing.assert_close(top.values, expected[:5], **CLOSE)
    assert int(top.n_live) == int(live.sum()) > 2 * 5 + 1 and top.residuals.max() < 1e-8
    columns = torch.cat([v.flatten(1) for v in top.vectors.values()], 1)
    assert not columns[:, ~live].any()
    torch.testing.assert_close(columns @ columns.T, torch.eye(5, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(whole @ columns[:, live].T, columns[:, live].T * top.values, rtol=1e-7, atol=1e-7)
    if matrix == "hessian":
        least = top_eigenvalues(model, state(model), task, k=3, masks=masks, end="smallest")
        torch.testing.assert_close(least.values, expected[-3:], **CLOSE)


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_the_trace_is_within_its_standard_error(matrix):
    model, masks, task = problem("mlp")
    whole, _ = dense(model, masks, task, matrix)
    found = trace(model, state(model), task, matrix=matrix, masks=masks, n_probes=200)
    assert (found.value - whole.trace()).abs() < 4 * found.standard_error
    variance = 2 * (whole.square().sum() - whole.diag().square().sum())
    assert 0.8 < found.standard_error / (variance / 200).sqrt() < 1.2


def test_all_eigenvalues_of_a_small_matrix_and_more_than_the_rank_of_a_large_one():
    model, masks, task = problem("mlp")
    few = task.limit(train=2)  # rank 2 * (3 - 1) at most
    expected = torch.linalg.eigvalsh(dense(model, masks, few, "gauss_newton")[0]).flip(0)
    for k in (4, 7, len(expected)):
        found = top_eigenvalues(model, state(model), few, k=k, matrix="gauss_newton", masks=masks)
        torch.testing.assert_close(found.values, expected[:k], **CLOSE)
    assert (expected[4:].abs() < 1e-12).all()


@pytest.mark.parametrize("end", ["largest", "smallest"])
def test_eigenvalues_that_occur_several_times_count_as_often(end):
    """One Krylov space has one vector of each; here all occur six times."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator, dtype=torch.float64) * torch.linspace(0.3, 1, 8, dtype=torch.float64)
    task = tl.Task.from_tensors(x, draw(60, 6), loss="squared_error", name="repeated")
    x, model = task.train.x, linear(8, 6)
    expected = torch.linalg.eigvalsh(x.T @ x / (3 * len(x))).flip(0).repeat_interleave(6)
    found = top_eigenvalues(model, state(model), task, k=8, end=end, vectors=True)
    torch.testing.assert_close(found.values, expected[:8] if end == "largest" else expected[-8:], **CLOSE)
    columns = found.vectors["weight"].flatten(1)
    torch.testing.assert_close(columns @ columns.T, torch.eye(8, dtype=torch.float64), **CLOSE)


# ---------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_batches_and_the_limit_change_nothing_but_rounding(matrix):
    model, masks, task = problem("tokens")
    whole = {size: top_eigenvalues(model, state(model), task, k=3, matrix=matrix, masks=masks, batch_size=size)
             for size in (3, 500)}  # fmt: skip
    torch.testing.assert_close(whole[3].values, whole[500].values, **CLOSE)
    first = top_eigenvalues(model, state(model), task, k=3, matrix=matrix, masks=masks, limit=7)
    cut = top_eigenvalues(model, state(model), task.limit(train=7), k=3, matrix=matrix, masks=masks)
    assert first.n == 7 and torch.equal(first.values, cut.values)
    other = top_eigenvalues(model, state(model), task, k=3, matrix=matrix, masks=masks, split="test", seed=5)
    assert other.n == len(task.test) and not torch.allclose(other.values, first.values)


def test_a_stack_is_its_networks():
    models = [problem("conv_bn", seed)[0] for seed in (0, 1)]
    masks = [problem("conv_bn", seed)[1] for seed in (0, 1)]
    task = problem("conv_bn")[2]
    both = stack_states([state(m) for m in models]), {n: torch.stack([m[n] for m in masks]) for n in masks[0]}
    found = top_eigenvalues(models[0], both[0], task, k=2, masks=both[1], vectors=True)
    traces = trace(models[0], both[0], task, masks=both[1], n_probes=4)
    assert found.values.shape == found.residuals.shape == (2, 2) and found.n_live.shape == (2,)
    for r in (0, 1):
        one = top_eigenvalues(models[r], state(models[r]), task, k=2, masks=masks[r], vectors=True)
        assert torch.equal(found.values[r], one.values) and found.n_live[r] == one.n_live
        assert all(torch.equal(found.vectors[n][r], v) for n, v in one.vectors.items())
        alone = trace(models[r], state(models[r]), task, masks=masks[r], n_probes=4)
        assert torch.equal(traces.value[r], alone.value) and traces.standard_error[r] == alone.standard_error
    levels = top_eigenvalues(models[0], state(models[0]), task, masks=both[1])  # one network, the masks stacked
    torch.testing.assert_close(levels.values[0], found.values[0, :1], **CLOSE)


def test_nothing_of_the_model_changes_and_its_own_loss_counts():
    model, masks, task = problem("conv_bn")
    model.train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    smoothed = CROSS_ENTROPY.smoothed(0.1)
    found = [top_eigenvalues(model, state(model), task, masks=masks, loss=loss) for loss in (None, smoothed)]
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not torch.allclose(found[0].values, found[1].values)


def test_an_untrained_parameter_is_no_coordinate():
    model, masks, task = problem("mlp")
    whole, live = dense(model, masks, task)
    model[0].weight.requires_grad_(False)
    kept = torch.arange(len(live))[live] >= 30
    found = top_eigenvalues(model, state(model), task, masks=masks)
    torch.testing.assert_close(found.values[0], torch.linalg.eigvalsh(whole[kept][:, kept])[-1], **CLOSE)


def test_single_precision_is_as_good_as_it_says():
    model, masks, task = problem("relu")
    exact = top_eigenvalues(model, state(model), task, k=4, masks=masks)
    task = task.to(dtype=torch.float32)
    found = top_eigenvalues(model.float(), state(model.float()), task, k=4, masks=masks)
    assert found.values.dtype == torch.float64
    assert ((found.values - exact.values).abs() < 1e-5 * exact.values[0]).all()
    assert found.residuals.max() < 1e-4 * exact.values[0]


class Dead(nn.Module):
    """Units that are zero for every input, and no bias behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.output = nn.Linear(6, 5), nn.Linear(5, 3, bias=False)
        nn.init.constant_(self.first.bias, -1e3)

    def forward(self, x):
        return self.output(self.first(x).relu())


@pytest.mark.parametrize("matrix", ["hessian", "gauss_newton"])
def test_where_there_is_no_curvature_it_is_zero(matrix):
    model, task = build(Dead), blobs()
    found = top_eigenvalues(model, state(model), task, k=3, matrix=matrix, vectors=True)
    assert torch.equal(found.values, torch.zeros(3, dtype=torch.float64)) and not found.residuals.any()
    columns = torch.cat([v.flatten(1) for v in found.vectors.values()], 1)
    assert torch.equal(columns @ columns.T, torch.eye(3, dtype=torch.float64))
    assert trace(model, state(model), task, matrix=matrix).value == 0


# ------------------------------------------------------------------------------------------------- refusals


class Hidden(torch.autograd.Function):
    """tanh, with a backward pass that hides what it depends on: x, or the gradient that comes in."""

    @staticmethod
    def forward(ctx, x, hide):
        ctx.save_for_backward(x)
        ctx.hide = hide
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        x, gradient = (x.detach(), gradient) if ctx.hide == "x" else (x, gradient.detach())
        return gradient * (1 - x.tanh().square()), None


class Hiding(nn.Module):
    def __init__(self, hide: str) -> None:
        super().__init__()
        self.first, self.output, self.hide = nn.Linear(6, 5), nn.Linear(5, 3), hide

    def forward(self, x):
        return self.output(Hidden.apply(self.first(x), self.hide))


def test_a_derivative_that_is_missing_or_wrong_is_refused():
    hard = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Hardsigmoid(), nn.Linear(5, 3)))
    for matrix in ("hessian", "gauss_newton"):
        with pytest.raises(ValueError, match="hardsigmoid_backward is not implemented"):
            top_eigenvalues(hard, state(hard), blobs(), matrix=matrix)
    model = build(lambda: Hiding("gradient"))
    for matrix, message in (("hessian", "must be symmetric"), ("gauss_newton", "differentiate the model's backward")):
        with pytest.raises(ValueError, match=message):
            trace(model, state(model), blobs(), matrix=matrix)
    model = build(lambda: Hiding("x"))  # of which Gauss-Newton asks for no second derivative
    plain = build(smooth)
    found, expected = (
        top_eigenvalues(m, dict(zip(dict(m.named_parameters()), plain.parameters(), strict=True)), blobs(),
                        matrix="gauss_newton").values for m in (model, plain)
    )  # fmt: skip
    torch.testing.assert_close(found, expected, **CLOSE)


def test_arguments_that_do_not_fit_are_refused():
    model, masks, task = problem("mlp")
    refused = [
        ({"k": 0}, "k must be an integer in 1..35, the number of live coordinates"),
        ({"k": 36}, "k must be an integer in 1..35"),
        ({"k": 1.0}, "k must be an integer"),
        ({"matrix": "fisher"}, "unknown matrix 'fisher'"),
        ({"end": "top"}, "unknown end 'top'"),
        ({"split": "tests"}, "unknown split 'tests'. Did you mean 'test'"),
        ({"limit": 21}, "the limit of train must be in 1..20"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"tolerance": 0}, r"tolerance must lie in \(0, 1\)"),
        ({"loss": "cross_entropy"}, "loss must be a Loss: got str"),
        ({"masks": {"9.weight": masks["0.weight"]}}, "9.weight"),
        ({"max_products": 0}, "max_products must be at least 1"),
        ({"max_products": 1, "k": 2, "end": "smallest"}, "Lanczos must converge within max_products"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            top_eigenvalues(model, state(model), task, **{"masks": masks, **arguments})
    with pytest.raises(ValueError, match="n_probes must be at least 2"):
        trace(model, state(model), task, n_probes=1)
    with pytest.raises(ValueError, match="task must be a Task: got str"):
        trace(model, state(model), "digits")
    with pytest.raises(ValueError, match="targets must have the shape of the outputs"):
        trace(linear(4, 2), state(linear(4, 2)), values_task())


def test_what_is_not_finite_is_refused():
    model, _, task = problem("mlp")
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    params["0.bias"][0] = torch.nan
    with pytest.raises(ValueError, match=r"params.* must be finite"):
        top_eigenvalues(model, params, task)

    class Root(nn.Module):
        """Finite outputs, an infinite slope."""

        def __init__(self) -> None:
            super().__init__()
            self.output = nn.Linear(6, 3, bias=False)
            nn.init.zeros_(self.output.weight)

        def forward(self, x):
            return self.output(x).abs().sqrt()

    root = build(Root)
    for matrix in ("hessian", "gauss_newton"):
        with pytest.raises(ValueError, match="must be finite"):
            top_eigenvalues(root, state(root), task, matrix=matrix)
    nothing = {n: torch.zeros_like(m) for n, m in tl.masks.ones(linear(6, 3)).items()}
    with pytest.raises(ValueError, match="curvature needs a live coordinate"):
        trace(linear(6, 3), state(linear(6, 3)), task, masks=nothing)


def test_the_sharpness_of_gradient_descent_decides_whether_it_diverges():
    """On a quadratic: below 2 / eta the loss falls, above it grows, from the leading eigenvector."""
    task = values_task()
    model = linear()
    sharpest = top_eigenvalues(model, state(model), task, vectors=True)
    x, y = task.train.x, task.train.y
    best = torch.linalg.lstsq(x, y).solution.T
    for factor in (0.95, 1.05):
        eta, w = factor * 2 / sharpest.values[0], best + sharpest.vectors["weight"][0]
        before = F.mse_loss(x @ w.T, y)
        for _ in range(3):
            w = w - eta * 2 / y.numel() * (x @ w.T - y).T @ x
        assert (F.mse_loss(x @ w.T, y) < before) == (factor < 1)


def test_the_bits_are_the_same_each_time():
    model, masks, task = problem("relu")
    first, again = (top_eigenvalues(model, state(model), task, k=2, masks=masks, vectors=True) for _ in range(2))
    assert torch.equal(first.values, again.values) and "vectors" not in repr(first)
    assert all(torch.equal(v, again.vectors[n]) for n, v in first.vectors.items())
    assert np.isfinite(first.values.numpy()).all() and curvature.Eigenvalues is type(first)
    assert FLOAT_TOLERANCE[torch.float64] > first.residuals.max() / first.values[0]
