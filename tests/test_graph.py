"""What a forward pass tells of a network's wiring: the layers that make the outputs, and how often a weight is used."""

from __future__ import annotations

import pytest
import torch
from cases import build, small_conv_bn, small_mlp
from torch import nn
from torch.nn.utils import parametrizations

from ticketlab.graph import output_layers, uses
from ticketlab.state import state


class HeadFirst(nn.Module):
    """The output layer is registered first, and a branch that no output sees last."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(5, 3), nn.Linear(6, 5), nn.Linear(6, 7)

    def forward(self, x):
        return self.head(self.body(x).relu())


class TwoHeads(HeadFirst):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        h = self.body(x).relu()
        return (self.head(h) + self.second(h)).log_softmax(-1) * self.scale


class Shortcut(HeadFirst):
    """A matrix of inputs alone that adds to the outputs makes outputs too."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Linear(6, 3)

    def forward(self, x):
        return super().forward(x) + self.skip(x)


class TiedTokens(nn.Module):
    """The output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle, self.output = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 11, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, x):
        return self.output(self.middle(self.embed(x)).relu())


def tokens():
    return torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    ("factory", "x", "names"),
    [
        (small_mlp, torch.ones(2, 6), ("output.weight",)),
        (small_conv_bn, torch.ones(2, 1, 8, 8), ("8.weight",)),
        (HeadFirst, torch.ones(2, 6), ("head.weight",)),
        (TwoHeads, torch.ones(2, 6), ("head.weight", "second.weight")),
        (Shortcut, torch.ones(2, 6), ("head.weight", "skip.weight")),
        (TiedTokens, tokens(), ("embed.weight",)),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2), nn.LayerNorm(2)), torch.ones(2, 6), ("1.weight",)),
        (
            lambda: nn.Sequential(nn.Linear(6, 4), parametrizations.weight_norm(nn.Linear(4, 2))),
            torch.ones(2, 6),
            ("1.parametrizations.weight.original0", "1.parametrizations.weight.original1"),
        ),
    ],
)
def test_output_layers_are_those_that_no_other_matrix_follows(factory, x, names):
    model = build(factory).train()
    before = state(model)
    assert output_layers(model, x.double() if x.is_floating_point() else x) == names
    assert all(torch.equal(p, before.params[n]) for n, p in model.named_parameters()) and model.training


def test_outputs_that_no_matrix_makes_are_refused():
    with pytest.raises(ValueError, match="must depend on a matrix of the model, differentiably"):
        output_layers(build(lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6))), torch.ones(2, 6).double())


class Functions(nn.Module):
    """Weights used through functions, twice, and sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.raw = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 6))

    def forward(self, x):
        h = nn.functional.linear(self.both(x), self.both.weight)
        return h @ self.raw[:, :3]


def test_uses_are_what_a_weight_is_multiplied_with():
    image = torch.ones(3, 1, 8, 8).double()
    assert uses(build(small_conv_bn), image, ["0.weight", "4.weight", "8.weight"]) == {
        "0.weight": 64.0,
        "4.weight": 1.0,
        "8.weight": 1.0,
    }
    assert uses(build(Functions), torch.ones(3, 4).double(), ["both.weight", "raw"]) == {"both.weight": 2.0, "raw": 0.5}
    up = build(lambda: nn.ConvTranspose2d(2, 3, 2, stride=2))
    assert uses(up, torch.ones(1, 2, 5, 5).double(), ["weight"]) == {"weight": 25.0}
    attention = build(lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    found = uses(attention, torch.ones(1, 7, 4).double(), ["self_attn.in_proj_weight", "linear1.weight"])
    assert found == {"self_attn.in_proj_weight": 7.0, "linear1.weight": 7.0}
