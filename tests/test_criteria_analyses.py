"""analyses.pruning_criteria at a tiny config: names, costs by closed form, one stack; its figure; the benchmark."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import ticketlab as tl
from analyses import pruning_criteria
from analyses.command import main
from analyses.pruning_criteria import parse
from benchmarks import zoo
from figures.pruning_criteria import PANELS, draw, supplement
from figures.style import save
from ticketlab.engine.start import Start

METHODS = ("random", "snip", "snip*3/layer", "magnitude@early", "magnitude", "movement")
STUDY = tl.ImpConfig(
    treatments=("ticket",),
    levels=2,
    prune_fraction=0.8,
    init_seeds=(0, 1),
    score_examples=100,
    recipe=tl.Recipe(steps=40, eval_every=20),
)
SIZE = 64 * 100 + 100 * 50 + 50 * 10


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs")
    config = pruning_criteria.Config(store=store, out=store, methods=METHODS, early_step=10, study=STUDY, device="cpu")
    return pruning_criteria.run(config)["networks"], list(tl.imp(replace(STUDY, snapshot_steps=(10,)), store=store))


def test_every_method_keeps_as_many_weights_as_the_ticket(table):
    networks, levels = table
    assert networks.groupby("method", sort=False).size().to_dict() == {"dense": 2, "imp": 2} | dict.fromkeys(METHODS, 2)
    trained = networks.query("level == 2")
    assert trained["kept"].unique().tolist() == [levels[2].metrics["kept"].iloc[0]]
    assert networks["test_error"].between(0, 1).all()
    assert not networks["cuts_the_network"].fillna(False).astype(bool).any()


def test_a_method_that_cuts_the_network_is_left_out_of_the_stack(table, tmp_path):
    _, levels = table
    model, task = tl.model_and_task(STUDY, device="cpu")
    finder = pruning_criteria._Finder(STUDY, 10, model, task, levels[0], tmp_path, {})
    few = {name: torch.zeros_like(mask) for name, mask in levels[2].masks.items()}
    for mask in few.values():
        mask[:, 0, 0] = True  # one weight in each layer
    level = replace(levels[2], masks=few)
    found = pruning_criteria._compared(finder, [parse("small_init"), parse("synflow/layer")], level)
    assert found["cuts_the_network"].tolist() == [True, True, False, False]
    assert found["kept"].tolist()[2:] == [3, 3] and found["test_error"].isna().tolist() == [True, True, False, False]
    assert len(pruning_criteria._compared(finder, [parse("small_init/layer")], level)) == 2
    still = pruning_criteria._compared(finder, [parse("movement@init"), parse("movement@init*2")], level)
    assert still["cuts_the_network"].all()  # nothing has moved: no score tells weights apart


def test_a_network_of_the_stack_is_the_one_trained_alone(table):
    networks, levels = table
    model, task = tl.model_and_task(STUDY, device="cpu")
    dense, ticket = levels[0].select(init_seed=1), levels[2].select(init_seed=1)
    x, y = tl.criteria.draw_examples(task, 100, 1)
    evidence = tl.criteria.Evidence(model, dense.masks, dense.snapshots[0], dense.snapshots[10], x, y)
    masks = tl.criteria.find("magnitude", evidence, float(tl.masks.density(ticket.masks)))
    alone = tl.train(model, [Start(dense.start, masks, 1)], task, STUDY.recipe).metrics
    row = networks.query("method == 'magnitude@early' and init_seed == 1").iloc[0]
    assert row["test_error"] == pytest.approx(alone["test_error"].iloc[0], abs=0.01)
    assert row["test_loss_nats"] == pytest.approx(alone["test_loss_nats"].iloc[0], rel=1e-3)


def test_costs_by_closed_form(table):
    networks, levels = table
    cost = networks.query("level != 1 and init_seed == 0").set_index("method")["dense_trainings"]
    score = 3 * 100 / (3 * 60 * 40)  # a gradient of 100 examples, in trainings of 40 steps of 60
    expected = {"dense": 0, "imp": 2, "random": 0, "snip": score, "snip*3/layer": 3 * score}
    expected |= {"magnitude@early": 10 / 40, "magnitude": 1, "movement": 1}
    assert cost[list(expected)].to_dict() == pytest.approx(expected)
    live = networks.query("method == 'imp' and init_seed == 0")["live_trainings"].item()
    assert live == pytest.approx(1 + levels[1].density)


def test_names_are_filled_in_as_in_the_literature():
    found = {name: parse(name) for name in ("snip", "synflow", "magnitude", "movement_same_sign", "large_init")}
    assert [(m.stage, m.rounds, m.scope) for m in found.values()] == [
        ("init", 1, "global"),
        ("init", 100, "global"),
        ("trained", 1, "global"),
        ("trained", 1, "global"),
        ("init", 1, "global"),
    ]
    full = parse("snip@early*20/layer")
    assert (full.criterion, full.stage, full.rounds, full.scope) == ("snip", "early", 20, "layer")
    for name in pruning_criteria.METHODS:
        assert parse(name).name == name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"methods": ("snipp",)}, "Did you mean 'snip'"),
        ({"methods": ("snip@late",)}, "unknown stage 'late'"),
        ({"methods": ("snip*0",)}, "a method must be criterion"),
        ({"methods": ("snip", "snip")}, "methods must be given once"),
        ({"replicas": 0}, "replicas must be at least 1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        pruning_criteria.Config(**change)


@pytest.mark.parametrize(
    ("change", "levels", "match"),
    [
        ({"at_levels": (99,)}, 2, r"levels must lie in 1\.\.2, those of the run: got \[99\]"),
        ({"at_levels": (0, 1)}, 2, r"levels must lie in 1\.\.2"),
        ({"at_levels": ()}, 2, r"levels must lie in 1\.\.2"),
        ({}, 0, r"levels must lie in 1\.\.0"),
        ({"replicas": 50}, 2, "replicas must be 1 to the run's 2 init seeds: got 50"),
    ],
)
def test_what_would_compare_nothing_is_refused_before_training(tmp_path, change, levels, match):
    study = replace(STUDY, levels=levels)
    with pytest.raises(ValueError, match=match):
        pruning_criteria.run(
            pruning_criteria.Config(store=tmp_path, out=tmp_path, study=study, early_step=10, **change)
        )
    assert list(tmp_path.iterdir()) == []


def test_every_second_level_is_compared_or_the_only_one():
    config = pruning_criteria.Config()
    wanted = [pruning_criteria._wanted(config, n) for n in (1, 2, 5)]
    assert wanted == [{1}, {2}, {2, 4}]


def test_a_run_is_measured_by_its_first_seeds_and_must_have_the_early_step(tmp_path, table):
    study = replace(STUDY, levels=1, recipe=tl.Recipe(steps=20, eval_every=20))
    list(tl.imp(study, store=tmp_path / "runs"))
    folder = str(tl.run_folder(study, tmp_path / "runs"))
    module = pruning_criteria

    def command(*flags):
        flags = ["--run", folder, "--out", str(tmp_path), "--at-levels", "1", *flags]
        return main("pruning_criteria", module.Config, module.run, module.draw, module.summary, flags)

    assert command("--methods", "random", "--replicas", "1") == 0
    (written,) = (tmp_path / "pruning_criteria").glob("*/networks.csv")
    networks = pd.read_csv(written)
    assert networks["method"].tolist() == ["dense", "imp", "random"] and set(networks["init_seed"]) == {0}
    assert command("--methods", "magnitude@early") == 2


# Figure


def fixture_table():
    methods = {
        "dense": ("", "", ""),
        "imp": ("", "", ""),
        "random": ("random", "init", "global"),
        "magnitude": ("magnitude", "trained", "global"),
        "small_init": ("small_init", "init", "layer"),
        "movement": ("movement", "trained", "layer"),
    }
    rows = []
    for (method, about), level, seed in itertools.product(methods.items(), range(3), range(2)):
        if (level == 0) == (method == "dense"):
            empties = method == "small_init" and level == 2
            row = {"method": method, **dict(zip(("criterion", "stage", "scope"), about, strict=True))}
            row |= {"level": level, "level_density": 0.2**level, "init_seed": seed, "dense_trainings": level}
            error = np.nan if empties else 0.02 * (1 + level + seed)
            rows.append(row | {"cuts_the_network": empties, "test_error": error, "rewind_step": 0, "steps": 50})
    return pd.DataFrame(rows).assign(task="digits", model="mlp_100_50", early_step=5)


def test_the_figure_shows_every_replica_and_says_n(tmp_path):
    figure = draw({"networks": fixture_table()})
    assert "n = 2" in figure.get_suptitle() and "early: step 5" in figure.get_suptitle()
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == list(PANELS) and len({axes.get_ylim() for axes in figure.axes}) == 1
    costs = supplement({"networks": fixture_table()})
    assert "at 4 % of the weights" in [axes.get_title() for axes in costs.axes]
    before = figure.axes[titles.index(PANELS[0])]
    shown = [y for line in before.lines if line.get_linestyle() == "None" for y in line.get_ydata()]
    assert {4.0, 6.0, 8.0} <= {round(y, 9) for y in shown}
    refused = [line for line in figure.axes[titles.index(PANELS[2])].lines if line.get_marker() == "x"]
    assert len(refused) == 1 and refused[0].get_xdata()[0] == pytest.approx(0.04)
    first = [p.read_bytes() for p in save(figure, tmp_path / "a")]
    assert first == [p.read_bytes() for p in save(draw({"networks": fixture_table()}), tmp_path / "b")]


# Benchmark


def test_the_zoo_holds_every_criterion_and_start_in_one_stack():
    x = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = tl.Task.from_tensors(x, torch.arange(200) % 10)
    networks = zoo.zoo("mlp_100_50", task, 0.2)
    assert len(networks) == len(tl.criteria.CRITERIA) - 1 + len(zoo.TREATMENTS) - 1  # obd_exact, fine_tune
    n, how, calls = zoo.contestants("mlp_100_50", task, zoo.Config(steps={"mlp_100_50": 2}))
    assert (n, how) == (len(networks), "vmap")
    calls["one stack"]()
