"""A module at m * theta: equal to the plain module, for one network and for a stack, and the user's is left alone."""

from __future__ import annotations

import copy
import math
import pickle
import random
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT_TOLERANCE, blobs, build, half_masks, images, small_conv_bn, small_mlp
from reference import loss_and_error
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from ticketlab import connectivity, gradients, masks, ntk, signal
from ticketlab.lending import lent
from ticketlab.losses import SQUARED_ERROR
from ticketlab.masks import masked
from ticketlab.network import apply, evaluate, n_replicas, network, resolve
from ticketlab.seeds import initialise
from ticketlab.state import State, stack, stack_states, state

EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": FLOAT_TOLERANCE[torch.float64], "atol": FLOAT_TOLERANCE[torch.float64]}


class Tied(nn.Module):
    """Encoder and decoder share a weight; one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.twice, self.decoder = nn.Linear(6, 3), nn.Linear(3, 3), nn.Linear(6, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(torch.relu(self.twice(torch.relu(self.twice(self.encoder(x))))) @ self.encoder.weight)


class Scaled(nn.Module):
    """A linear layer times a buffer that broadcasts: buffers of a wrong shape would pass unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("scale", torch.arange(1.0, 4.0))

    def forward(self, x):
        return self.fc(x) * self.scale


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.output = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.output(checkpoint(lambda h: self.fc(h).tanh(), x, use_reentrant=False))


class ByClosure(nn.Module):
    """Reaches one module through a closure and a hook, and another under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.output, self.hooked = nn.Linear(6, 6), nn.Linear(6, 3), nn.Identity()
        self.same = self.inner
        inner = self.inner
        self.reach = lambda x: inner(x).sin()
        self.hooked.register_forward_hook(lambda _m, _x, y: y + F.linear(y, inner.weight))

    def forward(self, x):
        return self.output(self.same(self.hooked(self.reach(x))))


def spectral():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.PReLU(8), nn.Linear(8, 3))


def grouped():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(self.lstm(x.view(-1, 3, 2))[0][:, -1])


class Routed(nn.Module):
    """Asks for a value on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        y = self.fc(x)
        return y if float(self.fc.bias.detach()[0]) > 0 else 2 * y


class MaskedConvolution(nn.Conv1d):
    """As PixelCNN has it: the forward pass writes into the weight."""

    def forward(self, x):
        self.weight.data[..., -1] = 0
        return super().forward(x)


def written():
    return nn.Sequential(nn.Unflatten(1, (1, 6)), MaskedConvolution(1, 4, 3), nn.Flatten(), nn.Linear(16, 3))


PROBLEMS = {
    "mlp": (small_mlp, blobs),
    "conv_bn": (small_conv_bn, images),
    "tied": (Tied, blobs),
    "buffer": (Scaled, blobs),
    "checkpointed": (Checkpointed, blobs),
    "closure": (ByClosure, blobs),
    "spectral": (spectral, blobs),
    "grouped": (grouped, images),
    "recurrent": (Recurrent, blobs),
    "routed": (Routed, blobs),
    "written": (written, blobs),
}
NO_RULE = ("routed", "recurrent", "spectral", "written")


def trained_looking(factory, seed):
    """A network whose buffers are not those of a fresh one."""
    model = build(factory, seed)
    generator = torch.Generator().manual_seed(seed)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model


def plain(model, masks, x):
    """The module itself on masked weights."""
    net = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, mask in (masks or {}).items():
            net.get_parameter(name)[~mask] = 0.0
        return net(x.clone())


# apply


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("problem", [name for name in PROBLEMS if name != "closure"])  # whose copy is no copy
def test_one_network_is_the_plain_module(problem, with_masks):
    factory, make_task = PROBLEMS[problem]
    x, model = make_task().test.x, trained_looking(factory, 1)
    masks = half_masks(model, 2) if with_masks else None
    own = state(model)
    kept = own.clone()
    expected = plain(model, masks, x)
    torch.testing.assert_close(apply(model, own, x, masks=masks), expected, **CLOSE)
    other = build(factory, 5)  # only the forward pass is lent
    torch.testing.assert_close(apply(other, own, x, masks=masks), expected, **CLOSE)
    torch.testing.assert_close(apply(other, own.params, x, masks=masks, buffers=own.buffers), expected, **CLOSE)
    assert all(torch.equal(t, k[n]) for part, k in zip(own, kept, strict=True) for n, t in part.items())


def test_a_module_reached_by_a_closure_and_a_hook_holds_the_lent_weights():
    one, other = build(ByClosure, 0), build(ByClosure, 1)
    x = blobs().test.x
    with torch.no_grad():
        torch.testing.assert_close(apply(one, state(other), x), other(x), **EXACT)


@pytest.mark.parametrize("kind", ["none", "shared", "stacked"])
@pytest.mark.parametrize("problem", [name for name in PROBLEMS if name != "closure"])
def test_a_stack_is_the_plain_modules(problem, kind):
    factory, make_task = PROBLEMS[problem]
    x, models = make_task().test.x, [trained_looking(factory, s) for s in range(3)]
    each = [half_masks(m, s if kind == "stacked" else 0) if kind != "none" else None for s, m in enumerate(models)]
    masks = {"none": None, "shared": each[0], "stacked": stack([m or {} for m in each])}[kind]
    expected = torch.stack([plain(m, one, x) for m, one in zip(models, each, strict=True)])
    whole = stack_states([state(m) for m in models])
    for execution in ("auto", "loop", *(() if problem in NO_RULE else ("vmap",))):
        found = apply(models[0], whole, x, masks=masks, execution=execution)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_what_vmap_cannot_follow_is_refused_only_where_vmap_is_demanded():
    model, x = build(Routed), blobs().test.x
    twice = stack_states([state(model), state(build(Routed, 1))])
    assert apply(model, twice, x, execution="auto").shape == (2, len(x), 3)
    with pytest.raises(ValueError, match="vmap cannot follow this model"):
        apply(model, twice, x, execution="vmap")


class OtherUnderVmap(nn.Linear):
    """An operation whose batching rule is wrong."""

    def forward(self, x):
        y = super().forward(x)
        return 2 * y if torch._C._functorch.is_batchedtensor(y) else y


def test_a_wrong_rule_of_vmap_is_noticed():
    model, x = build(lambda: OtherUnderVmap(6, 3)), blobs().test.x
    twice = stack_states([state(model)] * 2)
    torch.testing.assert_close(apply(model, twice, x), torch.stack([plain(model, None, x)] * 2), **EXACT)
    with pytest.raises(ValueError, match="vmap gives other outputs"):
        apply(model, twice, x, execution="vmap")


def test_masks_alone_or_shared_buffers_may_lack_the_axis():
    model, x = trained_looking(small_conv_bn, 0), images().test.x
    levels = [half_masks(model, s) for s in range(2)]
    found = apply(model, state(model), x, masks=stack(levels))
    torch.testing.assert_close(found, torch.stack([plain(model, m, x) for m in levels]), **CLOSE)
    shared = apply(model, stack([state(model).params] * 2), x, buffers=state(model).buffers)
    torch.testing.assert_close(shared, torch.stack([plain(model, None, x)] * 2), **CLOSE)


def test_outputs_have_no_graph():
    model, x = build(small_mlp), blobs().test.x
    assert not apply(model, dict(model.named_parameters()), x).requires_grad
    assert not any(out.requires_grad for out in evaluate(model, state(model), x, blobs().test.y))


def test_how_a_stack_is_computed():
    mlp, conv, wide = build(small_mlp), build(small_conv_bn), initialise(lambda: nn.Linear(1000, 100), 0)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve("auto", m, cpu) for m in (mlp, conv, wide)] == ["vmap", "loop", "loop"]
    assert [resolve("auto", m, cuda) for m in (mlp, conv, wide)] == ["vmap"] * 3
    assert [resolve(e, conv, d) for e in ("loop", "vmap") for d in (cpu, cuda)] == ["loop", "loop", "vmap", "vmap"]
    with pytest.raises(ValueError, match="execution must be 'auto', 'loop' or 'vmap': got 'fast'"):
        resolve("fast", mlp, cpu)


# Derivatives inside


@pytest.mark.parametrize("problem", [name for name in PROBLEMS if name != "written"])  # whose plain gradient is partial
def test_gradients_while_lent_are_those_of_the_module_that_holds_these_weights(problem):
    factory, make_task = PROBLEMS[problem]
    model, other, split = build(factory, 0), build(factory, 1).eval(), make_task().test
    expected = torch.autograd.grad(F.cross_entropy(other(split.x.clone()), split.y), list(other.parameters()))
    net = network(model, state(other), split.x)
    with net.lent() as weights:
        found = torch.autograd.grad(F.cross_entropy(net.forward(split.x), split.y), list(weights.values()))
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one, truth, **EXACT)


@pytest.mark.parametrize("problem", ["mlp", "conv_bn", "tied"])
def test_the_pure_function_has_the_same_derivative(problem):
    factory, make_task = PROBLEMS[problem]
    model, x = build(factory, 0), make_task().test.x[:4]
    net = network(model, state(build(factory, 1)), x)
    with net.lent() as weights:
        pure = torch.func.grad(lambda w: net.call(w, x).sin().sum())(dict(net.params))
        plainly = torch.autograd.grad(net.forward(x).sin().sum(), list(weights.values()))
    for name, truth in zip(weights, plainly, strict=True):
        torch.testing.assert_close(pure[name], truth, **CLOSE)


# evaluate


def test_evaluate_of_a_constant_network_is_known():
    model = initialise(lambda: nn.Linear(4, 5), 0)
    zeros = {n: torch.zeros_like(p) for n, p in state(model).params.items()}
    y = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    loss, error = evaluate(model, zeros, torch.ones(7, 4), y)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)  # logits are float32
    assert error.item() == 4 / 7
    assert loss.dtype == error.dtype == torch.float64


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
@pytest.mark.parametrize("problem", ["mlp", "conv_bn"])
def test_evaluate_equals_one_example_at_a_time(problem, batch_size):
    factory, make_task = PROBLEMS[problem]
    split, models = make_task().test, [trained_looking(factory, s) for s in range(3)]
    whole, masks = stack_states([state(m) for m in models]), [half_masks(m, s) for s, m in enumerate(models)]
    found = [
        evaluate(models[0], whole, split.x, split.y, masks=stack(masks), batch_size=batch_size, execution=execution)
        for execution in ("loop", "vmap")
    ]
    for r, (model, mask) in enumerate(zip(models, masks, strict=True)):
        net = copy.deepcopy(model)
        net.load_state_dict({**net.state_dict(), **masked(state(model).params, mask)}, strict=False)
        loss, error = loss_and_error(net, split.x, split.y)
        one = evaluate(model, state(model), split.x, split.y, masks=mask, batch_size=batch_size)
        for losses, errors in [*((f[0][r], f[1][r]) for f in found), one]:
            assert losses.item() == pytest.approx(loss, abs=FLOAT_TOLERANCE[torch.float64])
            assert errors.item() == error


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_row_with_a_nan_logit_counts_as_an_error(label):
    model, task = build(small_mlp), blobs()
    params = state(model).params
    params["output.bias"][label] = math.nan  # argmax returns the place of the NaN: it must not pass as right
    loss, error = evaluate(model, params, task.test.x, task.test.y)
    assert error.item() == 1.0
    assert loss.isnan()


def test_nan_in_one_example_and_one_replica_stays_there():
    model, task = build(small_mlp), blobs()
    x = task.test.x.clone()
    x[0] = math.nan
    good, bad = state(model).params, {n: p * math.nan for n, p in state(model).params.items()}
    _, error = evaluate(model, stack([good, bad]), x, task.test.y)
    _, rest = evaluate(model, good, x[1:], task.test.y[1:])
    assert error.tolist() == pytest.approx([(rest.item() * (len(x) - 1) + 1) / len(x), 1.0])


def test_another_loss_has_no_error():
    model, x = build(small_mlp), blobs().test.x
    y = torch.zeros(len(x), 3, dtype=torch.float64)
    loss, error = evaluate(model, state(model), x, y, loss=SQUARED_ERROR, batch_size=7)
    assert float(loss) == pytest.approx(float(plain(model, None, x).square().mean()), rel=1e-12) and error.isnan()


# The user's module


class Keeps(nn.Module):
    """Leaves all sorts of things on itself as it runs; none of them reaches its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.output = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("count", torch.tensor(0))
        self.calls, self.seen, self.last = 0, [torch.ones(1)], deque([1], maxlen=3)
        self.table, self.names = {"h": [None], "n": 0}, {"a"}
        self.scratch, self.array, self.pair = torch.zeros(2), np.zeros(2), (torch.zeros(2), 0)
        self.hidden, self.dice = [nn.BatchNorm1d(8)], [torch.Generator(), np.random.default_rng(0), random.Random(0)]

    def forward(self, x):
        for one in self.dice:
            torch.rand(1, generator=one) if isinstance(one, torch.Generator) else one.random()
        self.pair[0].add_(1)
        self.hidden[0].running_mean.add_(1)
        h = torch.relu(self.norm(self.fc(x)))
        self.h, self.calls = h, self.calls + 1
        self.seen.append(h)
        self.last.append(2)
        self.table["h"][0], self.table["n"] = h, 1
        self.names.add("b")
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        self.count += 1
        self.scratch += 1
        self.array += 1
        return self.output(h)


def picture(value):
    """What an object is and holds, tensors by value, down through modules and containers."""
    if isinstance(value, nn.Module):
        return id(value), [(name, picture(part)) for name, part in value.__dict__.items()]
    if isinstance(value, torch.Tensor | np.ndarray):
        kept = value.detach().clone() if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())
        return id(value), type(value).__name__, getattr(value, "requires_grad", None), kept.tolist()
    if isinstance(value, dict):
        return id(value), [(name, picture(part)) for name, part in value.items()]
    if isinstance(value, list | deque | set | tuple):
        return id(value), [picture(part) for part in value]
    if isinstance(value, torch.Generator | random.Random | np.random.Generator):
        return id(value), value.get_state().tolist() if isinstance(value, torch.Generator) else pickle.dumps(value)
    return value


X, Y = blobs().train.x[:12], blobs().train.y[:12]
MEASURES = {
    "apply": lambda m, s: apply(m, s, X),
    "evaluate": lambda m, s: evaluate(m, s, X, Y),
    "singular_values": lambda m, s: signal.jacobian_singular_values(m, s, X),
    "moments": lambda m, s: signal.jacobian_moments(m, s, X),
    "largest": lambda m, s: signal.largest_singular_values(m, s, X[:3], source="fc"),
    "layers": lambda m, s: signal.layer_statistics(m, s, X, Y),
    "sigma_w2": signal.effective_sigma_w2,
    "gradient": lambda m, s: gradients.gradient(m, s, X, Y),
    "alignment": lambda m, s: gradients.alignment(m, s, X, Y, dense_params=s, params_end=s),
    "batches": lambda m, s: gradients.batch_statistics(m, s, X, Y, batch_size=4),
    "step": lambda m, s: gradients.one_step(m, s, X, Y, learning_rate=0.1),
    "modes": lambda m, s: gradients.ntk_overlap(m, s, X, Y),
    "path": lambda m, s: connectivity.linear_path(m, s, s, blobs(60), n_alphas=3),
    "recalibrate": lambda m, s: connectivity.recalibrate(m, s, X),
    "kernel": lambda m, s: ntk.kernel(m, s, X),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_users_module_ends_as_it_was(measure, stacked):
    model = build(Keeps, 0).train()
    model.norm.eval()
    model(X)  # what the user's own pass has left is kept, graph and all
    model.fc.bias.grad = torch.ones_like(model.fc.bias)
    model.output.bias.requires_grad_(False)
    states = [state(build(Keeps, seed)) for seed in (1, 2)]
    own = stack_states(states) if stacked else states[0]
    before, copies, grad = picture(model), picture(own), model.fc.bias.grad
    MEASURES[measure](model, own)
    assert picture(model) == before and picture(own) == copies
    assert model.fc.bias.grad is grad and torch.equal(grad, torch.ones_like(grad))
    model.h.sum().backward()


class Breaks(nn.Module):
    """Fails in its forward pass; its children are in different modes."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.fc, self.norm, self.drop, self.error = nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), error

    def forward(self, x):
        self.left = x
        raise self.error("no forward pass today")


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, KeyError, ValueError])
def test_a_model_that_fails_on_its_inputs_is_refused_and_left_as_it_was(error):
    model = initialise(lambda: Breaks(error), 0)
    model.norm.eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=rf"fails on examples of shape \(6,\) .*{error.__name__}: .*no forward"):
        apply(model, state(model), torch.ones(2, 6))
    assert [m.training for m in model.modules()] == modes == [True, True, False, True]
    assert not hasattr(model, "left")


def test_what_is_lent_ends_with_the_block_even_where_it_is_thrown_out_of():
    model, other = build(small_mlp), state(build(small_mlp, 1))
    before = state(model).params
    with pytest.raises(KeyError), lent(model, other.params, None):
        assert all(torch.equal(p, other.params[n]) for n, p in model.named_parameters()) and not model.training
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and model.training


class WritesInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        return self.fc(x.sub_(0.5).div_(0.5))


@pytest.mark.parametrize("measure", ["evaluate", "singular_values", "layers", "gradient", "modes", "kernel", "path"])
def test_inputs_that_a_forward_pass_writes_into_do_not_change(measure):
    writes = build(WritesInput)
    inner = state(writes.fc)
    outside = build(lambda: nn.Sequential(Shifted(), nn.Linear(6, 3)))
    before = X.clone()
    found = MEASURES[measure](writes, State({f"fc.{n}": p for n, p in inner.params.items()}, {}))
    truth = MEASURES[measure](outside, State({f"1.{n}": p for n, p in inner.params.items()}, {}))
    assert torch.equal(X, before)
    flat = [torch.cat([torch.as_tensor(v).double().flatten() for v in numbers(result)]) for result in (found, truth)]
    torch.testing.assert_close(*flat, **CLOSE)


class Shifted(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.5


def numbers(result):
    if hasattr(result, "curves"):
        return list(result.curves.values())
    if hasattr(result, "select_dtypes"):
        return [result.select_dtypes("number").to_numpy()]
    if isinstance(result, torch.Tensor):
        return [result]
    return (
        list(result.values())
        if isinstance(result, dict)
        else list(result if isinstance(result, tuple) else vars(result).values())
    )


# What is refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p.pop("fc1.bias"), r"missing \['fc1.bias'\], unknown \[\]"),
        (lambda p: p.update(extra=torch.ones(1)), r"missing \[\], unknown \['extra'\]"),
        (lambda p: p.update({"fc1.bias": torch.ones(2)}), r"params\['fc1.bias'\] must have shape \(8,\).*got \(2,\)"),
        (lambda p: p.update({"fc1.bias": torch.ones(2, 2, 8)}), r"must have shape \(8,\).*got \(2, 2, 8\)"),
        (lambda p: p.update({"fc1.bias": torch.ones(2, 8)}), r"share one replica axis: got lengths \['2', 'None'\]"),
        (lambda p: p.update({"fc1.bias": np.ones(8)}), "must be a tensor like the model's, torch.float64: got ndarray"),
        (lambda p: p.update({"fc1.bias": torch.ones(8).long()}), "must be a tensor like the model's"),
        (lambda p: p.update({n: t[None][:0] for n, t in p.items()}), "must hold one network at least"),
    ],
)
def test_parameters_that_are_not_the_models_are_refused(change, match):
    model = build(small_mlp)
    params = state(model).params
    change(params)
    with pytest.raises(ValueError, match=match):
        network(model, params)


def test_n_replicas_of_one_and_of_a_stack():
    model = build(small_conv_bn)
    one = state(model).params
    assert n_replicas(model, one) is None
    assert n_replicas(model, stack([one])) == 1
    assert n_replicas(model, stack([one] * 5)) == 5
    assert n_replicas(nn.Flatten(), {}) is None


def test_a_model_without_parameters_is_a_network_too():
    x = torch.ones(3, 2, 2)
    assert torch.equal(apply(nn.Flatten(), {}, x), x.flatten(1))


@pytest.mark.parametrize(
    ("buffers", "match"),
    [
        ({"scale": torch.ones(5, 3, dtype=torch.float64)}, "share one replica axis"),
        ({"scael": torch.ones(3, 3, dtype=torch.float64)}, r"buffers\['sca"),
        ({"scale": torch.ones(3, 4, dtype=torch.float64)}, r"buffers\['scale'\] must have shape \(3,\)"),
        ({}, r"buffers\['scale'\] must have shape \(3,\)"),
    ],
)
def test_buffers_that_do_not_fit_the_stack_are_refused(buffers, match):
    model = build(Scaled)
    with pytest.raises(ValueError, match=match):
        apply(model, stack([state(model).params] * 3), blobs().test.x, buffers=buffers)


class Threshold(nn.Module):
    """Reads a buffer by comparison alone, where NaN goes unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("least", torch.tensor(0.1))

    def forward(self, x):
        return torch.where(self.fc(x) > self.least, 1.0, 0.0) + self.fc(x)


@pytest.mark.parametrize("factory", [small_conv_bn, Scaled, Threshold])
def test_buffers_that_are_read_must_be_known(factory):
    model, other = build(factory, 0), trained_looking(factory, 1)
    x = (images() if factory is small_conv_bn else blobs()).test.x
    own = state(other)
    expected = plain(other, None, x)
    torch.testing.assert_close(apply(model, own, x), expected, **CLOSE)
    torch.testing.assert_close(apply(other, own.params, x), expected, **CLOSE)  # the module's own weights
    pruned = half_masks(other, 0)
    torch.testing.assert_close(apply(other, own.params, x, masks=pruned), plain(other, pruned, x), **CLOSE)
    for params in (own.params, stack([own.params] * 2)):
        with pytest.raises(ValueError, match="those of these params are not known: pass a State"):
            apply(model, params, x)


class Noise(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc, self.generator = kind, nn.Linear(6, 3), np.random.default_rng(0)

    def forward(self, x):
        y = self.fc(x)
        if self.kind == "dropout":
            return F.dropout(y, 0.5)
        if self.kind == "its own generator":
            return y + float(self.generator.normal())
        if self.kind == "random, and rarely":
            return y + (random.random() < 1e-6)
        if self.kind == "numpy, and rarely":
            return y + (np.random.rand() < 1e-6)
        return {"mean": y - y.mean(0), "order": y.cumsum(0), "max": y / y.abs().max(), "norm": F.normalize(y, dim=0)}[
            self.kind
        ]


@pytest.mark.parametrize(
    "kind",
    ["dropout", "its own generator", "random, and rarely", "numpy, and rarely", "mean", "order", "max", "norm"],
)
@pytest.mark.parametrize("equal", [False, True])
def test_outputs_that_are_coupled_or_random_are_refused_by_everything_that_evaluates(kind, equal):
    model = build(lambda: Noise(kind)).eval()
    task = blobs()
    if equal:
        task = type(task)(
            "equal", *(type(s)(torch.ones_like(s.x), s.y) for s in (task.train, task.validation, task.test)), 3
        )
    own, (x, y) = state(model), (task.train.x[:10], task.train.y[:10])
    before, python = torch.random.get_rng_state(), random.getstate()
    for measure in (
        lambda: apply(model, own, x),
        lambda: evaluate(model, own, x, y),
        lambda: evaluate(model, stack_states([own] * 2), x, y),
        lambda: signal.jacobian_singular_values(model, own, x),
        lambda: signal.jacobian_moments(model, own, x),
        lambda: signal.layer_statistics(model, own, x),
        lambda: gradients.gradient(model, own, x, y),
        lambda: gradients.alignment(model, own, x, y),
        lambda: connectivity.linear_path(model, own, own, task, n_alphas=3),
    ):
        with pytest.raises(
            ValueError, match="each example must pass through the network by itself, the same each time"
        ):
            measure()
    assert torch.equal(torch.random.get_rng_state(), before) and random.getstate() == python


class Unfreezes(nn.Module):
    """Counts its evaluations in a buffer, and trains its bias or does not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("count", torch.tensor(0.0))

    def forward(self, x):
        self.count += 1
        if not torch._C._functorch.peek_interpreter_stack():  # under vmap it is an error
            self.fc.bias.requires_grad_(not self.fc.bias.requires_grad)
        return self.fc(x)


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_what_a_forward_pass_writes_stays_in_the_pass(execution):
    model = build(Unfreezes)
    states = stack_states([state(build(Unfreezes, seed)) for seed in (1, 2)])
    before = states.clone()
    with torch.no_grad():
        apply(model, states, X, execution=execution)
    assert model.fc.bias.requires_grad and float(model.count) == 0
    assert all(torch.equal(t, part[n]) for part, old in zip(states, before, strict=True) for n, t in old.items())


def test_surroundings_that_would_change_the_numbers_are_refused():
    model = build(small_mlp)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"would be autocast's\. Leave torch\.autocast, or put it into the model"),
    ):
        evaluate(model, state(model), X, Y)


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.LazyLinear(3)), lambda: nn.Linear(6, 3, device="meta")], ids=["lazy", "meta"]
)
def test_modules_that_hold_no_numbers_yet_are_refused(make):
    for of in (state, masks.ones, lambda m: apply(m, state(build(lambda: nn.Linear(6, 3))), X)):
        with pytest.raises(ValueError, match=r"must hold numbers: \['.*weight', .* do not\. Call lazy modules once"):
            of(make())


def test_a_diverged_replica_does_not_hide_that_outputs_are_coupled():
    model = build(lambda: Noise("mean")).eval()
    bad = State({n: p * math.nan for n, p in state(model).params.items()}, {})
    with pytest.raises(ValueError, match="each example must pass"):
        evaluate(model, stack_states([bad, state(model)]), X, Y)
    scaled, other = build(Scaled, 0), trained_looking(Scaled, 1)
    with pytest.raises(ValueError, match="those of these params are not known"):
        evaluate(scaled, stack([{n: p * math.nan for n, p in state(other).params.items()}, state(other).params]), X, Y)


class Looked(nn.Module):
    """Takes floating numbers for tokens, each place with a vocabulary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Embedding(2, 3), nn.Embedding(50, 3)

    def forward(self, x):
        return self.small(x[:, 0].long()) + self.large(x[:, 1].long())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("n", [1, 20])
def test_an_example_that_the_checks_make_up_is_one_that_may_occur(dtype, n):
    model = build(Looked)
    x = torch.stack([torch.arange(n) % 2, torch.arange(n) + 30], 1).to(dtype)
    torch.testing.assert_close(apply(model, state(model), x), plain(model, None, x), **EXACT)


class Attends(nn.Module):
    """A float mask of minus infinity in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

    def forward(self, x):
        y = self.fc(x)
        return torch.softmax(y[:, :, None] * y[:, None] + self.mask, -1) @ y[..., None] @ y.new_ones(1, 1)


def test_values_that_are_not_finite_are_refused_where_statistics_are_taken():
    masking = build(Attends)
    network(masking, state(masking), X)  # an attention mask is infinite by design
    model, conv = build(small_mlp), build(small_conv_bn)
    bad = X.clone()
    bad[5, 1] = math.nan
    with pytest.raises(ValueError, match="x must be finite: 1 of 72 entries"):
        network(model, state(model), bad)
    assert apply(model, state(model), bad)[5].isnan().all()
    own = state(conv)
    for value in (math.nan, math.inf):
        own.buffers["1.running_var"][0] = value
        with pytest.raises(ValueError, match=r"buffers\['1.running_var'\] must be finite: 1 of 4"):
            network(conv, own)
    roots = build(lambda: nn.Sequential(nn.Linear(6, 3), Root()))
    with pytest.raises(ValueError, match="outputs must be numbers"):
        network(roots, state(roots), X)
    assert apply(roots, state(roots), X).isnan().any()


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda y: (y, y), "must return one floating tensor .*: got tuple"),
        (lambda y: {"logits": y}, "must return one floating tensor .*: got dict"),
        (lambda y: y.sum(), r"must return one floating tensor .*: got shape \(\)"),
        (lambda y: y.T, "must return one floating tensor"),
        (lambda y: y.argmax(1), "must return one floating tensor .*: got shape .* torch.int64"),
        (lambda y: torch.complex(y, y), "must return one floating tensor .*: got shape .* torch.complex128"),
    ],
)
def test_outputs_that_are_no_tensor_of_examples_are_refused(forward, match):
    class Returns(nn.Linear):
        def forward(self, x):
            return forward(super().forward(x))

    model = build(lambda: Returns(6, 3))
    with pytest.raises(ValueError, match=match):
        apply(model, state(model), X)


def test_inputs_of_another_kind_are_refused():
    model = build(small_mlp)
    own = state(model)
    for x, match in (
        (X.float(), r"x must have the dtype of params, torch\.float64: got torch\.float32"),
        (X[:0], "x must hold at least one example"),
        (X.tolist(), "x must hold at least one example on its first axis: got list"),
        (X[:, :4], r"x must be what the model takes: Sequential fails on examples of shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            apply(model, own, x)
    with pytest.raises(ValueError, match=r"model must be an nn\.Module: got function"):
        apply(small_mlp, own, X)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        evaluate(model, own, X, Y, batch_size=0)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2 for 3 classes"):
        evaluate(model, own, X, Y + 1)


class Mixed(nn.Module):
    """A norm in float32 within a network in bfloat16, and complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.ones(4, dtype=torch.complex64))
        self.fc, self.norm = nn.Linear(6, 6).bfloat16(), nn.LayerNorm(6)
        self.register_buffer("shift", torch.full((6,), 1e-4))

    def forward(self, x):
        y = self.norm(self.fc(x).float() + self.shift)
        return torch.fft.irfft(torch.fft.rfft(y) * self.filter, n=6)


def test_weights_of_several_dtypes_keep_their_buffers():
    model, x = initialise(Mixed, 0), X.bfloat16()
    torch.testing.assert_close(apply(model, state(model), x), plain(model, None, x), **EXACT)


def test_float32_statistics_serve_a_float64_network():
    model = initialise(small_conv_bn, 0)
    own = State({n: p.double() for n, p in state(model).params.items()}, state(model).buffers)
    torch.testing.assert_close(
        apply(model, own, images().test.x), plain(copy.deepcopy(model).double(), None, images().test.x), **CLOSE
    )


class Aliased(nn.Module):
    """Keeps a tensor in the memory of a weight beside it, in a container."""

    def __init__(self, view) -> None:
        super().__init__()
        self.fc, self.output = nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)
        self.kept = {"weight": [view(self.fc.weight)]}

    def forward(self, x):
        return self.output(torch.relu(x @ self.kept["weight"][0]) + self.fc(x))


@pytest.mark.parametrize("view", [torch.detach, lambda w: w.data, lambda w: w.detach().t()])
def test_what_shares_memory_with_a_weight_follows_it(view):
    model, plain = (build(lambda: Aliased(view), 0) for _ in range(2))
    before, kept = state(model), model.kept["weight"][0]
    other = State({n: 2 * p for n, p in before.params.items()}, {})
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(other.params[name])
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(apply(model, other, x), plain(x), **EXACT)
    torch.testing.assert_close(apply(model, before, x), model(x), **EXACT)
    assert model.kept["weight"][0] is kept
    assert kept.untyped_storage().data_ptr() == model.fc.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("view", [torch.t, lambda w: w.view(6, 6), lambda w: w.detach().view(torch.int64)])
def test_a_view_that_cannot_follow_its_weight_is_refused(view):
    model = build(lambda: Aliased(view), 0)
    with pytest.raises(ValueError, match=r"must not share memory with 'fc\.weight'"):
        apply(model, state(model), torch.ones(5, 6, dtype=torch.float64))
