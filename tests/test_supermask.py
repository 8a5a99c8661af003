"""Masks learned on frozen weights: masks, gradients and rescaling exact, learning equal to a plain loop."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from threading import Lock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import FLOAT_TOLERANCE, blobs, build, images, small_conv_bn, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import loss_and_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import ticketlab as tl
from ticketlab import masks as mask_ops
from ticketlab.data import batch_indices
from ticketlab.engine.supermask import RESCALING, Learned, Supermask, evaluations, learn_masks, rescaled
from ticketlab.engine.supermask.module import straight_through, top
from ticketlab.seeds import stream
from ticketlab.state import stack_states, state

F64 = torch.float64
RECIPE = tl.Recipe(steps=12, batch_size=16, optimizer="sgd", learning_rate=2.0, eval_every=6)


def learned(method="bernoulli", factory=small_mlp, seeds=(0, 1), task=None, recipe=RECIPE, **options):
    frozen = stack_states([state(build(factory, seed)) for seed in seeds])
    return learn_masks(build(factory), frozen, task or blobs(), recipe, seeds, method=method, **options)


# Masks


def test_straight_through_is_exactly_the_mask_and_passes_the_gradient_on():
    score = torch.randn(1000, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    soft = score.sigmoid()
    mask = straight_through(score > 0.3, soft)
    assert set(mask.tolist()) == {0.0, 1.0} and torch.equal(mask.bool(), score > 0.3)
    weight = torch.arange(1000.0)
    (mask * weight).sum().backward()
    torch.testing.assert_close(score.grad, weight * (soft * (1 - soft)).detach())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99), st.integers(0, 1000), st.booleans())
def test_top_keeps_the_largest_magnitudes_and_exactly_as_many(size, density, seed, ties):
    score = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=F64)
    score = score.round() if ties else score
    kept = size - math.floor((1 - density) * size + 0.5)
    if kept:
        mask = top(score, density)
        assert int(mask.sum()) == kept
        ranked = sorted(score.abs().tolist(), reverse=True)
        assert sorted(score.abs()[mask].tolist(), reverse=True) == ranked[:kept]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_rescaling_multiplies_by_a_power_of_size_over_kept(power):
    params = {"a": torch.ones(4, 5, dtype=F64), "b": torch.full((3,), 2.0, dtype=F64), "bias": torch.ones(2, dtype=F64)}
    masks = {"a": torch.zeros(4, 5, dtype=torch.bool), "b": torch.tensor([True, False, False])}
    masks["a"][0] = True  # 5 of 20
    new = rescaled(params, masks, power)
    assert torch.equal(new["a"], masks["a"] * 4.0**power) and new["bias"] is params["bias"]
    torch.testing.assert_close(new["b"], torch.tensor([2 * 3.0**power, 0, 0], dtype=F64))
    stacked = rescaled(*({n: torch.stack([t, t]) for n, t in d.items()} for d in (params, masks)), power, stacked=True)
    assert all(torch.equal(stacked[n][1], new[n]) for n in params)


def test_an_empty_layer_is_zero_and_not_infinite():
    new = rescaled({"a": torch.ones(3)}, {"a": torch.zeros(3, dtype=torch.bool)}, 1.0)
    assert new["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
def test_the_square_root_keeps_the_variance_of_preactivations_at_every_density(density):
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator, dtype=F64) for shape in ((400, 1000), (1000, 50)))
    mask = top(torch.rand(weight.shape, generator=generator, dtype=F64), density)
    dense, sparse = (w @ x for w in (weight, rescaled({"w": weight}, {"w": mask}, 0.5)["w"]))
    assert (sparse.var() / dense.var()).item() == pytest.approx(1, abs=0.05)


# Gradients


def with_scores(method, density=0.4):
    """The module with random scores and weights, and its batch."""
    model = build(small_mlp)
    module = Supermask(model, method, density, RESCALING[method]).double()
    begun = module.begin(state(model), 3)
    module.load_state_dict({**begun.params, **begun.buffers})
    for i, score in enumerate(module.scores):
        with torch.no_grad():
            score.copy_(torch.randn(score.shape, generator=stream("test", i), dtype=F64))
    task = blobs()
    return module, model, task.train.x[:20], task.train.y[:20]


@pytest.mark.parametrize("method", RESCALING)
def test_gradients_reach_the_scores_alone_and_equal_the_chain_rule_by_hand(method):
    module, model, x, y = with_scores(method)
    module.train()
    F.cross_entropy(module(x), y).backward()
    assert all(p.grad is None and not p.requires_grad for p in module.net.parameters())
    # by hand: the gradient at the masked weights of a plain copy, times dw'/dm, times dm/ds
    plain = copy.deepcopy(model)
    generator = stream("mask draw", 3, 0)
    scores = [s.detach() for s in module.scores]
    noise = [torch.rand(s.shape, generator=generator, dtype=F64) for s in scores]
    factors = {}
    for name, score, u in zip(module.names, scores, noise, strict=True):
        mask = u < score.sigmoid() if method == "bernoulli" else slow_top(score, 0.4)
        factors[name] = (mask.numel() / int(mask.sum())) ** RESCALING[method]
        plain.get_parameter(name).data.mul_(mask.double() * factors[name])
    F.cross_entropy(plain(x), y).backward()
    for name, score, parameter in zip(module.names, scores, module.scores, strict=True):
        p = score.sigmoid()
        slope = p * (1 - p) if method == "bernoulli" else score.sign()
        weight = model.get_parameter(name).detach()
        expected = plain.get_parameter(name).grad * weight * factors[name] * slope
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=FLOAT_TOLERANCE[F64])


def slow_top(score, density):
    n = score.numel() - math.floor((1 - density) * score.numel() + 0.5)
    order = sorted(range(score.numel()), key=lambda i: -abs(float(score.flatten()[i])))
    return torch.tensor([i in order[:n] for i in range(score.numel())]).view_as(score)


# Learning


def plain_learning(model, task, recipe, seed, method, density):
    """One network after the paper's recipe in words: scores as tensors, plain momentum, masks by sorting."""
    names = mask_ops.prunable(model)
    weights = {n: model.get_parameter(n).detach() for n in names}
    scores = {}
    for i, name in enumerate(names):
        first = torch.empty(weights[name].shape, dtype=F64)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=stream(f"score {i}", seed))
        scores[name] = first if method == "edge_popup" else torch.full_like(first, math.log(density / (1 - density)))
    velocity = {n: torch.zeros_like(s) for n, s in scores.items()}
    for step in range(recipe.steps):
        index = batch_indices(len(task.train), recipe.batch_size, seed, step)
        generator = stream("mask draw", seed, step)
        net, factors = copy.deepcopy(model), {}
        for name in names:
            if method == "bernoulli":
                draw = torch.rand(weights[name].shape, generator=generator, dtype=F64)
                mask = draw < torch.sigmoid(scores[name])
            else:
                mask = slow_top(scores[name], density)
            factors[name] = (mask.numel() / int(mask.sum())) ** RESCALING[method]
            net.get_parameter(name).data = weights[name] * mask * factors[name]
        F.cross_entropy(net(task.train.x[index]), task.train.y[index]).backward()
        for name in names:
            at_mask = net.get_parameter(name).grad * weights[name] * factors[name]
            p = torch.sigmoid(scores[name])
            gradient = at_mask * (p * (1 - p) if method == "bernoulli" else scores[name].sign())
            velocity[name] = recipe.momentum * velocity[name] + gradient
            scores[name] = scores[name] - recipe.learning_rate * velocity[name]
    return scores


@pytest.mark.parametrize("method", RESCALING)
def test_learning_a_stack_equals_plain_loops_over_single_networks(method):
    task, found = blobs(), learned(method, density=0.3)
    for r, seed in enumerate((0, 1)):
        scores = plain_learning(build(small_mlp, seed), task, RECIPE, seed, method, 0.3)
        for name, expected in scores.items():
            torch.testing.assert_close(found.scores[name][r], expected, rtol=0, atol=1e-9)
            mask = expected > 0 if method == "bernoulli" else slow_top(expected, 0.3)
            assert torch.equal(found.masks[name][r], mask)


@pytest.mark.parametrize("method", RESCALING)
@pytest.mark.parametrize("factory", [small_mlp, small_conv_bn])
def test_weights_stay_exactly_as_given_and_metrics_are_those_of_the_masked_network(method, factory):
    task = blobs() if factory is small_mlp else images()
    found = learned(method, factory, task=task)
    for r, seed in enumerate((0, 1)):
        given_state = state(build(factory, seed))
        assert all(torch.equal(found.frozen.params[n][r], p) for n, p in given_state.params.items())
        plain = build(factory, seed)
        tensors = {**found.params, **found.frozen.buffers}
        plain.load_state_dict({n: t[r] for n, t in tensors.items()})
        loss, error = loss_and_error(plain, task.test.x, task.test.y)
        assert found.metrics["test_loss_nats"][r] == pytest.approx(loss, abs=1e-9)
        assert found.metrics["test_error"][r] == pytest.approx(error)
        kept = sum(int(mask[r].sum()) for mask in found.masks.values())
        assert found.metrics["kept"][r] == kept
    mask_ops.validate(build(factory), found.masks)


def test_statistics_of_batch_norm_are_those_of_the_masked_network():
    found = learned("edge_popup", small_conv_bn, task=images())
    assert (found.frozen.buffers["1.num_batches_tracked"] == RECIPE.steps).all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.77])
def test_edge_popup_keeps_its_density_in_every_layer(density):
    found = learned("edge_popup", density=density)
    for mask in found.masks.values():
        size = mask[0].numel()
        assert mask.flatten(1).sum(1).tolist() == [size - mask_ops.n_removed(size, 1 - density)] * 2


def test_learning_is_a_function_of_its_seeds():
    before = torch.random.get_rng_state()
    one, again, other = learned(), learned(), learned(draw_seeds=(5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(s, again.scores[n]) for n, s in one.scores.items())
    assert not any(torch.equal(s, other.scores[n]) for n, s in one.scores.items())


@pytest.mark.parametrize("method", RESCALING)
def test_masks_alone_learn_the_blobs(method):
    rates = {"bernoulli": 20.0, "edge_popup": 0.1}
    recipe = tl.Recipe(steps=300, batch_size=32, optimizer="sgd", learning_rate=rates[method])
    wide = lambda: tl.models.mlp((6,), 3, hidden=(40, 20))  # noqa: E731
    found = learned(method, wide, recipe=recipe)
    table = evaluations(build(wide), found, blobs().test)
    how = "sampled" if method == "bernoulli" else "deterministic"
    assert table[table["evaluation"] == how]["error"].mean() < 0.2  # chance is 0.67


def test_a_deterministic_mask_that_keeps_nothing_of_a_layer_warns():
    slow = replace(RECIPE, learning_rate=1e-3)
    with pytest.warns(RuntimeWarning, match=r"keeps no weight of 'fc1\.weight' in replicas \[0, 1\], 'fc2"):
        found = learned(density=0.02, recipe=slow)
    assert found.metrics["kept"].tolist() == [0, 0]
    sampled = evaluations(build(small_mlp), found, blobs().test).query("evaluation == 'sampled'")
    assert 0 < sampled["density"].mean() < 0.06
    assert learned(density=0.6, recipe=slow).metrics["density"].tolist() == [1, 1]


# Evaluation


def by_hand(logits, weights, power=1.0):
    """Learned masks with these logits on a bias-free linear map, R = 1."""
    scores, params = {"weight": logits[None]}, {"weight": weights[None]}
    masks = {"weight": logits[None] > 0}
    return Learned("bernoulli", masks, scores, tl.State(params, {}), power, None, None, 0.0)


def enumerated(logits, weights, x, y):
    """Expected loss and error over all masks, one after another."""
    p, total = torch.sigmoid(logits), np.zeros(2)
    for bits in itertools.product((0.0, 1.0), repeat=logits.numel()):
        mask = torch.tensor(bits, dtype=F64).view_as(logits)
        chance = float(torch.where(mask > 0, p, 1 - p).prod())
        w = weights * mask * (mask.numel() / max(1.0, float(mask.sum())))
        outputs = x @ w.T
        loss = F.cross_entropy(outputs, y).item()
        total += chance * np.array([loss, (outputs.argmax(1) != y).double().mean().item()])
    return total


def test_sampled_evaluation_agrees_with_enumerating_every_mask():
    generator = torch.Generator().manual_seed(4)
    logits, weights = (torch.randn(3, 2, generator=generator, dtype=F64) for _ in range(2))
    x = torch.randn(30, 2, generator=generator, dtype=F64)
    y = torch.randint(0, 3, (30,), generator=generator)
    model, split = build(lambda: nn.Linear(2, 3, bias=False)), tl.Split(x, y)
    table = evaluations(model, by_hand(logits, weights), split, draws=400)
    sampled = table[table["evaluation"] == "sampled"]
    assert len(sampled) == 400
    for column, expected in zip(("loss_nats", "error"), enumerated(logits, weights, x, y), strict=True):
        se = sampled[column].std() / math.sqrt(400)
        assert abs(sampled[column].mean() - expected) < 4 * se
    p = torch.sigmoid(logits)
    assert abs(sampled["density"].mean() - p.mean()) < 4 * sampled["density"].std() / math.sqrt(400)
    soft = weights * p * (6 / p.sum())
    (loss,) = table.loc[table["evaluation"] == "expected", "loss_nats"]
    assert loss == pytest.approx(F.cross_entropy(x @ soft.T, y).item(), abs=1e-12)


def test_evaluations_name_every_way_and_draw():
    table = evaluations(build(small_mlp), learned(), blobs().test, draws=3)
    assert table.groupby("evaluation").size().to_dict() == {"deterministic": 2, "expected": 2, "sampled": 6}
    again = evaluations(build(small_mlp), learned(), blobs().test, draws=3)
    assert table.equals(again)
    other = evaluations(build(small_mlp), learned(), blobs().test, draws=3, seed=1)
    assert not table.equals(other)
    popup = evaluations(build(small_mlp), learned("edge_popup"), blobs().test)
    assert popup["evaluation"].tolist() == ["deterministic"] * 2


@pytest.mark.parametrize("method", RESCALING)
def test_the_deterministic_evaluation_is_the_last_of_training(method):
    found = learned(method)
    table = evaluations(build(small_mlp), found, blobs().test)
    rows = table[table["evaluation"] == "deterministic"]
    np.testing.assert_allclose(rows["loss_nats"], found.metrics["test_loss_nats"], atol=1e-12)
    np.testing.assert_allclose(rows["density"], found.metrics["density"], atol=1e-12)


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "bernouli"}, r"unknown method 'bernouli'\. Did you mean 'bernoulli'"),
        ({"density": 1.0}, r"density must lie in \(0, 1\): got 1.0"),
        ({"method": "edge_popup", "density": 0.02}, r"0.02 leaves none in \['output.weight'\]"),
        ({"draw_seeds": (1,)}, "one replica for each order seed and draw seed: got 2, 2, 1"),
    ],
)
def test_what_cannot_be_learned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learned(**options)


def test_a_single_network_must_be_stacked():
    with pytest.raises(ValueError, match=r"frozen must be stacked .* got None, 1, 1"):
        learn_masks(build(small_mlp), state(build(small_mlp)), blobs(), RECIPE, (0,))


# Networks as users bring them


class Checkpointed(nn.Module):
    """Computed again on the way back, from whatever weights are there by then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.output = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.output(checkpoint(lambda h: self.middle(h).tanh(), self.first(x).tanh(), use_reentrant=False))


class Shared(nn.Module):
    """A module under two names, a weight in two modules, a hook that reads its module's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.output = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again, self.other.weight = self.first, self.first.weight
        self.output.register_forward_hook(lambda module, inputs, output: output * module.weight.square().sum())

    def forward(self, x):
        return self.output(self.other(self.again(self.first(x).tanh()).tanh()).tanh())


class Recurrent(nn.Module):
    """A list of its weights is kept by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.output = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(self.rnn(x.view(-1, 3, 2))[0][:, -1])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.output = nn.Linear(6, 3)

    def forward(self, x):
        return self.output(self.block(torch.stack([x, -x], 1)).mean(1))


@pytest.mark.parametrize("method", RESCALING)
@pytest.mark.parametrize("factory", [Checkpointed, Shared, Recurrent, Attends])
def test_learning_follows_a_plain_loop_whatever_the_network(factory, method):
    task, found = blobs(), learned(method, factory, density=0.8)
    for r, seed in enumerate((0, 1)):
        for name, expected in plain_learning(build(factory, seed), task, RECIPE, seed, method, 0.8).items():
            torch.testing.assert_close(found.scores[name][r], expected, rtol=0, atol=1e-9)
        masked = {n: t[r] for n, t in found.params.items()}
        plain = build(factory, seed)
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p.copy_(masked[name])
        loss, _ = loss_and_error(plain, task.test.x, task.test.y)
        assert found.metrics["test_loss_nats"][r] == pytest.approx(loss, abs=1e-9)


def test_what_the_user_names_is_masked_and_nothing_else():
    found = learned(prunable=("fc2.*",), density=0.6)
    assert list(found.masks) == list(found.scores) == ["fc2.weight"]
    given_state = state(build(small_mlp, 1))
    assert all(torch.equal(found.frozen.params[n][1], p) for n, p in given_state.params.items())
    assert torch.equal(found.params["fc1.weight"][1], given_state.params["fc1.weight"])


class Closure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.output = nn.Linear(6, 5), nn.Linear(5, 3)
        weight = self.first.weight
        self.read = lambda x: (x @ weight.T).tanh()

    def forward(self, x):
        return self.output(self.read(x))


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.output, self.lock = nn.Linear(6, 3), Lock()

    def forward(self, x):
        return self.output(x)


@pytest.mark.parametrize("method", RESCALING)
def test_weights_that_no_mask_can_reach_are_refused(method):
    with pytest.raises(ValueError, match="a mask must reach all that is computed with a weight"):
        learned(method, Closure)
    with pytest.raises(ValueError, match="masks are learned on a copy of the model: Locked cannot be deep-copied"):
        learned(method, Locked)


def test_a_module_that_has_run_can_be_copied_and_shows_itself_in_a_line():
    module, _, x, _ = with_scores("edge_popup")
    with torch.no_grad():
        outputs = module(x)
        again = copy.deepcopy(module)
        again.scores[0].zero_()
        assert not torch.equal(again(x), outputs) and torch.equal(module(x), outputs)
    assert len(repr(learned())) < 200
