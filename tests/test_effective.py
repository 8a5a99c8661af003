"""Live paths against counting them one by one: which kept weights lie on a path from an input to an output."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from ticketlab import masks as mask_ops
from ticketlab.graph import effective_masks, refuse_cut
from ticketlab.state import state

X = torch.ones(2, 5, dtype=torch.float64)


def sparse(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(m.shape, generator=generator) < density for n, m in mask_ops.ones(model).items()}


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


# A network as an acyclic graph of units: edges (from, to, weight) with weight a place in a mask, or None.

Edge = tuple[object, object, tuple[str, int] | None]


def on_paths(edges: list[Edge], inputs: set, outputs: set, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Units that inputs reach and units that reach outputs, edge by edge until nothing changes."""
    alive = [e for e in edges if e[2] is None or bool(masks[e[2][0]].flatten()[e[2][1]])]
    reached, reaching = set(inputs), set(outputs)
    for units, source, target in ((reached, 0, 1), (reaching, 1, 0)):
        before = -1
        while len(units) != before:
            before = len(units)
            units |= {e[target] for e in alive if e[source] in units}
    found = {n: torch.zeros_like(m) for n, m in masks.items()}
    for source, target, weight in alive:
        if weight is not None and source in reached and target in reaching:
            found[weight[0]].view(-1)[weight[1]] = True
    return found


def linear(name: str, shape: tuple[int, int], source: str, target: str) -> list[Edge]:
    out, inner = shape
    return [((source, i), (target, o), (name, o * inner + i)) for o in range(out) for i in range(inner)]


def convolution(name: str, shape: tuple[int, ...], source: str, target: str, size: int, stride: int = 1) -> list[Edge]:
    """3 x 3 with a padding of 1, or 1 x 1, on images of size x size."""
    out, inner, k, _ = shape
    edges: list[Edge] = []
    for index in range(out * inner * k * k):
        o, i, dy, dx = index // (inner * k * k), index // (k * k) % inner, index // k % k, index % k
        for y in range(0, size, stride):
            for x in range(0, size, stride):
                at = (y + dy - k // 2, x + dx - k // 2)
                if min(at) >= 0 and max(at) < size:
                    edges.append(((source, i, *at), (target, o, y // stride, x // stride), (name, index)))
    return edges


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([0.1, 0.2, 0.4, 0.8]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_fully_connected_networks(widths, density, seed):
    sizes = (5, *widths, 3)
    model = build(lambda: nn.Sequential(*(p for a, b in pairwise(sizes) for p in (nn.Linear(a, b), nn.ReLU())))[:-1])
    masks, edges = sparse(model, density, seed), []
    for i, (a, b) in enumerate(pairwise(sizes)):
        edges += linear(f"{2 * i}.weight", (b, a), f"units {i}", f"units {i + 1}")
    last = f"units {len(sizes) - 1}"
    expected = on_paths(edges, {("units 0", i) for i in range(5)}, {(last, o) for o in range(3)}, masks)
    assert_equal(effective_masks(model, masks, X), expected)


class Residual(nn.Module):
    """A stem, a block of two convolutions with a projected shortcut, batch norms, a mean over positions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.a, self.b = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut, self.head = nn.Conv2d(3, 4, 1, stride=2), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu_(self.norm(self.stem(x)))
        x = (self.b(self.a(x).relu()) + self.shortcut(x)).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_residual_convolutions(density, seed):
    model = build(Residual)
    masks, edges = sparse(model, density, seed), []
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for name, source, target, size, stride in (
        ("stem", "x", "stem", 6, 1),
        ("a", "stem", "a", 6, 2),
        ("b", "a", "sum", 3, 1),
        ("shortcut", "stem", "sum", 6, 2),
    ):
        edges += convolution(f"{name}.weight", shapes[f"{name}.weight"], source, target, size, stride)
    places = [(y, x) for y in range(3) for x in range(3)]
    edges += [(("sum", c, *at), ("mean", c), None) for c in range(4) for at in places]
    edges += linear("head.weight", (3, 4), "mean", "out")
    inputs = {("x", 0, y, x) for y in range(6) for x in range(6)}
    expected = on_paths(edges, inputs, {("out", o) for o in range(3)}, masks)
    assert_equal(effective_masks(model, masks, torch.ones(1, 1, 6, 6, dtype=torch.float64)), expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Hardswish])
def test_activations_and_norms_open_and_close_no_path(activation):
    """Layer norm makes some units negative, which a ReLU then shuts at one draw of weights."""
    layers = lambda: nn.Sequential(  # noqa: E731
        *(nn.Linear(5, 8), nn.LayerNorm(8), activation(), nn.Linear(8, 8), activation(), nn.Linear(8, 3))
    )
    for seed in range(8):
        model = build(layers)
        masks = sparse(model, 0.3, seed)
        edges = linear("0.weight", (8, 5), "x", "a") + [
            (("a", i), ("norm", o), None) for i in range(8) for o in range(8)
        ]
        edges += linear("3.weight", (8, 8), "norm", "b") + linear("5.weight", (3, 8), "b", "out")
        expected = on_paths(edges, {("x", i) for i in range(5)}, {("out", o) for o in range(3)}, masks)
        assert_equal(effective_masks(model, masks, X), expected)


def test_pools_close_no_path():
    """Entries of a kernel that one position alone uses pass a pool only where that position is the largest."""
    for seed in range(6):
        model = build(
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))
        )
        masks = sparse(model, 0.4, seed)
        edges = convolution("0.weight", (2, 1, 3, 3), "x", "conv", 2)
        edges += [(("conv", c, y, x), ("pool", c), None) for c in range(2) for y in range(2) for x in range(2)]
        edges += linear("3.weight", (3, 2), "pool", "out")
        inputs = {("x", 0, y, x) for y in range(2) for x in range(2)}
        expected = on_paths(edges, inputs, {("out", o) for o in range(3)}, masks)
        assert_equal(effective_masks(model, masks, torch.ones(1, 1, 2, 2, dtype=torch.float64)), expected)


def test_the_networks_own_values_do_not_matter_and_stay():
    model = build(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    masks = sparse(model, 0.4, 1)
    expected = effective_masks(model, masks, X)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)
    model[2].requires_grad_(False)
    before = state(model).params
    assert_equal(effective_masks(model, masks, X), expected)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]


def test_a_model_that_casts_by_itself_is_followed_in_its_own_dtype():
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.first(x.float()).relu().to(torch.float32))

    model = build(Casts, dtype=torch.float32)
    masks = sparse(model, 0.4, 0)
    edges = linear("first.weight", (4, 5), "x", "a") + linear("head.weight", (3, 4), "a", "out")
    expected = on_paths(edges, {("x", i) for i in range(5)}, {("out", o) for o in range(3)}, masks)
    assert_equal(effective_masks(model, masks, X.float()), expected)
    with pytest.raises(ValueError, match="x must be what the model takes"):
        effective_masks(model, masks, X[:, :4])


def test_masked_tokens_and_attention():
    """Tokens reach by the embedding; queries alone, without values, carry nothing."""

    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.attention = nn.Embedding(7, 4), nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.embedding(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    model, x = build(Attends), torch.tensor([[1, 4, 2], [0, 3, 3]])
    names = ("attention.in_proj_weight", "attention.out_proj.weight", "head.weight")
    masks = mask_ops.ones(model, names)
    assert_equal(effective_masks(model, masks, x), masks)
    masks["attention.in_proj_weight"][8:] = False  # values
    assert not any(mask.any() for mask in effective_masks(model, masks, x).values())


def test_a_network_cut_in_two_is_refused_and_an_empty_branch_is_not():
    model = build(Residual)
    masks, x = mask_ops.ones(model), torch.ones(1, 1, 6, 6, dtype=torch.float64)
    masks["shortcut.weight"] = torch.zeros_like(masks["shortcut.weight"])
    assert_equal(refuse_cut(model, masks, x), masks)
    masks["b.weight"] = torch.zeros_like(masks["b.weight"])
    with pytest.raises(ValueError, match=r"a live path from an input to an output: .* and empty are \['b.weight', 'sh"):
        refuse_cut(model, masks, x)
