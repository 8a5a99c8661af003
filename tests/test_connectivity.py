"""Paths and barriers: known curves, a slow loop over copies, and nothing of the user's changed."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from cases import FLOAT_TOLERANCE, blobs, build, half_masks, images, small_conv_bn, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import train_alone
from reference_measures import batchnorm_anew, path_alone
from torch import nn

from ticketlab.connectivity import barrier, linear_path, recalibrate, rise
from ticketlab.data import Split, Task
from ticketlab.engine.training import Recipe
from ticketlab.masks import masked
from ticketlab.network import evaluate
from ticketlab.seeds import initialise
from ticketlab.state import State, select, stack, stack_states, state

TOLERANCE = FLOAT_TOLERANCE[torch.float64]
BASELINES = ("mean", "linear", "max")
EXECUTIONS = ("loop", "vmap")
PROBLEMS = {"mlp": (small_mlp, blobs), "conv_bn": (small_conv_bn, images)}


class Product(nn.Module):
    """Logits (u v, 1/2): flipping the sign of u and v leaves the function, and moves it through its saddle."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.cat([x * self.u * self.v, torch.full_like(x, 0.5)], dim=1)


class SharedNorm(nn.Module):
    """One batch norm called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.output = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.output(torch.relu(self.norm(self.fc(torch.relu(self.norm(x))))))


def pairs(factory, n):
    """n networks at each end, running statistics that are nobody's."""
    models = [build(factory, seed) for seed in range(2 * n)]
    generator = torch.Generator().manual_seed(0)
    for model in models:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return models[:n], models[n:]


def one_class(x, label=0):
    """A task of examples that all have one label and one input."""
    split = Split(torch.full((4, 1), x, dtype=torch.float64), torch.full((4,), label))
    return Task("one_class", split, split, split, 2)


# Heights of known curves

CURVE = np.array([0.0, 3.0, 1.0, 2.0])


def test_each_baseline_on_a_curve_by_hand():
    assert barrier(CURVE, "mean") == 3 - 1
    assert barrier(CURVE, "linear") == pytest.approx(3 - 2 / 3)
    assert barrier(CURVE, "max") == 3 - 2
    assert barrier(CURVE) == barrier(CURVE, "mean")
    both = np.stack([CURVE, -CURVE], axis=1)  # [alpha, replica]
    np.testing.assert_allclose(barrier(both, "mean"), [2, 1])
    np.testing.assert_allclose(barrier(both, "linear"), [7 / 3, 1 / 3])
    np.testing.assert_allclose(barrier(both, "max"), [1, 0])


def test_a_straight_line_has_no_height_above_its_chord():
    line = np.linspace(0.3, 1.7, 31)
    assert barrier(line, "linear") == pytest.approx(0, abs=1e-15)
    assert barrier(line, "max") == 0
    assert barrier(np.array([0.9, -1.0, 0.1]), "linear") == 0  # exactly, where 0.9 + (0.1 - 0.9) rounds below 0.1
    assert barrier(line, "mean") == pytest.approx(0.7)  # half the difference of the ends: why linear exists


def test_rise_by_hand():
    assert rise(CURVE) == 3
    assert rise(np.array([3.0, 1.0, 2.0, 0.0, 5.0])) == 5
    assert rise(np.array([3.0, 2.0, 2.0, 1.0])) == 0
    np.testing.assert_array_equal(rise(np.stack([CURVE, -CURVE], axis=1)), [3, 2])


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=12))
@settings(max_examples=200, deadline=None)
def test_heights_are_ordered_and_equal_their_definition(values):
    curve = np.array(values)
    found = {name: float(barrier(curve, name)) for name in BASELINES}
    last = len(values) - 1
    chord = [values[0] + i / last * (values[-1] - values[0]) for i in range(last + 1)]
    expected = {
        "mean": max(v - (values[0] + values[-1]) / 2 for v in values),
        "linear": max(v - c for v, c in zip(values[1:-1], chord[1:-1], strict=True)),
        "max": max(values) - max(values[0], values[-1]),
    }
    expected["linear"] = max(0.0, expected["linear"])
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0 <= found["max"] <= found["linear"] + 1e-12
    assert found["mean"] >= abs(values[0] - values[-1]) / 2 - 1e-12
    for name in BASELINES:
        assert float(barrier(curve[::-1], name)) == pytest.approx(found[name], abs=1e-12)
        assert float(barrier(curve + 2, name)) == pytest.approx(found[name], abs=1e-12)
    climbs = [values[j] - values[i] for i in range(last + 1) for j in range(i, last + 1)]
    assert float(rise(curve)) == max(climbs)


def test_curves_that_are_too_short_and_unknown_baselines_are_refused():
    with pytest.raises(ValueError, match="at least 3 alphas, both ends included: got 2"):
        barrier(np.zeros(2))
    with pytest.raises(ValueError, match=r"baseline must be one of \['mean', 'linear', 'max'\]: got 'min'"):
        barrier(CURVE, "min")


# Paths with known loss


def test_a_saddle_between_two_equal_functions_by_closed_form():
    model, n = initialise(Product, 0).double(), 7
    s, r = 2.0, 1.5
    a = {name: torch.full((1,), s, dtype=torch.float64) for name in ("u", "v")}
    b = {name: torch.full((1,), -r, dtype=torch.float64) for name in ("u", "v")}
    path = linear_path(model, a, b, one_class(1.0), n_alphas=n)
    w = [(1 - i / (n - 1)) * s - i / (n - 1) * r for i in range(n)]
    loss = np.array([math.log1p(math.exp(0.5 - v * v)) for v in w])  # two classes: softplus of the logits' gap
    error = np.array([float(v * v < 0.5) for v in w])
    for split in ("train", "test"):
        np.testing.assert_allclose(path.curves[split, "loss_nats"], loss, atol=TOLERANCE)
        np.testing.assert_array_equal(path.curves[split, "error"], error)
    top = int(loss.argmax())
    assert path.barrier("error") == 1
    assert path.barrier("loss_nats", "train") == pytest.approx(loss[top] - (loss[0] + loss[-1]) / 2)
    assert path.barrier("loss_nats", "train", "max") == pytest.approx(loss[top] - loss[-1])
    chord = loss[0] + np.linspace(0, 1, n) * (loss[-1] - loss[0])
    assert path.barrier("loss_nats", "train", "linear") == pytest.approx((loss - chord).max())
    assert path.rise() == pytest.approx(loss[top] - loss[0])


def test_a_network_linear_in_its_parameters_has_a_convex_loss():
    model, task = build(lambda: nn.Linear(6, 3)), blobs()
    a, b = (state(build(lambda: nn.Linear(6, 3), seed)).params for seed in (1, 2))
    path = linear_path(model, a, b, task, n_alphas=9)
    curve = path.curves["train", "loss_nats"]
    assert (np.diff(curve, 2) > 0).all()
    assert path.barrier("loss_nats", "train", "linear") == 0
    assert path.barrier("loss_nats", "train", "max") == 0


def test_permuted_networks_have_a_barrier_and_equal_ones_have_none():
    task, recipe = blobs(), Recipe(steps=80, batch_size=32, optimizer="adam", learning_rate=0.02)
    trained = train_alone(build(small_mlp), {}, task, recipe, 0)
    a = state(trained).params
    order = torch.arange(7, -1, -1)
    b = a | {"fc1.weight": a["fc1.weight"][order], "fc1.bias": a["fc1.bias"][order]}
    b["fc2.weight"] = a["fc2.weight"][:, order]
    path = linear_path(trained, a, b, task)
    assert path.curves["test", "loss_nats"][0] == pytest.approx(path.curves["test", "loss_nats"][-1], abs=TOLERANCE)
    assert path.curves["test", "error"][0] == path.curves["test", "error"][-1] < 0.1
    assert path.barrier("loss_nats") > 0.1
    assert path.barrier("error") > 0.1


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_identical_networks_have_exactly_no_barrier(problem, execution):
    factory, make_task = PROBLEMS[problem]
    model = build(factory, 3)
    path = linear_path(model, state(model).params, state(model).params, make_task(), execution=execution, n_alphas=12)
    for metric in ("loss_nats", "error"):
        for split in ("train", "test"):
            assert [float(path.barrier(metric, split, b)) for b in BASELINES] == [0.0, 0.0, 0.0]
            assert path.rise(metric, split) == 0


# Against a loop over copies of the module


@pytest.mark.parametrize("batchnorm", ["recalibrate", "keep"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_path_equals_a_loop_over_copies(problem, with_masks, execution, batchnorm):
    factory, make_task = PROBLEMS[problem]
    (one,), (two,) = pairs(factory, 1)
    masks = half_masks(one, 0) if with_masks else None
    task, a, b = make_task(), state(one), state(two)
    if batchnorm == "recalibrate":
        a, b = a.params, b.params  # statistics are estimated anew: parameters will do
    path = linear_path(
        one,
        a,
        b,
        task,
        masks=masks,
        n_alphas=5,
        batchnorm=batchnorm,
        splits=("validation", "test"),
        execution=execution,
    )
    assert path.alphas.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert set(path.curves) == {(s, m) for s in ("validation", "test") for m in ("loss_nats", "error")}
    for split in ("validation", "test"):
        loss, error = path_alone(
            one, two, task, path.alphas.tolist(), masks=masks, recalibrate=batchnorm == "recalibrate", split=split
        )
        np.testing.assert_allclose(path.curves[split, "loss_nats"], loss, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(path.curves[split, "error"], error)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("n", [500, 777, 1100])
def test_statistics_come_from_whole_batches(n, execution):
    big = blobs(2 * n, (1, 8, 8)).limit(train=n, test=20)
    (one,), (two,) = pairs(small_conv_bn, 1)
    a, b = state(one).params, state(two).params
    path = linear_path(one, a, b, big, n_alphas=3, splits=("test",), execution=execution)
    loss, error = path_alone(one, two, big, [0, 0.5, 1])
    np.testing.assert_allclose(path.curves["test", "loss_nats"], loss, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(path.curves["test", "error"], error)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_ends_are_the_given_networks(problem):
    factory, make_task = PROBLEMS[problem]
    (one,), (two,) = pairs(factory, 1)
    masks, task = half_masks(one, 0), make_task()
    a, b = state(one), state(two)
    path = linear_path(one, a, b, task, masks=masks, batchnorm="keep", n_alphas=4, execution="loop")
    for end, given_end in ((0, a), (-1, b)):
        loss, error = evaluate(one, given_end, task.test.x, task.test.y, masks=masks)
        assert path.curves["test", "loss_nats"][end] == loss.item()  # to the bit: a path has its ends on it
        assert path.curves["test", "error"][end] == error.item()
    together = linear_path(one, a, b, task, masks=masks, batchnorm="keep", n_alphas=4, execution="vmap")
    np.testing.assert_allclose(
        together.curves["test", "loss_nats"], path.curves["test", "loss_nats"], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("batchnorm", ["recalibrate", "keep"])
@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_stack_of_paths_is_each_path(problem, execution, batchnorm):
    factory, make_task = PROBLEMS[problem]
    ones, twos = pairs(factory, 3)
    task, starts, ends = make_task(), stack_states([state(m) for m in ones]), stack_states([state(m) for m in twos])
    masks = stack([half_masks(m, s) for s, m in enumerate(ones)])
    options = {"n_alphas": 5, "batchnorm": batchnorm, "execution": execution}
    path = linear_path(ones[0], starts, ends, task, masks=masks, **options)
    for r in range(3):
        alone = linear_path(
            ones[0],
            starts.select(r),
            ends.select(r),
            task,
            masks=select(masks, r),
            **options,
        )
        for key, curve in alone.curves.items():
            np.testing.assert_allclose(path.curves[key][:, r], curve, rtol=0, atol=TOLERANCE)
        for baseline in BASELINES:
            assert path.barrier("loss_nats", "test", baseline)[r] == pytest.approx(
                float(alone.barrier("loss_nats", "test", baseline)), abs=TOLERANCE
            )
    assert path.barrier().shape == path.rise().shape == (3,)


def test_more_replicas_than_fit_one_pass():
    ones, twos = pairs(small_mlp, 11)
    task = blobs()
    a, b = (stack([state(m).params for m in models]) for models in (ones, twos))
    path = linear_path(ones[0], a, b, task, n_alphas=3)
    for r in (0, 10):
        alone = linear_path(ones[0], select(a, r), select(b, r), task, n_alphas=3)
        np.testing.assert_allclose(
            path.curves["test", "loss_nats"][:, r], alone.curves["test", "loss_nats"], rtol=0, atol=TOLERANCE
        )


def test_a_mask_holds_on_the_whole_way():
    (one,), (two,) = pairs(small_mlp, 1)
    masks, task = half_masks(one, 0), blobs()
    a, b = state(one).params, state(two).params
    path = linear_path(one, a, b, task, masks=masks, n_alphas=5)
    already = linear_path(one, masked(a, masks), masked(b, masks), task, n_alphas=5)
    dense = linear_path(one, a, b, task, n_alphas=5)
    for key, curve in path.curves.items():
        np.testing.assert_array_equal(curve, already.curves[key])
    assert not np.allclose(path.curves["test", "loss_nats"], dense.curves["test", "loss_nats"])


# Batch norm


def test_statistics_anew_are_torchs_own_cumulative_average():
    ones, _ = pairs(small_conv_bn, 2)
    states, x = stack_states([state(m) for m in ones]), images().train.x
    found = recalibrate(ones[0], states, x, batch_size=25)
    assert not torch.equal(found["1.running_mean"], states.buffers["1.running_mean"])
    untouched = stack_states([state(m) for m in ones]).buffers
    assert all(torch.equal(states.buffers[n], b) for n, b in untouched.items())
    for r, model in enumerate(ones):
        for name, buffer in batchnorm_anew(model, x, 25).named_buffers():
            if buffer.is_floating_point():
                torch.testing.assert_close(found[name][r], buffer, rtol=0, atol=0)


def test_a_batch_norm_called_twice_counts_both_calls():
    model, x = build(SharedNorm), blobs().train.x
    found = recalibrate(model, state(model), x, batch_size=40)
    expected = batchnorm_anew(model, x, 40)
    for name in ("norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(found[name], expected.get_buffer(name), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_anew_forget_what_was_there(value):
    (one,), _ = pairs(small_conv_bn, 1)
    params, buffers = stack_states([state(one)])
    spoiled = {n: torch.full_like(b, value) if b.is_floating_point() else b for n, b in buffers.items()}
    found, expected = (recalibrate(one, State(params, b), images().train.x) for b in (spoiled, buffers))
    for name in ("1.running_mean", "1.running_var", "5.running_mean", "5.running_var"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_without_batch_norm_there_is_nothing_to_recalibrate():
    (one,), (two,) = pairs(small_mlp, 1)
    a, b, task = state(one).params, state(two).params, blobs()
    kept, anew = (linear_path(one, a, b, task, n_alphas=4, batchnorm=mode) for mode in ("keep", "recalibrate"))
    for key, curve in kept.curves.items():
        np.testing.assert_array_equal(curve, anew.curves[key])
    assert recalibrate(one, a, task.train.x) == {}


# Other buffers


class Features(nn.Module):
    """Random features in a buffer, a running mean that is no batch norm's, and a mask that is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(6, 8))
        self.register_buffer("hidden", torch.tensor([0.0, 0.0, -math.inf]))
        self.register_buffer("order", torch.arange(8))
        self.register_buffer("seen", torch.tensor(0))
        self.norm, self.output = nn.InstanceNorm1d(8, track_running_stats=True), nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(torch.tanh(x @ self.features)[:, self.order][..., None])[..., 0]
        return self.output(h) + self.hidden.nan_to_num(neginf=-9)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_other_buffers_are_those_of_each_end_and_lie_between(execution):
    ones, twos = pairs(Features, 2)
    twos[0].seen += 5  # outputs do not depend on it
    task, a, b = blobs(), stack_states([state(m) for m in ones]), stack_states([state(m) for m in twos])
    path = linear_path(ones[0], a, b, task, n_alphas=5, execution=execution)
    for r in range(2):
        loss, error = path_alone(ones[r], twos[r], task, path.alphas.tolist())
        np.testing.assert_allclose(path.curves["test", "loss_nats"][:, r], loss, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(path.curves["test", "error"][:, r], error)
    for end, ends in ((0, a), (-1, b)):
        loss, _ = evaluate(ones[0], ends, task.test.x, task.test.y, execution=execution)
        np.testing.assert_array_equal(path.curves["test", "loss_nats"][end], loss)


def test_buffers_that_are_not_known_are_refused():
    (one,), (two,) = pairs(Features, 1)
    task, a, b = blobs(), state(one), state(two)
    with pytest.raises(ValueError, match=r"reads buffers.* those of these params are not known: pass a State"):
        linear_path(one, a.params, b.params, task, n_alphas=3)
    with pytest.raises(ValueError, match=r"reads buffers that are not estimated anew, .*: pass States"):
        linear_path(one, a.params, b.params, task, n_alphas=3, buffers=a.buffers)
    (norm,), (other,) = pairs(small_conv_bn, 1)
    ends = state(norm).params, state(other).params
    anew, given_too = (linear_path(norm, *ends, images(), n_alphas=3, buffers=b) for b in (None, state(other).buffers))
    np.testing.assert_array_equal(anew.curves["test", "loss_nats"], given_too.curves["test", "loss_nats"])
    for buffers in (None, state(other).buffers):
        with pytest.raises(ValueError, match="reads buffers"):
            linear_path(norm, *ends, images(), n_alphas=3, buffers=buffers, batchnorm="keep")


def test_buffers_that_nothing_lies_between_must_agree():
    (one,), (two,) = pairs(Features, 1)
    two.order.copy_(two.order.flip(0))
    with pytest.raises(ValueError, match=r"\['order'\] differ"):
        linear_path(one, state(one), state(two), blobs(), n_alphas=3)


def test_a_diverged_end_leaves_the_other_as_it_is():
    (one,), (two,) = pairs(small_mlp, 1)
    task, a = blobs(), state(one)
    path = linear_path(one, a.params, {n: p * math.nan for n, p in state(two).params.items()}, task, n_alphas=3)
    loss, error = evaluate(one, a, task.test.x, task.test.y)
    np.testing.assert_allclose(path.curves["test", "loss_nats"], [float(loss), math.nan, math.nan])
    np.testing.assert_array_equal(path.curves["test", "error"], [float(error), 1, 1])


def test_a_path_of_another_loss():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    task = Task.from_tensors(x, x[:, :2].sin(), name="sines", validation_size=0.2, test_size=0.2, loss="squared_error")
    one, two = (build(lambda: nn.Linear(4, 2), seed) for seed in (0, 1))
    path = linear_path(one, state(one), state(two), task, n_alphas=3)
    middle = (one(task.test.x) + two(task.test.x)).detach() / 2
    expected = float((middle - task.test.y).square().mean())
    assert path.curves["test", "loss_nats"][1] == pytest.approx(expected, abs=TOLERANCE)
    assert np.isnan(path.curves["test", "error"]).all()


# What is the user's


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("own_buffers", [False, True])
def test_nothing_of_the_users_is_changed(own_buffers, execution):
    (one,), (two,) = pairs(small_conv_bn, 1)
    one.train()
    one[5].eval()
    one[1].momentum = 0.3
    masks, a, b = half_masks(one, 0), state(one), state(two)
    modes, before = [m.training for m in one.modules()], copy.deepcopy(one.state_dict())
    given_dicts = (masks, a.params, b.params, a.buffers)
    copies = copy.deepcopy(given_dicts)
    options = {"masks": masks, "n_alphas": 3, "execution": execution}
    linear_path(one, a.params, b.params, images(), buffers=a.buffers if own_buffers else None, **options)
    assert [m.training for m in one.modules()] == modes
    assert (one[1].momentum, one[5].momentum) == (0.3, 0.1)
    assert all(torch.equal(before[n], t) for n, t in one.state_dict().items())
    for given_dict, kept in zip(given_dicts, copies, strict=True):
        assert all(torch.equal(kept[n], t) for n, t in given_dict.items())


def test_parameters_of_a_live_module_will_do():
    (one,), (two,) = pairs(small_mlp, 1)
    path = linear_path(one, dict(one.named_parameters()), dict(two.named_parameters()), blobs(), n_alphas=3)
    same = linear_path(one, state(one).params, state(two).params, blobs(), n_alphas=3)
    np.testing.assert_array_equal(path.curves["test", "loss_nats"], same.curves["test", "loss_nats"])
    assert all(p.grad is None for p in one.parameters())


# Tables and refusals


def test_the_table_is_tidy():
    ones, twos = pairs(small_mlp, 2)
    a, b = (stack([state(m).params for m in models]) for models in (ones, twos))
    path = linear_path(ones[0], a, b, blobs(), n_alphas=4, splits=("train", "validation"))
    assert list(path.table.columns) == ["replica", "split", "alpha", "loss_nats", "error"]
    assert len(path.table) == 2 * 2 * 4
    for (split, replica), rows in path.table.groupby(["split", "replica"]):
        assert rows["alpha"].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        for metric in ("loss_nats", "error"):
            assert rows[metric].tolist() == path.curves[split, metric][:, replica].tolist()
    single = linear_path(ones[0], select(a, 0), select(b, 0), blobs())
    assert single.table["replica"].unique().tolist() == [0]
    assert len(single.alphas) == 31
    assert single.barrier().shape == ()


def test_a_split_named_twice_is_evaluated_once():
    (one,), (two,) = pairs(small_mlp, 1)
    path = linear_path(one, state(one).params, state(two).params, blobs(), n_alphas=3, splits=("test", "test"))
    assert path.curves["test", "error"].shape == (3,)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_alphas": 2}, "n_alphas, both ends included, must be at least 3: got 2"),
        ({"batchnorm": "reset"}, "batchnorm must be 'recalibrate' or 'keep': got 'reset'"),
        ({"splits": ("tset",)}, r"splits must be some of train, validation, test: got \['tset'\]"),
        ({"splits": ()}, r"splits must be some of .*: got \[\]"),
        (
            {"masks": {"fc9.weight": torch.ones(1)}},
            r"masks must name parameters of the model.*: unknown \['fc9.weight'\]",
        ),
        ({"masks": {"fc1.weight": torch.ones(6, 8) > 0}}, r"masks\['fc1.weight'\] must have shape \(8, 6\)"),
        ({"execution": "fast"}, "execution must be 'auto', 'loop' or 'vmap': got 'fast'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, match):
    (one,), (two,) = pairs(small_mlp, 1)
    with pytest.raises(ValueError, match=match):
        linear_path(one, state(one).params, state(two).params, blobs(), **options)


def test_ends_that_do_not_fit_are_refused():
    (one,), (two,) = pairs(small_mlp, 1)
    a, b = state(one).params, state(two).params
    for first, second in ((a, stack([b])), (stack([a] * 2), b), (stack([a] * 2), stack([b] * 3))):
        with pytest.raises(ValueError, match="must both be single or stacks of one length"):
            linear_path(one, first, second, blobs())
    with pytest.raises(ValueError, match=r"missing \['fc1.bias'\]"):
        linear_path(one, a, {n: p for n, p in b.items() if n != "fc1.bias"}, blobs())


def test_a_task_in_another_dtype_or_of_more_classes_is_refused():
    (one,), (two,) = pairs(small_mlp, 1)
    a, b = state(one), state(two)
    with pytest.raises(ValueError, match=r"x must have the dtype of params, torch\.float64: got torch\.float32"):
        linear_path(one, a, b, blobs(dtype=torch.float32), n_alphas=3)
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2 for 3 classes: got 0\.\.3"):
        linear_path(one, a, b, blobs(n_classes=4), n_alphas=3)


def test_asking_a_path_for_what_it_has_not_is_refused():
    (one,), (two,) = pairs(small_mlp, 1)
    path = linear_path(one, state(one).params, state(two).params, blobs(), n_alphas=3, splits=("train",))
    with pytest.raises(ValueError, match=r"split and metric must be one of .*: got \('test', 'error'\)"):
        path.barrier()
    with pytest.raises(ValueError, match=r"got \('train', 'accuracy'\)"):
        path.rise("accuracy", "train")
    with pytest.raises(ValueError, match="baseline must be one of"):
        path.barrier("error", "train", "min")
