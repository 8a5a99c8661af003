"""Mean-field theory: closed forms, published points, an independent quadrature; and refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from torch import nn

from ticketlab import signal
from ticketlab.models import build
from ticketlab.seeds import initialise
from ticketlab.signal.activations import NAMED, elementwise
from ticketlab.signal.quadrature import mean, mean_of_pair
from ticketlab.state import stack, state

NUMPY = {"tanh": np.tanh, "relu": lambda u: np.maximum(u, 0), "silu": lambda u: u / (1 + np.exp(-u))}


@pytest.mark.parametrize(
    ("sigma_b2", "sigma_w2", "q"),
    [(0.01, 1.424205, 0.273301), (0.05, 1.760955, 0.570048), (0.1, 1.986073, 0.805799)],
)
def test_edge_of_chaos_of_tanh(sigma_b2, sigma_w2, q):
    critical = signal.critical_sigma_w2("tanh", sigma_b2)
    assert critical == pytest.approx(sigma_w2, abs=5e-7)
    found = signal.mean_field("tanh", critical, sigma_b2)
    assert found.q_star == pytest.approx(q, abs=5e-7)
    assert found.chi1 == pytest.approx(1, abs=1e-10) and found.c_star == 1
    assert found.xi_c == math.inf or found.xi_c > 1e9


def test_published_point_of_tanh():
    found = signal.mean_field("tanh", 1.3**2, 0.3**2)
    assert found.q_star == pytest.approx(0.607047, abs=5e-7)
    assert found.chi1 == pytest.approx(0.939807, abs=5e-7)
    assert found.c_star == 1 and found.xi_c == pytest.approx(-1 / math.log(found.chi1), rel=1e-12)
    assert found.note == ""


@pytest.mark.parametrize(
    ("activation", "sigma_w2"),
    [("tanh", 1), ("erf", math.pi / 4), ("relu", 2), ("linear", 1), ("leaky_relu", 2 / (1 + 0.01**2)), (torch.sin, 1)],
)
def test_edge_of_chaos_without_biases(activation, sigma_w2):
    assert signal.critical_sigma_w2(activation, 0.0) == pytest.approx(sigma_w2, rel=1e-10)


@pytest.mark.parametrize("q", [1e-3, 0.5, 3.0, 100.0, 1e4])
@pytest.mark.parametrize("c", [-0.9, 0.0, 0.3, 0.99, 1 - 1e-5])
def test_arc_cosine_and_arc_sine_kernels(q, c):
    erf, relu = elementwise("erf"), elementwise("relu")
    arcsine = 2 / math.pi * math.asin(2 * q * c / (1 + 2 * q))
    assert mean_of_pair(erf, lambda u, v: erf(u) * erf(v), q, c) == pytest.approx(arcsine, abs=1e-11)
    kappa_1 = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
    kappa_0 = (math.pi - math.acos(c)) / math.pi
    assert signal.c_map("relu", c, q, 2.0, 0.0) == pytest.approx(kappa_1, abs=1e-11)
    assert signal.chi("relu", q, 2.0, c) == pytest.approx(kappa_0, abs=1e-11)
    assert relu.kinks.tolist() == [0.0]


@pytest.mark.parametrize("sigma_w2", [0.5, 1.5, 1.99])
@pytest.mark.parametrize(("activation", "second_moment"), [("relu", 0.5), ("leaky_relu", 0.50005), ("linear", 1.0)])
def test_homogeneous_activations_in_closed_form(activation, second_moment, sigma_w2):
    slope = sigma_w2 * second_moment
    if slope >= 1:
        with pytest.raises(ValueError, match="lengths grow without bound"):
            signal.mean_field(activation, sigma_w2, 0.3)
        return
    found = signal.mean_field(activation, sigma_w2, 0.3)
    assert found.q_star == pytest.approx(0.3 / (1 - slope), rel=1e-10)
    assert found.chi1 == pytest.approx(slope, rel=1e-12) and found.c_star == 1
    assert found.xi_q == pytest.approx(-1 / math.log(slope), rel=1e-9)
    assert found.xi_c == pytest.approx(-1 / math.log(slope), rel=1e-9)


def hermite_free(f, q):
    """E f(sqrt(q) z) by adaptive quadrature, one unit of the integrand's own scale at a time."""
    cuts = np.unique(np.concatenate([np.linspace(-9, 9, 19), np.arange(-12, 13) / math.sqrt(q)]))
    cuts = cuts[np.abs(cuts) <= 9]
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    parts = [
        integrate.quad(lambda z: f(math.sqrt(q) * z) * density(z), a, b, epsabs=1e-14, epsrel=1e-12)[0]
        for a, b in pairwise(cuts)
    ]
    return math.fsum(parts)


@pytest.mark.parametrize("q", [0.3, 16.0, 1e4])
def test_integrals_at_large_q_against_adaptive_quadrature(q):
    tanh, silu = elementwise("tanh"), elementwise("silu")
    assert mean(tanh, lambda u: tanh(u) ** 2, q) == pytest.approx(hermite_free(lambda u: np.tanh(u) ** 2, q), abs=1e-11)
    slope = hermite_free(lambda u: np.cosh(min(abs(u), 300.0)) ** -4.0, q)
    assert mean(tanh, lambda u: tanh.derivative(u) ** 2, q) == pytest.approx(slope, abs=1e-11)
    expected = hermite_free(lambda u: (u / (1 + math.exp(-max(u, -700.0)))) ** 2, q)
    assert mean(silu, lambda u: silu(u) ** 2, q) == pytest.approx(expected, rel=1e-11)


def test_gauss_hermite_would_miss_chi_1():
    q = signal.mean_field("tanh", 16.0, 0.0).q_star
    nodes, weights = np.polynomial.hermite_e.hermegauss(201)
    naive = 16 * float(weights @ np.cosh(np.sqrt(q) * nodes) ** -4.0) / math.sqrt(2 * math.pi)
    exact = 16 * hermite_free(lambda u: np.cosh(u) ** -4.0, q)
    assert signal.chi("tanh", q, 16.0) == pytest.approx(exact, abs=1e-9)
    assert abs(naive / exact - 1) > 1e-3


def test_the_chaotic_fixed_point_against_a_double_integral():
    found = signal.mean_field("tanh", 2.5**2, 0.3**2)
    assert found.chi1 > 1 and 0 < found.c_star < 1

    nodes, weights = np.polynomial.legendre.leggauss(400)
    z, w = 9 * nodes, 9 * weights * np.exp(-((9 * nodes) ** 2) / 2) / math.sqrt(2 * math.pi)
    u = math.sqrt(found.q_star) * z
    c, spread = found.c_star, math.sqrt(1 - found.c_star**2)
    v = math.sqrt(found.q_star) * (c * z[:, None] + spread * z)
    after = (6.25 * w @ (np.tanh(u)[:, None] * np.tanh(v)) @ w + 0.09) / found.q_star
    assert after == pytest.approx(c, abs=1e-9)
    slope = 6.25 * w @ (np.cosh(u)[:, None] ** -2 * np.cosh(v) ** -2) @ w
    assert found.xi_c == pytest.approx(-1 / math.log(slope), rel=1e-7)


def test_xi_q_is_the_rate_at_which_lengths_settle():
    found = signal.mean_field(F.hardtanh, 1.5, 0.05)  # phi'' is two deltas: a formula with autograd's phi'' fails
    q = found.q_star * (1 + 1e-5)
    after = signal.q_map(F.hardtanh, q, 1.5, 0.05)
    rate = (after - found.q_star) / (q - found.q_star)
    assert found.xi_q == pytest.approx(-1 / math.log(rate), rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["tanh", "erf", "relu", "gelu"]), st.floats(0.2, 1.4), st.floats(0.01, 0.5))
def test_q_star_is_a_fixed_point_and_chi_1_the_slope_at_c_1(activation, sigma_w2, sigma_b2):
    found = signal.mean_field(activation, sigma_w2, sigma_b2)
    again = signal.q_map(activation, found.q_star, sigma_w2, sigma_b2)
    assert again == pytest.approx(found.q_star, rel=1e-10)
    assert signal.c_map(activation, 1.0, found.q_star, sigma_w2, sigma_b2) == pytest.approx(1, abs=1e-12)
    near = signal.c_map(activation, 1 - 1e-8, found.q_star, sigma_w2, sigma_b2)
    assert (1 - near) / 1e-8 == pytest.approx(found.chi1, rel=1e-3)


def test_callables_and_names_agree():
    custom = [torch.tanh, F.relu, nn.GELU(), nn.ReLU(inplace=True), F.leaky_relu]
    for function, name in zip(custom, ("tanh", "relu", "gelu", "relu", "leaky_relu"), strict=True):
        one, other = signal.mean_field(function, 1.2, 0.1), signal.mean_field(name, 1.2, 0.1)
        assert one.q_star == pytest.approx(other.q_star, rel=1e-12) and one.xi_c == pytest.approx(other.xi_c, rel=1e-9)


def test_kinks_anywhere_are_found():
    clipped = elementwise(lambda u: u.clamp(min=0.37, max=2.1))
    assert clipped.kinks.tolist() == pytest.approx([0.37, 2.1], abs=1e-8)
    value = mean(clipped, clipped, 1.0)
    normal = lambda u: math.exp(-u * u / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    below = lambda u: (1 + math.erf(u / math.sqrt(2))) / 2  # noqa: E731
    expected = 0.37 * below(0.37) + normal(0.37) - normal(2.1) + 2.1 * (1 - below(2.1))
    assert value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(
    ("activation", "sigma_w2", "sigma_b2", "match"),
    [
        ("relu", 2.0, 0.0, "every q is one"),
        ("linear", 1.0, 0.0, "every q is one"),
        ("relu", 2.0, 0.1, "lengths grow without bound"),
        ("relu", 3.0, 0.0, "lengths grow without bound"),
        ("linear", 1.5, 0.2, "lengths grow without bound"),
        ("gelu", 2.5, 0.0, "one stable end.*and lengths grow without bound"),
        ("rleu", 1.0, 0.0, "unknown activation 'rleu'. Did you mean 'relu'"),
        ("tanh", -1.0, 0.0, "sigma_w2 must be finite and at least 0"),
        ("tanh", 1.0, -0.1, "sigma_b2 must be finite and at least 0"),
        ("tanh", math.nan, 0.0, "sigma_w2 must be finite"),
        (lambda u: u.softmax(-1), 1.0, 0.0, "must be elementwise"),
        (lambda u: u - u.mean(), 1.0, 0.0, "must be elementwise"),
        (lambda u: u.cumsum(0), 1.0, 0.0, "must be elementwise"),
        (nn.LayerNorm(6).double(), 1.0, 0.0, "must be elementwise"),
        (nn.Dropout(), 1.0, 0.0, "must be elementwise"),
        (lambda u: u.sum(), 1.0, 0.0, "must be elementwise"),
        (lambda u: u.detach(), 1.0, 0.0, "must be elementwise.*differentiable"),
        (torch.sign, 1.0, 0.1, "must be continuous"),
        (torch.log, 1.0, 0.1, "must be finite"),
        (lambda u: u.float(), 1.0, 0.1, "must keep float64"),
        (3, 1.0, 0.1, "must be a name or an elementwise callable"),
        (nn.PReLU(), 1.0, 0.1, "must have its parameters in float64: convert it with .double"),
        (
            torch.sin,
            200.0,
            0.1,
            r"lengths still grow at q = 31\.6, beyond which sin varies too fast",
        ),  # q* is near 100.1
    ],
)
@pytest.mark.filterwarnings("ignore")  # some of these functions are not meant for what they are given
def test_refusals(activation, sigma_w2, sigma_b2, match):
    with pytest.raises(ValueError, match=match):
        signal.mean_field(activation, sigma_w2, sigma_b2)


def test_an_activation_that_overflows_and_one_with_parameters():
    found = signal.mean_field(torch.exp, 0.1, 0.1, q_start=0.1)
    assert found.q_star == pytest.approx(0.1 * math.exp(2 * found.q_star) + 0.1, rel=1e-10)  # E exp(2 u) = exp(2 q)
    leaky = signal.mean_field(nn.PReLU(init=0.01).double(), 1.0, 0.1)
    assert leaky.q_star == pytest.approx(signal.mean_field("leaky_relu", 1.0, 0.1).q_star, rel=1e-6)


def test_an_edge_beyond_what_is_resolved_is_not_denied():
    with pytest.raises(ValueError, match=r"none does, with a stable length up to q = 31\.6, the last resolved"):
        signal.critical_sigma_w2(torch.sin, 60.0)  # at q near 61


def test_maps_refuse_what_is_no_correlation_or_length():
    with pytest.raises(ValueError, match=r"c must lie in \[-1, 1\]"):
        signal.c_map("tanh", 1.5, 1.0, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"c must lie in \[-1, 1\]"):
        signal.c_map("tanh", 0.5, 0.0, 1.0, 0.0)
    with pytest.raises(ValueError, match="a layer without output"):
        signal.c_map("tanh", 0.5, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="q must be at most 50"):
        signal.q_map(torch.sin, 1e6, 1.0, 0.0)
    with pytest.raises(ValueError, match="none does"):
        signal.critical_sigma_w2("relu", 0.1)
    with pytest.raises(ValueError, match="density must lie in"):
        signal.masked_sigma_w2(1.0, 1.2)


def test_where_signals_die_it_is_said():
    found = signal.mean_field("tanh", 0.5, 0.0)
    assert found.q_star == 0 and found.chi1 == pytest.approx(0.5, abs=1e-12)
    assert math.isnan(found.c_star) and math.isnan(found.xi_c) and "q* = 0" in found.note
    assert signal.mean_field("relu", 1.0, 0.0).chi1 == pytest.approx(0.5, abs=1e-12)


def test_the_start_decides_between_several_ends():
    assert signal.mean_field("gelu", 2.5, 0.0, q_start=0.1).q_star == 0
    with pytest.raises(ValueError, match="grow without bound"):
        signal.mean_field("gelu", 2.5, 0.0, q_start=5.0)


def test_phase_diagram_says_every_phase():
    table = signal.phase_diagram("relu", [1.0, 2.0, 3.0], [0.0, 0.1]).set_index(["sigma_w2", "sigma_b2"])
    assert table["phase"].to_dict() == {
        **{(1.0, 0.0): "ordered", (1.0, 0.1): "ordered"},
        **{(2.0, 0.0): "none", (2.0, 0.1): "none", (3.0, 0.0): "none", (3.0, 0.1): "none"},
    }
    assert table.loc[(2.0, 0.0), "note"].count("every q") == 1 and np.isnan(table.loc[(3.0, 0.1), "q_star"])
    tanh = signal.phase_diagram("tanh", [1.0, signal.critical_sigma_w2("tanh", 0.05), 3.0], [0.05])
    assert tanh["phase"].tolist() == ["ordered", "critical", "chaotic"]


def test_a_random_mask_scales_the_measured_sigma_w2():
    model = initialise(lambda: build("conv_2", (1, 8, 8), 10), 0)
    params = state(model).params
    dense = signal.effective_sigma_w2(model, params)
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(params[n].shape, generator=generator) < 0.3 for n in dense}
    thin = signal.effective_sigma_w2(model, params, masks=masks)
    for name in ("fc1.weight", "conv2.weight"):
        w = params[name].double()
        fan_in, fan_out = w[0].numel(), len(w) * w[0, 0].numel() if w.ndim > 2 else len(w)
        assert float(dense[name]) == pytest.approx(2 * fan_in / (fan_in + fan_out), rel=0.03)  # Glorot
        assert float(dense[name]) == pytest.approx(fan_in * float(w.square().mean()), rel=1e-12)
        assert float(thin[name]) == pytest.approx(signal.masked_sigma_w2(float(dense[name]), 0.3), rel=0.05)
    both = signal.effective_sigma_w2(model, stack([params, params]), masks=masks)
    torch.testing.assert_close(both["fc1.weight"], thin["fc1.weight"].expand(2), rtol=1e-12, atol=0)


def test_every_named_activation_has_the_derivative_of_finite_differences():
    u = torch.linspace(-3, 3, 20, dtype=torch.float64)
    for name in NAMED:
        phi = elementwise(name)
        slope = (phi(u + 1e-6) - phi(u - 1e-6)) / 2e-6
        torch.testing.assert_close(phi.derivative(u), slope, rtol=1e-7, atol=1e-8)
