"""Levels, rewinding, treatments in the stack, the store: exact counts, equal bits, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from cases import blobs, small_conv_bn, small_mlp
from reference import prune_sorted, train_alone
from safetensors.torch import load_file
from torch import nn

import ticketlab as tl
from ticketlab import masks as mask_ops
from ticketlab.data import Task, batch_indices
from ticketlab.engine.criteria import CRITERIA
from ticketlab.engine.start import Start
from ticketlab.engine.treatments import RETRAINING, TREATMENTS
from ticketlab.state import State

RECIPE = tl.Recipe(steps=30, batch_size=16, optimizer="sgd", learning_rate=0.05, eval_every=10)
CONFIG = tl.ImpConfig(levels=3, rewind_step=5, init_seeds=(3, 4), recipe=RECIPE, dtype="float64")
EVERYTHING = ("ticket", "reinit", "random_mask", "layerwise_shuffle", "dense_restart", "sibling")


def levels(config=CONFIG, **options):
    return list(tl.imp(config, **{"model": small_mlp, "task": blobs(), "store": None, **options}))


def assert_same(a: tl.Level, b: tl.Level) -> None:
    """Bit for bit, wall time aside."""
    assert (a.level, a.density) == (b.level, b.density)
    for name, mask in a.masks.items():
        assert torch.equal(mask, b.masks[name])
    pairs = [(a.start, b.start), (a.end, b.end), *((a.snapshots[k], b.snapshots[k]) for k in a.snapshots)]
    for mine, others in pairs:
        for part, other in zip(mine, others, strict=True):
            assert part.keys() == other.keys()
            assert all(torch.equal(tensor, other[name]) for name, tensor in part.items())
    pd.testing.assert_frame_equal(a.metrics, b.metrics, check_exact=True)
    pd.testing.assert_frame_equal(a.curves, b.curves, check_exact=True)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_ticket_is_what_plain_loops_find(scope):
    config = replace(CONFIG, scope=scope, levels=2)
    found = levels(config)
    task = blobs()
    for r, seed in enumerate(config.init_seeds):
        model = tl.initialise(small_mlp, seed).double()
        names = mask_ops.prunable(model)
        masks = {n: torch.ones_like(dict(model.named_parameters())[n], dtype=torch.bool) for n in names}
        rewound = train_alone(model, masks, task, replace(RECIPE, steps=5), seed)
        trained = train_alone(model, masks, task, RECIPE, seed)
        for level in found:
            ticket = level.select(treatment="ticket", init_seed=seed)
            for name, p in trained.named_parameters():
                torch.testing.assert_close(ticket.theta_end[name], p.detach(), rtol=1e-10, atol=1e-10)
            for name in names:
                assert torch.equal(ticket.masks[name], masks[name])
                start = dict(rewound.named_parameters())[name].detach() * masks[name]
                torch.testing.assert_close(ticket.theta_start[name], start, rtol=1e-10, atol=1e-10)
            scores = {n: p.detach().abs() for n, p in trained.named_parameters() if n in masks}
            if scope == "global":
                masks = prune_sorted(masks, scores, mask_ops.n_removed(int(mask_ops.kept(masks)), 0.2))
            else:
                rates = {n: 0.1 if n == names[-1] else 0.2 for n in names}
                for n, rate in rates.items():
                    part = prune_sorted({n: masks[n]}, scores, mask_ops.n_removed(int(masks[n].sum()), rate))
                    masks = {**masks, **part}
            trained = train_alone(rewound, masks, task, RECIPE, seed, first_step=5)
        assert r < 2


def test_counts_are_exact_nested_and_asserted_after_training():
    found, alive = levels(replace(CONFIG, levels=6)), 6 * 8 + 8 * 5 + 5 * 3
    for before, level in zip([None, *found], found, strict=False):
        if before is not None:
            alive -= mask_ops.n_removed(alive, 0.2)
            for name, mask in level.masks.items():
                assert not (mask[:2] & ~before.masks[name][:2]).any()
        assert mask_ops.kept(level.masks, stacked=True).tolist() == [alive] * len(level.metrics)
        assert level.metrics["kept"].tolist() == [alive] * len(level.metrics)
        assert level.density == alive / 103
        assert sum(int((level.theta_end[n] != 0).sum()) for n in level.masks) == alive * len(level.metrics)


def test_treatments_stand_in_one_stack_and_share_what_they_should():
    level = levels(replace(CONFIG, treatments=EVERYTHING, levels=1))[1]
    ticket = level.select(treatment="ticket", init_seed=3)
    for treatment in EVERYTHING:
        other = level.select(treatment=treatment, init_seed=3)
        same_mask = all(torch.equal(m, other.masks[n]) for n, m in ticket.masks.items())
        assert same_mask == (treatment in ("ticket", "reinit", "sibling"))
        assert int(mask_ops.kept(other.masks)) == (103 if treatment == "dense_restart" else 103 - 21)
        if treatment != "reinit":  # biases are never masked, so they show where a network starts
            assert torch.equal(other.theta_start["fc1.bias"], ticket.theta_start["fc1.bias"])
        assert (other.metrics["order_seed"].item() == 3) == (treatment not in ("sibling", "dense_restart"))
    per_layer = {n: int(m.sum()) for n, m in ticket.masks.items()}
    shuffled = level.select(treatment="layerwise_shuffle", init_seed=3)
    assert {n: int(m.sum()) for n, m in shuffled.masks.items()} == per_layer
    assert level.metrics.set_index(["treatment", "init_seed"]).loc[("dense_restart", 3), "density"] == 1.0


def test_rewinding_restores_buffers_and_level_zero_keeps_its_snapshots():
    config = replace(CONFIG, snapshot_steps=(0, 12), levels=1)
    task = blobs(180, (1, 8, 8))
    dense, first = tl.imp(config, model=small_conv_bn, task=task, store=None)
    assert sorted(dense.snapshots) == [0, 5, 12]
    assert dense.snapshots[0].buffers["1.num_batches_tracked"].tolist() == [0, 0]
    ticket = first.select(treatment="ticket")
    assert ticket.start.buffers["1.num_batches_tracked"].tolist() == [5, 5]
    assert ticket.end.buffers["1.num_batches_tracked"].tolist() == [30, 30]
    assert torch.equal(ticket.start.buffers["1.running_mean"], dense.start.buffers["1.running_mean"])
    assert not torch.equal(dense.start.buffers["1.running_mean"], dense.end.buffers["1.running_mean"])
    assert first.select(treatment="reinit").start.buffers["1.num_batches_tracked"].tolist() == [0, 0]


def test_costs_by_closed_form():
    dense, first = levels(replace(CONFIG, levels=1))
    assert dense.metrics["macs_dense"].tolist() == [3 * 103 * 16 * 30] * 2
    assert first.metrics["macs_live"].tolist() == [3 * 82 * 16 * 25] * 4
    assert first.metrics["steps"].tolist() == [25] * 4


def test_one_shot_pruning_is_a_single_level_and_random_is_a_criterion():
    config = replace(CONFIG, levels=1, prune_fraction=0.9, scope="layer", output_fraction=0.5, criterion="random")
    one, again = levels(config)[1], levels(config)[1]
    per_layer = {n: m[0].sum().item() for n, m in one.masks.items()}
    assert per_layer == {"fc1.weight": 5, "fc2.weight": 4, "output.weight": 7}
    assert all(torch.equal(m, again.masks[n]) for n, m in one.masks.items())
    assert not torch.equal(one.masks["fc1.weight"][0], one.masks["fc1.weight"][1])


# ------------------------------------------------------------------------------------------------- the store


def test_what_is_stored_is_what_was_yielded(tmp_path):
    trained = levels(store=tmp_path)
    run = tl.load_run(next(tmp_path.iterdir()))
    assert len(run) == 4 and run.config.levels == 3 and run.config.recipe == RECIPE
    for level, stored in zip(trained, run, strict=True):
        assert_same(level, stored)
        assert level.wall_seconds == stored.wall_seconds
    with pytest.raises(IndexError, match="levels 0 to 3: got 4"):
        run[4]


def test_stopped_extended_and_resumed_runs_have_the_bits_of_an_uninterrupted_one(tmp_path):
    whole = levels()
    generator = tl.imp(CONFIG, model=small_mlp, task=blobs(), store=tmp_path)
    next(generator), next(generator)
    generator.close()
    shorter = levels(replace(CONFIG, levels=2), store=tmp_path)
    resumed = levels(store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    for a, b in zip(whole, resumed, strict=True):
        assert_same(a, b)
    assert_same(shorter[2], resumed[2])


def test_a_resumed_run_does_not_depend_on_the_order_of_names(tmp_path):
    def model():  # in another order than that of its names
        return nn.Sequential(OrderedDict(z=nn.Linear(6, 8), y=nn.ReLU(), a=nn.Linear(8, 3)))

    config = replace(CONFIG, levels=2, treatments=("ticket", "random_mask"))
    whole = list(tl.imp(config, model=model, task=blobs(), store=None))
    list(tl.imp(replace(config, levels=1), model=model, task=blobs(), store=tmp_path))
    for a, b in zip(whole, tl.imp(config, model=model, task=blobs(), store=tmp_path), strict=True):
        assert_same(a, b)


def test_a_finished_run_is_only_read(tmp_path):
    levels(store=tmp_path)
    folder = next(tmp_path.iterdir())
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    levels(store=tmp_path)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


SCRIPT = """
import sys; sys.path.insert(0, "tests")
import torch; torch.set_num_threads(2)
from test_imp import CONFIG, blobs, small_mlp, tl
from collections import OrderedDict
from dataclasses import replace
config = replace(CONFIG, levels=6, recipe=replace(CONFIG.recipe, steps=200))
for level in tl.imp(config, model=small_mlp, task=blobs(), store=sys.argv[1]):
    print(level.level, flush=True)
"""


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    config = replace(CONFIG, levels=6, recipe=replace(RECIPE, steps=200))
    whole = levels(config, store=tmp_path / "whole")
    for delay in (0.0, 0.17, 0.41):  # after the first line of output
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    for a, b in zip(whole, levels(config, store=tmp_path / "killed"), strict=True):
        assert_same(a, b)
    mine, other = (next((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    assert mine.name == other.name
    for path in sorted(mine.rglob("level_*/*")):
        if path.name != "manifest.json":  # that one has the wall time
            assert path.read_bytes() == (other / path.relative_to(mine)).read_bytes()


def test_files_are_readable_without_the_package(tmp_path):
    level = levels(store=tmp_path)[1]
    folder = next(tmp_path.iterdir()) / "level_01"
    weights, masks = load_file(folder / "weights.safetensors"), load_file(folder / "masks.safetensors")
    assert torch.equal(weights["end/params/fc1.weight"], level.theta_end["fc1.weight"])
    assert masks["fc1.weight"].dtype == torch.bool and masks["fc1.weight"].shape == (4, 8, 6)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["environment"]) == {
        *("device", "threads", "execution", "torch", "python", "ticketlab", "commit")
    }
    assert pd.read_csv(folder / "metrics.csv")["treatment"].tolist() == ["ticket"] * 2 + ["reinit"] * 2


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["weights.safetensors", "masks.safetensors", "metrics.csv", "curves.csv"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_found_named_and_repaired_by_moving_it_away(tmp_path, name, damage):
    whole = levels(replace(CONFIG, levels=1), store=tmp_path)
    folder = next(tmp_path.iterdir())
    path = folder / "level_01" / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-5] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    others = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p != path}
    with pytest.raises(ValueError, match=rf"level_01/{name} (is missing|does not match its checksum).*move level_01"):
        levels(replace(CONFIG, levels=1), store=tmp_path)
    with pytest.raises(ValueError, match="level_01"):
        list(tl.load_run(folder))
    assert {p: p.read_bytes() for p in others} == others
    shutil.rmtree(folder / "level_01")
    assert_same(levels(replace(CONFIG, levels=1), store=tmp_path)[1], whole[1])


def test_a_damaged_manifest_or_config_is_named(tmp_path):
    levels(replace(CONFIG, levels=1), store=tmp_path)
    folder = next(tmp_path.iterdir())
    (folder / "level_00" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"level_00/manifest.json is not a whole manifest"):
        levels(replace(CONFIG, levels=1), store=tmp_path)
    (folder / "config.json").write_text('{"config"')
    with pytest.raises(ValueError, match=r"config.json must be valid JSON"):
        tl.load_run(folder)
    with pytest.raises(ValueError, match="must be a run directory"):
        tl.load_run(tmp_path)


def test_a_directory_of_another_config_is_refused_and_left_alone(tmp_path):
    levels(replace(CONFIG, levels=0), store=tmp_path)
    folder = next(tmp_path.iterdir())
    path = folder / "config.json"
    stored = json.loads(path.read_text())
    stored["config"]["prune_fraction"] = 0.5
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"config.json must be what was stored: its content has the identity"):
        levels(replace(CONFIG, levels=0), store=tmp_path)
    assert json.loads(path.read_text()) == stored


def test_other_data_or_another_architecture_get_a_directory_of_their_own(tmp_path):
    config = replace(CONFIG, levels=0)
    levels(config, store=tmp_path)
    levels(config, task=blobs(250), store=tmp_path)

    def small_mlp_2():
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))

    small_mlp_2.__name__ = "small_mlp"
    levels(config, model=small_mlp_2, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_two_writers_are_refused(tmp_path):
    first = tl.imp(CONFIG, model=small_mlp, task=blobs(), store=tmp_path)
    next(first)
    second = tl.imp(CONFIG, model=small_mlp, task=blobs(), store=tmp_path)
    next(second)  # what is stored may be read
    with pytest.raises(ValueError, match="must have one writer"):
        next(second)
    first.close()
    assert len(levels(store=tmp_path)) == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"treatments": ("tickets",)}, "unknown treatment 'tickets'. Did you mean 'ticket'"),
        ({"treatments": ("reinit",)}, "must contain 'ticket'"),
        ({"criterion": "magnitud"}, "Did you mean 'magnitude'"),
        ({"scope": "globl"}, "Did you mean 'global'"),
        ({"prune_fraction": 1.0}, r"prune_fraction must lie in \(0, 1\): got 1.0"),
        ({"output_fraction": 0.1}, "need scope 'layer'"),
        ({"levels": -1}, "levels must be at least 0"),
        ({"rewind_step": 30}, r"rewind_step must lie in \[0, 30\)"),
        ({"snapshot_steps": (31,)}, r"snapshot_steps must lie in \[0, 30\]"),
        ({"init_seeds": (1, 1)}, "different seeds"),
        ({"init_seeds": (-1,)}, r"seeds must lie in \[0, 2\^32\)"),
        ({"order_seeds": (1,)}, "one for each"),
        ({"levels": 1.5}, r"ImpConfig\.levels must be int: got 1.5, a float"),
        ({"levels": True}, r"ImpConfig\.levels must be int: got True, a bool"),
        ({"recipe": None}, r"ImpConfig\.recipe must be Recipe: got None"),
        ({"init_seeds": [0, 1]}, r"ImpConfig\.init_seeds must be tuple.* a list\. Write a tuple as \(0, 1\)"),
        ({"init_seeds": (0, "1")}, r"ImpConfig\.init_seeds must be tuple"),
        ({"prune_fraction": "0.2"}, r"ImpConfig\.prune_fraction must be float"),
        ({"conv_fraction": "0.2"}, r"ImpConfig\.conv_fraction must be float \| None"),
        ({"task": None}, r"ImpConfig\.task must be str"),
    ],
)
def test_configs_that_make_no_sense_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        replace(CONFIG, **change)


def draws(origin):
    return Start(origin.rewound, {n: torch.rand(m.shape) < 0.5 for n, m in origin.masks.items()}, 0)


@pytest.mark.parametrize(
    ("change", "options", "match"),
    [
        ({"levels": 40}, {}, r"every level must prune a weight: none of 2 would go at level \d+ of 40. Use at most"),
        (
            {"levels": 40, "scope": "layer"},
            {},
            r"every level must prune a weight: none of \d+ would go at level \d+ of 40",
        ),
        (
            {"levels": 4, "scope": "layer", "prune_fraction": 0.9},
            {},
            r"a live weight must be left: .*'fc1.weight'.* lose all at level 2 of 4. Use at most 1",
        ),
        ({"model": "lenet"}, {"model": None}, "unknown model 'lenet'"),
        ({"task": "mnits"}, {"task": None}, "Did you mean 'mnist'"),
        ({"recipe": replace(RECIPE, batch_size=10_000)}, {}, "batch_size must be at most"),
        ({}, {"task": "digits"}, r"task must be a Task: got str\. A named one belongs into ImpConfig"),
        ({}, {"start": {}}, r"start must be a State: got dict\. Pass tl\.state"),
        ({}, {"criteria": [print]}, "criteria must be a Mapping: got list"),
        ({"validation_size": 5}, {}, "validation_size and split_seed split the named data sets"),
        ({"split_seed": 1}, {}, "validation_size and split_seed split the named data sets"),
        ({"scope": "layer", "conv_fraction": 0.1}, {}, "conv_fraction needs a convolution"),
        ({}, {"treatments": {"mine": lambda origin: None}}, r"what treatment 'mine' returns must be a Start: got None"),
        ({}, {"treatments": {"mine": draws}}, "must not draw from a global generator"),
    ],
)
def test_studies_that_cannot_end_are_refused_before_they_begin(change, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        tl.imp(replace(CONFIG, **change), **{"model": small_mlp, "task": blobs(), "store": tmp_path, **options})
    assert list(tmp_path.iterdir()) == []


def lopsided(factor):
    net = small_mlp()
    with torch.no_grad():
        net.output.weight.mul_(factor)
    return net


def test_a_level_that_cuts_the_network_in_two_stops_the_run_and_keeps_what_is_stored(tmp_path):
    config = replace(CONFIG, levels=6, rewind_step=0, recipe=replace(RECIPE, learning_rate=1e-12))
    with pytest.raises(ValueError, match=r"a live path .*: \d+ weights leave none, and empty are \['output.weight'\]"):
        levels(config, model=lambda: lopsided(1e-9), store=tmp_path)
    assert len(tl.load_run(next(tmp_path.iterdir()))) == 1


class Branched(nn.Module):
    """A residual branch that may empty while the network still classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.branch, self.o = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.branch.weight.mul_(1e-6)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.o(h + torch.relu(self.branch(h)))


def test_a_branch_may_empty_as_long_as_a_live_path_is_left_and_it_is_said():
    config = replace(CONFIG, levels=1, prune_fraction=0.5, rewind_step=0, recipe=replace(RECIPE, learning_rate=1e-12))
    with pytest.warns(RuntimeWarning, match=r"level 1 leaves 1 of 3 layers without a live weight, \['branch.weight'\]"):
        level = levels(config, model=Branched)[1]
    ticket = level.subset(treatment="ticket")
    assert not ticket.masks["branch.weight"].any()
    assert ticket.metrics["test_error"].notna().all()
    assert (ticket.metrics["effective_density"] <= ticket.metrics["density"]).all()


# ------------------------------------------------------------------------------ what a network does is what it is


class Detached(nn.Module):
    """As ReLU, but nothing is learned below."""

    def forward(self, x):
        return torch.relu(x).detach()

    def __repr__(self):
        return "ReLU()"


ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "slope": lambda: nn.LeakyReLU(0.1),
    "other slope": lambda: nn.LeakyReLU(0.2),
    "detached": Detached,
    "none": nn.Identity,
}


def test_networks_that_differ_in_what_they_do_have_a_directory_each(tmp_path):
    folders = set()
    for act in ACTIVATIONS.values():
        model = lambda act=act: nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 3))  # noqa: E731
        folders.add(tl.run_folder(CONFIG, tmp_path, model=model, task=blobs()))
        assert tl.run_folder(CONFIG, tmp_path, model=model, task=blobs()) in folders
    assert len(folders) == len(ACTIVATIONS)

    def frozen():
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        net[0].requires_grad_(False)
        return net

    assert tl.run_folder(CONFIG, tmp_path, model=frozen, task=blobs()) not in folders


def test_a_criterion_or_treatment_of_ones_own_is_run_and_names_the_run(tmp_path):
    def mine(evidence):
        return {n: -w.abs() for n, w in evidence.final.items()}

    def other(evidence):
        return {n: w.abs() for n, w in evidence.final.items()}

    def doubled(origin):
        twice = State({n: 2 * p for n, p in origin.rewound.params.items()}, {})
        return tl.Start(twice, origin.masks, origin.order_seed)

    config = replace(CONFIG, levels=1, criterion="mine")
    level = levels(config, criteria={"mine": mine}, treatments={"doubled": doubled})[1]
    known = levels(replace(config, criterion="small_final"))[1]
    masks, expected = level.subset(treatment="ticket").masks, known.subset(treatment="ticket").masks
    assert all(torch.equal(mask, expected[name]) for name, mask in masks.items())
    ticket, twice = (level.select(treatment=t, init_seed=3).theta_start for t in ("ticket", "doubled"))
    assert torch.equal(2 * ticket["fc1.weight"], twice["fc1.weight"])
    names = {tl.Study(config, model=small_mlp, task=blobs(), criteria={"mine": f}).identity for f in (mine, other)}
    assert len(names) == 2
    with pytest.raises(ValueError, match="unknown criterion 'mine'"):
        levels(config)
    with pytest.raises(ValueError, match=r"must be named by config\.criterion"):
        levels(CONFIG, criteria={"mine": mine})
    with pytest.raises(ValueError, match="need names of their own"):
        levels(CONFIG, treatments={"reinit": doubled})


# ------------------------------------------------------------------------------------------------------- seeds


class Hidden(nn.Module):
    """Layers in a plain list, which PyTorch does not see."""

    def __init__(self, kind=list):
        super().__init__()
        self.layers, self.head = kind([nn.Linear(6, 12)]), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.layers[0](x).relu())


class Projected(nn.Module):
    """Random features in a plain attribute, or in a buffer."""

    def __init__(self, registered):
        super().__init__()
        self.head = nn.Linear(12, 3)
        features = torch.randn(6, 12)
        if registered:
            self.register_buffer("features", features)
        else:
            self.features = features

    def forward(self, x):
        return self.head((x @ self.features).relu())


def test_weights_that_pytorch_does_not_see_are_refused():
    config = replace(CONFIG, dtype="float32")
    for factory in (Hidden, lambda: Projected(False)):
        with pytest.raises(ValueError, match="must hold all of its weights"):
            levels(config, model=factory)
    for factory in (lambda: Hidden(nn.ModuleList), lambda: Projected(True)):
        tl.Study(config, model=factory, task=blobs())

    def of_any_width():
        width = int(torch.randint(5, 50, ()))
        return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 3))

    with pytest.raises(ValueError, match="must build one architecture"):
        levels(config, model=of_any_width)


class OnGraph(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
        self.register_buffer("adjacency", torch.eye(6).to_sparse())

    def forward(self, x):
        return super().forward((self.adjacency @ x.T).T)


def test_sparse_buffers_are_refused_by_name():
    with pytest.raises(ValueError, match=r"must be dense: \['adjacency'\] are sparse"):
        levels(CONFIG, model=OnGraph)


def test_a_factory_that_ignores_the_seed_is_refused_and_weights_may_be_given():
    net = tl.initialise(small_mlp, 0)
    for factory in (lambda: net, lambda: copy.deepcopy(net)):
        with pytest.raises(ValueError, match="two seeds must give two networks"):
            levels(model=factory)
        with pytest.raises(ValueError, match=r"'reinit'\] the ticket itself"):
            levels(replace(CONFIG, init_seeds=(3,)), model=factory)
    generator = np.random.default_rng()

    def drawn():
        made = small_mlp()
        made.output.weight.data = torch.from_numpy(generator.standard_normal((3, 5)))
        return made

    with pytest.raises(ValueError, match="two calls with one seed gave different weights"):
        levels(model=drawn)
    given = levels(replace(CONFIG, levels=1, rewind_step=0), start=tl.state(net))
    assert all((p == tl.state(net).params[n]).all() for n, p in given[0].theta_start.items())
    ticket, fresh = (given[1].subset(treatment=t).theta_start["fc1.weight"] for t in ("ticket", "reinit"))
    assert torch.equal(ticket[0] * ticket[1], ticket[0] ** 2 * (ticket[1] != 0)) and not torch.equal(ticket, fresh)
    with pytest.raises(ValueError, match="start must be one network's state"):
        levels(start=tl.State({}, {}))


def test_initialisers_that_draw_from_numpy_or_random_are_seeded():
    def drawn():
        net = small_mlp()
        net.output.weight.data = torch.from_numpy(np.random.randn(3, 5) * random.random())
        return net

    states = [tl.state(tl.initialise(drawn, seed)).params["output.weight"] for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    with pytest.raises(ValueError, match="must be a factory"):
        levels(model=tl.initialise(small_mlp, 0))


# ------------------------------------------------------------------------------------------------- divergence


@pytest.fixture(scope="module")
def poisoned() -> Task:
    """Data on which the network of seed 4 meets a NaN before its first look, and that of seed 3 none."""
    task = blobs()
    x = task.train.x.clone()
    seen = {s: torch.cat([batch_indices(len(task.train), 16, s, t) for t in range(30)]).tolist() for s in (3, 4)}
    x[next(i for i in seen[4][: 8 * 16] if i not in seen[3][: 8 * 16])] = float("nan")
    return replace(task, name="poisoned", train=tl.Split(x, task.train.y))


OTHER_ORDERS = ("sibling", "dense_restart")  # whose batches meet the NaN elsewhere
EVERY = tuple(name for name in TREATMENTS if not name.startswith("frozen") and name not in OTHER_ORDERS)


@pytest.mark.parametrize(
    "change",
    [
        *({"criterion": name} for name in CRITERIA),
        *({"retraining": name} for name in RETRAINING),
        {"rewind_step": 6},
        {"treatments": EVERY},
        {"treatments": ("ticket", "frozen_init", "frozen_unless_shrunk")},
        {"scope": "layer"},
    ],
    ids=lambda change: "-".join(str(value) for value in change.values())[:40],
)
def test_a_line_that_diverged_stays_diverged_in_every_table(poisoned, change):
    config = replace(CONFIG, levels=2, rewind_step=0, recipe=replace(RECIPE, steps=8, eval_every=4), score_examples=8)
    with pytest.warns(RuntimeWarning, match="is not finite"):
        found = levels(replace(config, **change), task=poisoned)
    for level in found:
        lost, well = (level.metrics[level.metrics["init_seed"] == seed] for seed in (4, 3))
        assert lost["diverged_step"].notna().all() and lost["test_error"].isna().all()
        assert well["diverged_step"].isna().all() and well["test_error"].notna().all()
        assert level.metrics["kept"].nunique() == 1


def test_a_study_of_which_every_replica_diverges_ends_and_can_be_read(tmp_path):
    config = replace(CONFIG, levels=2, rewind_step=0, recipe=replace(RECIPE, learning_rate=1e300))
    with pytest.warns(RuntimeWarning, match="is not finite"):
        made = levels(config, store=tmp_path)
    read = list(tl.load_run(next(tmp_path.iterdir())))
    assert len(made) == len(read) == 3
    assert all(level.metrics["test_error"].isna().all() and level.curves.empty for level in read)


# -------------------------------------------------------------------------------------------------- the store


def test_levels_that_are_swapped_copied_or_of_another_run_are_refused(tmp_path):
    levels(replace(CONFIG, levels=2), store=tmp_path / "a")
    levels(replace(CONFIG, levels=2, init_seeds=(8, 9)), store=tmp_path / "b")
    one, other = (next((tmp_path / name).iterdir()) for name in "ab")
    for source in (one / "level_02", other / "level_01"):
        shutil.move(one / "level_01", tmp_path / "aside")
        shutil.copytree(source, one / "level_01")
        with pytest.raises(ValueError, match=r"level_01 holds level \d of run \w+, not level 1 of"):
            list(tl.load_run(one))
        with pytest.raises(ValueError, match="level_01 holds level"):
            levels(replace(CONFIG, levels=2), store=tmp_path / "a")
        shutil.rmtree(one / "level_01")
        shutil.move(tmp_path / "aside", one / "level_01")
    assert len(list(tl.load_run(one))) == 3


def test_a_level_without_its_manifest_stands_aside_and_is_trained_again(tmp_path):
    whole = levels(replace(CONFIG, levels=1), store=tmp_path)
    folder = next(tmp_path.iterdir())
    (folder / "level_01" / "manifest.json").unlink()
    assert_same(levels(replace(CONFIG, levels=1), store=tmp_path)[1], whole[1])
    assert (folder / "level_01.without_manifest" / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"split_seed": 0', '"split_seed": 5'),
        ('"steps": 30', '"steps": 90'),
        ('"scope"', '"scopf"'),
        ('"task": "', '"task": "0'),
    ],
)
def test_a_config_that_is_not_what_was_stored_is_refused(tmp_path, old, new):
    levels(replace(CONFIG, levels=0), store=tmp_path)
    path = next(tmp_path.iterdir()) / "config.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match="must be what was stored"):
        tl.load_run(path.parent)


def test_a_config_of_a_later_version_or_no_config_at_all_is_refused_by_name(tmp_path):
    for text, match in (
        ('{"config": {"new": 1, "recipe": {}}, "fingerprint": {}}', "fields of this version"),
        ("[" * 100_000, "must be valid JSON"),
        ("[]", "must describe a study"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            tl.load_run(tmp_path)


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for store in (tmp_path / "file", tmp_path / ("d" * 300)):
        with pytest.raises(ValueError, match="must be a place to write to"):
            levels(store=store)


def test_an_estimate_counts_trainings_and_steps():
    study = tl.Study(CONFIG, model=small_mlp, task=blobs())
    estimate = study.estimate()
    assert estimate.trainings == 2 + 3 * 2 * 2
    assert estimate.steps == 2 * 30 + 3 * 2 * 2 * 25
    assert estimate.hours > 0 and estimate.disk_bytes > 0 and estimate.memory_bytes > 0


# -------------------------------------------------------------------------------------------------- the noun


def test_selections_compose_and_subsets_keep_the_axis():
    level = levels(replace(CONFIG, levels=1))[1]
    direct = level.select(treatment="reinit", init_seed=4)
    chained = level.select(init_seed=4).select(treatment="reinit")
    assert all(torch.equal(p, chained.theta_end[n]) for n, p in direct.theta_end.items())
    assert direct.select(treatment="reinit") is direct
    subset = level.subset(treatment="reinit").subset(init_seed=4)
    assert subset.theta_end["fc1.weight"].shape == (1, 8, 6)
    assert torch.equal(subset.theta_end["fc1.weight"][0], direct.theta_end["fc1.weight"])
    assert subset.metrics["replica"].tolist() == [0] and set(subset.curves["replica"]) == {0}
    with pytest.raises(ValueError, match="no replica of level 1 has treatment='ticket'"):
        direct.select(treatment="ticket")
    with pytest.raises(ValueError, match="one network without a replica axis"):
        direct.subset(init_seed=4)


def test_a_module_holds_the_ticket():
    level, task = levels(replace(CONFIG, levels=1))[1], blobs()
    net = level.module(0)
    one = level.select(treatment="ticket", init_seed=3)
    assert not net.training
    assert all(torch.equal((p != 0), one.masks[n]) for n, p in net.named_parameters() if n in one.masks)
    error = (net(task.test.x).argmax(1) != task.test.y).double().mean()
    assert float(error) == level.metrics["test_error"].iloc[0]
    with pytest.raises(ValueError, match=r"replica must lie in 0\.\.3: got 4"):
        level.module(4)
    assert repr(level).startswith("Level 1: density 0.79")


def test_select_says_what_there_is():
    level = levels(replace(CONFIG, levels=1))[1]
    assert level.select(treatment="ticket").theta_end["fc1.weight"].shape == (2, 8, 6)
    assert level.select(treatment="ticket", init_seed=4).theta_end["fc1.weight"].shape == (8, 6)
    assert isinstance(level.select(init_seed=4).start, State)
    with pytest.raises(ValueError, match=r"no replica of level 1 has treatment='random': it has .*ticket"):
        level.select(treatment="random")
    with pytest.raises(ValueError, match="select needs columns of metrics: got 'seed'"):
        level.select(seed=1)


def test_what_a_user_writes_into_stays_ones_own():
    def rude(given):
        for part in (given.masks, *(given.rewound if hasattr(given, "rewound") else given.end)):
            for tensor in part.values():
                tensor.zero_()

    def criterion(evidence):
        scores = {n: w.abs() for n, w in evidence.final.items()}
        rude(evidence)
        return scores

    def treatment(origin):
        start = Start(origin.rewound.clone(), {n: m.clone() for n, m in origin.masks.items()}, 0)
        rude(origin)
        return start

    own = {"criteria": {"mine": criterion}, "treatments": {"polite": treatment}}
    config = replace(CONFIG, levels=1, init_seeds=CONFIG.init_seeds[:1], order_seeds=None)
    how = {"model": small_mlp, "task": blobs(), "store": None, "execution": "loop"}
    expected, found = tl.imp(config, **how), tl.imp(replace(config, criterion="mine"), **how, **own)
    for one, other in zip(found, expected, strict=True):
        for part, same in zip(one.select(treatment="ticket").end, other.select(treatment="ticket").end, strict=True):
            for name, tensor in part.items():
                torch.testing.assert_close(tensor, same[name], rtol=0, atol=0)


def test_a_criterion_of_ones_own_must_not_draw_from_a_global_generator():
    noise = {"mine": lambda evidence: {n: torch.rand(m.shape) for n, m in evidence.masks.items()}}
    with pytest.raises(ValueError, match=r"must not draw from a global generator"):
        list(tl.imp(replace(CONFIG, criterion="mine"), model=small_mlp, task=blobs(), store=None, criteria=noise))


def test_selections_take_several_values_and_nan():
    *_, level = tl.imp(replace(CONFIG, levels=1), model=small_mlp, task=blobs(), store=None)
    seeds = list(CONFIG.init_seeds)
    assert set(level.subset(init_seed=seeds[:1]).metrics["init_seed"]) == {seeds[0]}
    assert len(level.subset(init_seed=seeds).metrics) == len(level.metrics)
    assert len(level.subset(diverged_step=float("nan")).metrics) == len(level.metrics)


def test_a_run_without_a_middle_level_says_so_and_devices_are_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = replace(CONFIG, levels=2)
    study = tl.Study(config, model=small_mlp, task=blobs(), progress=False)
    list(study.levels("~/runs"))
    folder = tmp_path / "runs" / study.folder("").name
    assert len(tl.load_run(f"~/runs/{folder.name}")) == 3
    with pytest.raises(ValueError, match="device must be one that PyTorch has here"):
        tl.load_run(folder, device="gpu")
    (folder / "level_01").rename(folder / "elsewhere")
    with pytest.warns(RuntimeWarning, match="level 1 of .* is missing, and the 1 after it"):
        assert len(tl.load_run(folder)) == 1
