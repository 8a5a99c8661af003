"""A training that is stopped half way goes on to the same bits, from its last checkpoint and not from its start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp

import ticketlab as tl
from ticketlab.engine import training
from ticketlab.engine.checkpoint import STATE, TENSORS, Checkpoints
from ticketlab.engine.start import Start
from ticketlab.engine.training import Outcome, train

SGD = tl.Recipe(
    steps=40, batch_size=16, optimizer="sgd", learning_rate=0.05, nesterov=True, eval_every=8, schedule="cosine"
)
ADAM = replace(SGD, optimizer="adamw", nesterov=False, learning_rate=0.005, weight_decay=0.1, decay_all=False)
NETWORKS = {"mlp": (small_mlp, blobs), "conv_bn": (small_conv_bn, images)}


class Stopped(Exception):
    pass


def problem(name: str) -> tuple[torch.nn.Module, list[Start], tl.Task]:
    factory, data = NETWORKS[name]
    nets = [build(factory, seed, torch.float32) for seed in range(3)]
    starts = [Start(tl.state(net), half_masks(net, 5), 10 + r) for r, net in enumerate(nets)]
    starts[1] = replace(starts[1], frozen=True)
    return nets[0], starts, data(dtype=torch.float32)


def same(one: Outcome, two: Outcome) -> bool:
    states = [(one.end, two.end), *((one.snapshots[k], two.snapshots[k]) for k in one.snapshots)]
    tensors = [(a[n], b[n]) for s, t in states for a, b in zip(s, t, strict=True) for n in a]
    tables = one.metrics.equals(two.metrics) and one.curves.equals(two.curves)
    return tables and one.snapshots.keys() == two.snapshots.keys() and all(torch.equal(a, b) for a, b in tensors)


def stopping(at: int):
    def look(step: int, rows: object) -> None:
        if step >= at:
            raise Stopped

    return look


@pytest.mark.parametrize("execution", ["loop", "vmap"])
@pytest.mark.parametrize("recipe", [replace(SGD, weight_decay=0.0), replace(ADAM, weight_decay=0.0, decay_all=True)],
                         ids=["sgd", "adamw"])  # fmt: skip
@pytest.mark.parametrize("name", NETWORKS)
def test_a_stopped_training_ends_in_the_same_bits(name, recipe, execution, tmp_path, monkeypatch) -> None:
    model, starts, task = problem(name)
    monkeypatch.setattr(training, "PIECE", 5)  # between two looks too
    given = {"snapshot_steps": (3, 21), "first_step": 2, "progress": False, "execution": execution}
    whole = train(model, starts, task, recipe, **given)
    kept = Checkpoints(tmp_path / "half", "a run", seconds=0)
    for at in (9, 25, 39):
        with pytest.raises(Stopped):
            train(model, starts, task, recipe, on_eval=stopping(at), checkpoints=kept, **given)
    seen: list[int] = []
    again = train(model, starts, task, recipe, on_eval=lambda step, _: seen.append(step), checkpoints=kept, **given)
    assert same(whole, again) and seen == [40], "what was done is not done again"
    other = Checkpoints(tmp_path / "half", "another run", seconds=0)
    assert other.read(task.device, 3) is None
    kept.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_network_stays_diverged_over_a_checkpoint(tmp_path) -> None:
    model, starts, task = problem("mlp")
    starts[1] = replace(starts[0], learning_rate=1e30)
    kept = Checkpoints(tmp_path / "half", "a run", seconds=0)
    with pytest.warns(RuntimeWarning, match="replica 1 is not finite"):
        whole = train(model, starts, task, replace(SGD, weight_decay=0.0), progress=False)
    with pytest.warns(RuntimeWarning), pytest.raises(Stopped):
        train(model, starts, task, SGD, on_eval=stopping(33), checkpoints=kept, progress=False)
    assert same(whole, train(model, starts, task, SGD, checkpoints=kept, progress=False))


@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_a_damaged_checkpoint_is_not_believed(name, tmp_path) -> None:
    model, starts, task = problem("mlp")
    kept = Checkpoints(tmp_path / "half", "a run", seconds=0)
    with pytest.raises(Stopped):
        train(model, starts, task, SGD, on_eval=stopping(17), checkpoints=kept, progress=False)
    path = kept.folder / name
    content = path.read_bytes()
    whole = kept.read(task.device, 1)
    assert whole is not None
    for place in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = kept.read(task.device, 1)  # None, or the same number: of the last digit of a time not all counts
        assert found is None or found.state == whole.state
    again = train(model, starts, task, SGD, checkpoints=kept, progress=False)
    assert same(train(model, starts, task, SGD, progress=False), again)


def test_a_study_leaves_checkpoints_and_takes_them_away(tmp_path, monkeypatch) -> None:
    config = tl.ImpConfig(levels=1, init_seeds=(0,), recipe=tl.Recipe(steps=20, eval_every=5))
    whole = list(tl.imp(config, store=None, progress=False, device="cpu"))
    real, left = training.Watch.look, []

    def look(self, step: int) -> None:
        folders = sorted(path.name for path in tmp_path.glob("*/*.checkpoint"))
        left.append(folders)
        if folders and step == 15:
            raise Stopped
        real(self, step)

    monkeypatch.setattr(training.Watch, "look", look)
    study = tl.Study(config, device="cpu", progress=False, checkpoint_minutes=0)
    with pytest.raises(Stopped):
        list(study.levels(tmp_path))
    assert left[-1] == ["level_00.checkpoint"]
    monkeypatch.setattr(training.Watch, "look", real)
    for one, two in zip(whole, study.levels(tmp_path), strict=True):
        for name, tensor in one.end.params.items():
            assert torch.equal(tensor, two.end.params[name])
    assert not [path for path in Path(tmp_path).rglob("*checkpoint*")]


@pytest.mark.parametrize("level", [0, 1])
def test_what_a_killed_process_could_not_take_away_goes_with_the_next(level, tmp_path, monkeypatch) -> None:
    config = tl.ImpConfig(levels=1, init_seeds=(0,), recipe=tl.Recipe(steps=20, eval_every=5))
    study, real = tl.Study(config, device="cpu", progress=False, checkpoint_minutes=0), Checkpoints.clear

    def killed(self) -> None:
        if self.folder.name == f"level_{level:02d}.checkpoint":
            raise Stopped
        real(self)

    monkeypatch.setattr(Checkpoints, "clear", killed)
    with pytest.raises(Stopped):
        list(study.levels(tmp_path))
    assert len(list(tmp_path.glob(f"*/level_{level:02d}*"))) == 2, "the level, and the checkpoint beside it"
    monkeypatch.setattr(Checkpoints, "clear", real)
    list(study.levels(tmp_path))
    assert len(tl.load_run(study.folder(tmp_path))) == 2 and not list(tmp_path.rglob("*checkpoint*"))
