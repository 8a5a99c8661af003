"""Recipes: schedules by closed form and against PyTorch's, and every flag against a plain loop."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp, starts
from reference import loss_and_error, train_alone
from torch import nn

import ticketlab as tl
from ticketlab.engine.config import described, from_json
from ticketlab.engine.optimizer import undecayed
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.store import identity, plain
from ticketlab.engine.training import train
from ticketlab.state import stack, stack_states, state

SGD = Recipe(steps=20, batch_size=16, optimizer="sgd", learning_rate=0.05, eval_every=7)
ADAMW = Recipe(steps=20, batch_size=16, optimizer="adamw", learning_rate=3e-3, weight_decay=0.1, eval_every=7)


def rates(recipe):
    return [recipe.learning_rate_at(step) for step in range(recipe.steps)]


def test_linear_falls_to_zero_at_t_and_counts_the_warm_up():
    plain = Recipe(steps=10, schedule="linear", learning_rate=2.0)
    assert rates(plain) == pytest.approx([2 * (1 - t / 10) for t in range(10)])
    warm = replace(plain, warmup_steps=4)
    assert rates(warm) == pytest.approx([2 * min(1, (t + 1) / 4) * (1 - t / 10) for t in range(10)])
    assert rates(warm)[4:] == rates(plain)[4:]


def test_triangular_rises_and_falls_without_a_jump():
    recipe = Recipe(steps=10, schedule="triangular", learning_rate=1.0, warmup_steps=4)
    fall = [(10 - t) / 6 for t in range(4, 10)]
    assert rates(recipe) == pytest.approx([0.25, 0.5, 0.75, 1.0, *fall])
    assert rates(replace(recipe, warmup_steps=10)) == pytest.approx([(t + 1) / 10 for t in range(10)])


@pytest.mark.parametrize("steps", [4, 10, 137])
def test_one_cycle_is_pytorchs(steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.7, total_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < steps:
            cycle.step()
    assert rates(Recipe(steps=steps, schedule="one_cycle", learning_rate=0.7)) == pytest.approx(expected, rel=1e-9)


def falling(step):
    return 0.1 / (1 + step)


def rmsprop(params):
    return torch.optim.RMSprop(params, alpha=0.9, momentum=0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"clip_norm": math.inf}, "clip_norm must be positive and finite"),
        ({"decay_all": False}, "decay_all=False needs a weight_decay"),
        ({"schedule": "triangular"}, "'triangular' needs warmup_steps"),
        ({"schedule": "one_cycle", "warmup_steps": 3}, "rise of their own, leave warmup_steps"),
        ({"schedule": "one_cycle", "steps": 3}, "needs 4 steps at least"),
        ({"schedule": falling}, "leave learning_rate at its default"),
        ({"schedule": falling, "learning_rate": 1.2e-3, "warmup_steps": 2}, "rise of their own"),
        ({"schedule": lambda step: -1.0, "learning_rate": 1.2e-3}, r"at least 0 and finite: got -1.0 of <lambda>\(0\)"),
        ({"schedule": lambda: 1.0, "learning_rate": 1.2e-3}, "must return the rate of a step"),
        ({"schedule": "linar"}, "linear"),
        ({"optimizer": rmsprop, "weight_decay": 0.1}, "weight decay of its own"),
        ({"optimizer": rmsprop, "momentum": 0.5}, "belong to optimizer 'sgd'"),
    ],
)
def test_flags_that_do_nothing_or_make_no_sense_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        replace(SGD, **change)


class Spared(nn.Module):
    """Norms of every kind, one of a class of its own, and biases under other names."""

    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1, 8))

        def forward(self, x):
            return self.gain * x / x.norm(dim=-1, keepdim=True)

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.own = nn.Linear(1, 8), nn.LayerNorm(8), Spared.ScaleNorm()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(self.embed(x[..., None]))
        return self.output(self.scale * self.own(h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


WITHOUT_DECAY = {
    small_conv_bn: ("1.weight", "1.bias", "5.weight", "5.bias", "8.bias"),
    small_mlp: ("fc1.bias", "fc2.bias", "output.bias"),
    Spared: (
        "embed.bias",
        "norm.weight",
        "norm.bias",
        "own.gain",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "output.bias",
    ),
}


@pytest.mark.parametrize("factory", WITHOUT_DECAY)
def test_norms_and_biases_are_found_from_the_module(factory):
    assert undecayed(build(factory)) == set(WITHOUT_DECAY[factory])


FLAGS = {
    "decay": ({"weight_decay": 0.3, "decay_all": False}, ("loop", "vmap")),
    "smoothing": ({"label_smoothing": 0.3}, ("loop", "vmap")),
    "clip": ({"clip_norm": 0.2}, ("loop", "vmap")),
    "all": ({"weight_decay": 0.3, "decay_all": False, "label_smoothing": 0.1, "clip_norm": 0.5}, ("loop", "vmap")),
    "own schedule": ({"schedule": falling, "learning_rate": 1.2e-3}, ("loop", "vmap")),
}


@pytest.mark.parametrize("base", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("problem", [(small_mlp, blobs), (small_conv_bn, images)], ids=["mlp", "conv_bn"])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_are_a_plain_loops_in_loop_and_vmap(flag, problem, base):
    (change, executions), (factory, make_task) = FLAGS[flag], problem
    recipe, task, seeds = replace(base, **change), make_task(), (3, 4)
    models = [build(factory, seed) for seed in seeds]
    masks = [half_masks(m, seed) for m, seed in zip(models, seeds, strict=True)]
    spared = () if recipe.decay_all else WITHOUT_DECAY[factory]
    alone = [
        train_alone(m, mask, task, recipe, seed, spared=spared)
        for m, mask, seed in zip(models, masks, seeds, strict=True)
    ]
    begun = starts(stack_states([state(m) for m in models]), stack(masks), seeds)
    for execution in executions:
        outcome = train(models[0], begun, task, recipe, execution=execution)
        for r, net in enumerate(alone):
            torch.testing.assert_close(outcome.end.select(r).params, state(net).params, rtol=1e-10, atol=1e-10)
            loss, error = loss_and_error(net, task.test.x, task.test.y)  # the plain loss, without smoothing
            assert outcome.metrics["test_loss_nats"][r] == pytest.approx(loss, abs=1e-10)
            assert outcome.metrics["test_error"][r] == error


def test_a_long_gradient_is_clipped_for_its_own_replica_alone():
    task, recipe = blobs(), replace(SGD, clip_norm=0.3, steps=8)
    models = [build(small_mlp, seed) for seed in (0, 1)]
    with torch.no_grad():
        models[1][-1].weight.mul_(50.0)
    begun = [Start(state(m), {}, 0) for m in models]
    both = train(models[0], begun, task, recipe, execution="vmap").end
    for r, start in enumerate(begun):
        alone = train(models[0], [start], task, recipe, execution="vmap").end
        torch.testing.assert_close(alone.select(0).params, both.select(r).params, rtol=1e-12, atol=1e-12)


def test_label_smoothing_of_a_loss_without_labels_is_refused():
    x = blobs(dtype=torch.float32).train.x
    task, model = tl.Task.from_tensors(x, x[:, :3], loss="squared_error"), build(small_mlp, 0, torch.float32)
    with pytest.raises(ValueError, match="needs the cross-entropy"):
        train(model, [Start(state(model), {}, 0)], task, replace(SGD, label_smoothing=0.1))
    with pytest.raises(ValueError, match="needs the cross-entropy"):
        tl.Study(tl.ImpConfig(recipe=replace(SGD, label_smoothing=0.1)), model=small_mlp, task=task)


# Optimizers and schedules of a user's own.


class Wandering(torch.optim.Optimizer):
    """Moves weights that have no gradient too."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad - 0.5, alpha=-group["lr"])


OWN = {"rmsprop": rmsprop, "class": torch.optim.Rprop, "wandering": Wandering}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("own", OWN)
def test_an_optimizer_of_ones_own_is_a_plain_loops_and_pruned_weights_stay(own, frozen):
    recipe = Recipe(steps=15, batch_size=16, optimizer=OWN[own], learning_rate=2e-3, schedule="linear", clip_norm=1.0)
    task, model = blobs(), build(small_mlp, 3)
    masks = half_masks(model, 3)
    outcome = train(model, [Start(state(model), masks, 3, frozen=frozen), Start(state(model), {}, 4)][:1], task, recipe)
    alone = train_alone(model, masks, task, recipe, 3, frozen=frozen)
    torch.testing.assert_close(outcome.end.select(0).params, state(alone).params, rtol=1e-12, atol=1e-12)
    for name, mask in masks.items():
        began = state(model).params[name][~mask] * float(frozen)
        assert torch.equal(outcome.end.params[name][0][~mask], began)


def test_optimizers_that_are_none_are_refused_by_name():
    task, model = blobs(), build(small_mlp)

    def two_rates(params):
        return torch.optim.SGD([{"params": params[:1], "lr": 1.0}, {"params": params[1:]}], lr=0.1)

    for own, match in (
        (lambda params: None, "must be a torch.optim.Optimizer: <lambda> returns NoneType"),
        (lambda params: torch.optim.SGD(params[:2], lr=0.1), "must take every parameter"),
        (two_rates, r"one rate, the recipe's, .* two_rates has \[0.1, 1.0\]"),
        (torch.optim.LBFGS, "must step without a closure"),
    ):
        with pytest.raises(ValueError, match=match):
            train(model, [Start(state(model), {}, 0)], task, replace(SGD, optimizer=own))
    begun = [Start(state(model), {}, seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"an optimizer of your own, .* need the loop"):
        train(model, begun, task, replace(SGD, optimizer=rmsprop), execution="vmap")


def study(**recipe):
    given = {"steps": 6, "batch_size": 16, "eval_every": 3, **recipe}
    config = tl.ImpConfig(levels=1, init_seeds=(0,), treatments=("ticket",), recipe=Recipe(**given))
    return tl.Study(config, model=small_mlp, task=blobs(dtype=torch.float32), device="cpu", progress=False)


def with_alpha(alpha):
    def made(params):
        return torch.optim.RMSprop(params, alpha=alpha)

    return made


def test_what_ones_own_optimizer_or_schedule_does_names_the_run():
    half = torch.optim.RMSprop

    def centred(params):
        return half(params, **OPTIONS)

    OPTIONS = {"centered": True}
    first, again = study(optimizer=centred).identity, study(optimizer=centred).identity
    OPTIONS["centered"] = False  # what its text does not tell
    assert first == again != study(optimizer=centred).identity
    assert study(optimizer=with_alpha(0.9)).identity != study(optimizer=with_alpha(0.8)).identity
    assert study(schedule=falling).identity != study(schedule=lambda step: 0.1 / (1 + step)).identity  # its name
    slower = lambda step: 0.05 / (1 + step)  # noqa: E731
    assert study(schedule=slower).identity != study(schedule=lambda step: 0.1 / (1 + step)).identity


def test_what_cannot_be_told_is_refused_with_a_store_alone(tmp_path):
    class Noisy(Wandering):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(torch.randn_like(p), alpha=-group["lr"])

    with pytest.raises(ValueError, match="must be a function of its parameters and gradients"):
        study(optimizer=Noisy).levels(tmp_path)

    def picky(params):
        assert not params[0].is_leaf or params[0].abs().sum() < 0, "not these"
        return Noisy(params)

    with pytest.raises(ValueError, match="picky fails on gradients made up for it: not these"):
        study(optimizer=picky).levels(tmp_path)
    once, again = (list(study(optimizer=Noisy).levels(None)) for _ in range(2))  # seeded, as dropout is
    assert all(torch.equal(p, again[1].end.params[n]) for n, p in once[1].end.params.items())


def test_a_run_with_ones_own_is_stored_resumed_and_read(tmp_path):
    own = {"optimizer": rmsprop, "schedule": falling}
    whole = list(study(**own).levels(tmp_path))
    resumed = list(study(**own).levels(tmp_path))
    for name, p in whole[-1].end.params.items():
        assert torch.equal(p, resumed[-1].end.params[name])
    folder = study(**own).folder(tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["config"]["recipe"]["optimizer"] == "own:rmsprop"
    assert stored["config"]["recipe"]["schedule"] == "own:falling"
    assert set(stored["own"]) == {"optimizer", "schedule"}
    recipe = tl.load_run(folder).config.recipe
    assert repr(recipe.optimizer) == "own:rmsprop"
    assert recipe == from_json(described(tl.load_run(folder).config)).recipe
    with pytest.raises(ValueError, match="'falling' is an optimizer or schedule of a user's own"):
        recipe.learning_rate_at(0)
    model = build(small_mlp, 0, torch.float32)
    with pytest.raises(ValueError, match=r"dataclasses.replace"):
        train(model, [Start(state(model), {}, 0)], blobs(dtype=torch.float32), replace(recipe, schedule="constant"))
    back = replace(recipe, **own)
    outcome = train(model, [Start(state(model), {}, 0)], blobs(dtype=torch.float32), back)
    assert torch.equal(outcome.end.params["fc1.weight"], whole[0].end.params["fc1.weight"])


def test_later_fields_at_their_default_name_no_run():
    told = described(tl.ImpConfig())
    assert not {"decay_all", "label_smoothing", "clip_norm"} & set(told["recipe"])
    assert "levels" not in told
    other = tl.ImpConfig(recipe=Recipe(weight_decay=0.1, decay_all=False, clip_norm=1.0, label_smoothing=0.1))
    assert described(other)["recipe"] | {"decay_all": False, "clip_norm": 1.0} == described(other)["recipe"]
    assert from_json(json.loads(json.dumps(described(other)))) == replace(other, levels=8)


def test_a_run_of_defaults_keeps_the_name_that_it_was_stored_under():
    assert identity(plain(described(tl.ImpConfig()))) == "6eb11a1391"
