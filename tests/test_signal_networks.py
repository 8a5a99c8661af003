"""Jacobians and layer statistics of real networks: closed forms, finite differences, random-matrix theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import build, half_masks, small_conv_bn, small_mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ticketlab import signal
from ticketlab.losses import SQUARED_ERROR
from ticketlab.masks import masked
from ticketlab.network import apply
from ticketlab.signal import moments as by_products
from ticketlab.state import State, stack, stack_states, state

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def deep(width: int, depth: int) -> nn.Sequential:
    """Square layers without biases."""
    return build(lambda: nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))))


def gaussian(model: nn.Module, replicas: int, sigma_w2: float, sigma_b2: float = 0.0) -> dict[str, Tensor]:
    found = {}
    for seed, (name, p) in enumerate(model.named_parameters()):
        scale = sigma_w2 / p[0].numel() if p.ndim > 1 else sigma_b2
        found[name] = math.sqrt(scale) * normal(replicas, *p.shape, seed=seed)
    return found


def differences(model: nn.Module, params: dict[str, Tensor] | State, x: Tensor) -> Tensor:
    """J of one input, column by column, by central differences."""
    columns = []
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=F64)
        step[i] = 1e-6
        step = step.view_as(x)
        up, down = (apply(model, params, (x + sign * step)[None]).flatten() for sign in (1, -1))
        columns.append((up - down) / 2e-6)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("factory", [small_mlp, small_conv_bn])
def test_singular_values_are_those_of_finite_differences(factory):
    model = build(factory).eval()
    x = normal(3, *((6,) if factory is small_mlp else (1, 8, 8)))
    own, masks = state(model), half_masks(model, 1)
    found = signal.jacobian_singular_values(model, own, x, masks=masks)
    thin = own._replace(params=masked(own.params, masks))
    expected = torch.stack([torch.linalg.svdvals(differences(model, thin, one)) for one in x])
    assert found.shape == (3, 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_stacked_replicas_are_the_separate_ones():
    models = [build(small_conv_bn, seed).eval() for seed in (0, 1)]
    states, masks = [state(m) for m in models], [half_masks(models[0], s) for s in (0, 1)]
    stacked, x = stack_states(states), normal(4, 1, 8, 8)
    both = stack(masks)
    y = torch.tensor([0, 1, 2, 0])
    one = [signal.jacobian_singular_values(models[0], s, x, masks=m) for s, m in zip(states, masks, strict=True)]
    found = signal.jacobian_singular_values(models[0], stacked, x, masks=both)
    torch.testing.assert_close(found, torch.stack(one), rtol=1e-12, atol=0)
    moments = signal.jacobian_moments(models[0], stacked, x, masks=both, seed=3)
    alone = signal.jacobian_moments(models[0], states[1], x, masks=masks[1], seed=3)
    torch.testing.assert_close(moments.values[1], alone.values, rtol=1e-12, atol=0)
    table = signal.layer_statistics(models[0], stacked, x, y, masks=both)
    alone = signal.layer_statistics(models[0], states[1], x, y, masks=masks[1])
    rows = table[table["replica"] == 1].drop(columns="replica").reset_index(drop=True)
    np.testing.assert_allclose(rows.iloc[:, 2:].to_numpy(), alone.iloc[:, 2:].to_numpy(), rtol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_products_of_gaussian_matrices_have_fuss_catalan_moments_and_their_edge(depth):
    width, replicas = 100, 12
    model = deep(width, depth)
    s = signal.jacobian_singular_values(model, gaussian(model, replicas, 1.0), torch.zeros(1, width, dtype=F64))
    for order in (1, 2, 3):
        samples = (s ** (2 * order)).mean((1, 2))
        error = float(samples.std()) / replicas**0.5
        exact = signal.fuss_catalan(depth, order)
        assert abs(float(samples.mean()) - exact) < 4 * error + 2 * order**2 / width * exact
    edge = ((depth + 1) ** (depth + 1) / depth**depth) ** 0.5
    assert s[..., 0].mean() == pytest.approx(edge, rel=0.05)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_density_of_the_theory_has_these_moments_and_ends_there(depth):
    edge = ((depth + 1) ** (depth + 1) / depth**depth) ** 0.5
    angle = (np.arange(200) + 0.5) / 200 * np.pi / 2
    s, weights = edge * np.sin(angle) ** 2, edge * np.sin(2 * angle) * np.pi / 400
    density = signal.singular_value_density(s, [9] * (depth + 1), [1.0] * depth, 1.0)
    for order in (1, 2, 3):
        assert weights @ (density * s ** (2 * order)) == pytest.approx(signal.fuss_catalan(depth, order), rel=1e-3)
    assert signal.singular_value_density(np.array([1.01 * edge]), [9] * (depth + 1), [1.0] * depth, 1.0)[0] < 1e-6


def test_the_density_of_unequal_layers_with_inactive_units_is_that_of_samples():
    widths, sigma_w2, n = (160, 120, 110, 40), (1.4, 1.5, 1.8), 20
    found = []
    for seed in range(n):
        product = torch.eye(widths[0], dtype=F64)
        for layer, (a, b, w2) in enumerate(zip(widths, widths[1:], sigma_w2, strict=False)):
            product = math.sqrt(w2 / a) * normal(b, a, seed=10 * seed + layer) @ product
            if layer < 2:
                product = (normal(b, 1, seed=1000 + 10 * seed + layer) > 0) * product
        found.append(torch.linalg.svdvals(product))
    s = torch.stack(found).numpy().ravel()
    edges = np.linspace(0, 2.4, 9)
    share = np.histogram(s, edges)[0] / len(s)
    fine = (np.arange(480) + 0.5) * 2.4 / 480
    theory = signal.singular_value_density(fine, widths, sigma_w2).reshape(8, 60).sum(1) * 2.4 / 480
    assert theory.sum() == pytest.approx(1, abs=3e-3)
    np.testing.assert_allclose(share, theory, atol=0.02)


def test_orthogonal_linear_networks_are_isometries():
    model = deep(20, 6)
    params = {n: torch.linalg.qr(normal(20, 20, seed=i))[0] for i, n in enumerate(dict(model.named_parameters()))}
    s = signal.jacobian_singular_values(model, params, normal(3, 20))
    torch.testing.assert_close(s, torch.ones(3, 20, dtype=F64), rtol=1e-12, atol=0)
    found = signal.isometry(3 * s)
    torch.testing.assert_close(found.mean_squared, torch.full((3,), 9.0, dtype=F64))
    torch.testing.assert_close(found.condition_number, torch.ones(3, dtype=F64))
    torch.testing.assert_close(found.distance, torch.full((3,), 2.0, dtype=F64))
    assert (found.scaled_distance < 1e-6).all()


def test_a_bernoulli_mask_scales_the_mean_squared_singular_value_layer_by_layer():
    width, depth, replicas, keep = 80, 3, 24, 0.4
    model = deep(width, depth)
    params = gaussian(model, replicas, 1.5)
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(p.shape, generator=generator) < keep for n, p in params.items()}
    s = signal.jacobian_singular_values(model, params, torch.zeros(1, width, dtype=F64), masks=masks)
    samples = signal.isometry(s).mean_squared.mean(1)
    expected = signal.masked_sigma_w2(1.5, keep) ** depth
    assert abs(float(samples.mean()) - expected) < 4 * float(samples.std()) / replicas**0.5


def test_correlations_decay_at_the_predicted_rate_through_a_deep_tanh_network():
    width, depth, replicas, sigma_w2, sigma_b2 = 300, 24, 8, 1.3**2, 0.3**2
    model = build(lambda: nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh()))))
    theory = signal.mean_field("tanh", sigma_w2, sigma_b2)
    x = normal(1, width) + 0.3 * normal(2, width, seed=1)
    table = signal.layer_statistics(model, gaussian(model, replicas, sigma_w2, sigma_b2), x)
    table = table[table["depth"] > 5]
    rates = np.array(
        [np.polyfit(rows["depth"], np.log(1 - rows["correlation"]), 1)[0] for _, rows in table.groupby("replica")]
    )
    error = rates.std(ddof=1) / replicas**0.5
    assert error < 0.02
    assert abs(rates.mean() + 1 / theory.xi_c) < 3 * error
    lengths = table.groupby("replica")["second_moment"].mean()
    assert abs(lengths.mean() - theory.q_star) < 4 * lengths.std() / replicas**0.5 + 0.01


@pytest.mark.parametrize(("source", "target"), [(None, None), ("0", "4"), (None, "3")])
def test_stochastic_moments_cover_the_exact_ones(source, target):
    model = build(small_conv_bn).eval()
    params, x = state(model).params, normal(6, 1, 8, 8)
    s = signal.jacobian_singular_values(model, params, x, source=source, target=target)
    n_out = {None: 3, "4": 4, "3": 64}[target]
    exact = torch.stack([(s ** (2 * k)).sum(-1) / n_out for k in (1, 2, 3)], -1)
    z = []
    for seed in range(8):
        found = signal.jacobian_moments(
            model, params, x, n_moments=3, n_probes=40, seed=seed, source=source, target=target
        )
        z.append((found.mean - exact.mean(0)) / found.mean_standard_error)
        assert found.values.shape == found.standard_errors.shape == (6, 3)
    z = torch.stack(z)
    assert z.abs().max() < 4 and 0.3 < float(z.square().mean()) < 2.5


def test_lanczos_finds_the_top_of_the_spectrum():
    model = build(small_conv_bn).eval()
    params, x = state(model).params, normal(3, 1, 8, 8)
    for source, target in (("0", "3"), (None, "0"), (None, None)):
        s = signal.jacobian_singular_values(model, params, x, source=source, target=target)
        top = signal.largest_singular_values(model, params, x, n_values=2, source=source, target=target)
        torch.testing.assert_close(top, s[:, :2], rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"n_values must lie in 1\.\.2"):
        signal.largest_singular_values(model, params, x, n_values=3)


def test_the_top_of_a_jacobian_that_is_zero_is_zero():
    model = build(small_mlp).eval()
    nothing = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters() if p.ndim > 1}
    assert not signal.largest_singular_values(model, state(model), normal(3, 6), masks=nothing).any()


def test_sections_multiply_to_the_whole():
    model = build(lambda: nn.Sequential(nn.Linear(5, 5), nn.ReLU(inplace=True), nn.Linear(5, 5)))
    params = gaussian(model, 1, 2.0, 0.1)
    params = {n: p[0] for n, p in params.items()}
    x = normal(4, 5)
    first = signal.jacobian_singular_values(model, params, x, target="0")
    torch.testing.assert_close(first, torch.linalg.svdvals(params["0.weight"]).expand(4, 5), rtol=1e-10, atol=1e-12)
    relu = signal.jacobian_singular_values(model, params, x, source="0", target="1")
    active = (x @ params["0.weight"].T + params["0.bias"] > 0).sum(1)
    torch.testing.assert_close(relu.sum(1), active.to(F64))
    both = signal.jacobian_singular_values(model, params, x, source="1")
    torch.testing.assert_close(both, torch.linalg.svdvals(params["2.weight"]).expand(4, 5), rtol=1e-10, atol=1e-12)


def test_wide_outputs_are_differentiated_forward():
    model = build(lambda: nn.Sequential(nn.Linear(3, 70), nn.Tanh(), nn.Linear(70, 80)))
    params = {n: p[0] for n, p in gaussian(model, 1, 1.0).items()}
    x = normal(4, 3)
    s = signal.jacobian_singular_values(model, params, x)
    expected = torch.stack([torch.linalg.svdvals(differences(model, params, one)) for one in x])
    torch.testing.assert_close(s, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_layer_with_a_parametrized_weight_has_the_row_of_the_layer(kind):
    model = build(lambda: nn.Sequential(kind(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))).eval()
    x = normal(4, 6)
    table = signal.layer_statistics(model, state(model), x)
    assert table["layer"].tolist() == ["0", "2"]
    with torch.no_grad():
        h = x @ model[0].weight.T + model[0].bias
    assert table["second_moment"][0] == pytest.approx(float(h.square().mean()))
    (own,) = signal.layer_statistics(model[0], state(model[0]), x)["layer"]
    assert own == ""


def test_layer_statistics_by_hand():
    model = build(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
    params = {n: p[0] for n, p in gaussian(model, 1, 2.0, 0.1).items()}
    x, y = normal(5, 4), torch.tensor([0, 1, 2, 0, 1])
    h1 = (x @ params["0.weight"].T + params["0.bias"]).requires_grad_()
    h2 = h1.relu() @ params["2.weight"].T + params["2.bias"]
    table = signal.layer_statistics(model, params, x, y).set_index("layer")
    per_input = torch.stack([F.cross_entropy(h2[i : i + 1], y[i : i + 1]) for i in range(5)])
    grads = torch.autograd.grad(per_input.sum(), [h1, h2])
    for name, h, grad in (("0", h1.detach(), grads[0]), ("2", h2.detach(), grads[1])):
        row = table.loc[name]
        assert row["mean"] == pytest.approx(float(h.mean()))
        assert row["variance"] == pytest.approx(float(h.var(correction=0)))
        assert row["second_moment"] == pytest.approx(float((h**2).mean()))
        pairs = [float(F.cosine_similarity(h[i], h[j], 0)) for i in range(5) for j in range(i)]
        assert row["correlation"] == pytest.approx(np.mean(pairs))
        assert row["gradient_norm"] == pytest.approx(float(grad.norm(dim=1).square().mean().sqrt()))
    assert "gradient_norm" not in signal.layer_statistics(model, params, x)
    assert table["depth"].tolist() == [1, 2]


def test_the_users_model_is_left_alone():
    model = build(small_mlp).train()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    x = normal(3, 6)
    signal.jacobian_singular_values(model, state(model).params, x, source="fc1", target="relu2")
    signal.layer_statistics(model, state(model).params, x, torch.tensor([0, 1, 2]))
    assert model.training and all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_refusals():
    mlp = build(small_mlp)
    params, x = state(mlp).params, normal(3, 6)
    with pytest.raises(ValueError, match=r"x must have the dtype of params, torch\.float64: got torch\.float32"):
        signal.jacobian_singular_values(mlp, params, x.float())
    with pytest.raises(ValueError, match="x must hold at least one example"):
        signal.jacobian_singular_values(mlp, params, x[:0])
    with pytest.raises(ValueError, match="unknown module 'fc3'"):
        signal.jacobian_singular_values(mlp, params, x, source="fc3")
    with pytest.raises(ValueError, match="must depend on relu2"):
        signal.jacobian_singular_values(mlp, params, x, source="relu2", target="fc1")
    with pytest.raises(ValueError, match="unknown layer 'fc3'"):
        signal.layer_statistics(mlp, params, x, layers=["fc3"])
    for y, why in (
        ([1], r"labels must have shape \(3,\)"),
        ([[0], [1], [2]], r"labels must have shape \(3,\) .* got shape \(3, 1\)"),
        ([0.0, 1.0, 2.0], "labels must be integer class labels, .*: got torch.float32"),
        ([0, 1, 3], r"labels must be in 0\.\.2 for 3 classes: got 0\.\.3"),
        ([0, 1, -100], r"labels must be in 0\.\.2 for 3 classes: got -100"),
    ):
        with pytest.raises(ValueError, match=why):
            signal.layer_statistics(mlp, params, x, torch.tensor(y))
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 2\)"):
        deeper = build(lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3))))
        signal.layer_statistics(deeper, state(deeper).params, x, torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="n_probes must be at least 2"):
        signal.jacobian_moments(mlp, params, x, n_probes=1)
    for coupling in ([Centred()], [Centred(), nn.Softmax(1)], [Total()]):  # a softmax has a constant sum
        with pytest.raises(ValueError, match="each example must pass through the network by itself"):
            coupled = build(lambda coupling=coupling: nn.Sequential(nn.Linear(6, 3), *coupling))
            signal.jacobian_singular_values(coupled, state(coupled).params, x)
    twice = build(Twice)
    with pytest.raises(ValueError, match="must run once in a forward pass: it runs 2 times"):
        signal.layer_statistics(twice, state(twice).params, x)
    with pytest.raises(ValueError, match="must run once"):
        signal.jacobian_singular_values(twice, state(twice).params, x, target="layer")
    with pytest.raises(ValueError, match="must be"):
        signal.isometry(torch.tensor([-1.0]))
    with pytest.raises(ValueError, match="widths need 2 sigma_w2"):
        signal.singular_value_density(np.ones(1), [3, 2, 1], [1.0])
    with pytest.raises(ValueError, match="narrowest"):
        signal.singular_value_density(np.ones(1), [3, 2, 4], [1.0, 1.0])
    with pytest.raises(ValueError, match="n_factors must be at least 1"):
        signal.fuss_catalan(0, 1)


@pytest.mark.parametrize(
    "measure",
    [signal.jacobian_singular_values, signal.jacobian_moments, signal.layer_statistics, signal.effective_sigma_w2],
)
def test_masks_and_weights_that_do_not_fit_are_refused(measure):
    model = build(small_mlp)
    params, masks = state(model).params, half_masks(model, 0)

    def call(model, params, masks=None):
        inputs = [] if measure is signal.effective_sigma_w2 else [normal(3, 6)]
        return measure(model, params, *inputs, masks=masks)

    for wrong, why in (
        ({n: 0.5 * m for n, m in masks.items()}, "must be bool"),
        ({n: 3 * m for n, m in masks.items()}, "must be bool"),
        ({**masks, "fc9.weight": masks["fc1.weight"]}, "must name parameters of the model"),
    ):
        with pytest.raises(ValueError, match=why):
            call(model, params, wrong)
    with pytest.raises(ValueError, match=r"params\['fc1.bias'\] must be finite: 8 of 8"):
        call(model, {**params, "fc1.bias": params["fc1.bias"] / 0})


class Log(nn.Module):
    """NaN for a negative input, while the derivative is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.log().relu())


def test_values_that_are_not_finite_are_refused():
    model, x = build(small_mlp), normal(7, 6)
    x[3, 2] = math.nan
    log, positive = build(Log), normal(7, 6).abs()
    positive[3, 2] = -1  # where neither the first nor the last input tells
    for measure in (signal.jacobian_singular_values, signal.jacobian_moments, signal.largest_singular_values):
        with pytest.raises(ValueError, match="x must be finite: 1 of 42 entries"):
            measure(model, state(model), x)
        with pytest.raises(ValueError, match=r"values of the output must be finite: 3 of"):
            measure(log, state(log), positive)


def test_masks_alone_may_be_stacked_as_the_levels_of_one_network():
    model, x = build(small_conv_bn).eval(), normal(3, 1, 8, 8)
    params, levels = state(model).params, [half_masks(model, seed) for seed in (0, 1)]
    stacked = stack(levels)
    found = signal.jacobian_singular_values(model, params, x, masks=stacked)
    torch.testing.assert_close(
        found, torch.stack([signal.jacobian_singular_values(model, params, x, masks=m) for m in levels])
    )
    assert signal.layer_statistics(model, params, x, masks=stacked)["replica"].nunique() == 2
    sigma_w2 = signal.effective_sigma_w2(model, params, masks=stacked)
    assert all(
        torch.equal(w2[1], signal.effective_sigma_w2(model, params, masks=levels[1])[n]) for n, w2 in sigma_w2.items()
    )


class Attention(nn.Module):
    """Three tokens of four entries; the attention returns a tuple, and its output projection does not run itself."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(4, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.output = nn.Linear(12, n_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        return self.output(self.encoder(x + self.att(x, x, x, need_weights=False)[0]).flatten(1))


@pytest.mark.parametrize("n_out", [3, 20])
def test_attention(n_out):
    model, x = build(lambda: Attention(n_out)).eval(), normal(3, 12)
    params = state(model).params
    s = signal.jacobian_singular_values(model, params, x)
    expected = torch.stack([torch.linalg.svdvals(differences(model, params, one)) for one in x])
    torch.testing.assert_close(s, expected, rtol=1e-6, atol=1e-7)
    top = signal.largest_singular_values(model, params, x)
    torch.testing.assert_close(top[:, 0], s[:, 0], rtol=1e-8, atol=0)
    exact = torch.stack([(s ** (2 * k)).sum(-1) / n_out for k in (1, 2)], -1)
    moments = signal.jacobian_moments(model, params, x, n_probes=200)
    assert ((moments.values - exact).abs() < 5 * moments.standard_errors).all()
    for y in (None, torch.tensor([0, 1, 2])):
        table = signal.layer_statistics(model, params, x, y)
        assert table["layer"].tolist() == ["encoder.linear1", "encoder.linear2", "output"]
    for measure in (
        lambda: signal.layer_statistics(model, params, x, layers=["att"]),
        lambda: signal.jacobian_singular_values(model, params, x, source="att"),
        lambda: signal.jacobian_singular_values(model, params, x, target="att"),
    ):
        with pytest.raises(ValueError, match=r"'att' must return one tensor .*: it returns tuple"):
            measure()


def test_attention_alone_has_no_layer_to_report():
    model = build(lambda: Attention(3)).eval()
    model.encoder, model.output = nn.Identity(), nn.Identity()
    with pytest.raises(ValueError, match="no module with prunable weights returns one tensor"):
        signal.layer_statistics(model, state(model).params, normal(3, 12))


def test_a_layer_by_itself_and_tied_layers_have_rows():
    layer = build(lambda: nn.Linear(4, 3))
    params, x, y = state(layer).params, normal(5, 4), torch.tensor([0, 1, 2, 0, 1])
    alone = signal.layer_statistics(layer, params, x, y)
    within = nn.Sequential(layer)
    inside = signal.layer_statistics(within, {f"0.{n}": p for n, p in params.items()}, x, y)
    assert alone["layer"].tolist() == [""] and inside["layer"].tolist() == ["0"]
    assert alone.drop(columns="layer").equals(inside.drop(columns="layer"))
    tied = build(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    tied[2].weight = tied[0].weight
    assert signal.layer_statistics(tied, state(tied).params, x)["layer"].tolist() == ["0", "2"]


def test_a_lost_direction_has_an_infinite_condition_number():
    found = signal.isometry(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert found.condition_number.tolist() == [math.inf, math.inf]
    assert found.scaled_distance[0] == pytest.approx(0.5**0.5) and math.isnan(found.scaled_distance[1])


# What users bring: the truth is plain autograd, one input after another, on a module that holds the weights.


def truth(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.jacobian(model, u[None]).reshape(-1, u.numel()) for u in x])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(x)[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 20), nn.Linear(20, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=False))


class Viewed(nn.Module):
    """Does not run in channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.output = nn.Conv2d(2, 4, 3), nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.conv(x).view(len(x), -1).relu())


class Strided(nn.Module):
    """Reads storage as it lies: in channels-last it is another function, without a word."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.clone()).tanh()
        return y.as_strided((len(x), y[0].numel()), (y[0].numel(), 1))


class Wrong(torch.autograd.Function):
    """A cube whose backward pass is wrong under vmap, and whose derivative of the derivative is lost."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch._C._functorch.is_batchedtensor(grad):
            return 7 * grad
        return torch.zeros_like(x).copy_(3 * x.detach() ** 2 * grad.detach()) + 0 * grad


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Wrong.apply(x)


USERS = {
    "prelu": (lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 5)), (5, 6)),  # inputs = outputs
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten()), (3, 2, 4, 4)),
    "lstm": (Recurrent, (4, 3, 2)),
    "checkpoint": (Checkpointed, (4, 6)),
    "view": (Viewed, (4, 2, 5, 5)),
    "strided": (Strided, (4, 2, 4, 4)),
    "hardsigmoid": (lambda: nn.Sequential(nn.Linear(3, 7), nn.Hardsigmoid(), nn.Linear(7, 8)), (4, 3)),
    "wrong rule, few outputs": (lambda: nn.Sequential(nn.Linear(6, 5), Cubes(), nn.Linear(5, 3)), (4, 6)),
    "wrong rule, many outputs": (lambda: nn.Sequential(nn.Linear(3, 5), Cubes(), nn.Linear(5, 8)), (4, 3)),
    "instance norm": (lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3), nn.Flatten()), (4, 2, 5)),
}


@pytest.mark.parametrize("name", USERS)
def test_networks_as_users_bring_them(name):
    factory, shape = USERS[name]
    model, other, x = build(factory, 0), build(factory, 1).eval(), normal(*shape)
    exact = truth(other, x)
    s = torch.linalg.svdvals(exact)
    own = state(other)
    torch.testing.assert_close(signal.jacobian_singular_values(model, own, x), s, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(
        signal.largest_singular_values(model, own, x, n_values=2), s[:, :2], rtol=1e-7, atol=1e-9
    )
    moments = signal.jacobian_moments(model, own, x, n_moments=2, n_probes=300)
    expected = torch.stack([(s ** (2 * k)).sum(-1) / exact.shape[1] for k in (1, 2)], -1)
    assert ((moments.values - expected).abs() < 5 * moments.standard_errors + 1e-12).all()


def test_a_jacobian_too_large_to_hold_is_refused_where_the_second_derivative_is_missing(monkeypatch):
    monkeypatch.setattr(by_products, "_MATRIX", 100)
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Hardsigmoid(), nn.Linear(5, 3)))
    assert signal.jacobian_moments(model, state(model), normal(2, 6), n_moments=1).values.isfinite().all()
    for measure in (signal.jacobian_moments, signal.largest_singular_values):
        with pytest.raises(ValueError, match="must have a second derivative where a Jacobian is too large to hold"):
            measure(model, state(model), normal(2, 6))


def test_half_precision_is_factorised_in_float32():
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))).bfloat16()
    x = normal(4, 6).bfloat16()
    found = signal.jacobian_singular_values(model, state(model), x)
    expected = torch.linalg.svdvals(truth(model, x).float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.01)


class Tokens(nn.Module):
    """Tokens first, as sequence models may have it inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(9, 4), nn.GRU(4, 4)
        self.flat, self.output = nn.Flatten(), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.flat(self.mix(self.embed(x).transpose(0, 1))[0].transpose(0, 1)))


def test_tokens_are_measured_from_where_they_are_embedded():
    model = build(Tokens)
    own, x = state(model), torch.randint(0, 9, (5, 5), generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 0, 1])
    for measure in (signal.jacobian_singular_values, signal.jacobian_moments, signal.largest_singular_values):
        with pytest.raises(ValueError, match=r"x must be floating to be differentiated in: .* source=.* \['embed'\]"):
            measure(model, own, x)

    def after(u: Tensor) -> Tensor:
        return model.output(model.mix(u.transpose(0, 1))[0].transpose(0, 1).flatten(1))

    expected = torch.linalg.svdvals(truth(after, model.embed(x).detach()))
    found = signal.jacobian_singular_values(model, own, x, source="embed")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    table = signal.layer_statistics(model, own, x, y, layers=["embed", "flat", "output"]).set_index("layer")
    u = model.embed(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(after(u), y, reduction="sum"), u)
    assert table.loc["embed", "gradient_norm"] == pytest.approx(
        float(slope.flatten(1).norm(dim=1).square().mean().sqrt())
    )
    frozen = build(Tokens).requires_grad_(False)
    assert signal.layer_statistics(frozen, own, x, y, layers=["embed", "flat", "output"]).equals(table.reset_index())


class Sequence(nn.Module):
    """A layer inside sees [t, n, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.output = nn.Linear(2, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(x.transpose(0, 1)).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_axis_of_time_is_not_taken_for_that_of_inputs(n):
    model, x = build(Sequence), normal(n, 3, 2)
    for measure in (
        lambda: signal.layer_statistics(model, state(model), x),
        lambda: signal.jacobian_singular_values(model, state(model), x, target="inner"),
        lambda: signal.jacobian_moments(model, state(model), x, source="inner"),
    ):
        with pytest.raises(ValueError, match=r"'inner' must return one tensor whose first axis is the \d inputs"):
            measure()
    assert signal.layer_statistics(model, state(model), x, layers=["output"])["layer"].tolist() == ["output"]


class Detached(nn.Module):
    """Adds up to nothing in value; its derivative couples the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y - y.mean(0) + y.mean(0).detach()


def test_derivatives_that_couple_are_refused_too():
    model = build(Detached)
    with pytest.raises(ValueError, match="each input must pass through the network by itself: the output at one"):
        signal.jacobian_singular_values(model, state(model), normal(4, 6))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpoint_that_hides_the_graph_is_refused_by_name():
    class Reentrant(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(checkpoint(lambda h: self.first(h).tanh(), x, use_reentrant=True))

    model = build(Reentrant)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        signal.jacobian_singular_values(model, state(model), normal(4, 6))


class Conv1D(nn.Module):
    """Hugging Face's linear layer, [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_units_are_outputs_however_a_weight_lies():
    model = build(Conv1D)
    found = signal.effective_sigma_w2(model, state(model))["weight"]
    assert float(found) == pytest.approx(float(model.weight.detach().square().sum()) / 3)
    raw = build(lambda: nn.Sequential(Conv1D(), nn.Linear(3, 3)))
    raw[0].__class__ = type("Product", (Conv1D,), {})  # a matrix that only a mask names
    masks = {"0.weight": torch.ones(6, 3, dtype=torch.bool), "1.weight": torch.ones(3, 3, dtype=torch.bool)}
    assert set(signal.effective_sigma_w2(raw, state(raw))) == {"1.weight"}
    assert set(signal.effective_sigma_w2(raw, state(raw), masks=masks)) == set(masks)
    normed = build(lambda: nn.Sequential(nn.Linear(3, 3), parametrizations.weight_norm(nn.Linear(3, 3))))
    with pytest.raises(ValueError, match="is what a weight is computed from"):
        signal.effective_sigma_w2(normed, state(normed))


def test_a_module_in_training_mode_is_evaluated():
    model, x, y = build(small_conv_bn), normal(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    own = state(model)
    for measure in (
        lambda: signal.jacobian_singular_values(model, own, x).tolist(),
        lambda: signal.layer_statistics(model, own, x, y).to_dict(),
    ):
        model.train()
        assert measure() == (model.eval(), measure())[1]


def test_the_gradient_norm_of_another_loss():
    model, x = build(lambda: nn.Linear(6, 3)), normal(5, 6)
    y = normal(5, 3, seed=1)
    found = signal.layer_statistics(model, state(model), x, y, loss=SQUARED_ERROR)["gradient_norm"][0]
    slope = 2 * (model(x) - y).detach() / 3
    assert found == pytest.approx(float(slope.norm(dim=1).square().mean().sqrt()))
