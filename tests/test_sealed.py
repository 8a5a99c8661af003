"""What is stored is tied to what made it: JSON files to the last character, levels to their run, data to theirs."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from cases import blobs, small_mlp
from safetensors.torch import load_file, save_file
from torch import nn

import ticketlab as tl
from analyses.command import OfRun, open_run
from ticketlab import models
from ticketlab.engine import store as files
from ticketlab.engine.start import Start
from ticketlab.errors import Refused
from ticketlab.models import mlp

CONFIG = tl.ImpConfig(
    levels=2, prune_fraction=0.5, init_seeds=(0, 1), recipe=tl.Recipe(steps=8, eval_every=4), snapshot_steps=(4,)
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("sealed")
    list(tl.imp(CONFIG, store=store, device="cpu", progress=False))
    return tl.run_folder(CONFIG, store)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def test_verify_finds_a_run_whole(run: Path) -> None:
    assert tl.verify(run) == {0: None, 1: None, 2: None}
    renamed = run.rename(run.with_name("my-favourite"))
    (renamed / ".lock").unlink(missing_ok=True)
    assert tl.verify(renamed) == {0: None, 1: None, 2: None} and len(tl.load_run(renamed)) == 3


def _reads_as(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["config.json", "level_01/manifest.json"])
def test_no_exchanged_character_is_believed(run: Path, name: str) -> None:
    path, draw = run / name, random.Random(0)
    text = path.read_text()
    places = [found.start() for found in re.finditer(r"[0-9a-zA-Z]", text)]
    for place in draw.sample(places, 150):
        other = draw.choice([c for c in "0123456789abcxyz" if c != text[place]])
        path.write_text(changed := text[:place] + other + text[place + 1 :])
        if _reads_as(changed) == json.loads(text):  # the last digit of a time
            continue
        with pytest.raises(Refused):
            tl.load_run(run)[1]
    path.write_text(text)
    assert tl.load_run(run)[1].level == 1


@pytest.mark.parametrize("change", [{"density": 0.1}, {"density": float("nan")}, {"wall_seconds": 0}, {"level": 2}])
def test_no_field_of_a_manifest_is_believed_without_its_seal(run: Path, change: dict[str, float]) -> None:
    path = run / "level_01" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(Refused, match=r"level_01/manifest.json does not match its seal"):
        tl.load_run(run)[1]
    assert "seal" in str(tl.verify(run)[1])


def resealed(path: Path, change: dict[str, object]) -> None:
    """As one who knows the format would write it."""
    content = json.loads(path.read_text()) | change
    path.write_bytes(files.sealed(content))


def rewritten(level: Path, name: str, content: bytes) -> None:
    (level / name).write_bytes(content)
    sums = json.loads((level / "manifest.json").read_text())["sha256"]
    sums[name] = hashlib.sha256(content).hexdigest()
    resealed(level / "manifest.json", {"sha256": sums})


def test_verify_finds_what_checksums_of_a_forger_hide(run: Path) -> None:
    metrics = run / "level_01" / "metrics.csv"
    table = pd.read_csv(metrics)
    rewritten(run / "level_01", "metrics.csv", table.assign(test_error=table["test_error"] + 0.1).to_csv().encode())
    assert "where its metrics say" in str(tl.verify(run)[1])
    rewritten(run / "level_01", "metrics.csv", table.assign(kept=table["kept"] + 1).to_csv().encode())
    assert "in replica 0 5950 live weights, where its metrics say 5951" in str(tl.verify(run)[1])
    rewritten(run / "level_01", "metrics.csv", table.assign(density=table["density"] / 2).to_csv().encode())
    assert "density 0.5, where its metrics say 0.25" in str(tl.verify(run)[1])
    masks = load_file(run / "level_02" / "masks.safetensors")
    masks["fc1.weight"] = masks["fc1.weight"].roll(1, -1)
    save_file(masks, run / "masks")
    rewritten(run / "level_02", "masks.safetensors", (run / "masks").read_bytes())
    rewritten(run / "level_01", "metrics.csv", table.to_csv().encode())
    assert "that the level before has pruned" in str(tl.verify(run)[2])
    weights = load_file(run / "level_00" / "weights.safetensors")
    weights["end/params/fc1.bias"][0, 0] = float("nan")
    save_file(weights, run / "weights")
    rewritten(run / "level_00", "weights.safetensors", (run / "weights").read_bytes())
    assert "replica 0 weights that are not finite" in str(tl.verify(run)[0])
    weights = load_file(run / "level_01" / "weights.safetensors")
    weights["end/params/fc1.weight"][0] += 1
    save_file(weights, run / "weights")
    rewritten(run / "level_01", "weights.safetensors", (run / "weights").read_bytes())
    assert "pruned weights of fc1.weight that are neither zero nor where they started" in str(tl.verify(run)[1])


def test_a_run_is_not_measured_on_other_data(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["fingerprint"]["task"] = "0" * 16
    config.pop("seal")
    config["identity"] = files.identity({k: v for k, v in config.items() if k not in ("environment", "identity")})
    (run / "config.json").write_bytes(files.sealed(config))
    run = run.rename(run.with_name("another"))
    with pytest.raises(Refused, match="must be those of the run"):
        open_run(OfRun(run=(run,), device="cpu"))
    with pytest.raises(Refused, match="must be those of the run"):
        tl.verify(run)


def test_a_run_is_not_measured_with_another_network(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.build
    monkeypatch.setattr(models, "build", lambda *given: nn.Sequential(real(*given), nn.Softmax(1)))
    with pytest.raises(Refused, match="must make the network of the run"):
        open_run(OfRun(run=(run,), device="cpu"))
    with pytest.raises(Refused, match="must make the network of the run"):
        tl.verify(run)


def test_verify_takes_a_network_and_data_of_ones_own(tmp_path: Path) -> None:
    how = {"model": small_mlp, "task": blobs(dtype=torch.float32)}
    list(tl.imp(CONFIG, store=tmp_path, device="cpu", progress=False, **how))
    (run,) = tmp_path.iterdir()
    assert tl.verify(run) == tl.verify(run, **how) == {0: None, 1: None, 2: None}
    table = pd.read_csv(run / "level_01" / "metrics.csv")
    rewritten(run / "level_01", "metrics.csv", table.assign(test_error=table["test_error"] + 0.1).to_csv().encode())
    assert "where its metrics say" in str(tl.verify(run, **how)[1])
    with pytest.raises(Refused, match="must make the network of the run"):
        tl.verify(run, model=lambda: mlp((6,), 3, hidden=(8, 6)), task=how["task"])


def test_a_folder_named_as_another_run_is_refused(run: Path) -> None:
    other = run.rename(run.with_name("digits-mlp_100_50-0123456789"))
    with pytest.raises(Refused, match="not 0123456789"):
        tl.load_run(other)


def test_a_number_of_too_many_digits_is_one_line(run: Path) -> None:
    (run / "config.json").write_text('{"config": ' + "1" * 5000 + "}")
    with pytest.raises(Refused, match="must be valid JSON"):
        tl.load_run(run)


def test_more_than_a_hundred_levels_are_counted(run: Path) -> None:
    for number in range(3, 102):
        (run / f"level_{number:02d}").mkdir()
        (run / f"level_{number:02d}" / "manifest.json").write_text("{}")
    assert files.n_stored(run) == 102 and files.n_beyond(run) == 0
    (run / "level_50" / "manifest.json").unlink()
    assert files.n_stored(run) == 50 and files.n_beyond(run) == 51


def test_who_has_lost_the_lock_does_not_write(tmp_path: Path) -> None:
    first = tl.imp(CONFIG, store=tmp_path, device="cpu", progress=False)
    next(first)
    (run,) = tmp_path.iterdir()
    (run / ".lock").unlink()
    second = tl.imp(CONFIG, store=tmp_path, device="cpu", progress=False)
    next(second), next(second)
    with pytest.raises(Refused, match="it was deleted, and another process may write now"):
        list(first)
    list(second)
    assert tl.verify(run) == {0: None, 1: None, 2: None}


def test_runs_of_another_network_under_the_same_name_are_not_merged(tmp_path: Path) -> None:
    found, task = [], blobs(dtype=torch.float32)
    for width, seed, execution in ((8, 0, "auto"), (9, 1, "auto"), (8, 2, "loop"), (8, 3, "auto")):
        config = replace(CONFIG, init_seeds=(seed,))
        net = partial(mlp, (6,), 3, hidden=(width, 5))
        study = tl.Study(config, model=net, task=task, execution=execution, device="cpu", progress=False)
        list(study.levels(tmp_path))
        found.append(study.folder(tmp_path))
    with pytest.raises(Refused, match="differ in their network"):
        tl.load_run(found[:2])
    with pytest.raises(Refused, match="differ in execution"):
        tl.load_run([found[0], found[2]])
    assert tl.load_run([found[0], found[3]]).config.init_seeds == (0, 3)


def test_merged_runs_keep_all_their_folders(whole: Path, tmp_path: Path) -> None:
    others = []
    for seed in (2, 3):
        config = replace(CONFIG, init_seeds=(seed,))
        list(tl.imp(config, store=tmp_path, device="cpu", progress=False))
        others.append(tl.run_folder(config, tmp_path))
    merged = tl.load_run([whole, *others])
    assert merged.folders == (whole, *others)
    assert merged.config.init_seeds == (0, 1, 2, 3) and sorted(set(merged[2].metrics["init_seed"])) == [0, 1, 2, 3]


def test_snapshots_of_a_network_that_diverged_are_nan() -> None:
    task = blobs(dtype=torch.float32)
    model = tl.initialise(small_mlp, 0).float()
    ones, own = tl.masks.ones(model), tl.state(model)
    wild = replace(Start(own, ones, 1), learning_rate=1e30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = tl.train(
            model, [Start(own, ones, 1), wild], task, tl.Recipe(steps=12, batch_size=20, optimizer="sgd", eval_every=5),
            snapshot_steps=(0, 7, 12), progress=False,
        )  # fmt: skip
    for step, state in outcome.snapshots.items():
        finite = [bool(state.params["fc1.weight"][r].isfinite().all()) for r in (0, 1)]
        assert finite == [True, step == 0], step
