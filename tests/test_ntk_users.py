"""Networks as users bring them: what differs from a chain of layers, each against one plain gradient at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference_ntk import one_gradient_at_a_time, plain_kernel
from test_ntk_kernel import assert_close, build, fast_names, images, tokens, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ticketlab import ntk
from ticketlab.seeds import initialise
from ticketlab.state import state

F64 = torch.float64


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


class Recurrent(nn.Module):
    """No batching rule in torch."""

    def __init__(self, kind: Callable[..., nn.Module], **kwargs: object) -> None:
        super().__init__()
        self.inside = kind(4, 5, batch_first=True, **kwargs)
        self.head = nn.Linear(5 * (1 + self.inside.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x)[0][:, -1])


class Checkpointed(nn.Module):
    """Activations that are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inside, self.head, self.reentrant = (
            nn.Linear(6, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 3),
            reentrant,
        )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.head(checkpoint(lambda z: self.inside(z).tanh(), hidden, use_reentrant=self.reentrant))


class TwoNames(nn.Module):
    """One module reachable under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.a(x).relu()))


class Transposed(nn.Module):
    """A decoder that is its encoder, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).tanh(), self.first.weight.T)


class Closure(nn.Module):
    """A parameter that the forward pass reaches around the module's attributes, and one that a hook uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        weight = self.second.weight
        self.call = lambda x: x @ weight
        self.first.register_forward_hook(lambda module, args, output: output + F.linear(args[0], weight))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.first(x).tanh()))


class Keeps(nn.Module):
    """Activations that stay on the module, in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.log = nn.Linear(6, 8), nn.Linear(8, 3), []

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x).relu()
        self.log.append(self.hidden)
        return self.head(self.hidden)


class WritesInput(nn.Module):
    """A preprocessing step in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.sub_(0.5).div_(0.5)).relu_())


class ChannelsLast(nn.Module):
    """GroupNorm in channels-last: no batching rule, and a backward pass that must ask for its input's gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(100, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x.to(memory_format=torch.channels_last))).relu().flatten(1))


class MaskedAttention(nn.Module):
    """A padding mask that depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, key_padding_mask=x[..., 0] > 1, need_weights=False)[0].mean(1))


class Trimmed(nn.Module):
    """Padding is cut off at the longest example of the batch: positions differ from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inside, self.head = nn.Embedding(7, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        kept = x > 1
        x, kept = x[:, : 1 + int(kept.nonzero()[:, 1].amax())], kept[:, : 1 + int(kept.nonzero()[:, 1].amax())]
        return self.head((self.inside(self.embed(x)).tanh() * kept[..., None]).sum(1))


class TokensToExperts(nn.Module):
    """Every position goes to one of two layers, across examples."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.a, self.b, self.head = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share = self.router(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for k, expert in enumerate((self.a, self.b)):
            at = (share.argmax(-1) == k).nonzero()[:, 0]
            out = out.index_add(0, at, expert(flat[at]).tanh() * share[at, k, None])
        return self.head(out.view_as(x).mean(1))


class Ragged(nn.Module):
    """A nested tensor inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        ragged = torch.nested.nested_tensor(list(x), layout=torch.jagged)
        return self.head(torch.stack([hidden.tanh().mean(0) for hidden in self.inside(ragged).unbind()]))


class Row(nn.Module):
    """A linear map to one number, whose weight has one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.row, self.head = nn.Parameter(torch.ones(6)), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.row)[:, None].tanh())


class SwapsInside(nn.Module):
    """Two of the inner rows change places in large batches alone: neither a few examples nor the ends show it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x))
        if len(x) > 5:
            order[[2, 3]] = order[[3, 2]]
        return self.head(self.first(x[order]).tanh()[order])


class WithoutVmap(torch.autograd.Function):
    """A ReLU that torch.func does not take, and that is differentiable once."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * (ctx.saved_tensors[0] > 0)


class Detaches(WithoutVmap):
    """The same, whose second derivative is lost without an error."""

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.detach() * (ctx.saved_tensors[0] > 0)


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function, self.head = nn.Linear(6, 8), function, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x)))


class MasksGradients(Applies):
    """A hook on a parameter, by which gradients are masked."""

    def __init__(self) -> None:
        super().__init__(torch.tanh)
        self.first.weight.register_hook(lambda grad: grad.tril())


def prelu() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 3))


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))


def instance_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(100, 3))


def sparse_embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Flatten(), nn.Linear(20, 3))


def map_output() -> nn.Module:
    return nn.Conv2d(4, 2, 3, padding=1, stride=3)


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


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "lstm": (partial(Recurrent, nn.LSTM, bidirectional=True), vectors(3, 4)),
    "gru": (partial(Recurrent, nn.GRU), vectors(3, 4)),
    "checkpointing": (partial(Checkpointed, False), vectors(6)),
    "two names": (TwoNames, vectors(6)),
    "transposed": (Transposed, vectors(6)),
    "closure": (Closure, vectors(6)),
    "kept activation": (Keeps, vectors(6)),
    "input written in place": (WritesInput, vectors(6)),
    "leading in-place relu": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3)), vectors(6)),
    "channels last": (ChannelsLast, images),
    "masked attention": (MaskedAttention, vectors(3, 4)),
    "trimmed": (Trimmed, tokens),
    "no vmap": (partial(Applies, WithoutVmap.apply), vectors(6)),
    "no second derivative": (partial(Applies, Detaches.apply), vectors(6)),
    "hardswish": (partial(Applies, F.hardswish), vectors(6)),
    "masked gradients": (MasksGradients, vectors(6)),
    "prelu": (prelu, vectors(6)),
    "spectral norm": (spectral, vectors(6)),
    "instance norm": (instance_norm, images),
    "map": (map_output, images),
    "sparse embedding": (sparse_embedding, tokens),
    "tokens to experts": (TokensToExperts, vectors(3, 4)),
    "ragged": (Ragged, vectors(3, 4)),
    "row": (Row, vectors(6)),
    "swapped inside": (SwapsInside, vectors(6)),
    **{name: (factory, inputs) for name, (factory, inputs, _) in USERS_MODELS.items()},
}


def away(model: nn.Module) -> tuple[dict[str, Tensor], dict[int, dict]]:
    """A point other than the module's own, and what its modules hold."""
    generator = torch.Generator().manual_seed(1)
    params = {n: p + 0.1 * torch.randn(p.shape, generator=generator, dtype=F64) for n, p in state(model).params.items()}
    return params, {id(module): dict(module.__dict__) for module in model.modules()}


@pytest.mark.parametrize("name", KINDS)
def test_every_measure_against_plain_gradients_and_nothing_is_left_on_the_module(name: str) -> None:
    """Seven examples: more than a few, and not as many as outputs or positions."""
    factory, inputs = KINDS[name]
    model, x = build(factory), inputs(7, 0)
    (params, before), own, data = away(model), state(model), x.clone()
    buffers = own.buffers  # spectral norm's vectors belong to the weights
    rows = one_gradient_at_a_time(build(factory), params, x)
    expected = torch.einsum("nok,mpk->nomp", rows, rows)
    for method in ("auto", "rows", "gather", "generic"):
        assert_close(ntk.kernel(model, params, x, buffers=buffers, method=method), expected)
    assert_close(ntk.kernel(model, params, x[:2], x[2:], buffers=buffers, block_size=2), expected[:2, :, 2:])
    assert_close(ntk.kernel(model, params, x, buffers=buffers, outputs="sum_logits"), expected.sum((1, 3)))
    assert_close(ntk.jacobian(model, params, x, buffers=buffers).values, rows)
    operator = ntk.operator(model, params, x, buffers=buffers)
    vector = torch.randn(operator.size, generator=torch.Generator().manual_seed(2), dtype=F64)
    assert_close(operator.product(vector), expected.flatten(2).flatten(0, 1) @ vector)
    assert_close(operator.trace().value, expected.flatten(2).flatten(0, 1).trace())
    assert torch.equal(x, data)
    assert before == {id(module): module.__dict__ for module in model.modules()}
    assert all(torch.equal(t, own.params[n]) for n, t in model.named_parameters())


def test_inputs_that_want_a_gradient_get_none() -> None:
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)))
    x = vectors(6)(3, 0).requires_grad_()
    operator = ntk.operator(model, state(model), x)
    found = [ntk.kernel(model, state(model), x, method=method) for method in ("auto", "generic")]
    found += [
        ntk.jacobian(model, state(model), x).values,
        operator.product(torch.ones(6, dtype=F64)),
        operator.trace().value,
    ]
    assert x.grad is None
    assert not any(one.requires_grad for one in found)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_as_many_examples_as_outputs(n: int) -> None:
    """Two nested vmaps over PReLU's backward are wrong, in silence, where both are 3 (torch 2.13)."""
    model, x = build(prelu), vectors(6)(n, 0)
    expected = plain_kernel(partial(build, prelu), state(model).params, x)
    for method in ("auto", "generic"):
        assert_close(ntk.kernel(model, state(model), x, method=method), expected)


@pytest.mark.parametrize("name", USERS_MODELS)
def test_what_has_a_fast_path(name: str) -> None:
    factory, inputs, fast = USERS_MODELS[name]
    assert fast_names(build(factory), inputs(3, 0)) == fast  # 3 examples: as many as SequenceFirst has positions


def test_a_routing_that_the_first_few_do_not_show() -> None:
    model, x = build(Experts), vectors(6)(12, 0)
    x[:, 0], x[1, 0] = -9, 9
    for block_size in (None, 5):
        found = ntk.kernel(model, state(model), x, block_size=block_size)
        assert_close(found, plain_kernel(partial(build, Experts), state(model).params, x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # where nothing has, on purpose
@pytest.mark.parametrize("factory", [Spoilt, partial(Checkpointed, True)])
def test_a_model_that_plain_autograd_does_not_differentiate_is_refused(factory: Callable[[], nn.Module]) -> None:
    model, x = build(factory), vectors(6)(3, 0)
    for call in (ntk.kernel, ntk.jacobian, lambda *args: ntk.operator(*args).product(torch.ones(9, dtype=F64))):
        with pytest.raises(
            ValueError, match=r"PyTorch must be able to differentiate the model.*(inplace|use_reentrant)"
        ):
            call(model, state(model), x)


class Without(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 3)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def test_outputs_without_a_derivative_are_refused() -> None:
    model = build(Without)
    with pytest.raises(ValueError, match=r"outputs must have a derivative.*no_grad"):
        ntk.kernel(model, state(model), vectors(6)(3, 0))


def test_a_frozen_body_has_no_coordinates() -> None:
    model, x = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))), vectors(6)(3, 0)
    model[0].requires_grad_(False)
    features = torch.nn.functional.pad(model[1](model[0](x)), (0, 1), value=1.0)
    assert_close(ntk.kernel(model, state(model), x, outputs="trace"), 2 * features @ features.T)


class Islands(nn.Module):
    """A norm that computes in float32 whatever comes in, as many language models have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(self.first(x).float(), (8,), self.norm.weight.float(), self.norm.bias.float())
        return self.head(h.to(x.dtype).tanh())


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_float32_inside_another_dtype(dtype: torch.dtype, tolerance: float) -> None:
    model, x = initialise(Islands, 0).to(dtype), vectors(6)(6, 0).to(dtype)
    expected = plain_kernel(
        partial(build, Islands), {n: p.double() for n, p in state(model).params.items()}, x.double()
    )
    assert fast_names(model, x) == {"first.weight", "first.bias", "head.weight", "head.bias"}
    for method in ("auto", "generic"):
        found = ntk.kernel(model, state(model), x, method=method)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * float(expected.max()))


class Mixed(nn.Module):
    """Parameters of two dtypes: the kernel has the wider one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh().double())


def test_parameters_of_two_dtypes() -> None:
    model, x = initialise(Mixed, 0), vectors(6)(4, 0).float()
    expected = plain_kernel(partial(initialise, Mixed, 0), state(model).params, x)
    for method in ("auto", "generic"):
        found = ntk.kernel(model, state(model), x, method=method)
        assert found.dtype == F64
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.max()))
