"""RigL, SET and gradual pruning against per-weight references, and budgets against closed forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import train_alone
from reference_dynamic import drop_grow, train_rigl_alone
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ticketlab import masks as mask_ops
from ticketlab.data import batch_indices
from ticketlab.engine.dynamic import DropGrow, Gradual, layer_counts, sparse_masks, validate
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.training import train
from ticketlab.models import mlp
from ticketlab.seeds import initialise
from ticketlab.state import state

SGD = Recipe(steps=60, batch_size=16, optimizer="sgd", learning_rate=0.05, eval_every=25)
ADAM = Recipe(steps=60, batch_size=16, optimizer="adam", learning_rate=3e-3, eval_every=25)
RIGL = DropGrow("gradient", every=7, until=0.75, drop_fraction=0.4)
SET = DropGrow("random", every=7, until=0.75, drop_fraction=0.4)


@dataclass(frozen=True)
class Recorded:
    """A dynamics that also keeps what it was asked and what it answered."""

    inner: DropGrow | Gradual
    seen: list[dict[str, Any]] = field(default_factory=list)

    def update_steps(self, steps: int) -> range:
        return self.inner.update_steps(steps)

    def next_mask(self, name: str, mask: Tensor, weight: Tensor, gradient: Tensor, step: int, steps: int) -> Tensor:
        new = self.inner.next_mask(name, mask, weight, gradient, step, steps)
        now = {"mask": mask.clone(), "weight": weight.clone(), "gradient": gradient.clone(), "new": new.clone()}
        self.seen.append({"name": name, "step": step, **now})
        return new


def stacked(factory, replicas: int):
    models = [build(factory, seed) for seed in range(replicas)]
    return models, [half_masks(m, seed) for seed, m in enumerate(models)]


def train_one(dynamics, recipe=SGD, masks: Mapping[str, Tensor] | None = None):
    model = build(small_mlp)
    masks = half_masks(model, 0) if masks is None else masks
    return train(model, [Start(state(model), masks, 3, dynamics=dynamics)], blobs(), recipe, progress=False)


# ---- the choice of connections ----


@given(seed=st.integers(0, 999), share=st.sampled_from([0.2, 0.5, 0.9]), step=st.integers(1, 44))
@settings(max_examples=60, deadline=None)
def test_drop_and_grow_equal_the_per_weight_reference(seed, share, step):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(5, 7, generator=generator) < share
    # few distinct values, so that ties are everywhere
    weight = torch.randint(-3, 4, (5, 7), generator=generator).double() * mask
    gradient = torch.randint(-3, 4, (5, 7), generator=generator).double()
    fraction = 0.4 / 2 * (1 + math.cos(math.pi * step / 45))
    new = RIGL.next_mask("w", mask, weight, gradient, step, 60)
    assert torch.equal(new, drop_grow(mask, weight, gradient.abs(), fraction))
    assert int(new.sum()) == int(mask.sum())
    moved = SET.next_mask("w", mask, weight, gradient, step, 60)
    strongest = sorted(mask.flatten().nonzero()[:, 0].tolist(), key=lambda i: (-abs(float(weight.flatten()[i])), i))
    stay = strongest[: len(strongest) - math.floor(len(strongest) * fraction)]
    assert moved.flatten()[stay].all()
    assert int(moved.sum()) == int(mask.sum())


def test_what_was_dropped_may_be_grown_again_and_keeps_its_weight():
    mask = torch.tensor([True, True, True, False])
    weight = torch.tensor([3.0, 2.0, 0.1, 0.0])
    gradient = torch.tensor([0.0, 0.0, 5.0, 1.0])
    dynamics = DropGrow(drop_fraction=0.99)
    assert DropGrow(drop_fraction=0.7).next_mask("w", mask, weight, gradient, 1, 1000).tolist() == [1, 0, 1, 1]
    assert torch.equal(dynamics.next_mask("w", torch.ones(4, dtype=torch.bool), weight, gradient, 1, 1000), mask | True)


def test_random_growth_is_a_function_of_seed_step_and_layer():
    mask, zero = torch.arange(400).view(20, 20) % 4 == 0, torch.zeros(20, 20)
    weight = torch.arange(400.0).view(20, 20) * mask

    def grown(name: str, seed: int, step: int) -> tuple[int, ...]:
        new = replace(SET, seed=seed).next_mask(name, mask, weight, zero, step, 60)
        return tuple((new & ~mask).flatten().nonzero()[:, 0].tolist())

    assert grown("a", 0, 7) == grown("a", 0, 7)
    assert len({grown("a", 0, 7), grown("b", 0, 7), grown("a", 1, 7), grown("a", 0, 14)}) == 4


def test_updates_by_closed_form():
    assert list(DropGrow(every=100).update_steps(1000)) == [100, 200, 300, 400, 500, 600, 700]
    assert list(DropGrow(every=250).update_steps(1000)) == [250, 500, 750]  # t <= 0.75 T
    assert list(DropGrow(every=5, until=1.0).update_steps(10)) == [5]  # the last step is number 9
    assert DropGrow().drop_fraction_at(0, 1000) == 0.3
    assert DropGrow().drop_fraction_at(375, 1000) == pytest.approx(0.15)
    assert DropGrow().drop_fraction_at(750, 1000) == pytest.approx(0.0)


def test_gradual_counts_follow_the_cubic_schedule():
    gradual, size = Gradual({"w": 10}, every=10, until=0.5), 1010
    updates = list(gradual.update_steps(100))
    assert updates == [10, 20, 30, 40, 50]
    expected = [math.floor(10 + 1000 * (1 - t / 50) ** 3 + 0.5) for t in updates]
    assert [gradual.kept_at("w", size, t, 100) for t in updates] == expected == [522, 226, 74, 18, 10]
    assert [gradual.kept_at("w", size, t, 100) for t in (0, 9, 59, 99)] == [1010, 1010, 10, 10]
    weight = torch.randperm(size, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones(size, dtype=torch.bool)
    for t, count in zip(updates, expected, strict=True):
        mask = gradual.next_mask("w", mask, weight, torch.zeros(size), t, 100)
        assert torch.equal(mask, weight >= size - count)


# ---- in the training loop ----


@pytest.mark.parametrize("recipe", [SGD, ADAM], ids=["sgd", "adam"])
def test_rigl_equals_a_plain_loop_over_one_network(recipe):
    models, masks = stacked(small_mlp, 3)
    task, moves = blobs(), (RIGL, None, RIGL)
    starts = [Start(state(m), masks[r], 3 + r, dynamics=moves[r]) for r, m in enumerate(models)]
    outcome = train(models[0], starts, task, recipe)
    for r in (0, 2):
        alone, last = train_rigl_alone(models[r], masks[r], task, recipe, 3 + r, 7, 0.4, 0.75)
        torch.testing.assert_close(outcome.end.select(r).params, state(alone).params, rtol=1e-10, atol=1e-10)
        assert all(torch.equal(outcome.masks[name][r], mask) for name, mask in last.items())
        assert any(not torch.equal(mask, masks[r][name]) for name, mask in last.items())
    static = train_alone(models[1], masks[1], task, recipe, 4)
    torch.testing.assert_close(outcome.end.select(1).params, state(static).params, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(outcome.masks[name][1], mask) for name, mask in masks[1].items())


def test_methods_in_one_stack_equal_each_by_itself():
    models, masks = stacked(small_conv_bn, 4)
    masks[2] = mask_ops.ones(models[2])
    dynamics = (RIGL, SET, Gradual(layer_counts(models[2], 0.3), every=7), None)
    starts = [Start(state(m), masks[r], r, dynamics=dynamics[r]) for r, m in enumerate(models)]
    whole = train(models[0], starts, images(), ADAM)
    for r, start in enumerate(starts):
        one = train(models[r], [start], images(), ADAM, progress=False)
        assert all(torch.equal(whole.masks[n][r], m[0]) for n, m in one.masks.items())
        torch.testing.assert_close(whole.end.select([r]).params, one.end.params, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recipe", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize("dynamics", [RIGL, SET], ids=["rigl", "set"])
def test_counts_are_constant_and_grown_weights_start_from_zero(dynamics, recipe):
    recorded = Recorded(dynamics)
    outcome = train_one(recorded, recipe)
    masks = half_masks(build(small_mlp), 0)
    assert sorted({s["step"] for s in recorded.seen}) == [7, 14, 21, 28, 35, 42]
    for seen in recorded.seen:
        count = int(masks[seen["name"]].sum())
        assert int(seen["mask"].sum()) == int(seen["new"].sum()) == count
        assert (seen["weight"][~seen["mask"]] == 0).all()  # dead between updates, to the bit
        assert (seen["gradient"][~seen["mask"]] != 0).any()  # the dense gradient, dead weights too
    assert any((s["new"] & ~s["mask"]).any() for s in recorded.seen)
    for name, mask in outcome.masks.items():
        assert (outcome.end.params[name][~mask] == 0).all()


@pytest.mark.parametrize("recipe", [SGD, ADAM], ids=["sgd", "adam"])
def test_grown_connections_start_from_zero_in_weight_and_optimizer_state(recipe):
    """One step after growth they have moved by their first gradient alone; Adam's step counter is the tensor's."""
    recorded = Recorded(replace(RIGL, every=4, drop_fraction=0.9))
    model, task = build(small_mlp), blobs()
    start = Start(state(model), half_masks(model, 0), 3, dynamics=recorded)
    outcome = train(model, [start], task, recipe, snapshot_steps=(9, 10))
    before, after = (outcome.snapshots[k].select(0).params for k in (9, 10))
    index = batch_indices(len(task.train), recipe.batch_size, 3, 9)
    leaves = {name: p.clone().requires_grad_() for name, p in before.items()}
    loss = F.cross_entropy(functional_call(model, leaves, (task.train.x[index],)), task.train.y[index])
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for seen in (s for s in recorded.seen if s["step"] == 8):
        grown = seen["new"] & ~seen["mask"]
        assert grown.any()
        assert (before[seen["name"]][grown] == 0).all()
        g = gradients[seen["name"]][grown]
        if recipe.optimizer == "sgd":
            expected = -recipe.learning_rate * g
        else:  # the eighth descent: steps 0 to 9 without the updates 4 and 8
            m, v = 0.1 * g / (1 - 0.9**8), 0.001 * g**2 / (1 - 0.999**8)
            expected = -recipe.learning_rate * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(after[seen["name"]][grown], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_a_diverged_replica_has_its_weights_under_its_own_mask(growth):
    recipe = replace(SGD, learning_rate=1e300, momentum=0.0, eval_every=15)
    moves = DropGrow(growth, every=10)
    with pytest.warns(RuntimeWarning, match="replica 0 is not finite at step 15"):
        outcome = train_one(moves, recipe)
    for name, mask in outcome.masks.items():
        assert not outcome.end.params[name][~mask].any()
    first = half_masks(build(small_mlp), 0)  # the start was its last finite evaluation
    assert outcome.metrics["diverged_step"].item() == 15
    assert all(torch.equal(mask[0], first[name]) for name, mask in outcome.masks.items())


def test_gradual_pruning_ends_at_its_counts_and_is_nested():
    model = build(small_mlp)
    counts = layer_counts(model, 0.3)
    recorded = Recorded(Gradual(counts, every=7))
    outcome = train_one(recorded.inner, masks=mask_ops.ones(model))
    assert {name: int(mask.sum()) for name, mask in outcome.masks.items()} == counts
    train_one(recorded, masks=mask_ops.ones(model))
    for seen in recorded.seen:
        assert not (seen["new"] & ~seen["mask"]).any()
        assert int(seen["new"].sum()) == recorded.inner.kept_at(seen["name"], seen["mask"].numel(), seen["step"], 60)


# ---- budgets ----


@given(
    widths=st.lists(st.integers(1, 60), min_size=2, max_size=5),
    density=st.floats(0.05, 1.0),
    spread=st.sampled_from(["uniform", "erdos_renyi", "erdos_renyi_kernel"]),
)
@settings(max_examples=80, deadline=None)
def test_layer_counts_sum_to_the_budget_exactly(widths, density, spread):
    model = initialise(lambda: mlp((widths[0],), 10, hidden=tuple(widths[1:])), 0)
    sizes = {name: mask.numel() for name, mask in mask_ops.ones(model).items()}
    try:
        counts = layer_counts(model, density, spread)
    except ValueError as error:
        assert "would have none" in str(error)
        return
    assert sum(counts.values()) == math.floor(density * sum(sizes.values()) + 0.5)
    assert all(1 <= counts[name] <= size for name, size in sizes.items())


def test_erdos_renyi_kernel_by_closed_form():
    model = initialise(lambda: mlp((784,), 10, hidden=(300, 100)), 0)
    shapes = {name: tuple(mask.shape) for name, mask in mask_ops.ones(model).items()}
    budget = math.floor(0.02 * 266200 + 0.5)
    epsilon = budget / sum(a + b for a, b in shapes.values())  # no layer above 1: N_l * sum / product = sum
    counts = layer_counts(model, 0.02)
    assert all(abs(counts[name] - epsilon * sum(shape)) < 1 for name, shape in shapes.items())
    assert sum(counts.values()) == budget
    # At 30 % the output layer would exceed 1: dense, and epsilon solved for again without it.
    counts = layer_counts(model, 0.3)
    *hidden, output = shapes
    budget = math.floor(0.3 * 266200 + 0.5)
    dense = [output]
    epsilon = (budget - 1000) / sum(sum(shapes[n]) for n in hidden)
    if epsilon * (300 + 100) > 30000:  # then the second layer too
        dense.append(hidden[1])
        epsilon = (budget - 31000) / sum(shapes[hidden[0]])
    assert counts[output] == 1000
    for name in (n for n in shapes if n not in dense):
        assert abs(counts[name] - epsilon * sum(shapes[name])) < 1


def test_kernels_count_for_the_kernel_rule_alone():
    model = initialise(lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 20)), 0)
    names = list(mask_ops.ones(model))
    sizes = {names[0]: 288, names[1]: 640}
    for spread, raw in (
        ("erdos_renyi", {names[0]: 12 / 32, names[1]: 52 / 640}),
        ("erdos_renyi_kernel", {names[0]: 18 / 288, names[1]: 52 / 640}),
        ("uniform", dict.fromkeys(names, 1.0)),
    ):
        counts = layer_counts(model, 0.1, spread)
        epsilon = 93 / sum(raw[n] * sizes[n] for n in names)
        assert sum(counts.values()) == 93
        assert all(abs(counts[n] - epsilon * raw[n] * sizes[n]) < 1 for n in names)
    first = layer_counts(model, 0.5, "first_dense")
    assert first == {names[0]: 288, names[1]: 464 - 288}


class HeadFirst(nn.Module):
    """Registered against the order of the forward pass, which begins by writing into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem, self.norm = nn.Linear(8, 3), nn.Linear(6, 8), nn.LayerNorm(6)

    def forward(self, x):
        return self.head(self.stem(self.norm(x.relu_())).relu())


class Parallel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.a(x) * self.b(x))


def test_the_first_layer_is_found_from_the_graph():
    model, x = build(HeadFirst), blobs().train.x[:3]
    counts = layer_counts(model, 0.75, "first_dense", x=x)
    assert counts == {"head.weight": 54 - 48, "stem.weight": 48}
    with pytest.raises(ValueError, match="the order of registration does not tell it: pass some inputs as x="):
        layer_counts(model, 0.75, "first_dense")
    assert layer_counts(model, 0.75, "uniform") == {"head.weight": 18, "stem.weight": 36}
    with pytest.raises(ValueError, match=r"one layer that meets the inputs: found \['a.weight', 'b.weight'\]"):
        layer_counts(build(Parallel), 0.75, "first_dense", x=x)
    chain, names = build(small_mlp), ("fc2.weight", "output.weight")
    assert layer_counts(chain, 50 / 55, "first_dense", prunable=names) == {"fc2.weight": 40, "output.weight": 10}
    assert layer_counts(chain, 50 / 55, "first_dense", prunable=names, x=x)["fc2.weight"] == 40
    tokens = build(lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 9), nn.Linear(9, 2)))
    assert layer_counts(tokens, 0.75, "first_dense", x=torch.tensor([[0, 2], [1, 1]])) == {
        "1.weight": 36,
        "2.weight": 5,
    }


def test_budgets_are_of_what_the_user_names():
    model = build(small_mlp)
    counts = layer_counts(model, 0.5, prunable=("fc*",))
    assert set(counts) == {"fc1.weight", "fc2.weight"} and sum(counts.values()) == 44
    masks = sparse_masks(model, counts, 0, prunable=("fc*",))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    with pytest.raises(ValueError, match="kept must name every prunable layer"):
        sparse_masks(model, counts, 0)
    emptied = sparse_masks(model, {**counts, "output.weight": 0}, 0)
    assert not emptied["output.weight"].any() and int(mask_ops.kept(emptied)) == 44


def test_remainders_go_to_the_largest_and_of_equal_ones_to_the_first():
    model = initialise(lambda: nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))), 0)
    assert list(layer_counts(model, 14 / 36, "uniform").values()) == [4, 4, 3, 3]


def test_sparse_masks_have_the_counts_and_depend_on_the_seed_alone():
    model = build(small_conv_bn)
    counts = layer_counts(model, 0.4)
    masks = sparse_masks(model, counts, 5)
    mask_ops.validate(model, masks)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    assert all(torch.equal(m, sparse_masks(model, counts, 5)[n]) for n, m in masks.items())
    assert any(not torch.equal(m, sparse_masks(model, counts, 6)[n]) for n, m in masks.items())


# ---- refusals ----


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DropGrow("gradients"), "unknown growth 'gradients'. Did you mean 'gradient'"),
        (lambda: DropGrow(drop_fraction=0.0), r"drop_fraction must lie in \(0, 1\)"),
        (lambda: DropGrow(drop_fraction=1.0), r"drop_fraction must lie in \(0, 1\)"),
        (lambda: DropGrow(every=1, until=1.0), "every must be at least 2 steps"),
        (lambda: DropGrow(until=0.0), r"must lie in \(0, 1\]: got 0.0"),
        (lambda: DropGrow(until=1.5), r"must lie in \(0, 1\]: got 1.5"),
        (lambda: Gradual({}), "kept must be counts, some above 0"),
        (lambda: Gradual({"w": 0}), "kept must be counts, some above 0"),
        (lambda: Gradual({"w": -1, "v": 3}), "kept must be counts, some above 0"),
        (lambda: Gradual({"w": 1}, every=0), "every must be at least 2 steps"),
        (lambda: layer_counts(build(small_mlp), 0.0), r"density must lie in \(0, 1\]"),
        (lambda: layer_counts(build(small_mlp), 1.1), r"density must lie in \(0, 1\]"),
        (lambda: layer_counts(build(small_mlp), 0.5, "erk"), "unknown spread 'erk'"),
        (lambda: layer_counts(build(small_mlp), 0.01, "uniform"), "would have none of 1 under"),
        (lambda: layer_counts(build(small_mlp), 0.3, "first_dense"), "must pay for a dense first layer"),
        (lambda: sparse_masks(build(small_mlp), {"fc1.weight": 3}, 0), "must name every prunable layer"),
        (
            lambda: sparse_masks(build(small_mlp), {"fc1.weight": 49, "fc2.weight": 1, "output.weight": 0}, 0),
            r"0 to all of its weights, some layer one: got {'fc1.weight': 49}",
        ),
        (
            lambda: sparse_masks(build(small_mlp), {"fc1.weight": 0, "fc2.weight": 0, "output.weight": 0}, 0),
            "0 to all of its weights, some layer one",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_dynamics_that_do_not_fit_a_training_are_refused():
    model = build(small_mlp)
    ones = mask_ops.ones(model)
    counts = layer_counts(model, 0.3)
    with pytest.raises(ValueError, match=r"an update before 0\.75 of 60 steps: got one every 46"):
        validate(DropGrow(every=46), ones, 60)
    with pytest.raises(ValueError, match="kept must name every masked layer"):
        validate(Gradual({"w": 1}), ones, 1000)
    with pytest.raises(ValueError, match="kept must be at most the size of each layer"):
        validate(Gradual(counts | {"fc1.weight": 49}), ones, 1000)
    with pytest.raises(ValueError, match="gradual pruning starts dense"):
        train_one(Gradual(counts, every=7))
    with pytest.raises(ValueError, match="a mask that moves must be there: got none"):
        validate(RIGL, {}, 60)
    start = Start(state(model), half_masks(model, 0), 0, dynamics=RIGL)
    with pytest.raises(ValueError, match="replica 0 is frozen"):
        train(model, [replace(start, frozen=True)], blobs(), SGD)
    with pytest.raises(ValueError, match="need the loop"):
        train(model, [start], blobs(), SGD, execution="vmap")
