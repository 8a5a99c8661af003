"""Multiply-adds by closed form, and against PyTorch's own count of operations."""

from __future__ import annotations

import pytest
import torch
from cases import build, half_masks, small_conv_bn, small_mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ticketlab import models
from ticketlab.engine.cost import forward_macs, positions, training_macs
from ticketlab.masks import ones, prunable
from ticketlab.seeds import initialise
from ticketlab.state import state


def make(factory):
    return initialise(factory, 0)


def sizes(model):
    return {name: mask.numel() for name, mask in ones(model).items()}


class Twice(nn.Module):
    """One layer called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 2)
        self.again = self.first

    def forward(self, x):
        return self.other(self.again(torch.relu(self.first(x))))


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


CLOSED_FORMS = {
    "linear": (lambda: nn.Linear(5, 3), (5,), {"weight": 1}),
    "linear_on_a_sequence": (lambda: nn.Linear(5, 3), (7, 5), {"weight": 7}),
    "conv": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 8, 6), {"weight": 48}),
    "conv_valid": (lambda: nn.Conv2d(2, 4, 3), (2, 8, 6), {"weight": 24}),
    "conv_stride": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 8, 7), {"weight": 4 * 4}),
    "conv_dilation": (lambda: nn.Conv2d(2, 4, 3, dilation=2), (2, 8, 8), {"weight": 16}),
    "conv_groups": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 8, 8), {"weight": 36}),
    "conv_depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), (6, 10), {"weight": 8}),
    "conv_3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 4, 5), {"weight": 2 * 3 * 4}),
    "called_twice": (Twice, (4,), {"first.weight": 2, "other.weight": 1}),
    "attention": (
        Attends,
        (5, 8),
        {"attention.in_proj_weight": 5, "attention.out_proj.weight": 5, "head.weight": 1},
    ),
    "encoder_layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (5, 8),
        dict.fromkeys(("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"), 5),
    ),
    "tied": (Tied, (4,), {"a.weight": 2}),
    "conv_transposed": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 5, 4), {"weight": 20}),
}


@pytest.mark.parametrize(("factory", "shape", "expected"), CLOSED_FORMS.values(), ids=CLOSED_FORMS.keys())
def test_positions_by_closed_form(factory, shape, expected):
    model = make(factory)
    assert positions(model, torch.zeros(3, *shape)) == expected


def test_tokens_are_inputs_too():
    model = make(lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6)))
    assert positions(model, torch.zeros(2, 3, dtype=torch.long)) == {"1.weight": 3}


class Functional(nn.Module):
    """Keys of another length than the queries, a weight multiplied by hand, one passed to a function, experts."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
        self.raw, self.passed = nn.Parameter(torch.ones(8, 5)), nn.Linear(5, 5)
        self.experts = nn.Parameter(torch.ones(2, 5, 3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        keys = x[:, :1].expand(-1, 7, -1)
        y = self.attention(x, keys[..., :4], keys[..., :6])[0]
        y = F.linear(y.mean(1) @ self.raw, self.passed.weight)
        return y @ self.experts[0]


def test_weights_used_through_functions_count_and_those_unseen_are_named():
    """Queries of 5 tokens, keys and values of 7; of the experts one in two is used."""
    model = make(Functional)
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    with pytest.warns(UserWarning, match=r"leave out 1 of 8 weights, .*\['unused.weight'\]"):
        uses = positions(model, torch.zeros(2, 5, 8), names)
    assert uses == {
        "attention.q_proj_weight": 5,
        "attention.k_proj_weight": 7,
        "attention.v_proj_weight": 7,
        "attention.out_proj.weight": 5,
        "raw": 1,
        "passed.weight": 1,
        "experts": 0.5,
        "unused.weight": 0,
    }
    assert forward_macs(uses, {"experts": 30, "raw": 40, "unused.weight": 9}) == 15 + 40


PARAMETRIZED = {
    "spectral_norm": (nn.utils.parametrizations.spectral_norm, "parametrizations.weight.original"),
    "weight_norm": (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1"),
    "spectral_norm_by_hooks": (nn.utils.spectral_norm, "weight_orig"),
}


@pytest.mark.parametrize(("wrap", "name"), PARAMETRIZED.values(), ids=PARAMETRIZED.keys())
def test_weights_under_a_parametrization_count_what_is_computed_with_them(wrap, name):
    """48 positions of a convolution, whatever it costs to normalise its weight."""
    model = make(lambda: wrap(nn.Conv2d(2, 4, 3, padding=1)))
    for module in (model, model.eval()):
        assert positions(module, torch.zeros(1, 2, 8, 6)) == {name: 48}


class Latents(nn.Module):
    """A weight that meets learned queries, one cast to another dtype, one masked by a buffer, all by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.project = nn.Embedding(5, 4), nn.Linear(4, 4)
        self.cast, self.masked = nn.Linear(4, 4), nn.Linear(4, 3)
        self.masked.register_buffer("kept", torch.ones(3, 4))

    def forward(self, x):
        x = x + self.project(self.queries.weight)
        x = (x.half() @ self.cast.weight.half().T).float()
        return (x @ (self.masked.weight * self.masked.kept).T).mean(1)


def test_weights_that_are_cast_masked_or_meet_no_input_count():
    names = ("project.weight", "cast.weight", "masked.weight")
    uses = positions(make(Latents), torch.zeros(2, 5, 4), names)
    assert uses == dict.fromkeys(names, 5)


def test_recurrent_weights_count_once_a_step():
    uses = positions(make(lambda: Last(nn.LSTM(4, 6, batch_first=True))), torch.zeros(2, 9, 4))
    assert uses == {"rnn.weight_ih_l0": 9, "rnn.weight_hh_l0": 9}


class Last(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="x must be what the model takes"):
        positions(make(lambda: nn.Linear(5, 3)), torch.zeros(2, 6))


@pytest.mark.parametrize("name", ["linear", "conv", "conv_stride", "conv_groups", "conv_dilation", "conv_transposed"])
def test_macs_are_half_of_the_operations_that_pytorch_counts(name):
    factory, shape, _ = CLOSED_FORMS[name]
    model = make(factory)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    macs = forward_macs(positions(model, torch.zeros(1, *shape)), sizes(model))
    assert 2 * macs == counter.get_total_flops()


@pytest.mark.parametrize("depth", [2, 4, 6])
def test_macs_of_the_conv_nets(depth):
    model, x = make(lambda: models.build(f"conv_{depth}_bn", (3, 32, 32), 10)), torch.zeros(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    assert 2 * forward_macs(positions(model, x), sizes(model)) == counter.get_total_flops()


def test_lenet_costs_one_multiply_add_a_weight():
    model = make(lambda: models.build("lenet_300_100", (1, 28, 28), 10))
    uses = positions(model, torch.zeros(60, 1, 28, 28))
    assert uses == dict.fromkeys(prunable(model), 1)
    assert forward_macs(uses, sizes(model)) == 266_200
    assert training_macs(266_200, 60, 50_000) == 3 * 266_200 * 60 * 50_000


def test_live_macs_weigh_each_layer_by_its_positions():
    model = build(small_conv_bn)
    uses = positions(model, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    assert uses == {"0.weight": 64, "4.weight": 1, "8.weight": 1}
    kept = {name: int(mask.sum()) for name, mask in half_masks(model, 0).items()}
    expected = 64 * kept["0.weight"] + kept["4.weight"] + kept["8.weight"]
    assert forward_macs(uses, kept) == expected


def test_the_users_model_is_not_changed():
    model = build(small_conv_bn)
    before = state(model)
    positions(model, torch.zeros(1, 1, 8, 8))  # in float32, on a float64 model
    assert all(m.training and not m._forward_hooks for m in model.modules())
    for part, kept in zip(state(model), before, strict=True):
        assert all(torch.equal(part[n], t) and part[n].dtype == t.dtype for n, t in kept.items())
    assert positions(build(small_mlp), torch.zeros(1, 6)) == {"fc1.weight": 1, "fc2.weight": 1, "output.weight": 1}
