"""Small runs of every kind, held to the numbers that version 0.1.0 gave for them.

``golden/*.json`` was written by version 0.1.0, before the engine was redesigned. A difference is a change of results:
find out why before anything else. Only where results change on purpose is a file made anew, one kind at a time::

    rm tests/golden/KIND.json && python tests/test_golden.py --write KIND

Masks and counts are compared exactly. Of a tensor the file holds its sum, its sum of squares and its product with
cos(0), cos(1), ...: a relative error e of the tensor moves the first and the last by at most e sqrt(size) |tensor|.
Everything is float64 and begins with draws that are the same bits on every machine (uniform ones; torch draws normal
numbers differently with and without AVX2), so that the order of operations alone moves a number: between instruction
sets, numbers of threads, the loop and ``vmap`` by 2e-13 at most when the files were written, and no mask when scores
were moved by 1e-13. Zhou's variants by sign are left out: they changed on purpose. What is not in a file, such as a
new column, is not compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import ticketlab as tl
from ticketlab.engine.transfer import carry
from ticketlab.engine.treatments import Start

GOLDEN = Path(__file__).parent / "golden"
RTOL = {"cpu": 1e-11, "cuda": 1e-8}
DEVICE = "cpu"  # a test sets it
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
F64 = torch.float64
Tree = dict[str, Any]

# Problems of this file's own: a golden test that leaned on others' cases would move with them.


def drawn(net: nn.Module) -> nn.Module:
    """Uniform weights and biases: exact in float32, whatever the machine."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = 1.5 / math.sqrt(module.weight[0].numel())
                for p in module.parameters():
                    p.copy_((2 * torch.rand(p.shape) - 1) * bound)
    return net


def dense(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return drawn(nn.Sequential(*layers[:-1]))


def small() -> nn.Module:
    return dense(10, 12, 8, 4)


def more_classes() -> nn.Module:
    return dense(10, 12, 8, 5)


def for_digits() -> nn.Module:
    return dense(64, 20, 12, 10)


def conv_bn() -> nn.Module:
    """No bias before a batch norm: its gradient is rounding alone, which Adam would blow up."""
    first = [nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return drawn(nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(32, 10), nn.ReLU(), nn.Linear(10, 4)))


def clusters(*shape: int, n_classes: int = 4, seed: int = 0, **options: Any) -> tl.Task:
    """Clusters that overlap: losses stay away from 0."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.rand(n_classes, *shape, generator=generator, dtype=F64) - 1
    y = torch.arange(400) % n_classes
    x = centres[y] + 3 * torch.rand(400, *shape, generator=generator, dtype=F64) - 1.5
    return tl.Task.from_tensors(x, y, name="clusters", validation_size=80, test_size=80, **options).to(DEVICE)


SGD = tl.Recipe(
    steps=40, batch_size=20, optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=1e-3,
    schedule="step", milestones=(25, 35), decay=0.2, eval_every=10,
)  # fmt: skip
ADAM = tl.Recipe(
    steps=40, batch_size=20, optimizer="adam", learning_rate=0.01, schedule="cosine", warmup_steps=5, eval_every=10
)
PLAIN = tl.Recipe(steps=40, batch_size=20, optimizer="sgd", learning_rate=0.1, momentum=0.9, eval_every=10)
CONFIG = tl.ImpConfig(
    levels=2, prune_fraction=0.3, init_seeds=(3, 4), order_seeds=(7, 8), rewind_step=6, recipe=SGD, dtype="float64"
)
CONTROLS = ("ticket", "reinit", "random_mask", "layerwise_shuffle", "dense_restart", "sibling")
TREATMENTS = (
    *CONTROLS, "lr_rewind", "fine_tune", "reinit_keep_sign", "reshuffle", "reshuffle_keep_sign", "random_sign",
    "signed_constant", "random_constant", "frozen_init", "frozen_unless_shrunk",
)  # fmt: skip
OF_WEIGHTS = (
    "magnitude", "random", "large_final", "small_final", "large_init", "small_init", "large_init_large_final",
    "small_init_small_final", "magnitude_increase", "movement",
)  # fmt: skip
OF_OUTPUTS = ("obd_exact", "obd_gauss_newton", "obd_fisher", "snip", "grasp", "synflow")
ZERO_AT_INIT = ("magnitude_increase", "movement")  # where no weight has moved

# What is kept of a run. Tensors and masks have the replica axis.


def of_masks(masks: Mapping[str, Tensor]) -> Tree:
    """The SHA-256 of each network's mask, layers in alphabetical order, and what each layer keeps."""
    hashes = []
    for r in range(len(next(iter(masks.values())))):
        digest = hashlib.sha256()
        for name in sorted(masks):
            digest.update(name.encode() + masks[name][r].bool().contiguous().cpu().numpy().tobytes())
        hashes.append(digest.hexdigest())
    return {"sha256": hashes, "kept": {name: m.flatten(1).sum(1).tolist() for name, m in sorted(masks.items())}}


def of_tensors(tensors: Mapping[str, Tensor]) -> Tree:
    """Of each tensor and replica: its sum, its sum of squares, its product with a fixed vector."""
    numbers = {}
    for name, tensor in sorted(tensors.items()):
        rows = tensor.cpu().double().reshape(len(tensor), -1)
        fixed = torch.arange(rows.shape[1], dtype=F64).cos()
        numbers[name] = {
            "size": rows.shape[1],
            "rows": torch.stack([rows.sum(1), rows.square().sum(1), rows @ fixed], 1).tolist(),
        }
    return numbers


def of_state(state: tl.State) -> Tree:
    return of_tensors({**state.params, **state.buffers})


def of_table(table: pd.DataFrame) -> Tree:
    """Columns; what is missing or NaN is None."""
    return {str(c): [None if pd.isna(v) else v for v in table[c].tolist()] for c in table if "seconds" not in str(c)}


def of_levels(config: tl.ImpConfig, model: Callable[[], nn.Module], task: tl.Task | None) -> Tree:
    """A study, level by level."""
    found = {}
    for level in tl.imp(config, model=model, task=task, store=None, device=DEVICE, progress=False):
        found[f"level {level.level}"] = {
            "density": level.density,
            "masks": of_masks(level.masks),
            "start": of_state(level.start),
            "end": of_state(level.end),
            "snapshots": {str(step): of_state(state) for step, state in level.snapshots.items()},
            "metrics": of_table(level.metrics),
            "curves": of_table(level.curves),
        }
    return found


def of_training(model: nn.Module, starts: list[Start], task: tl.Task, recipe: tl.Recipe, **options: Any) -> Tree:
    """A training of one stack."""
    outcome = tl.train(model, starts, task, recipe, progress=False, **options)
    return {
        "masks": of_masks(outcome.masks),
        "end": of_state(outcome.end),
        "snapshots": {str(step): of_state(state) for step, state in outcome.snapshots.items()},
        "metrics": of_table(outcome.metrics),
        "curves": of_table(outcome.curves),
    }


def network(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    return tl.initialise(factory, seed).to(DEVICE, F64)


def alone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a replica axis of one."""
    return {name: tensor[None] for name, tensor in tensors.items()}


# The kinds.


def imp_global_sgd() -> Tree:
    """Momentum, weight decay, step schedule; late rewinding, snapshots, the usual controls."""
    return of_levels(replace(CONFIG, treatments=CONTROLS, snapshot_steps=(0, 12)), small, clusters(10))


def imp_layer_adam() -> Tree:
    """A rate for each layer; warmup and cosine; from step 0; batch orders that are the init seeds."""
    config = replace(CONFIG, scope="layer", output_fraction=0.1, recipe=ADAM, rewind_step=0, order_seeds=None)
    return of_levels(config, small, clusters(10))


def imp_digits_adamw() -> Tree:
    """The bundled data, decoupled decay, the usual half rate of the output layer."""
    recipe = replace(ADAM, optimizer="adamw", weight_decay=0.05, batch_size=60)
    config = replace(CONFIG, task="digits", recipe=recipe, scope="layer", validation_size=150, split_seed=1)
    return of_levels(replace(config, init_seeds=(0, 1, 2), order_seeds=(5, 5, 6)), for_digits, None)


def imp_treatments() -> Tree:
    """Everything that is trained beside a ticket."""
    config = replace(CONFIG, recipe=replace(SGD, weight_decay=0.0), treatments=TREATMENTS)
    return of_levels(replace(config, init_seeds=(3,), order_seeds=(7,)), small, clusters(10))


def imp_retraining() -> Tree:
    """Weights that go on from level to level instead of being rewound."""
    config = replace(CONFIG, treatments=("ticket", "sibling"))
    ways = ("lr_rewind", "fine_tune")
    return {how: of_levels(replace(config, retraining=how), small, clusters(10)) for how in ways}


def imp_batch_norm() -> Tree:
    """Convolutions at their own rate, Nesterov, augmented images, buffers that rewind."""
    recipe = replace(SGD, steps=24, milestones=(16,), nesterov=True, learning_rate=0.03, eval_every=8)
    config = replace(CONFIG, scope="layer", conv_fraction=0.2, output_fraction=0.1, recipe=recipe, snapshot_steps=(10,))
    config = replace(config, treatments=("ticket", "reinit", "layerwise_shuffle"))
    return of_levels(config, conv_bn, clusters(2, 8, 8, augmentation="crop_flip"))


def imp_criteria() -> Tree:
    """Levels pruned by something else than magnitude."""
    found = {}
    for criterion, scope in (("snip", "global"), ("synflow", "layer"), ("movement", "layer"), ("random", "global")):
        config = replace(CONFIG, levels=1, criterion=criterion, scope=scope, score_examples=100)
        levels = of_levels(replace(config, treatments=("ticket",)), small, clusters(10))
        found[criterion] = levels["level 1"]  # what was trained before is the same
    return found


def criteria_dense() -> Tree:
    """Every criterion on a fully connected network."""
    return of_criteria(small, clusters(10), (*OF_WEIGHTS, *OF_OUTPUTS))


def criteria_batch_norm() -> Tree:
    """Those that look at outputs, through convolutions and running statistics; the exact Hessian would take long."""
    return of_criteria(conv_bn, clusters(2, 8, 8), OF_OUTPUTS[1:])


def of_criteria(factory: Callable[[], nn.Module], task: tl.Task, names: tuple[str, ...]) -> Tree:
    """Scores, and masks at a density of the network and of each layer: at initialisation, and trained at half."""
    model = network(factory, 1)
    first, everything = tl.state(model), tl.masks.ones(model)
    half = tl.dynamic.sparse_masks(model, tl.dynamic.layer_counts(model, 0.6), 2)
    trained = tl.train(model, [Start(first, half, 5)], task, PLAIN, progress=False).end.select(0)
    found: Tree = {}
    for when, masks, end in (("init", everything, first), ("trained", half, trained)):
        alive = float(tl.masks.density(masks))  # not where a unit of one path dies: its weights tie under synflow
        for name in names:
            if when == "init" and name in ZERO_AT_INIT:
                continue
            evidence = tl.criteria.Evidence(model, masks, first, end, task.train.x[:60], task.train.y[:60], 9)
            pruned: Tree = {"global": tl.criteria.find(name, evidence, 0.7 * alive)}
            by_layer = {n: (0.5 + 0.1 * i) * float(m.double().mean()) for i, (n, m) in enumerate(masks.items())}
            pruned["layer"] = tl.criteria.find(name, replace(evidence, scope="layer"), by_layer)
            pruned["rounds"] = tl.criteria.find(name, evidence, 0.5 * alive, rounds=3)
            scores = {how: tl.criteria.score(name, replace(evidence, scope=how)) for how in ("global", "layer")}
            told = {f"scores {how}": of_tensors(alone(s)) for how, s in scores.items()}
            found[f"{name} {when}"] = told | {how: of_masks(alone(m)) for how, m in pruned.items()}
    return found


def random_masks() -> Tree:
    """Controls at random positions, and budgets spread over layers."""
    found: Tree = {}
    for factory in (small, conv_bn):
        model = network(factory)
        for spread in ("uniform", "first_dense", "erdos_renyi", "erdos_renyi_kernel"):
            for density in (0.55, 0.8):
                counts = tl.dynamic.layer_counts(model, density, spread)
                masks = tl.dynamic.sparse_masks(model, counts, 4)
                drawn_again = {
                    "sparse": masks,
                    "random": tl.masks.random_mask(masks, 5),
                    "shuffled": tl.masks.layerwise_shuffle(masks, 6),
                }
                named = {how: of_masks(alone(m)) for how, m in drawn_again.items()}
                found[f"{factory.__name__} {spread} {density}"] = {"counts": counts, **named}
    return found


def train_each_its_own() -> Tree:
    """Frozen weights, rates of their own, snapshots, a later first step, and a neighbour that diverges."""
    model, task = network(small), clusters(10)
    masks = [tl.dynamic.sparse_masks(model, tl.dynamic.layer_counts(model, 0.5), seed) for seed in range(4)]
    states = [tl.state(network(small, seed)) for seed in range(4)]
    starts = [Start(state, mask, 10 + r) for r, (state, mask) in enumerate(zip(states, masks, strict=True))]
    mixed = [starts[0], replace(starts[1], frozen=True), replace(starts[2], learning_rate=0.02)]
    found = {
        "own rates": of_training(model, mixed, task, PLAIN, first_step=4, snapshot_steps=(4, 17)),
        "frozen": of_training(model, [replace(s, frozen=True) for s in starts[:2]], task, ADAM, first_step=7),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a replica diverges
        found["diverged"] = of_training(model, [*starts[:2], replace(starts[3], learning_rate=1e200)], task, PLAIN)
    return found


def dynamics() -> Tree:
    """RigL, SET and gradual pruning beside a mask that stays, under momentum and under Adam."""
    model, task = network(small), clusters(10)
    counts = tl.dynamic.layer_counts(model, 0.5)
    sparse, full, first = tl.dynamic.sparse_masks(model, counts, 1), tl.masks.ones(model), tl.state(model)
    rigl, random = (tl.dynamic.DropGrow(growth, every=8, seed=3) for growth in ("gradient", "random"))
    moves = ((sparse, None), (sparse, rigl), (sparse, random), (full, tl.dynamic.Gradual(counts, every=8)))
    starts = [Start(first, masks, 20 + i, dynamics=move) for i, (masks, move) in enumerate(moves)]
    recipes = {"sgd": SGD, "adam": replace(ADAM, weight_decay=1e-3)}
    found = {name: of_training(model, starts, task, recipe, snapshot_steps=(20,)) for name, recipe in recipes.items()}
    images, conv = clusters(2, 8, 8), network(conv_bn)
    half = tl.dynamic.sparse_masks(conv, tl.dynamic.layer_counts(conv, 0.5), 1)
    start = Start(tl.state(conv), half, 20, dynamics=replace(rigl, every=5))
    return found | {"batch norm": of_training(conv, [start], images, replace(PLAIN, steps=20))}


def supermasks() -> Tree:
    """Masks learned on weights that stay, and what they score."""
    found: Tree = {}
    bernoulli, edge_popup = replace(ADAM, learning_rate=0.1), replace(SGD, learning_rate=0.5)
    for factory, task in ((small, clusters(10)), (conv_bn, clusters(2, 8, 8))):
        states = [tl.state(network(factory, seed)) for seed in (0, 1)]
        parts = [[getattr(s, part) for s in states] for part in ("params", "buffers")]
        frozen = tl.State(*({n: torch.stack([t[n] for t in part]) for n in part[0]} for part in parts))
        for method, recipe in (("bernoulli", bernoulli), ("edge_popup", edge_popup)):
            options = {"method": method, "density": 0.6, "draw_seeds": (30, 31), "progress": False}
            learned = tl.supermask.learn_masks(network(factory), frozen, task, recipe, (10, 11), **options)
            ways = tl.supermask.evaluations(network(factory), learned, task.test, draws=3, seed=2)
            found[f"{factory.__name__} {method}"] = {
                "masks": of_masks(learned.masks),
                "scores": of_tensors(learned.scores),
                "params": of_tensors(learned.params),
                "buffers": of_tensors(learned.frozen.buffers),
                "metrics": of_table(learned.metrics),
                "curves": of_table(learned.curves),
                "evaluations": of_table(ways),
            }
    return found


def transfer() -> Tree:
    """A ticket's mask, and its weights, on the same problem and on one of more classes, then trained there."""
    *_, last = tl.imp(CONFIG, model=small, task=clusters(10), store=None, device=DEVICE, progress=False)
    ticket = last.select(treatment="ticket", init_seed=3)
    found = {}
    for factory, n_classes in ((small, 4), (more_classes, 5)):
        model, task = network(factory, 2), clusters(10, n_classes=n_classes, seed=1)
        starts = [carry(model, tl.state(model), ticket.masks, 40, weights=weights) for weights in (None, ticket.start)]
        found[factory.__name__] = of_training(model, starts, task, SGD)
    return found


KINDS: dict[str, Callable[[], Tree]] = {
    f.__name__: f
    for f in (
        imp_global_sgd, imp_layer_adam, imp_digits_adamw, imp_treatments, imp_retraining, imp_batch_norm, imp_criteria,
        criteria_dense, criteria_batch_norm, random_masks, train_each_its_own, dynamics, supermasks, transfer,
    )
}  # fmt: skip


# The comparison.


def differences(found: Any, stored: Any, where: str = "") -> Iterator[str]:
    """What differs from the file, leaf by leaf."""
    if isinstance(stored, dict) and "rows" in stored:
        size, pairs = stored["size"], zip(found["rows"], stored["rows"], strict=True)
        for r, (new, old) in enumerate(pairs):
            slack = RTOL[DEVICE] * math.sqrt(size * old[1])  # of a sum; of the sum of squares it is relative
            near = abs(new[0] - old[0]) <= slack and abs(new[2] - old[2]) <= slack
            if found["size"] != size or not near or abs(new[1] - old[1]) > 2 * RTOL[DEVICE] * old[1]:
                yield f"{where}, replica {r}: {new}, was {old}"
    elif isinstance(stored, dict):
        for name, old in stored.items():
            at = f"{where}/{name}"
            yield from differences(found[name], old, at) if name in found else [f"{at} is gone"]
    elif isinstance(stored, list):
        if len(found) != len(stored):
            yield f"{where}: {len(found)} entries, were {len(stored)}"
        for i, (new, old) in enumerate(zip(found, stored, strict=False)):
            yield from differences(new, old, f"{where}[{i}]")
    elif isinstance(stored, float) and isinstance(found, float | int):
        if not math.isclose(found, stored, rel_tol=RTOL[DEVICE], abs_tol=1e-12):
            yield f"{where}: {found}, was {stored}"
    elif found != stored:
        yield f"{where}: {found}, was {stored}"


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])],
)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_have_not_moved(kind, device, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", device)
    stored = json.loads((GOLDEN / f"{kind}.json").read_text())
    moved = list(differences(json.loads(json.dumps(KINDS[kind]())), stored))
    assert not moved, f"{len(moved)} numbers moved, the first of them: " + "\n".join(moved[:20])


@pytest.mark.parametrize("wrong", [1e-7, -1e-7])
def test_the_comparison_sees_small_changes(wrong):
    weights = {"w": torch.rand(2, 30, generator=torch.Generator().manual_seed(0), dtype=F64)}
    stored, moved = of_tensors(weights), {"w": weights["w"].clone()}
    moved["w"][1, 3] += wrong
    assert len(list(differences(of_tensors(moved), stored))) == 1 and not list(differences(stored, stored))
    assert list(differences({"a": 1}, {"a": 2})) == ["/a: 1, was 2"]
    assert list(differences({}, {"a": 1})) == ["/a is gone"]
    assert list(differences({"a": [1.0], "b": 0}, {"a": [1.0 + 1e-13]})) == []


def main(kinds: list[str]) -> None:
    """Write the files of these kinds; never over one that stands."""
    for kind in kinds or list(KINDS):
        parts = KINDS[kind]().items()
        lines = [f"{json.dumps(name)}:{json.dumps(part, separators=(',', ':'))}" for name, part in parts]
        with (GOLDEN / f"{kind}.json").open("x") as file:
            file.write("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    main(sys.argv[2:])
