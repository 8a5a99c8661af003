"""analyses.transfer at a tiny config, its settings against slow references, and its figure from a fixture table."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from scipy.stats import ttest_1samp

import ticketlab as tl
from analyses import settings, transfer
from analyses.command import main
from analyses.intervals import holm
from figures.transfer import draw
from ticketlab.engine.store import read_config

STUDY = replace(
    transfer.STUDY,
    levels=2,
    init_seeds=(0, 1),
    snapshot_steps=(10,),
    recipe=tl.Recipe(steps=20, batch_size=16, eval_every=20),
)
KEYS = ["target", "source", "carried", "control", "level"]


def config(folder, **flags):
    return transfer.Config(store=folder / "runs", out=folder / "out", **{"study": STUDY, "theta_k": 10, **flags})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def tables(folder):
    return transfer.run(config(folder, sources=("digits:0-4", "digits:6-9")))


# Settings


def load(word, study=STUDY, **flags):
    return settings.setting(word, study, **{"resize": None, "grey": False, "device": "cpu", **flags})


def test_a_setting_is_read_from_one_word():
    plain = load("digits")
    assert plain.recipe == STUDY.recipe and plain.task.name == "digits" and plain.task.n_classes == 10
    assert plain.task.fingerprint() == tl.load_task("digits").fingerprint()
    sgd = load("digits@sgd,0.05").recipe
    assert sgd == replace(STUDY.recipe, optimizer="sgd", learning_rate=0.05)
    assert load("digits:3-4@sgd,0.1,0").recipe == replace(sgd, learning_rate=0.1, momentum=0.0)


def test_classes_are_kept_and_numbered_anew():
    whole, part = load("digits").task, load("digits:3-5").task
    assert part.name == "digits_3-5" and part.n_classes == 3
    for name in ("train", "validation", "test"):
        given, kept = getattr(whole, name), getattr(part, name)
        expected = [(x, y - 3) for x, y in zip(given.x, given.y.tolist(), strict=True) if 3 <= y <= 5]
        assert kept.y.tolist() == [y for _, y in expected]
        assert torch.equal(kept.x, torch.stack([x for x, _ in expected]))


@pytest.mark.parametrize(
    ("word", "match"),
    [
        ("digits:3", r"a setting must be TASK\[:FIRST-LAST\].*'digits:3'"),
        ("digits@sgd", "a setting must be TASK"),
        ("digit", "unknown task 'digit'.*'digits'"),
        ("digits:3-3", r"classes must be FIRST-LAST in 0\.\.9, two at least: got 3-3"),
        ("digits:5-10", r"classes must be FIRST-LAST in 0\.\.9"),
        ("digits@sgd,fast", "rate and momentum must be numbers"),
        ("digits@sdg,0.1", "unknown optimizer 'sdg'.*'sgd'"),
    ],
)
def test_words_that_name_nothing_are_refused(word, match):
    with pytest.raises(ValueError, match=match):
        load(word)


# The analysis


def test_every_network_of_the_matrix_is_there(tables):
    networks = tables["networks"]
    pairs = list(itertools.product(("digits:0-4", "digits:6-9"), repeat=2))
    kinds = [("mask", "ticket"), ("mask", "layerwise_shuffle"), ("theta0", "ticket"), ("theta_k", "ticket")]
    kinds += [("theta_k", "layerwise_shuffle")]
    expected = {(t, s, *kind, level) for t, s in pairs for kind in kinds for level in (1, 2)}
    expected |= {(t, t, "mask", "random_mask", level) for t, _ in pairs for level in (1, 2)}
    expected |= {(t, "none", "none", "dense", 0) for t, _ in pairs}
    counts = networks.groupby(KEYS).size()
    assert set(counts.index) == expected and (counts == 2).all()
    assert (networks["first_step"] == 10 * networks["carried"].eq("theta_k")).all()


def test_controls_keep_the_tickets_counts(tables):
    networks = tables["networks"].query("level > 0")
    assert (networks.groupby(["target", "source", "level", "source_seed"])["kept"].nunique() == 1).all()
    whole = networks.query("source == target").groupby(["target", "level"])["kept"].first()
    for (target, level), kept in whole.items():
        size = 64 * 100 + 100 * 50 + 50 * (5 if target == "digits:0-4" else 4)
        for _ in range(level):
            size -= int(np.floor(0.6 * size + 0.5))
        assert kept == size
    # From another number of classes, the output layer is dense.
    carried = networks.query("target == 'digits:6-9' and source == 'digits:0-4' and level == 2")
    assert (carried["kept"] > whole["digits:6-9", 2]).all() and (carried["prunable"] == 11600).all()


def test_the_diagonal_is_the_run_itself(tables, folder):
    """theta0 on its own source is the IMP run's ticket, and the dense network its level 0."""
    networks = tables["networks"]
    (stored,) = (folder / "runs").glob("digits_0-4-*")
    run = tl.load_run(stored)
    assert read_config(stored)["config"]["treatments"] == ["ticket"]
    for level, query in ((0, "control == 'dense'"), (2, "source == target and carried == 'theta0' and level == 2")):
        found = networks.query(f"target == 'digits:0-4' and {query}")
        rows = run[level].metrics
        assert found["source_seed"].tolist() == found["init_seed"].tolist() == rows["init_seed"].tolist()
        np.testing.assert_allclose(found["test_loss_nats"], rows["test_loss_nats"], rtol=1e-3)


def test_a_mask_alone_starts_from_another_seed(tables):
    alone = tables["networks"].query("carried == 'mask'")
    assert (alone["init_seed"] == 1 - alone["source_seed"]).all()
    assert (alone["order_seed"] == alone["source_seed"]).all()


def test_contrasts_are_paired_by_seed(tables):
    networks, contrasts = tables["networks"], tables["contrasts"]
    assert len(contrasts) == 2 * 2 * 2 * 3 * 3
    where = "target == 'digits:0-4' and source == 'digits:6-9' and level == 2"
    row = contrasts.query(f"{where} and carried == 'theta0' and against == 'layerwise_shuffle'").iloc[0]
    mine = networks.query(f"{where} and carried == 'theta0'").set_index("source_seed")["test_error"]
    other = networks.query(f"{where} and carried == 'mask' and control == 'layerwise_shuffle'")
    d = mine - other.set_index("source_seed")["test_error"]
    assert row["error_above"] == pytest.approx(d.mean()) and row["n"] == 2
    assert row["high"] - row["error_above"] == pytest.approx(12.706 * d.std() / np.sqrt(2), rel=1e-3)
    assert row["p_value"] == pytest.approx(ttest_1samp(d, 0).pvalue)
    own = contrasts.query("source == target and carried == 'theta0' and against == 'own_ticket'")
    assert (own["error_above"] == 0).all() and own["p_value"].isna().all()


def test_contrasts_are_corrected_for_the_whole_table(tables):
    contrasts = tables["contrasts"]
    pd.testing.assert_series_equal(contrasts["p_holm"], holm(contrasts["p_value"]), check_names=False)
    n = contrasts["p_value"].count()
    assert (contrasts["n_family"] == n).all() and {"p_unadjusted", f"p_holm_of_{n}"} <= set(transfer.summary(tables))


def test_the_command_takes_stored_runs_across_optimizers(tmp_path, folder, tables, capsys):
    (stored,) = (folder / "runs").glob("digits_0-4-*")
    words = ["--sources", "digits:0-4", "--targets", "digits:0-4@sgd,0.05,0", "--runs", str(stored)]
    flags = ["--levels", "2", "--steps", "20", "--eval-every", "20", "--init-seeds", "0", "1", "--batch-size", "16"]
    flags += ["--snapshot-steps", "10", "--theta-k", "0", "--at-levels", "1"]
    argv = [*words, *flags, "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main("transfer", transfer.Config, transfer.run, transfer.draw, transfer.summary, argv) == 0
    (out,) = (tmp_path / "out" / "transfer").iterdir()
    names = ["config.json", "contrasts.csv", "networks.csv", "transfer.pdf", "transfer.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    networks = pd.read_csv(out / "networks.csv")
    assert set(networks["carried"]) == {"none", "mask", "theta0"} and set(networks["level"]) == {0, 1}
    assert (networks["optimizer"] == "sgd").all() and (networks["momentum"] == 0).all()
    assert json.loads((out / "config.json").read_text())["at_levels"] == [1]
    assert len(list((tmp_path / "runs").iterdir())) == 1  # the source's was given
    assert "above_shuffled_points" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"at_levels": (3,)}, r"levels must lie in 1\.\.2, those of the run: got \[3\]"),
        ({"at_levels": (0,)}, r"levels must lie in 1\.\.2"),
        ({"theta_k": 7}, r"weights at step theta_k = 7: it has those at \[0, 10\]"),
        ({"theta_k": 20}, r"theta_k must lie in 0\.\.19"),
        ({"study": replace(STUDY, init_seeds=(0,))}, "two init seeds at least"),
        ({"study": replace(STUDY, task="mnist")}, "tasks are named by sources and targets"),
        ({"resize": (0, 4)}, "sides of at least 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, flags, match):
    with pytest.raises(ValueError, match=match):
        transfer.run(config(tmp_path, **flags))
    assert not (tmp_path / "runs").exists()


def test_inputs_of_another_size_need_a_stated_resize(tmp_path, monkeypatch):
    x = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    colourful = tl.Task.from_tensors(x, torch.arange(20) % 2, name="colours")

    def load_task(name, **_):
        return colourful if name == "colours" else tl.load_task(name)

    monkeypatch.setattr(settings, "load", load_task)
    words = ("digits", "colours")
    with pytest.raises(ValueError, match=r"one shape.*\(1, 8, 8\).*\(3, 8, 8\).*--resize HEIGHT WIDTH.*--grey"):
        transfer.run(config(tmp_path, sources=words))
    assert [load(w, grey=True, resize=(6, 6)).task.input_shape for w in words] == [(1, 6, 6)] * 2


def test_runs_of_no_setting_are_refused(tables, folder):
    stored = next((folder / "runs").glob("digits_0-4-*"))
    with pytest.raises(ValueError, match=r"runs must be of a setting.*Give the flags that they were made with"):
        transfer.run(config(folder, sources=("digits:5-9",), runs=(stored,)))
    longer = replace(STUDY, init_seeds=(0, 1, 2))
    with pytest.raises(ValueError, match=r"init seeds \(0, 1, 2\): it has \(0, 1\)"):
        transfer.run(config(folder, sources=("digits:0-4",), runs=(stored,), study=longer))


def test_the_figure_shows_every_network_of_every_pair():
    kinds = [("mask", "ticket"), ("mask", "layerwise_shuffle"), ("mask", "random_mask"), ("theta0", "ticket")]
    kinds += [("theta_k", "ticket"), ("theta_k", "layerwise_shuffle")]
    rows = [
        {"model": "lenet_300_100", "target": target, "source": source, "carried": carried, "control": control}
        | {"level": level, "density": 0.8**level, "source_seed": seed, "test_error": 0.02 + 0.001 * seed}
        | {"first_step": 500 * (carried == "theta_k"), "optimizer": "sgd" if "@" in target else "adam"}
        | {"learning_rate": 0.05 if "@" in target else 0.0012}
        for target, source in itertools.product(("mnist", "fashion_mnist@sgd,0.05"), repeat=2)
        for carried, control in kinds
        for level in (7, 15)
        for seed in range(3)
    ]
    dense = [
        {**row, "source": "none", "carried": "none", "control": "dense", "level": 0, "density": 1.0}
        for row in rows
        if row["carried"] == "theta0" and row["level"] == 7 and row["source"] == row["target"]
    ]
    figure = draw({"networks": pd.DataFrame(rows + dense)})
    assert len(figure.axes) == 4
    titles = {axes.get_title() for axes in figure.axes}
    assert {t for t in titles if "3.52 %" in t} == {
        "on Fashion-MNIST, SGD 0.05: 3.52 % kept, n = 3",
        "on MNIST, Adam 0.0012: 3.52 % kept, n = 3",
    }
    for axes in figure.axes:
        dots = [line for line in axes.lines if line.get_linestyle() == "None"]
        assert sum(len(line.get_xdata()) for line in dots) == 2 * len(kinds) * 3
    assert len(figure.legends[0].get_texts()) == 4
    plt.close(figure)
