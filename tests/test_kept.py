"""Trainings that are kept: the same one is read, any other is done; an analysis that was killed goes on from them."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from cases import blobs, build, half_masks, small_conv_bn, small_mlp

import ticketlab as tl
from analyses import dynamic_sparsity, supermasks
from analyses.command import config_of
from ticketlab.engine import training
from ticketlab.engine.checkpoint import Checkpoints
from ticketlab.engine.dynamic import DropGrow
from ticketlab.errors import Refused

RECIPE = tl.Recipe(steps=12, eval_every=5, batch_size=16)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replicas each training that was done had."""
    counts, real = [], training.train

    def counting(model, starts, *rest, **options):
        counts.append(len(starts))
        return real(model, starts, *rest, **options)

    monkeypatch.setattr(training, "train", counting)
    return counts


def starts(model: torch.nn.Module, **each: object) -> list[tl.Start]:
    return [tl.Start(tl.state(model), half_masks(model, seed), seed, **each) for seed in (0, 1)]


def test_what_is_read_is_what_was_trained(tmp_path, trained):
    model, task = build(small_mlp), blobs()
    how = {"first_step": 2, "snapshot_steps": (7,), "progress": False}
    first, again = (tl.train(model, starts(model), task, RECIPE, store=tmp_path, **how) for _ in range(2))
    plain = tl.train(model, starts(model), task, RECIPE, **how)
    assert trained == [2, 2], "one kept, one plain"
    for other in (again, plain):
        pd.testing.assert_frame_equal(first.metrics, other.metrics)
        pd.testing.assert_frame_equal(first.curves, other.curves)
        for a, b in ((first.end, other.end), (first.snapshots[7], other.snapshots[7])):
            assert all(torch.equal(p, b.params[n]) for n, p in a.params.items())
        assert all(torch.equal(mask, other.masks[n]) for n, mask in first.masks.items())
        assert first.execution == other.execution


def test_any_other_training_is_done(tmp_path, trained):
    model, task = build(small_mlp), blobs()
    begun = starts(model)
    moved = tl.State({n: p + 1e-9 for n, p in begun[0].state.params.items()}, {})
    other = blobs(n_classes=4)
    many = [
        (model, begun, task, RECIPE, {}),
        (model, [begun[0], replace(begun[1], order_seed=7)], task, RECIPE, {}),
        (model, [begun[0], replace(begun[1], state=moved)], task, RECIPE, {}),
        (model, [begun[0], replace(begun[1], masks=begun[0].masks)], task, RECIPE, {}),
        (model, starts(model, frozen=True), task, RECIPE, {}),
        (model, starts(model, learning_rate=0.1), task, RECIPE, {}),
        (model, starts(model, dynamics=DropGrow(every=3)), task, RECIPE, {}),
        (model, begun[::-1], task, RECIPE, {}),
        (model, begun, task, replace(RECIPE, learning_rate=0.002), {}),
        (model, begun, task, replace(RECIPE, optimizer=torch.optim.RMSprop), {}),
        (model, begun, task, RECIPE, {"first_step": 1}),
        (model, begun, task, RECIPE, {"snapshot_steps": (12,)}),
        (model, begun, task, RECIPE, {"execution": "loop"}),
        (build(lambda: torch.nn.Sequential(*small_mlp().children(), torch.nn.Tanh())), None, task, RECIPE, {}),
        (build(lambda: tl.models.mlp((6,), 4, hidden=(8, 5))), None, other, RECIPE, {}),
    ]
    for net, given, data, recipe, options in many * 2:
        tl.train(net, given or starts(net), data, recipe, store=tmp_path, progress=False, **options)
    assert len(trained) == len(many) == len(list((tmp_path / "trainings").iterdir()))
    assert len(tl.runs(tmp_path)) == 0, "trainings are no runs"


def test_a_killed_one_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    model, task = build(small_conv_bn), blobs(180, (1, 8, 8))
    plain = tl.train(model, starts(model), task, RECIPE, progress=False)
    monkeypatch.setattr(training, "PIECE", 3)
    real, looks = training.Watch.look, []

    def look(watch, step):
        looks.append(step)
        if step == 10 and looks.count(10) == 1:
            raise KeyboardInterrupt
        return real(watch, step)

    monkeypatch.setattr(training.Watch, "look", look)
    how = {"store": tmp_path, "checkpoint_minutes": 0.0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        tl.train(model, starts(model), task, RECIPE, **how)
    outcome = tl.train(model, starts(model), task, RECIPE, **how)
    assert looks == [5, 10, 10, 12]
    for part, other in zip(plain.end, outcome.end, strict=True):
        assert all(torch.equal(t, other[n]) for n, t in part.items())


def test_what_a_killed_one_could_not_take_away_goes_with_the_next(tmp_path, monkeypatch):
    model, task = build(small_mlp), blobs()

    def again() -> None:
        tl.train(model, starts(model), task, RECIPE, store=tmp_path, checkpoint_minutes=0, progress=False)

    def killed(self) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoints, "clear", killed)
        again()
    assert list(tmp_path.rglob("level_00/manifest.json")) and list(tmp_path.rglob("level_00.checkpoint"))
    again()
    assert not list(tmp_path.rglob("*checkpoint*"))


def test_a_hook_hears_nothing_of_what_is_read(tmp_path):
    model = build(small_mlp)
    with pytest.raises(Refused, match="on_eval hears nothing"):
        tl.train(model, starts(model), blobs(), RECIPE, store=tmp_path, on_eval=lambda step, rows: None)


STUDY = ["--levels", "1", "--steps", "20", "--eval-every", "10", "--init-seeds", "0", "1", "--device", "cpu"]


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (dynamic_sparsity, ["--extend", "steps", "--update-every", "5"]),
        (supermasks, ["--learned-steps", "8", "--learned-seeds", "1", "--densities", "0.5", "--draws", "2"]),
    ],
    ids=["dynamic_sparsity", "supermasks"],
)
def test_an_analysis_that_was_killed_trains_only_what_is_missing(module, flags, tmp_path, trained, monkeypatch):
    def run(folder: str) -> tuple[list[int], dict[str, pd.DataFrame]]:
        name, trained[:] = module.__name__.rpartition(".")[2], []
        argv = [*STUDY, *flags, "--store", str(tmp_path / "runs"), "--out", str(tmp_path / folder)]
        tables = module.run(config_of(name, module.Config, argv))
        return [*trained], tables

    _, whole = run("whole")
    real, done = training.train, []

    def killed(*args, **options):
        done.append(1)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed")
    again, tables = run("killed")
    assert len([*(tmp_path / "whole" / "trainings").iterdir()]) == len(again) + 1
    last, read = run("killed")
    assert last == [], "all of it is read"
    for name, table in whole.items():
        pd.testing.assert_frame_equal(tables[name], table, check_exact=True)
        pd.testing.assert_frame_equal(read[name], table, check_exact=True)
