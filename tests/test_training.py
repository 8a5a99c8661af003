"""The stacked loop against a plain loop, and what it promises beside that."""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import replace
from itertools import islice

import pytest
import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp, starts
from reference import loss_and_error, train_alone
from torch import nn
from torch.utils.checkpoint import checkpoint

from ticketlab.data import Task
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.training import _stops, train
from ticketlab.masks import ones
from ticketlab.seeds import initialise
from ticketlab.state import State, stack, stack_states, state

SGD = Recipe(steps=40, batch_size=16, optimizer="sgd", learning_rate=0.05, weight_decay=1e-3, eval_every=7)
ADAM = Recipe(steps=40, batch_size=16, optimizer="adam", learning_rate=3e-3, eval_every=7)
RECIPES = {
    "sgd_momentum": SGD,
    "nesterov_step": Recipe(**{**SGD.__dict__, "nesterov": True, "schedule": "step", "milestones": (10, 30)}),
    "adam": ADAM,
    "adamw_cosine_warmup": Recipe(
        **{**ADAM.__dict__, "optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 5}
    ),
}
PROBLEMS = {"mlp": (small_mlp, blobs), "conv_bn": (small_conv_bn, images)}


def stacked(factory, seeds):
    models = [build(factory, seed) for seed in seeds]
    masks = [half_masks(m, seed) for m, seed in zip(models, seeds, strict=True)]
    return models, masks


@pytest.mark.parametrize("execution", ["loop", "vmap"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_stack_equals_separate_plain_loops(recipe, problem, execution):
    factory, make_task = PROBLEMS[problem]
    task, seeds = make_task(), (3, 4, 5)
    models, masks = stacked(factory, seeds)
    outcome = train(
        models[0],
        starts(stack_states([state(m) for m in models]), stack(masks), seeds),
        task,
        recipe,
        execution=execution,
    )
    for r, (model, mask, seed) in enumerate(zip(models, masks, seeds, strict=True)):
        alone = train_alone(model, mask, task, recipe, seed)
        expected = state(alone)
        for part, given in zip(expected, outcome.end.select(r), strict=True):
            for name, tensor in part.items():
                torch.testing.assert_close(given[name], tensor, rtol=1e-10, atol=1e-10)
        loss, error = loss_and_error(alone, task.test.x, task.test.y)
        row = outcome.metrics.iloc[r]
        assert row["test_loss_nats"] == pytest.approx(loss, abs=1e-10)
        assert row["test_error"] == error


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_pruned_weights_stay_zero_and_live_ones_move(execution):
    models, masks = stacked(small_mlp, (0, 1))
    start = stack_states([state(m) for m in models])
    outcome = train(models[0], starts(start, stack(masks), (0, 1)), blobs(), SGD, execution=execution)
    for name, mask in stack(masks).items():
        end = outcome.end.params[name]
        assert torch.equal(end != 0, mask)  # the density after training is the mask's, to the weight
        assert (end[mask] != start.params[name][mask]).all()


@pytest.mark.parametrize("execution", ["loop", "vmap"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("recipe", ["sgd", "adam"])
def test_frozen_replicas_keep_their_pruned_weights(recipe, problem, execution):
    factory, make_task = PROBLEMS[problem]
    recipe = {"sgd": Recipe(**{**SGD.__dict__, "weight_decay": 0.0}), "adam": ADAM}[recipe]
    task, seeds, frozen = make_task(), (3, 4, 5), (True, False, True)
    models, masks = stacked(factory, seeds)
    start = stack_states([state(m) for m in models])
    outcome = train(models[0], starts(start, stack(masks), seeds, frozen=frozen), task, recipe, execution=execution)
    for r, (model, mask, seed) in enumerate(zip(models, masks, seeds, strict=True)):
        alone = train_alone(model, mask, task, recipe, seed, frozen=frozen[r])
        torch.testing.assert_close(outcome.end.select(r).params, state(alone).params, rtol=1e-10, atol=1e-10)
        assert outcome.metrics["test_error"][r] == loss_and_error(alone, task.test.x, task.test.y)[1]
        for name, m in mask.items():
            expected = start.params[name][r][~m] * float(frozen[r])
            assert torch.equal(outcome.end.params[name][r][~m], expected)  # to the bit, where they started


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_each_replica_at_its_own_constant_rate(recipe, problem):
    factory, make_task = PROBLEMS[problem]
    task, seeds, rates = make_task(), (3, 4, 5), (None, 1e-3, 7e-3)
    models, masks = stacked(factory, seeds)
    start = stack_states([state(m) for m in models])
    outcome = train(models[0], starts(start, stack(masks), seeds, learning_rates=rates), task, recipe, first_step=4)
    for r, (model, mask, seed) in enumerate(zip(models, masks, seeds, strict=True)):
        alone = train_alone(model, mask, task, recipe, seed, first_step=4, learning_rate=rates[r])
        torch.testing.assert_close(outcome.end.select(r).params, state(alone).params, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_without_frozen_weights_rates_or_dynamics_the_bits_are_the_same(execution):
    models, masks = stacked(small_mlp, (0, 1))
    start = stack_states([state(m) for m in models])
    none = {"frozen": (False, False), "learning_rates": (None, None), "dynamics": (None, None)}
    plain = train(models[0], starts(start, stack(masks), (0, 1)), blobs(), SGD, execution=execution)
    given = train(models[0], starts(start, stack(masks), (0, 1), **none), blobs(), SGD, execution=execution)
    assert all(torch.equal(plain.end.params[n], given.end.params[n]) for n in start.params)


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_going_on_from_a_snapshot_takes_the_same_batches_and_rates(execution):
    recipe = RECIPES["nesterov_step"]
    models, masks = stacked(small_mlp, (0, 1))
    task, start = blobs(), stack_states([state(m) for m in models])
    whole = train(
        models[0], starts(start, stack(masks), (5, 6)), task, recipe, snapshot_steps=(0, 13, 40), execution=execution
    )
    rest = train(
        models[0], starts(whole.snapshots[13], stack(masks), (5, 6)), task, recipe, first_step=13, execution=execution
    )
    at_13 = copy.deepcopy(models[0])
    at_13.load_state_dict(whole.snapshots[13].select(0).params)
    alone = train_alone(at_13, masks[0], task, recipe, 5, first_step=13)
    torch.testing.assert_close(rest.end.select(0).params, state(alone).params, rtol=1e-10, atol=1e-10)
    assert rest.curves["step"].min() == 14
    for name, tensor in whole.end.params.items():
        assert torch.equal(whole.snapshots[40].params[name], tensor)
        assert torch.equal(whole.snapshots[0].params[name] != 0, (start.params[name] != 0) & (tensor != 0))


def test_augmented_batches_are_the_plain_loops():
    base = images()
    task = Task(base.name, base.train, base.validation, base.test, base.n_classes, "crop_flip")
    models, masks = stacked(small_conv_bn, (0, 1))
    outcome = train(models[0], starts(stack_states([state(m) for m in models]), stack(masks), (8, 9)), task, SGD)
    alone = state(train_alone(models[1], masks[1], task, SGD, 9))
    torch.testing.assert_close(outcome.end.select(1).params, alone.params, rtol=1e-10, atol=1e-10)


def test_early_stop_is_the_least_validation_loss_of_the_curve():
    models, masks = stacked(small_mlp, (0, 1, 2))
    outcome = train(models[0], starts(stack_states([state(m) for m in models]), stack(masks), (0, 1, 2)), blobs(), ADAM)
    assert sorted(outcome.curves["step"].unique()) == [7, 14, 21, 28, 35, 40]
    for r, row in outcome.metrics.iterrows():
        curve = outcome.curves[outcome.curves["replica"] == r]
        best = curve.loc[curve["loss_nats"].idxmin()]
        assert row["early_stop_step"] == best["step"]
        assert row["early_stop_validation_loss_nats"] == pytest.approx(best["loss_nats"], abs=1e-12)
        alone = train_alone(models[r], masks[r], blobs(), Recipe(**{**ADAM.__dict__, "steps": int(best["step"])}), r)
        assert row["early_stop_test_error"] == loss_and_error(alone, blobs().test.x, blobs().test.y)[1]


@pytest.mark.parametrize("execution", ["loop", "vmap"])
def test_a_diverging_replica_is_frozen_and_the_others_are_untouched(execution):
    models, masks = stacked(small_mlp, (0, 1))
    with torch.no_grad():
        models[1][1].weight[0, 0] = math.nan
    bad = stack_states([state(m) for m in models])
    ones = {n: torch.ones_like(m) for n, m in stack(masks).items()}
    with pytest.warns(RuntimeWarning, match="replica 1 is not finite at step 0"):
        outcome = train(models[0], starts(bad, ones, (0, 1)), blobs(), SGD, execution=execution)
    alone = train(
        models[0], starts(stack_states([state(models[0])]), {n: m[:1] for n, m in ones.items()}, (0,)), blobs(), SGD
    )
    torch.testing.assert_close(outcome.end.select(0).params, alone.end.select(0).params, rtol=1e-10, atol=1e-10)
    assert outcome.metrics["diverged_step"].tolist()[1] == 0
    assert outcome.metrics["test_error"].isna().tolist() == [False, True]
    for name, tensor in outcome.end.params.items():  # frozen where it was last evaluated: at the start
        torch.testing.assert_close(tensor[1], bad.params[name][1], equal_nan=True, rtol=0, atol=0)


def test_a_replica_that_explodes_later_keeps_its_last_finite_weights():
    recipe = Recipe(steps=30, batch_size=16, optimizer="sgd", learning_rate=1e4, momentum=0.0, eval_every=1)
    model = build(small_mlp)
    start = stack_states([state(model)])
    ones = {n: torch.ones_like(p, dtype=torch.bool) for n, p in start.params.items() if p.ndim == 3}
    with pytest.warns(RuntimeWarning, match="is not finite at step"):
        outcome = train(
            model, starts(start, ones, (0,)), blobs(), Recipe(**{**recipe.__dict__, "learning_rate": 1e300})
        )
    assert all(p.isfinite().all() for p in outcome.end.params.values())


def test_the_users_model_is_not_changed():
    model = build(small_conv_bn)
    model.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    masks = stack([half_masks(model, 0)] * 2)
    train(model, starts(stack_states([state(model)] * 2), masks, (0, 1)), images(), SGD)
    assert not model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_do_not_move_and_the_thread_count_is_given_back():
    model = build(small_mlp)
    model[1].bias.requires_grad_(False)
    start, threads = stack_states([state(model)] * 3), torch.get_num_threads()
    masks = stack([half_masks(model, 0)] * 3)
    for execution in ("loop", "vmap"):
        outcome = train(model, starts(start, masks, (0, 1, 2)), blobs(), SGD, execution=execution)
        assert torch.equal(outcome.end.params["fc1.bias"], start.params["fc1.bias"])
        assert not torch.equal(outcome.end.params["fc2.bias"], start.params["fc2.bias"])
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, r"steps must lie in \[1, 10\^9\]"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs a momentum"),
        ({"milestones": (3,)}, "milestones belong to schedule 'step'"),
        ({"schedule": "step", "milestones": (30, 3)}, "milestones must rise"),
        ({"warmup_steps": 99}, "warmup_steps must lie"),
        ({"decay": 0.0}, "decay must lie"),
        ({"weight_decay": math.inf}, "weight_decay must be at least 0 and finite"),
        ({"optimizer": "adam", "nesterov": True}, "belong to optimizer 'sgd'"),
        ({"optimizer": "adamw", "momentum": 0.5}, "belong to optimizer 'sgd'"),
        ({"decay": 0.5}, "decay belongs to schedule 'step'"),
        ({"schedule": "step"}, "needs milestones"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        Recipe(**{**SGD.__dict__, **change})


def test_schedules_by_closed_form():
    step = Recipe(steps=100, schedule="step", milestones=(50, 80), learning_rate=1.0)
    assert [step.learning_rate_at(s) for s in (0, 49, 50, 79, 80)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = Recipe(steps=100, schedule="cosine", learning_rate=1.0, warmup_steps=10)
    assert cosine.learning_rate_at(0) == pytest.approx(0.1)
    assert cosine.learning_rate_at(50) == pytest.approx(0.5)
    assert cosine.learning_rate_at(100) == pytest.approx(0.0)


def test_inputs_that_do_not_fit_are_refused():
    model = build(small_mlp)
    start, masks = stack_states([state(model)] * 2), stack([half_masks(model, 0)] * 2)
    with pytest.raises(ValueError, match="at least one start"):
        train(model, [], blobs(), SGD)
    with pytest.raises(ValueError, match="number 0 has a replica axis"):
        train(model, [Start(start, masks, 0)], blobs(), SGD)
    with pytest.raises(ValueError, match=r"first step must lie in \[0, 40\)"):
        train(model, starts(start, masks, (0, 1)), blobs(), SGD, first_step=40)
    with pytest.raises(ValueError, match="snapshot steps must lie"):
        train(model, starts(start, masks, (0, 1)), blobs(), SGD, snapshot_steps=(41,))
    with pytest.raises(ValueError, match=r"masks\['fc1.weight'\] must have shape"):
        train(model, [Start(state(model), {"fc1.weight": torch.ones(3, 3) > 0}, 0)], blobs(), SGD)
    with pytest.raises(ValueError, match=r"weight decay would move frozen weights: got 0\.001"):
        train(model, starts(start, masks, (0, 1), frozen=(False, True)), blobs(), SGD)
    with pytest.raises(ValueError, match=r"positive and finite, or None for the schedule: got 0\.0"):
        train(model, starts(start, masks, (0, 1), learning_rates=(None, 0.0)), blobs(), SGD)
    with pytest.raises(ValueError, match="need the loop"):
        train(model, starts(start, masks, (0, 1), learning_rates=(None, 0.1)), blobs(), SGD, execution="vmap")


def test_looking_for_draws_leaves_the_start_and_its_statistics_alone():
    model = build(small_conv_bn)
    start = stack_states([state(model)])
    before = start.clone()
    train(model, starts(start, stack([half_masks(model, 0)]), (0,)), images(), Recipe(steps=1, batch_size=4))
    assert all(torch.equal(b, before.buffers[n]) for n, b in start.buffers.items())


# Modules as users write them: the same numbers as in a plain loop.


class Hooked(nn.Module):
    """A parameter that only a hook reaches, through a closure over the module or over the parameter itself."""

    def __init__(self, captured: bool) -> None:
        super().__init__()
        self.a, self.o, self.alpha = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(8))
        alpha = self.alpha
        self.a.register_forward_hook((lambda m, i, o: o * alpha) if captured else (lambda m, i, o: o * self.alpha))

    def forward(self, x):
        return self.o(torch.tanh(self.a(x)))


class Rebound(nn.Module):
    """Buffers that the forward pass replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.mean, self.seen = 0.9 * self.mean + 0.1 * h.detach().mean(0), self.seen + 1
        return self.o(torch.relu(h - self.mean))


class Kept(nn.Module):
    """Keeps an activation and a list, and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.all = nn.Linear(6, 8), nn.Linear(8, 3), []

    def forward(self, x):
        self.h = torch.relu(self.a(x.sub_(0.5)))
        self.all.append(self.h)
        return self.o(self.h)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        body = lambda h: torch.tanh(self.a(torch.tanh(h)))  # noqa: E731
        return self.o(checkpoint(body, self.i(x), use_reentrant=False))


class TwoNames(nn.Module):
    """One layer under two names, and a weight tied across modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = self.a
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.o(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.again(torch.tanh(self.a(x)))))))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.o(self.r(x.unflatten(1, (3, 2)))[0][:, -1])


class Locked(nn.Module):
    """A module that deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.lock = nn.Linear(6, 8), nn.Linear(8, 3), threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.o(torch.relu(self.a(x)))


USERS = {
    "hook over the module": lambda: Hooked(False),
    "hook over the parameter": lambda: Hooked(True),
    **{f.__name__: f for f in (Rebound, Kept, Checkpointed, TwoNames, Recurrent, Locked)},
}


@pytest.mark.parametrize("execution", ["loop", "auto"])
@pytest.mark.parametrize("factory", USERS.values(), ids=USERS.keys())
def test_users_modules_train_as_in_a_plain_loop_and_stay_as_they_were(factory, execution):
    model, task, seeds = build(factory, 7), blobs(), (3, 4)
    begun = [state(build(factory, seed)) for seed in (0, 1)]
    before = [(m.__dict__.copy(), [*m._parameters.values(), *m._buffers.values()]) for m in model.modules()]
    values = {n: t.clone() for n, t in model.state_dict().items()}
    inputs = task.test.x.clone()
    masks = {n: m.clone() for n, m in ones(model).items()}
    for mask in masks.values():
        mask.view(-1)[::3] = False
    outcome = train(
        model, [Start(s, masks, seed) for s, seed in zip(begun, seeds, strict=True)], task, SGD, execution=execution
    )
    assert torch.equal(inputs, task.test.x)
    for module, (attributes, tensors) in zip(model.modules(), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
        assert all(
            a is b for a, b in zip([*module._parameters.values(), *module._buffers.values()], tensors, strict=True)
        )
    assert getattr(model, "all", []) == []
    assert all(torch.equal(values[n], t) for n, t in model.state_dict().items())
    for r, seed in enumerate(seeds):
        net = build(factory, r)  # hooks of its own: train_alone would copy it
        alone = train_alone(net, masks, task, SGD, seed, copies=False)
        for part, given in zip(state(alone), outcome.end.select(r), strict=True):
            for name, tensor in part.items():
                torch.testing.assert_close(given[name], tensor, rtol=1e-10, atol=1e-10)
        loss, _ = loss_and_error(alone, task.test.x, task.test.y, copies=False)
        assert outcome.metrics.iloc[r]["test_loss_nats"] == pytest.approx(loss, abs=1e-10)


def test_vmap_that_does_not_follow_is_refused_where_it_is_asked_for():
    for factory in (Rebound, Recurrent):
        model = build(factory)
        begun = [Start(state(model), {}, seed) for seed in (0, 1)]
        with pytest.raises(ValueError, match="vmap cannot follow this model as it trains"):
            train(model, begun, blobs(), SGD, execution="vmap")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_half_precision_steps_as_the_unfused_optimizer_does(optimizer):
    recipe = Recipe(steps=60, batch_size=16, optimizer=optimizer, learning_rate=0.01, eval_every=60)
    task, model = blobs().to(dtype=torch.bfloat16), build(small_mlp, 0, torch.bfloat16)
    outcome = train(model, [Start(state(model), {}, 3)], task, recipe)
    alone = train_alone(model, {}, task, recipe, 3)
    assert all(torch.equal(p, outcome.end.params[n][0]) for n, p in state(alone).params.items())


def test_adam_in_float16_is_refused():
    model = build(small_mlp, 0, torch.float16)
    with pytest.raises(ValueError, match="eps = 1e-8, which is 0 in float16"):
        train(model, [Start(state(model), {}, 0)], blobs().to(dtype=torch.float16), ADAM)


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.o = nn.Linear(6, 8), nn.Parameter(torch.ones(5, dtype=torch.cfloat)), nn.Linear(8, 3)

    def forward(self, x):
        return self.o(torch.relu(torch.fft.irfft(torch.fft.rfft(self.a(x)) * self.w, n=8)))


def test_complex_parameters_train_as_in_a_plain_loop():
    model, task = initialise(Spectral, 0), blobs(dtype=torch.float32)
    outcome = train(model, [Start(state(model), {}, 3)], task, ADAM)
    for name, tensor in state(train_alone(model, {}, task, ADAM, 3)).params.items():
        torch.testing.assert_close(outcome.end.params[name][0], tensor)


def test_outputs_that_do_not_fit_the_task_are_refused_by_name():
    task = blobs()
    for factory, match in (
        (lambda: nn.Linear(6, 2), "labels must be in 0..1"),
        (lambda: nn.Linear(6, 1), "two classes at least"),
        (lambda: nn.LSTM(6, 3), "one floating tensor .* got tuple"),
        (lambda: nn.Linear(5, 3), r"Linear fails on examples of shape \(6,\)"),
    ):
        model = build(factory)
        with pytest.raises(ValueError, match=match):
            train(model, [Start(state(model), {}, 0)], task, SGD)


def test_the_hook_sees_every_look():
    seen = []
    model = build(small_mlp)
    outcome = train(
        model, [Start(state(model), {}, 0)], blobs(), SGD, on_eval=lambda step, rows: seen.append((step, rows))
    )
    assert [step for step, _ in seen] == [7, 14, 21, 28, 35, 40]
    assert [rows[0]["loss_nats"] for _, rows in seen] == outcome.curves["loss_nats"].tolist()


class Clipped(nn.Module):
    """Gradients are clipped by hooks on the parameters; a weight gets another tensor in each training pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.output = nn.Linear(6, 8), nn.Linear(8, 3)
        for p in self.parameters():
            p.register_hook(lambda g: g.clamp(-0.01, 0.01))

    def forward(self, x):
        if self.training:
            self.fc.weight.data = self.fc.weight.data / self.fc.weight.data.norm(dim=1, keepdim=True).clamp(min=0.3)
        return self.output(torch.tanh(self.fc(x)))


def test_hooks_on_parameters_and_weights_put_in_place_train_as_in_a_plain_loop():
    task, recipe, model = blobs(), Recipe(steps=7, batch_size=8, eval_every=3), build(Clipped)
    with torch.no_grad():
        outcome = train(model, [Start(state(model), {}, 0)], task, recipe, progress=False)
    alone = train_alone(build(Clipped), {}, task, recipe, 0, copies=False)
    for name, p in alone.named_parameters():
        torch.testing.assert_close(outcome.end.params[name][0], p.detach(), rtol=1e-12, atol=1e-12)


class Hidden(nn.Module):
    """A running mean in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mean = nn.Linear(6, 3), 0.0

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean().item()
        return self.a(x - self.mean)


def test_state_that_is_neither_parameter_nor_buffer_is_refused():
    model = build(Hidden)
    with pytest.raises(ValueError, match="must be a parameter or a buffer"):
        train(model, [Start(state(model), {}, 0)], blobs(), SGD)


class KeepsAlias(nn.Module):
    """A tensor in the memory of a weight, which plain training moves with it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.output = nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)
        self.kept = [self.fc1.weight.detach()]

    def forward(self, x):
        return self.output(torch.relu(self.fc1(x) + x @ self.kept[0]))


def test_what_shares_memory_with_a_weight_trains_as_in_a_plain_loop():
    task, model = blobs(), build(KeepsAlias, 3)
    masks = half_masks(model, 3)
    outcome = train(model, starts(stack_states([state(model)]), stack([masks]), (3,)), task, SGD)
    plain = train_alone(model, masks, task, SGD, 3, copies=False)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(outcome.end.params[name][0], p.detach(), rtol=1e-10, atol=1e-10)


def test_a_lost_replica_first_does_not_hide_what_the_module_is():
    """Of NaN everything equals everything: copies of this module stand alone in nothing else."""
    task, model = blobs(), build(lambda: Hooked(True))
    whole = state(model)
    lost = State({n: torch.full_like(p, math.nan) for n, p in whole.params.items()}, whole.buffers)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        outcome = train(model, [Start(lost, {}, 0), Start(whole, {}, 1)], task, SGD, progress=False)
    alone = train_alone(build(lambda: Hooked(True)), {}, task, SGD, 1, copies=False)
    for name, p in alone.named_parameters():
        torch.testing.assert_close(outcome.end.params[name][1], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("problem", [(small_mlp, blobs), (small_conv_bn, images)], ids=["mlp", "conv"])
def test_by_the_loop_bits_depend_neither_on_neighbours_nor_on_threads(problem):
    factory, make_task = problem
    task, models = make_task(dtype=torch.float32), [build(factory, seed, torch.float32) for seed in range(3)]
    begun = [Start(state(model), {}, seed) for seed, model in enumerate(models)]
    before = torch.get_num_threads()
    ends = []
    try:
        for threads, chosen in ((1, begun), (2, begun), (2, begun[:1]), (2, [begun[1], begun[0]])):
            torch.set_num_threads(threads)
            ends.append(train(models[0], chosen, task, SGD, execution="loop", progress=False))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    first = [ends[0], ends[1], ends[2], replace(ends[3], end=ends[3].end.select([1, 0]))]
    for outcome in first:
        assert outcome.execution == "loop"
        assert all(torch.equal(p[0], ends[0].end.params[n][0]) for n, p in outcome.end.params.items())


def test_pauses_are_those_of_looks_snapshots_and_pieces_however_long_the_recipe():
    recipe = Recipe(steps=10**9, eval_every=400)
    assert [*islice(_stops(390, recipe, (7, 395, 1001)), 8)] == [395, 400, 500, 800, 1000, 1001, 1200, 1500]
    assert [*_stops(0, replace(recipe, steps=450), (450,))] == [400, 450]
    with pytest.raises(ValueError, match=r"steps must lie in \[1, 10\^9\]"):
        Recipe(steps=10**12)
