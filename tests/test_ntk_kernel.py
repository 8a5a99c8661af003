"""The kernel: every method against the generic oracle, and the oracle against one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reference_ntk import one_gradient_at_a_time
from torch import Tensor, nn

from ticketlab import masks as mk
from ticketlab import ntk
from ticketlab.ntk.features import features
from ticketlab.ntk.layers import Layer, find_layers, retried
from ticketlab.ntk.problem import problems
from ticketlab.seeds import initialise
from ticketlab.state import select, stack, state

F64 = torch.float64
RTOL = {torch.float64: 1e-10, torch.float32: 2e-4, torch.bfloat16: 0.05}


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, 7, bias=False), nn.Tanh(), nn.Linear(7, 3)
    )


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 5, (3, 2), dilation=2, padding="same", bias=False),
        nn.ReLU(),
        nn.Conv2d(5, 5, 2, padding=1, padding_mode="circular", groups=5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 3),
    )


def sequence() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), nn.GELU(), nn.Flatten(), nn.Linear(16, 2))


class Attention(nn.Module):
    """Embedding, norm, one attention block and a head: as small as a transformer gets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


def encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(block, nn.Flatten(), nn.Linear(12, 3))


def images(n: int, seed: int) -> Tensor:
    return torch.randn(n, 4, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=F64)


def vectors(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda n, seed: torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def tokens(n: int, seed: int) -> Tensor:
    return torch.randint(0, 7, (n, 4), generator=torch.Generator().manual_seed(seed))


CASES = {
    "mlp": (mlp, vectors(6)),
    "conv": (conv, images),
    "sequence": (sequence, vectors(3, 9)),
    "attention": (Attention, tokens),
    "encoder": (encoder, vectors(3, 4)),
}


def build(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 model in evaluation mode, its batch norms with statistics other than 0 and 1."""
    model = initialise(factory, seed).to(F64).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(1))
            module.running_var.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(2))
    return model


def some_masks(model: nn.Module, density: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    """Bernoulli masks, with one unit that loses every input and one that keeps them all."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(m.shape, generator=generator) < density for name, m in mk.ones(model).items()}
    for mask in found.values():
        mask[0], mask[-1] = False, True
    return found


def fast_names(model: nn.Module, x: Tensor) -> set[str]:
    """What has a fast path, of the layers that prove to meet all of ``x`` alike."""
    (problem,), _ = problems(model, state(model), x)

    def proven(layers: list[Layer]) -> set[str]:
        features(problem, layers, x)
        return {name for layer in layers for name in layer.names}

    with problem.net.lent():
        return retried(proven, find_layers(problem, x)[0])


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    torch.testing.assert_close(
        found, expected, rtol=0, atol=RTOL[found.dtype] * max(1e-30, float(expected.abs().max()))
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("coordinates", ["live", "all"])
def test_the_oracle_is_the_gram_matrix_of_single_gradients(name: str, coordinates: str) -> None:
    factory, inputs = CASES[name]
    model, x, x2 = build(factory), inputs(3, 1), inputs(2, 2)
    params, masks = state(model).params, some_masks(model)
    point = {n: p * masks[n] if n in masks else p for n, p in params.items()}
    live = {n: torch.ones_like(p, dtype=bool) for n, p in point.items()}
    live |= masks if coordinates == "live" else {}
    j1, j2 = (one_gradient_at_a_time(build(factory), point, z, live) for z in (x, x2))
    expected = torch.einsum("nok,mpk->nomp", j1, j2)
    for outputs, value in {
        "full": expected,
        "trace": torch.einsum("nomo->nm", expected),
        "sum_logits": expected.sum((1, 3)),
    }.items():
        found = ntk.kernel(
            model, params, x, x2, masks=masks, outputs=outputs, coordinates=coordinates, method="generic"
        )
        assert_close(found, value)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("outputs", ["full", "trace", "sum_logits"])
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_every_method_agrees_with_the_oracle(name: str, outputs: str, density: float) -> None:
    factory, inputs = CASES[name]
    model, x, x2 = build(factory), inputs(5, 1), inputs(3, 2)
    params = state(model).params
    masks = None if density == 1 else some_masks(model, density)
    methods = ["auto", "rows", "gather"] + ["structured"] * (masks is None)
    for other in (None, x2):
        oracle = ntk.kernel(model, params, x, other, masks=masks, outputs=outputs, method="generic")
        for method in methods:
            for block_size in (None, 2):  # 2 divides neither 5 nor 3
                found = ntk.kernel(
                    model, params, x, other, masks=masks, outputs=outputs, method=method, block_size=block_size
                )
                assert_close(found, oracle)


@pytest.mark.parametrize("name", CASES)
def test_the_fast_paths_are_taken(name: str) -> None:
    expected = {
        "mlp": {"0.weight", "0.bias", "2.weight", "4.weight", "4.bias"},
        "conv": {"0.weight", "0.bias", "3.weight", "5.weight", "5.bias", "8.weight", "8.bias"},
        "sequence": {"0.weight", "0.bias", "3.weight", "3.bias"},
        "attention": {"qkv.weight", "qkv.bias", "out.weight", "out.bias", "head.weight", "head.bias"},
        "encoder": {f"{n}.{p}" for n in ("0.linear1", "0.linear2", "2") for p in ("weight", "bias")},
    }
    factory, inputs = CASES[name]
    assert fast_names(build(factory), inputs(3, 0)) == expected[name]


@pytest.mark.parametrize("method", ["auto", "rows", "gather", "structured"])
def test_all_coordinates_at_the_masked_point(method: str) -> None:
    model, x = build(mlp), vectors(6)(5, 0)
    params, masks = state(model).params, some_masks(model)
    oracle = ntk.kernel(model, params, x, masks=masks, coordinates="all", method="generic")
    assert_close(ntk.kernel(model, params, x, masks=masks, coordinates="all", method=method), oracle)
    assert (oracle - ntk.kernel(model, params, x, masks=masks)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("method", ["auto", "generic"])
def test_stacked_replicas_are_separate_kernels(name: str, method: str) -> None:
    factory, inputs = CASES[name]
    models, x = [build(factory, seed) for seed in range(3)], inputs(3, 1)
    params, buffers = stack([state(m)[0] for m in models]), stack([state(m)[1] for m in models])
    masks = stack([some_masks(models[0], seed=seed) for seed in range(3)])
    together = ntk.kernel(models[0], params, x, masks=masks, buffers=buffers, method=method)
    for r, model in enumerate(models):
        assert_close(together[r], ntk.kernel(model, state(model), x, masks=select(masks, r), method=method))


def test_buffers_alone_may_be_stacked() -> None:
    model, x = build(conv), images(3, 0)
    params, buffers = state(model)
    other = {n: b + 0.5 if b.is_floating_point() else b for n, b in buffers.items()}
    together = ntk.kernel(model, params, x, buffers=stack([buffers, other]))
    for r, one in enumerate((buffers, other)):
        assert_close(together[r], ntk.kernel(model, params, x, buffers=one))


def test_levels_are_a_stack_of_masks_over_one_network() -> None:
    model, x = build(mlp), vectors(6)(4, 0)
    params, levels = state(model).params, [some_masks(model, d) for d in (0.8, 0.4, 0.1)]
    together = ntk.kernel(model, params, x, masks=stack(levels))
    for r, masks in enumerate(levels):
        assert_close(together[r], ntk.kernel(model, params, x, masks=masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["auto", "rows", "gather", "generic"])
def test_the_dtype_is_kept(dtype: torch.dtype, method: str) -> None:
    model, x = build(conv), images(3, 0)
    exact = ntk.kernel(model, state(model).params, x, masks=some_masks(model))
    cast = state(model)._replace(params={name: p.to(dtype) for name, p in state(model).params.items()})
    found = ntk.kernel(model, cast, x.to(dtype), masks=some_masks(model), method=method)  # buffers are cast with them
    assert_close(found, exact.to(dtype))


def test_a_kernel_of_one_set_of_inputs_is_exactly_symmetric() -> None:
    model, x = build(conv).float(), images(5, 0).float()
    for method in ("auto", "rows", "gather", "generic"):
        for block_size in (None, 2):
            found = ntk.kernel(
                model, state(model).params, x, masks=some_masks(model), method=method, block_size=block_size
            )
            assert torch.equal(found, found.permute(2, 3, 0, 1))


def test_the_model_stays_as_it_was() -> None:
    model = build(conv)
    model[8].train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with torch.no_grad():  # whoever calls, the derivatives are taken
        found = ntk.kernel(model, state(model).params, images(3, 0), masks=some_masks(model))
    assert not found.requires_grad
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["auto", "rows", "gather", "structured", "generic"])
def test_frozen_parameters_are_not_coordinates(method: str) -> None:
    model, x = build(mlp), vectors(6)(3, 0)
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    params = state(model).params
    rows = one_gradient_at_a_time(model, params, x)
    expected = torch.einsum("nok,mpk->nomp", rows, rows)
    assert_close(ntk.kernel(model, params, x, method=method), expected)


def test_one_example_is_enough() -> None:
    model, x = build(conv), images(1, 0)
    params = state(model).params
    assert_close(ntk.kernel(model, params, x), ntk.kernel(model, params, x, method="generic"))
