"""Models as pure functions: equal to the plain module, for one network and for a stack, and nothing is mutated."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import FLOAT_TOLERANCE, blobs, build, half_masks, images, small_conv_bn, small_mlp
from reference import loss_and_error
from torch import nn

from ticketlab.errors import nearest
from ticketlab.functional import apply, evaluate, evaluating, masked, n_replicas, resolve
from ticketlab.seeds import initialise, stream
from ticketlab.state import State, select, stack, stack_states, state

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


class Breaks(nn.Module):
    """Fails in its forward pass; its children are in different modes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        raise RuntimeError("no forward pass today")


PROBLEMS = {
    "mlp": (small_mlp, blobs),
    "conv_bn": (small_conv_bn, images),
    "tied": (Tied, blobs),
    "buffer": (Scaled, blobs),
}


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
        return net(x)


# Seeds


def test_initialise_depends_on_the_seed_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = initialise(small_mlp, 7)
        torch.rand(13)
        second, other = initialise(small_mlp, 7), initialise(small_mlp, 8)
    for name, tensor in state(first).params.items():
        torch.testing.assert_close(state(second).params[name], tensor, **EXACT)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_initialise_leaves_the_global_generator_where_it_was():
    before = torch.random.get_rng_state()
    initialise(small_conv_bn, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(RuntimeError, match="no forward"):
        initialise(lambda: Breaks().forward(None), 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_initialise_leaves_the_generators_of_accelerators_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    initialise(small_mlp, 3)
    assert seeded == []


def test_streams_are_one_a_purpose_and_seeds():
    named = [("order", (1,)), ("order", (1, 0)), ("order", (0, 1)), ("order", (2,)), ("crop", (1,)), ("order", ())]
    draws = [torch.rand(8, generator=stream(purpose, *seeds)) for purpose, seeds in named]
    again = [torch.rand(8, generator=stream(purpose, *seeds)) for purpose, seeds in named]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({tuple(d.tolist()) for d in draws}) == len(named)


def test_a_stream_is_the_same_on_every_machine():
    # NumPy promises the values of SeedSequence, PyTorch those of its CPU generator: pinned, for runs depend on them.
    assert stream("order", 0).initial_seed() == 1817707480
    assert stream("order", 2**32 - 1).initial_seed() == 1297899199


@pytest.mark.parametrize("seeds", [(-1,), (2**32,), (0, -3), (1.5,), ("1",)])
def test_seeds_out_of_range_are_refused(seeds):
    with pytest.raises(ValueError, match=r"seeds must be integers in 0\.\.2\^32 - 1: got .* for 'order'"):
        stream("order", *seeds)


# Dicts of tensors


def test_state_copies_and_detaches():
    model = build(small_conv_bn)
    taken = state(model)
    assert not any(t.requires_grad for part in taken for t in part.values())
    for part in taken:
        for tensor in part.values():
            tensor.add_(1)
    fresh = build(small_conv_bn).state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in model.state_dict().items())
    assert set(taken.params) | set(taken.buffers) == set(fresh)


def test_a_tied_parameter_appears_once():
    assert set(state(build(Tied)).params) == {"encoder.weight", "encoder.bias", "twice.weight", "twice.bias"}


def test_states_clone_move_and_select():
    states = [state(trained_looking(small_conv_bn, s)) for s in range(3)]
    stacked = stack_states(states)
    clone = stacked.clone()
    for part in stacked:
        for tensor in part.values():
            tensor.zero_()
    for r, one in enumerate(states):
        for given, expected in zip(clone.select(r), one, strict=True):
            assert all(torch.equal(given[n], t) for n, t in expected.items())
    two = clone.select([2, 0])
    assert torch.equal(
        two.params["0.weight"], torch.stack([states[2].params["0.weight"], states[0].params["0.weight"]])
    )
    moved = clone.to("cpu", torch.float32)
    assert isinstance(moved, State)
    assert moved.params["0.weight"].dtype == moved.buffers["1.running_var"].dtype == torch.float32
    assert moved.buffers["1.num_batches_tracked"].dtype == torch.int64


def test_select_undoes_stack():
    dicts = [state(build(small_mlp, s)).params for s in range(4)]
    stacked = stack(dicts)
    assert stacked["fc1.weight"].shape == (4, 8, 6)
    for r, one in enumerate(dicts):
        assert all(torch.equal(select(stacked, r)[n], t) for n, t in one.items())
    assert list(select(stacked, 0)) == list(dicts[0])
    assert select(stacked, [1, 3])["fc1.weight"].shape == (2, 8, 6)
    assert select(stacked, slice(1, 4))["fc1.weight"].shape == (3, 8, 6)


def test_stack_refuses_nothing_and_other_names():
    with pytest.raises(ValueError, match="at least one dict of tensors: got none"):
        stack([])
    with pytest.raises(ValueError, match=r"names \['a'\]: number 1 has \['b'\]"):
        stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


def test_n_replicas_of_one_and_of_a_stack():
    model = build(small_conv_bn)
    one = state(model).params
    assert n_replicas(model, one) is None
    assert n_replicas(model, stack([one])) == 1
    assert n_replicas(model, stack([one] * 5)) == 5
    assert n_replicas(nn.Flatten(), {}) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: p.pop("fc1.bias"), r"missing \['fc1.bias'\], unknown \[\].*functional.state"),
        (lambda p: p.update(extra=torch.ones(1)), r"missing \[\], unknown \['extra'\]"),
        (lambda p: p.update({"fc1.bias": torch.ones(2)}), r"params\['fc1.bias'\] must have shape \(8,\).*got \(2,\)"),
        (lambda p: p.update({"fc1.bias": torch.ones(2, 2, 8)}), r"must have shape \(8,\).*got \(2, 2, 8\)"),
        (lambda p: p.update({"fc1.bias": torch.ones(2, 8)}), r"share one replica axis: got lengths \['2', 'None'\]"),
    ],
)
def test_n_replicas_refuses_what_is_not_the_models(change, match):
    model = build(small_mlp)
    params = state(model).params
    change(params)
    with pytest.raises(ValueError, match=match):
        n_replicas(model, params)


def test_masked_is_the_product_and_leaves_the_rest():
    params = state(build(small_mlp)).params
    masks = half_masks(build(small_mlp), 0)
    found = masked(params, masks)
    for name, tensor in params.items():
        expected = torch.where(masks[name], tensor, torch.zeros(())) if name in masks else tensor
        assert torch.equal(found[name], expected)
    stacked = masked(stack([params, params]), masks)  # one mask for all replicas
    assert all(torch.equal(stacked[n][1], t) for n, t in found.items())
    assert masked(params, None) == params


def test_masked_refuses_what_does_not_fit():
    params = state(build(small_mlp)).params
    with pytest.raises(ValueError, match=r"unknown \['fc9.weight'\]. Build them with masks.ones"):
        masked(params, {"fc9.weight": torch.ones(8, 6)})
    with pytest.raises(ValueError, match=r"masks\['fc1.weight'\] must have the shape .*\(8, 6\): got \(6, 8\)"):
        masked(params, {"fc1.weight": torch.ones(6, 8)})
    with pytest.raises(ValueError, match=r"got \(2, 8, 6\)"):  # a stack of masks for one network
        masked(params, {"fc1.weight": torch.ones(2, 8, 6)})
    with pytest.raises(ValueError, match=r"got \(2, 8, 6\)"):  # 2 masks for 3 networks
        masked(stack([params] * 3), {"fc1.weight": torch.ones(2, 8, 6)})


@pytest.mark.parametrize("shape", [(), (6,)])
def test_a_mask_of_the_last_axes_alone_is_not_broadcast(shape):
    model, task = build(small_mlp), blobs()
    with pytest.raises(ValueError, match=r"masks\['fc1.weight'\] must have the shape of the parameter"):
        apply(model, state(model).params, task.test.x, masks={"fc1.weight": torch.ones(shape, dtype=torch.bool)})


# apply


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_network_is_the_plain_module(problem, with_masks):
    factory, make_task = PROBLEMS[problem]
    x, model = make_task().test.x, trained_looking(factory, 1)
    masks = half_masks(model, 2) if with_masks else None
    given = state(model)
    expected = plain(model, masks, x)
    torch.testing.assert_close(apply(model, given.params, x, masks=masks), expected, **EXACT)
    other = build(factory, 5)  # only the forward pass is lent
    found = apply(other, given.params, x, masks=masks, buffers=given.buffers)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("execution", ["auto", "loop", "vmap"])
@pytest.mark.parametrize("kind", ["none", "shared", "stacked"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_stack_is_the_plain_modules(problem, kind, execution):
    factory, make_task = PROBLEMS[problem]
    x, models = make_task().test.x, [trained_looking(factory, s) for s in range(3)]
    each = [half_masks(m, s if kind == "stacked" else 0) if kind != "none" else None for s, m in enumerate(models)]
    masks = {"none": None, "shared": each[0], "stacked": stack([m or {} for m in each])}[kind]
    params, buffers = stack_states([state(m) for m in models])
    found = apply(models[0], params, x, masks=masks, buffers=buffers, execution=execution)
    expected = torch.stack([plain(m, one, x) for m, one in zip(models, each, strict=True)])
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_without_buffers_a_stack_takes_the_models_own(execution):
    x, models = images().test.x, [trained_looking(small_conv_bn, s) for s in range(2)]
    found = apply(models[1], stack([state(m).params for m in models]), x, execution=execution)
    mixed = copy.deepcopy(models[0])
    mixed.load_state_dict({**models[1].state_dict(), **state(models[0]).params})
    torch.testing.assert_close(found, torch.stack([plain(mixed, None, x), plain(models[1], None, x)]), **CLOSE)


@pytest.mark.parametrize(
    "buffers",
    [
        {"scale": torch.ones(3, dtype=torch.float64)},  # without the replica axis: each replica would get a number
        {"scale": torch.ones(5, 3, dtype=torch.float64)},  # of more replicas
        {"scael": torch.ones(3, 3, dtype=torch.float64)},
    ],
    ids=["unstacked", "five", "unknown"],
)
def test_buffers_that_do_not_fit_the_stack_are_refused(buffers):
    model = build(Scaled)
    with pytest.raises(ValueError, match="buffers"):
        apply(model, stack([state(model).params] * 3), blobs().test.x, buffers=buffers, execution="loop")


def test_gradients_flow_to_live_weights_alone():
    model, task = build(small_mlp), blobs()
    params = {n: p.requires_grad_() for n, p in state(model).params.items()}
    masks = half_masks(model, 0)
    apply(model, params, task.test.x, masks=masks).square().sum().backward()
    for name, mask in masks.items():
        assert (params[name].grad[~mask] == 0).all()
        assert (params[name].grad[mask] != 0).any()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_the_users_model_is_not_changed(execution):
    model = trained_looking(small_conv_bn, 0)
    model.train()
    model[1].eval()
    modes, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    given = stack_states([state(model)] * 2)
    kept = given.clone()
    evaluate(model, given.params, images().test.x, images().test.y, buffers=given.buffers, execution=execution)
    evaluate(model, given.params, images().test.x, images().test.y, execution=execution)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(torch.equal(k[n], t) for k, g in zip(kept, given, strict=True) for n, t in g.items())


def test_modes_come_back_after_an_exception():
    model = initialise(Breaks, 0)
    model.norm.eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="no forward pass today"):
        apply(model, state(model).params, torch.ones(2, 6))
    assert [m.training for m in model.modules()] == modes == [True, True, False, True]
    with evaluating(model) as lent:
        assert lent is model
        assert not any(m.training for m in model.modules())


def test_how_a_stack_is_computed():
    mlp, conv, wide = build(small_mlp), build(small_conv_bn), initialise(lambda: nn.Linear(1000, 100), 0)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [resolve("auto", m, cpu) for m in (mlp, conv, wide)] == ["vmap", "loop", "loop"]
    assert [resolve("auto", m, cuda) for m in (mlp, conv, wide)] == ["vmap"] * 3
    assert [resolve(e, conv, d) for e in ("loop", "vmap") for d in (cpu, cuda)] == ["loop", "loop", "vmap", "vmap"]
    with pytest.raises(ValueError, match="execution must be 'auto', 'loop' or 'vmap': got 'fast'"):
        resolve("fast", mlp, cpu)


# evaluate


def test_evaluate_of_a_constant_network_is_known():
    model = initialise(lambda: nn.Linear(4, 5), 0)
    zeros = {n: torch.zeros_like(p) for n, p in state(model).params.items()}
    y = torch.tensor([0, 1, 2, 3, 4, 0, 0])
    loss, error = evaluate(model, zeros, torch.ones(7, 4), y)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-6)  # logits are float32
    assert error.item() == 4 / 7
    assert loss.dtype == error.dtype == torch.float64


@pytest.mark.parametrize("batch_size", [1, 7, 48, 10_000])
@pytest.mark.parametrize("problem", ["mlp", "conv_bn"])
def test_evaluate_equals_one_example_at_a_time(problem, batch_size):
    factory, make_task = PROBLEMS[problem]
    split, models = make_task().test, [trained_looking(factory, s) for s in range(3)]
    params, buffers = stack_states([state(m) for m in models])
    masks = [half_masks(m, s) for s, m in enumerate(models)]
    found = {
        execution: evaluate(
            models[0],
            params,
            split.x,
            split.y,
            masks=stack(masks),
            buffers=buffers,
            batch_size=batch_size,
            execution=execution,
        )
        for execution in ("loop", "vmap")
    }
    for r, (model, mask) in enumerate(zip(models, masks, strict=True)):
        net = copy.deepcopy(model)
        net.load_state_dict({**net.state_dict(), **masked(state(model).params, mask)}, strict=False)
        loss, error = loss_and_error(net, split.x, split.y)
        one = evaluate(model, state(model).params, split.x, split.y, masks=mask, batch_size=batch_size)
        for losses, errors in [*((f[0][r], f[1][r]) for f in found.values()), one]:
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


def test_evaluate_builds_no_graph():
    model, task = build(small_mlp), blobs()
    loss, _ = evaluate(model, dict(model.named_parameters()), task.test.x, task.test.y)
    assert not loss.requires_grad


# Names


def test_an_unknown_name_comes_with_the_nearest():
    message = nearest("model", "conv4", ("conv_4", "lenet"))
    assert message == "unknown model 'conv4'. Did you mean 'conv_4'? Known: conv_4, lenet."
    assert "Did you mean" not in nearest("model", "zzz", ("conv_4", "lenet"))
    assert "unknown model 3." in nearest("model", 3, ("conv_4",))
