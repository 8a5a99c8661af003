"""Groups of hidden units by hand, planted permutations, and functions that stay the same."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from cases import build, half_masks, small_conv_bn, small_mlp
from torch import nn

from ticketlab import permutation
from ticketlab.models import build as build_model
from ticketlab.models import mlp
from ticketlab.network import apply
from ticketlab.state import stack, state


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def residual():
    """Two residual blocks on one stream, then 2x2 positions flattened into a linear layer."""
    stem = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(
        *stem, Block(6), Block(6), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3)
    )


class Grouped(nn.Module):
    """Depthwise and grouped convolutions, group and layer norm, a slice and an operation without a rule."""

    def __init__(self):
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=4)
        self.grouped, self.norm = nn.Conv2d(8, 4, 1, groups=2), nn.GroupNorm(2, 4)
        self.fc, self.layer_norm, self.output = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(9, 3)

    def forward(self, x):
        x = self.norm(self.grouped(self.depthwise(torch.relu(self.first(x))))).mean((2, 3))
        x = self.layer_norm(torch.nn.functional.gelu(self.fc(x)))
        return self.output(torch.cat([x, x[:, 1:4].cumsum(1)], 1))


PROBLEMS = {
    "mlp": (small_mlp, (6,)),
    "conv_bn": (small_conv_bn, (1, 8, 8)),
    "residual": (residual, (1, 8, 8)),
    "grouped": (Grouped, (1, 8, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), (5, 8)),
}


def problem(name, seed=0):
    return with_data(*PROBLEMS[name], seed)


def with_data(factory, shape, seed=0):
    """A network whose vectors are random too, and four examples."""
    model = build(factory, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.buffers(), *(p for p in model.parameters() if p.ndim == 1)):
        if tensor.is_floating_point():
            tensor.data += torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return model, torch.randn(4, *shape, generator=generator, dtype=torch.float64)


def inverse(permutations):
    return {group: order.argsort() for group, order in permutations.items()}


# Groups


def test_groups_of_a_fully_connected_network_by_hand():
    model, x = problem("mlp")
    found = permutation.groups(model, x)
    assert found.sizes == {"fc1": 8, "fc2": 5}
    assert found.axes == {
        "fc1.weight": ((("fc1", 8),), ((None, 6),)),
        "fc1.bias": ((("fc1", 8),),),
        "fc2.weight": ((("fc2", 5),), (("fc1", 8),)),
        "fc2.bias": ((("fc2", 5),),),
        "output.weight": (((None, 3),), (("fc2", 5),)),
        "output.bias": (((None, 3),),),
    }


def test_a_residual_stream_is_one_group_and_flattening_expands_it():
    found = permutation.groups(*problem("residual"))
    assert found.sizes == {"0": 6, "3.conv1": 6, "4.conv1": 6, "7": 7}
    for name in ("0.weight", "1.bias", "1.running_var", "3.conv2.weight", "4.norm2.running_mean"):
        assert found.axes[name][0] == (("0", 6),)
    assert found.axes["4.conv1.weight"][:2] == ((("4.conv1", 6),), (("0", 6),))
    assert found.axes["7.weight"] == ((("7", 7),), (("0", 6), (None, 2), (None, 2)))


def test_grouped_channels_move_with_their_group():
    found = permutation.groups(*problem("grouped"))
    assert found.axes["depthwise.weight"][1] == ()
    assert {group for axis in found.axes["first.weight"] for group, _ in axis} > {None}
    assert found.of("output.weight") == set()  # behind a slice and a concatenation


class Mlp(nn.Module):
    """Twelve hidden units, what a case does with them, a linear layer."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between, self.output = nn.Linear(6, 12), between, nn.Linear(12, 3)
        self.register_buffer("order", torch.randperm(12, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return self.output(self.between(self, self.first(x).tanh()))


ORDERED = {
    "max_pool1d": lambda m, h: F.max_pool1d(h, 3, 1, 1),
    "avg_pool1d": lambda m, h: F.avg_pool1d(h, 3, 1, 1),
    "max_pool2d": lambda m, h: F.max_pool2d(h.view(4, 4, 3), 3, 1, 1).flatten(1),
    "adaptive": lambda m, h: F.adaptive_avg_pool2d(h.view(4, 4, 3), (4, 3)).flatten(1),
    "index": lambda m, h: h[:, m.order],
    "reflect": lambda m, h: F.pad(h, (3, 3), mode="reflect")[:, 3:15],
    "shift": lambda m, h: F.pad(h, (1, -1)),
    "expand": lambda m, h: h.mean(1, keepdim=True).expand(4, 12).reshape(4, 3, 4).cumsum(1).flatten(1),
}


@pytest.mark.parametrize("name", ORDERED)
def test_units_whose_order_matters_stay_where_they_are(name):
    model, x = with_data(lambda: Mlp(ORDERED[name]), (6,))
    try:
        groups = permutation.groups(model, x)
    except ValueError as error:
        assert "must have hidden units that can be permuted" in str(error)
    else:
        assert_symmetric(model, x, groups)


class Around(nn.Module):
    """A convolution, what a case puts behind it, another convolution and a mean."""

    def __init__(self, between, convolution=nn.Conv2d, last=None):
        super().__init__()
        self.first, self.between = convolution(2, 6, 3), between
        self.last = last or convolution(6, 3, 1)

    def forward(self, x):
        return self.last(self.between(self.first(x))).flatten(2).mean(2)


def weight_normed():
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    for place, dim in ((0, 0), (2, 1), (4, None)):
        nn.utils.parametrizations.weight_norm(model[place], dim=dim)
    return model


class Written(nn.Module):
    """Layers that are written as products."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 12)), nn.Parameter(torch.randn(12, 5))
        self.c, self.d = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        h = torch.addmm(self.d.expand(len(x), -1), torch.einsum("ni,io->no", x, self.a).tanh(), self.b)
        centred = (h - h.mean(1, keepdim=True).expand_as(h)) / h.std(1, keepdim=True)
        both = torch.stack([centred, h.sigmoid().float().double()], 1)
        return torch.einsum("nkh,hc->nc", both, self.c) + both.var(dim=(1, 2), unbiased=False)[:, None]


KNOWN = {
    "prelu": (lambda: Around(nn.PReLU(6)), (2, 8, 8), {"first": 6}),
    "prelu_of_one_weight": (lambda: Around(nn.PReLU()), (2, 8, 8), {"first": 6}),
    "prelu_of_a_vector": (lambda: nn.Sequential(nn.Linear(6, 9), nn.PReLU(9), nn.Linear(9, 3)), (6,), {"0": 9}),
    "transposed": (lambda: Around(nn.ConvTranspose2d(6, 6, 2, stride=2)), (2, 8, 8), {"first": 6, "between": 6}),
    "transposed_groups": (
        lambda: Around(nn.ConvTranspose2d(6, 8, 2, groups=2), last=nn.Conv2d(8, 3, 1)),
        (2, 8, 8),
        {"first": 2, "first#2": 3, "between": 4},
    ),
    "upsampled_1d": (lambda: Around(nn.Upsample(scale_factor=2, mode="linear"), nn.Conv1d), (2, 8), {"first": 6}),
    "upsampled_2d": (lambda: Around(nn.Upsample(scale_factor=2, mode="bilinear")), (2, 8, 8), {"first": 6}),
    "upsampled_3d": (lambda: Around(nn.Upsample(scale_factor=2), nn.Conv3d), (2, 4, 4, 4), {"first": 6}),
    "padded": (lambda: Around(nn.ReflectionPad2d((1, 0, 2, 1))), (2, 8, 8), {"first": 6}),
    "written": (Written, (6,), {"b": 12, "c": 5}),
    "weight_norm": (weight_normed, (6,), {"0": 12, "2": 5}),
}


@pytest.mark.parametrize("name", KNOWN)
def test_layers_that_have_a_rule_keep_their_function(name):
    factory, shape, sizes = KNOWN[name]
    model, x = with_data(factory, shape)
    groups = permutation.groups(model, x)
    assert groups.sizes == sizes
    assert_symmetric(model, x, groups)


def assert_symmetric(model, x, groups):
    params, buffers = state(model)
    for seed in range(3):
        chosen = permutation.random(groups, seed)
        moved = [permutation.permute(groups, part, chosen) for part in (params, buffers)]
        permutation.assert_same_function(model, (params, buffers), tuple(moved), x)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_permutation_leaves_the_function_and_the_model_unchanged(name):
    model, x = problem(name)
    before, rng = state(model), torch.get_rng_state()
    groups = permutation.groups(model.train(), x)
    assert model.training and torch.equal(rng, torch.get_rng_state())
    model.eval()
    expected = model(x)
    masks = {n: m for n, m in half_masks(model, 1).items() if "embedding" not in n}
    for seed in range(3):
        chosen = permutation.random(groups, seed)
        moved = [permutation.permute(groups, part, chosen) for part in before]
        assert any(not torch.equal(moved[0][n], before.params[n]) for n in before.params)
        torch.testing.assert_close(apply(model, moved[0], x, buffers=moved[1]), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            apply(model, moved[0], x, buffers=moved[1], masks=permutation.permute(groups, masks, chosen)),
            apply(model, before.params, x, buffers=before.buffers, masks=masks),
            rtol=1e-10,
            atol=1e-12,
        )
        back = permutation.permute(groups, moved[0], inverse(chosen))
        assert all(torch.equal(back[n], before.params[n]) for n in back)


def test_stacks_are_permuted_together_or_one_by_one():
    model, x = problem("residual")
    groups = permutation.groups(model, x)
    networks = [state(problem("residual", seed)[0]).params for seed in range(2)]
    chosen = [permutation.random(groups, seed) for seed in range(2)]
    shared = permutation.permute(groups, stack(networks), chosen[0])
    own = permutation.permute(groups, stack(networks), {g: torch.stack([c[g] for c in chosen]) for g in chosen[0]})
    for r, network in enumerate(networks):
        for found, order in ((shared, chosen[0]), (own, chosen[r])):
            expected = permutation.permute(groups, network, order)
            assert all(torch.equal(found[n][r], expected[n]) for n in expected)


# Matching


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_planted_permutations_are_found_ten_times_of_ten(name, noise):
    model, x = problem(name)
    groups, params = permutation.groups(model, x), state(model).params
    generator = torch.Generator().manual_seed(0)
    for seed in range(10):
        planted = permutation.random(groups, seed)
        b = permutation.permute(groups, params, planted)
        b = {n: p + noise * p.std() * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in b.items()}
        found = permutation.match(groups, params, b, seed=seed)
        assert all(torch.equal(found.permutations[g], order) for g, order in inverse(planted).items())
        assert found.objective == max(found.objectives) and len(found.objectives) == 4
        moved = permutation.permute(groups, b, found.permutations)
        assert found.objective == pytest.approx(float(sum((params[n] * moved[n]).sum() for n in params)), rel=1e-12)


def test_matching_finds_the_best_of_all_permutations():
    model = build(lambda: mlp((3,), 2, hidden=(4, 3)), 0)
    groups = permutation.groups(model, torch.zeros(2, 3, dtype=torch.float64))
    a, b = (state(build(lambda: mlp((3,), 2, hidden=(4, 3)), seed)).params for seed in (1, 2))
    values = []
    for one, two in itertools.product(itertools.permutations(range(4)), itertools.permutations(range(3))):
        moved = permutation.permute(groups, b, {"fc1": torch.tensor(one), "fc2": torch.tensor(two)})
        values.append(float(sum((a[n] * moved[n]).sum() for n in a)))
    found = permutation.match(groups, a, b, restarts=8)
    assert found.objective == pytest.approx(max(values), rel=1e-12)
    assert found.objectives[0] >= float(sum((a[n] * b[n]).sum() for n in a))  # it starts from the identity
    again = permutation.match(groups, a, b, restarts=8)
    assert again.objectives == found.objectives


def test_alignment_carries_masks_and_buffers_and_keeps_the_function():
    (model, x), (other, _) = problem("residual"), problem("residual", 1)
    a, b = state(model), state(other)
    masks = half_masks(model, 3)
    found = permutation.align(model, x, a.params, b.params, masks_b=masks, buffers_b=b.buffers)
    torch.testing.assert_close(
        apply(model, found.params, x, buffers=found.buffers),
        apply(model, b.params, x, masks=masks, buffers=b.buffers),
        rtol=1e-10,
        atol=1e-12,
    )
    for name, mask in found.masks.items():
        assert int(mask.sum()) == int(masks[name].sum()) and not found.params[name][~mask].any()


# Refusals


def test_what_does_not_fit_is_refused():
    model, x = problem("mlp")
    groups, params = permutation.groups(model, x), state(model).params
    with pytest.raises(ValueError, match="must order the indices 0 to 7"):
        permutation.permute(groups, params, {"fc1": torch.zeros(8, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"permutations must be of the groups \['fc1', 'fc2'\]: got 'fc9'"):
        permutation.permute(groups, params, {"fc9": torch.arange(8)})
    with pytest.raises(ValueError, match=r"'fc9.weight' is none of them"):
        permutation.permute(groups, {"fc9.weight": torch.ones(2)}, {})
    with pytest.raises(ValueError, match=r"'fc1.bias' must have shape \[8\]"):
        permutation.permute(groups, {"fc1.bias": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="must have the same tensors"):
        permutation.match(groups, params, {})
    with pytest.raises(ValueError, match=r"one pair of networks: 'fc1.weight' is stacked"):
        permutation.match(groups, params, stack([params]))
    with pytest.raises(ValueError, match="restarts must be at least 1: got 0"):
        permutation.match(groups, params, params, restarts=0)
    with pytest.raises(ValueError, match="must have the 2 replicas of the permutations"):
        permutation.permute(groups, params, {"fc1": torch.arange(8).expand(2, 8)})
    with pytest.raises(ValueError, match="must compute the same function: outputs differ"):
        permutation.assert_same_function(model, (params, None), ({n: 2 * p for n, p in params.items()}, None), x)
    with pytest.raises(ValueError, match="must have hidden units that can be permuted"):
        permutation.groups(build(lambda: nn.Linear(3, 2)), torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"an operation without a rule \(here: cumsum\)"):
        permutation.groups(build(lambda: Mlp(lambda m, h: h.cumsum(1))), x)
    with pytest.raises(ValueError, match=r"traceable by torch.export on an input of shape \(2, 5\)"):
        permutation.groups(model, x[:2, :5])


def test_the_projects_own_networks_have_the_groups_of_their_hidden_layers():
    found = permutation.groups(
        build(lambda: build_model("conv_2_bn", (1, 8, 8), 10)), torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    )
    assert found.sizes == {"conv1": 64, "conv2": 64, "fc1": 256, "fc2": 256}
    assert found.axes["fc1.weight"][1] == (("conv2", 64), (None, 4), (None, 4))
