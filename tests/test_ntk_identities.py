"""What is true of every restricted kernel: the identities, at one point m * theta, and the known limits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ntk import one_gradient_at_a_time
from torch import Tensor, nn

from ticketlab import masks as mk
from ticketlab import ntk
from ticketlab.network import apply
from ticketlab.seeds import initialise
from ticketlab.state import state

F64 = torch.float64
METHODS = ["auto", "rows", "gather", "generic"]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


MODELS = {"mlp": (mlp, (4, 5)), "conv": (conv, (4, 2, 5, 5))}


def problem(name: str, seed: int = 0, density: float = 0.5) -> tuple[nn.Module, dict, dict, Tensor]:
    factory, shape = MODELS[name]
    model = initialise(factory, seed).to(F64).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(shape, generator=generator, dtype=F64)
    masks = {n: torch.rand(m.shape, generator=generator) < density for n, m in mk.ones(model).items()}
    return model, state(model).params, masks, x


def matrix(kernel: Tensor) -> Tensor:
    return kernel.flatten(2).flatten(0, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_and_its_complement_add_up(name: str, method: str) -> None:
    """Theta_m + Theta_{1-m} = Theta in all coordinates, all three at the point m * theta."""
    model, params, masks, x = problem(name)
    point = {n: p * masks[n] if n in masks else p for n, p in params.items()}
    whole = ntk.kernel(model, params, x, masks=masks, coordinates="all", method=method)
    live = ntk.kernel(model, params, x, masks=masks, method=method)
    dead = ntk.kernel(model, point, x, coordinates={n: ~m for n, m in masks.items()}, method=method)
    torch.testing.assert_close(live + dead, whole, rtol=0, atol=1e-12 * float(whole.abs().max()))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), density=st.floats(0.05, 0.95), name=st.sampled_from(sorted(MODELS)))
def test_nested_masks_are_ordered(seed: int, density: float, name: str) -> None:
    """At one point, fewer coordinates: the difference is PSD and every eigenvalue falls."""
    model, params, masks, x = problem(name, seed, density)
    generator = torch.Generator().manual_seed(seed)
    nested = {n: m & (torch.rand(m.shape, generator=generator) < 0.5) for n, m in masks.items()}
    larger, smaller = (matrix(ntk.kernel(model, params, x, coordinates=c)) for c in (masks, nested))
    slack = 1e-12 * float(larger.abs().max())
    assert torch.linalg.eigvalsh(larger - smaller).min() >= -slack
    assert (torch.linalg.eigvalsh(larger) - torch.linalg.eigvalsh(smaller)).min() >= -slack


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), kept=st.integers(1, 12))
def test_the_rank_is_at_most_the_number_of_live_coordinates(seed: int, kept: int) -> None:
    model, params, masks, x = problem("mlp", seed)
    order = torch.randperm(sum(m.numel() for m in masks.values()), generator=torch.Generator().manual_seed(seed))
    parts = (order < kept).split([m.numel() for m in masks.values()])
    live = {n: part.view_as(m) for (n, m), part in zip(masks.items(), parts, strict=True)}
    found = ntk.spectrum(ntk.kernel(model, params, x, coordinates=live))
    assert int(found.rank) <= min(kept, 8)
    exact = ntk.spectrum(ntk.jacobian(model, params, x, coordinates=live))
    assert int((exact.eigenvalues > 0).sum()) <= min(kept, 8)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_the_trace_is_the_sum_of_squared_live_gradients(name: str, method: str) -> None:
    model, params, masks, x = problem(name)
    point = {n: p * masks[n] if n in masks else p for n, p in params.items()}
    live = {n: masks.get(n, torch.ones_like(p, dtype=torch.bool)) for n, p in params.items()}
    total = float(one_gradient_at_a_time(problem(name)[0], point, x, live).square().sum())
    kernel = ntk.kernel(model, params, x, masks=masks, method=method)
    traced = ntk.kernel(model, params, x, masks=masks, method=method, outputs="trace")
    assert float(matrix(kernel).trace()) == pytest.approx(total, rel=1e-12)
    assert float(traced.trace()) == pytest.approx(total, rel=1e-12)


def test_hidden_permutations_leave_the_kernel_alone() -> None:
    model, params, masks, x = problem("mlp")
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    moved, moved_masks = dict(params), dict(masks)
    for tensors in (moved, moved_masks):
        tensors["0.weight"], tensors["2.weight"] = tensors["0.weight"][order], tensors["2.weight"][:, order]
    moved["0.bias"] = params["0.bias"][order]
    before, after = ntk.kernel(model, params, x, masks=masks), ntk.kernel(model, moved, x, masks=moved_masks)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-13)


class TwoLinear(nn.Module):
    """Linear in its parameters, with two outputs that share one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(4, 2), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) + (x.square() @ self.shared)[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [3, 20])
def test_a_linear_model_follows_its_kernel_exactly(masked: bool, n: int) -> None:
    """Against gradient flow in the parameters: a linear equation, solved by least squares and a matrix exponential."""
    model = initialise(TwoLinear, 0).to(F64)
    params, generator = state(model).params, torch.Generator().manual_seed(0)
    masks = {"own.weight": torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]]).bool()} if masked else None
    x, y, z = (torch.randn(*s, generator=generator, dtype=F64) for s in ((n, 4), (n, 2), (5, 4)))
    k_train, k_test = ntk.kernel(model, params, x, masks=masks), ntk.kernel(model, params, z, x, masks=masks)
    start = {"f_train": apply(model, params, x, masks=masks), "f_test": apply(model, params, z, masks=masks)}

    phi, phi_test = (live_features(model, params, masks, inputs) for inputs in (x, z))  # [n * out, k]
    residual = (y - start["f_train"]).flatten()
    move = torch.linalg.pinv(phi) @ residual
    expected = start["f_test"] + (phi_test @ move).view(5, 2)
    torch.testing.assert_close(ntk.kernel_regression(k_train, y, k_test, **start), expected, rtol=0, atol=1e-9)
    forever = ntk.gradient_flow_prediction(k_train, y, k_test, math.inf, **start)
    torch.testing.assert_close(forever, expected, rtol=0, atol=1e-9)

    for time in (0.0, 0.01, 0.3):
        # d(move)/dt = phi' (residual - phi move), with the constant carried along as one more coordinate.
        flow = torch.zeros(phi.shape[1] + 1, phi.shape[1] + 1, dtype=F64)
        flow[:-1, :-1], flow[:-1, -1] = -phi.T @ phi, phi.T @ residual
        move = torch.linalg.matrix_exp(flow * time)[:-1, -1]
        expected = start["f_test"] + (phi_test @ move).view(5, 2)
        found = ntk.gradient_flow_prediction(k_train, y, k_test, time, **start)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def live_features(model: nn.Module, params: dict, masks: dict | None, x: Tensor) -> Tensor:
    """Outputs at every unit vector of the live coordinates."""
    columns = []
    for name, p in params.items():
        live = (masks or {}).get(name, torch.ones_like(p, dtype=bool))
        for index in live.nonzero():
            unit = {n: torch.zeros_like(q) for n, q in params.items()}
            unit[name][tuple(index)] = 1
            columns.append(apply(model, unit, x).detach().flatten())
    return torch.stack(columns, 1)


def infinite_width_relu(x: Tensor, depth: int, bias_variance: float) -> Tensor:
    """Theta of a ReLU network of infinite width under NTK scaling, sigma_w^2 = 2: the arc-cosine recursion."""
    covariance = 2 * x @ x.T / x.shape[1] + bias_variance
    theta = covariance.clone()
    for _ in range(depth):
        scale = covariance.diagonal().sqrt()
        c = (covariance / scale[:, None] / scale).clamp(-1, 1)
        angle = torch.acos(c)
        kappa_0 = (math.pi - angle) / math.pi
        kappa_1 = ((1 - c**2).sqrt() + c * (math.pi - angle)) / math.pi
        covariance = scale[:, None] * scale * kappa_1 + bias_variance
        theta = covariance + kappa_0 * theta
    return theta


class NtkLinear(nn.Module):
    """NTK scaling: unit normal parameters, the standard deviations multiplied in."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_out, n_in)), nn.Parameter(torch.randn(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return math.sqrt(2 / x.shape[1]) * x @ self.weight.T + 0.1 * self.bias


@pytest.mark.parametrize("scaling", ["ntk", "standard"])
def test_wide_relu_networks_approach_the_infinite_width_kernel(scaling: str) -> None:
    """Two hidden layers, 8 draws: a draw's error falls as width^(-1/2), and the mean of the draws is close.

    In standard scaling the same function has its scales inside the weights, and plain linear layers.
    """
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = infinite_width_relu(x, 2, 0.01)
    errors = {}
    for width in (16, 256):
        kernels = []
        for seed in range(8):
            model = initialise(partial(wide, width), seed).to(F64)
            params = state(model).params
            if scaling == "ntk":
                kernels.append(ntk.kernel(model, params, x, outputs="trace"))
            else:
                kernels.append(in_standard_scaling(params, x, width))
        draws = torch.stack(kernels)
        errors[width] = float((draws - expected).norm(dim=(1, 2)).mean() / expected.norm())
    assert errors[256] < errors[16] / 2.5  # a factor 4 expected
    assert (draws.mean(0) - expected).norm() / expected.norm() < 0.1


def wide(width: int) -> nn.Sequential:
    return nn.Sequential(NtkLinear(6, width), nn.ReLU(), NtkLinear(width, width), nn.ReLU(), NtkLinear(width, 1))


def plain(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))


def in_standard_scaling(params: dict[str, Tensor], x: Tensor, width: int) -> Tensor:
    """Scales inside the weights: derivatives shrink by them, parameter by parameter."""
    model = initialise(partial(plain, width), 0).to(F64)
    scale = {n: math.sqrt(2 / p.shape[1]) if p.ndim == 2 else 0.1 for n, p in params.items()}
    inside = {n: p * scale[n] for n, p in params.items()}
    parts = [
        scale[n] ** 2 * ntk.kernel(model, inside, x, outputs="trace", coordinates={n: torch.ones_like(p, dtype=bool)})
        for n, p in inside.items()
    ]
    return torch.stack(parts).sum(0)
