"""The kernel: every method against the generic oracle, and the oracle against one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ticketlab import masks as mk
from ticketlab import ntk
from ticketlab.ntk.layers import find_layers
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


def one_gradient_at_a_time(model: nn.Module, params: dict[str, Tensor], x: Tensor, live: dict[str, Tensor]) -> Tensor:
    """J [n, out, k] by the definition: one autograd call for each example and output."""
    rows = []
    for example in x:
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        y = functional_call(model, leaves, (example[None],)).flatten()
        for value in y:
            grads = torch.autograd.grad(value, [leaves[n] for n in live], retain_graph=True, allow_unused=True)
            parts = [
                (torch.zeros_like(params[n]) if g is None else g)[live[n]] for n, g in zip(live, grads, strict=True)
            ]
            rows.append(torch.cat(parts))
    return torch.stack(rows).view(len(x), -1, len(rows[0]))


def fast_names(model: nn.Module, x: Tensor) -> set[str]:
    (problem,), _ = problems(model, state(model)[0], None, "live", None, "full")
    return {name for layer in find_layers(problem, x)[0] for name in layer.names}


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
    params, masks = state(model)[0], some_masks(build(factory))
    point = {n: p * masks[n] if n in masks else p for n, p in params.items()}
    live = {n: torch.ones_like(p, dtype=bool) for n, p in point.items()}
    live |= masks if coordinates == "live" else {}
    j1, j2 = (one_gradient_at_a_time(model, point, z, live) for z in (x, x2))
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
    params = state(model)[0]
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
    params, masks = state(model)[0], some_masks(model)
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
        assert_close(together[r], ntk.kernel(model, state(model)[0], x, masks=select(masks, r), method=method))


def test_buffers_alone_may_be_stacked() -> None:
    model, x = build(conv), images(3, 0)
    params, buffers = state(model)
    other = {n: b + 0.5 if b.is_floating_point() else b for n, b in buffers.items()}
    together = ntk.kernel(model, params, x, buffers=stack([buffers, other]))
    for r, one in enumerate((buffers, other)):
        assert_close(together[r], ntk.kernel(model, params, x, buffers=one))


def test_levels_are_a_stack_of_masks_over_one_network() -> None:
    model, x = build(mlp), vectors(6)(4, 0)
    params, levels = state(model)[0], [some_masks(model, d) for d in (0.8, 0.4, 0.1)]
    together = ntk.kernel(model, params, x, masks=stack(levels))
    for r, masks in enumerate(levels):
        assert_close(together[r], ntk.kernel(model, params, x, masks=masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["auto", "rows", "gather", "generic"])
def test_the_dtype_is_kept(dtype: torch.dtype, method: str) -> None:
    model, x = build(conv), images(3, 0)
    exact = ntk.kernel(model, state(model)[0], x, masks=some_masks(model))
    params = {name: p.to(dtype) for name, p in state(model)[0].items()}  # buffers stay float64 in the model
    found = ntk.kernel(model, params, x.to(dtype), masks=some_masks(model), method=method)
    assert_close(found, exact.to(dtype))


def test_a_kernel_of_one_set_of_inputs_is_exactly_symmetric() -> None:
    model, x = build(conv).float(), images(5, 0).float()
    for method in ("auto", "rows", "gather", "generic"):
        for block_size in (None, 2):
            found = ntk.kernel(model, state(model)[0], x, masks=some_masks(model), method=method, block_size=block_size)
            assert torch.equal(found, found.permute(2, 3, 0, 1))


def test_the_model_stays_as_it_was() -> None:
    model = build(conv)
    model[8].train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    with torch.no_grad():  # whoever calls, the derivatives are taken
        found = ntk.kernel(model, state(model)[0], images(3, 0), masks=some_masks(model))
    assert not found.requires_grad
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Reused(nn.Module):
    """One linear layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.again(self.first(x)).tanh())


class Tied(nn.Module):
    """An embedding whose weight is also the head, and two linear layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight, self.b.weight = self.embed.weight, self.a.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.embed(tokens)).tanh()).mean(1))


class UsedElsewhere(nn.Module):
    """A linear layer whose weight is also used behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()) + (x @ self.first.weight).sum(-1, keepdim=True)


class Spoilt(nn.Module):
    """An input that is changed in place after a layer has read it: no gradient can be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.first(x)
        return self.second(y + x.mul_(2.0))


class SequenceFirst(nn.Module):
    """Positions on the first axis inside, as many as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x.transpose(0, 1)).tanh().cumsum(0).transpose(0, 1).mean(1))


class Folded(nn.Module):
    """Positions folded into the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x.flatten(0, 1)).tanh().view(len(x), -1, 5).mean(1))


class Branching(nn.Module):
    """Control flow that depends on values, which vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        return self.second(hidden if hidden.isfinite().all().item() else -hidden)


class Auxiliary(nn.Module):
    """A layer that is also called for what is not returned: on other inputs, and on fewer of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aside = self.first(2 * x), self.first(x[:1]).detach()
        return self.second(self.first(x).tanh())


class AuxiliaryConvolution(nn.Module):
    """The same of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 2, 3), nn.Linear(50, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aside = self.first(2 * x)
        return self.second(self.first(x).tanh().flatten(1))


class Sorted(nn.Module):
    """The examples in another order inside, each on its own all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort(descending=True)
        return self.second(self.first(x[order]).tanh()[order.argsort()])


class Experts(nn.Module):
    """Every example goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        left = x[:, 0] < x[:, 1]
        hidden = x.new_zeros(len(x), 5).index_put((left,), self.a(x[left])).index_put((~left,), self.b(x[~left]))
        return self.head(hidden.tanh())


def normalised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 2))


def scalar_output() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))


USERS_MODELS = {
    "reused": (Reused, vectors(6), {"again.weight", "again.bias", "first.weight", "first.bias"}),
    "tied": (Tied, tokens, {"a.weight"}),
    "used elsewhere": (UsedElsewhere, vectors(6), {"second.weight", "second.bias"}),
    "sequence first": (SequenceFirst, vectors(3, 4), {"head.weight", "head.bias"}),
    "folded": (Folded, vectors(3, 4), {"head.weight", "head.bias"}),
    "branching": (Branching, vectors(6), {"first.weight", "first.bias", "second.weight", "second.bias"}),
    "auxiliary": (Auxiliary, vectors(6), {"first.weight", "first.bias", "second.weight", "second.bias"}),
    "auxiliary convolution": (
        AuxiliaryConvolution,
        images,
        {"first.weight", "first.bias", "second.weight", "second.bias"},
    ),
    "sorted": (Sorted, vectors(6), {"second.weight", "second.bias"}),
    "experts": (Experts, vectors(6), {"head.weight", "head.bias"}),
    "weight norm": (normalised, vectors(6), {"2.weight", "2.bias"}),
    "scalar output": (scalar_output, vectors(6), {"0.weight", "0.bias", "2.weight", "2.bias"}),
}


@pytest.mark.parametrize("name", USERS_MODELS)
@pytest.mark.parametrize("method", ["auto", "rows", "gather", "generic"])
def test_a_users_model_gets_the_right_kernel(name: str, method: str) -> None:
    factory, inputs, fast = USERS_MODELS[name]
    model, x = build(factory), inputs(3, 0)  # 3 examples: as many as SequenceFirst has positions
    assert fast_names(model, x) == fast
    params = state(model)[0]
    rows = one_gradient_at_a_time(model, params, x, {n: torch.ones_like(p, dtype=bool) for n, p in params.items()})
    assert_close(ntk.kernel(model, params, x, method=method), torch.einsum("nok,mpk->nomp", rows, rows))
    assert_close(ntk.jacobian(model, params, x).values, rows)


@pytest.mark.parametrize("name", ["sorted", "experts"])
def test_the_second_inputs_are_looked_at_too(name: str) -> None:
    factory, inputs, _ = USERS_MODELS[name]
    model, x = build(factory), inputs(5, 1)
    params = state(model)[0]
    assert_close(ntk.kernel(model, params, x[:1], x), ntk.kernel(model, params, x[:1], x, method="generic"))


def test_a_routing_that_the_first_few_did_not_show() -> None:
    model, x = build(Experts), vectors(6)(40, 0)
    x[:, 0], x[1, 0] = -9, 9  # the second of 40 inputs is not among 16 evenly spaced ones
    params = state(model)[0]
    with pytest.raises(ValueError, match=r"'a.weight' must meet every example alike.*method='generic'"):
        ntk.kernel(model, params, x)
    assert ntk.kernel(model, params, x, method="generic").isfinite().all()


def test_an_input_changed_under_a_layer_is_refused() -> None:
    model = build(Spoilt)
    assert fast_names(model, vectors(6)(3, 0)) == {"second.weight", "second.bias"}
    with pytest.raises(RuntimeError, match="inplace operation"):
        ntk.kernel(model, state(model)[0], vectors(6)(3, 0))


def test_a_hook_of_the_user_is_part_of_the_model() -> None:
    model, x = build(mlp), vectors(6)(3, 0)
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    params = state(model)[0]
    assert_close(ntk.kernel(model, params, x), ntk.kernel(model, params, x, method="generic"))


@pytest.mark.parametrize("method", ["auto", "rows", "gather", "structured", "generic"])
def test_frozen_parameters_are_not_coordinates(method: str) -> None:
    model, x = build(mlp), vectors(6)(3, 0)
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    params = state(model)[0]
    free = {n: torch.ones_like(params[n], dtype=bool) for n, p in model.named_parameters() if p.requires_grad}
    rows = one_gradient_at_a_time(model, params, x, free)
    expected = torch.einsum("nok,mpk->nomp", rows, rows)
    assert_close(ntk.kernel(model, params, x, method=method), expected)


def test_one_example_is_enough() -> None:
    model, x = build(conv), images(1, 0)
    params = state(model)[0]
    assert_close(ntk.kernel(model, params, x), ntk.kernel(model, params, x, method="generic"))
