"""The analysis of bounds at a tiny config, and its figure from a fixture table."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import ticketlab as tl
from analyses import generalization_bounds as analysis
from analyses.command import main
from figures import generalization_bounds as figure
from figures.style import save
from tests.cases import build, small_conv_bn
from ticketlab import bounds

HYPOTHESES = ("trained", "quantised", "untrained", "random_signs")
BOUNDS = ("mdl", "occam_hoeffding", "occam_kl", "binomial_tail", "held_out")


def tiny(tmp_path, **changes) -> analysis.Config:
    recipe = tl.Recipe(steps=40, eval_every=20)
    about = {"levels": 2, "init_seeds": (0, 1), "treatments": ("ticket", "reinit", "sibling"), "prune_fraction": 0.5}
    study = tl.ImpConfig(recipe=recipe, **about | changes)
    return analysis.Config(study=study, store=tmp_path / "runs", out=tmp_path / "results", n_values=(2, 4))


def test_every_network_is_bounded_under_each_hypothesis(tmp_path):
    config = tiny(tmp_path)
    tables = analysis.run(config)
    table, statements = tables["bounds"], tables["statements"]
    # level 0: tickets alone; level 2: tickets and reinit; a sibling adds nothing
    assert len(table) == (2 + 4) * len(HYPOTHESES) * len(BOUNDS)
    assert set(table["level"]) == {0, 2} and set(table["treatment"]) == {"ticket", "reinit"}
    wide = table.pivot_table("value", ["level", "treatment", "init_seed", "hypothesis"], "bound")
    assert (wide["binomial_tail"] <= wide["occam_kl"] + 1e-9).all()
    assert (wide["occam_kl"] <= wide["occam_hoeffding"] + 1e-12).all()
    np.testing.assert_allclose(table["empirical"] + table["complexity"], table["value"], rtol=1e-12)
    certified = statements.set_index(["hypothesis", "bound"])["certificate"]
    assert not certified["trained", "mdl"] and not certified["quantised", "mdl"]
    assert certified.drop([("trained", "mdl"), ("quantised", "mdl")]).all() and len(certified) == 20

    # one row by hand, from the stored run
    stored = tl.load_run(tl.run_folder(config.study, config.store))
    model, task = tl.model_and_task(config.study)
    one = stored[2].select(treatment="reinit", init_seed=1)
    error = float(tl.evaluate(model, one.theta_start, task.train.x, task.train.y)[1])
    choices = {"all": 2 * 3 * 3 * 2}  # seeds, treatments, levels, signs
    nats = bounds.description_length(one.masks, choices=choices).nats
    found = table[(table["level"] == 2) & (table["treatment"] == "reinit") & (table["init_seed"] == 1)]
    untrained = found[found["hypothesis"] == "untrained"].set_index("bound")
    kept, total = int(tl.masks.kept(one.masks)), tl.masks.total(one.masks)
    mdl_nats = kept * math.log(total) + math.log(36)  # the choices are paid for in every certificate
    assert untrained.loc["mdl", "value"] == pytest.approx(
        bounds.occam_hoeffding(error, mdl_nats, len(task.train)).value
    )
    row = found[(found["hypothesis"] == "untrained") & (found["bound"] == "binomial_tail")].iloc[0]
    expected = bounds.binomial_tail(error, nats, len(task.train))
    assert row["value"] == pytest.approx(expected.value) and row["train_error"] == pytest.approx(error)
    assert row["description_bits"] == pytest.approx(nats / math.log(2))
    trained = found[(found["hypothesis"] == "trained") & (found["bound"] == "held_out")].iloc[0]
    assert trained["test_error"] == pytest.approx(one.metrics["test_error"].iloc[0])


def test_rewound_weights_are_fixed_by_no_seed(tmp_path):
    tables = analysis.run(tiny(tmp_path, levels=1, rewind_step=5, init_seeds=(0,), treatments=("ticket",)))
    assert set(tables["bounds"]["hypothesis"]) == {"trained", "quantised"}


@pytest.mark.parametrize("changes", [{"treatments": ("ticket", "fine_tune", "lr_rewind")}, {"retraining": "fine_tune"}])
def test_trained_weights_are_fixed_by_no_seed(tmp_path, changes):
    config = replace(tiny(tmp_path, levels=1, init_seeds=(0,), **{"treatments": ("ticket",)} | changes), at_levels=(1,))
    found = analysis.run(config)["bounds"].groupby("treatment")["hypothesis"].unique().map(set).to_dict()
    trained = {"trained", "quantised"}
    expected = {"ticket": trained} if "retraining" in changes else {"ticket": set(HYPOTHESES)}
    assert found == expected | {name: trained for name in found if name != "ticket"}


def test_levels_that_the_run_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"levels must lie in 0\.\.2, those of the run: got \[1, 99\]"):
        analysis.run(replace(tiny(tmp_path), at_levels=(1, 99)))
    assert not (tmp_path / "runs").exists()


def test_a_network_of_a_stored_run_comes_back_from_its_bytes(tmp_path):
    config = tiny(tmp_path, levels=1, init_seeds=(0,), treatments=("ticket",))
    list(tl.imp(config.study, store=config.store))
    level = tl.load_run(tl.run_folder(config.study, config.store))[1]
    model, _ = tl.model_and_task(config.study)
    one = level.select(treatment="ticket", init_seed=0)
    assert list(level.theta_end) == [name for name, _ in model.named_parameters()]
    by_name = dict(sorted(one.masks.items())), dict(sorted(one.theta_end.items()))  # as version 0.1 stored them
    word = bounds.encode(*by_name, "coded")
    assert word == bounds.encode(one.masks, one.theta_end, "coded")
    masks, params = bounds.decode(word, tl.state(model).params, tl.masks.prunable(model))
    assert all(torch.equal(params[n], p) for n, p in one.theta_end.items())
    assert all(torch.equal(masks[n], m) for n, m in one.masks.items())


def test_batch_norm_statistics_are_paid_for():
    model = build(small_conv_bn, 0, torch.float32)
    state = tl.state(model)
    level = tl.Level(0, 1.0, tl.masks.ones(model), state, state, pd.DataFrame(), pd.DataFrame())
    without = bounds.description_length(level.masks, state.params, "coded").nats
    counted = analysis._coded(level, state).nats
    statistics = [b for b in state.buffers.values() if b.is_floating_point()]
    assert len(statistics) == 4 and all(len(b.unique()) == 1 for b in statistics)
    # each: a bit to say how, ln 256, one float32; one symbol costs nothing to tell from itself
    few = len(statistics) * (33 * math.log(2) + math.log(256))
    assert counted - without == pytest.approx(few)


def test_the_command_leaves_tables_and_a_figure(tmp_path, capsys):
    flags = ["--store", str(tmp_path / "runs"), "--out", str(tmp_path / "results"), "--levels", "1", "--steps", "20"]
    flags += ["--eval-every", "20", "--init-seeds", "0", "--treatments", "ticket", "--n-values", "3"]
    module = analysis
    assert main("generalization_bounds", module.Config, module.run, module.draw, module.summary, flags) == 0
    assert "certified_%" in capsys.readouterr().out
    (written,) = (tmp_path / "results" / "generalization_bounds").iterdir()
    assert {p.name for p in written.iterdir()} >= {"bounds.csv", "statements.csv", "generalization_bounds.png"}
    with pytest.raises(ValueError, match="n_values must hold at least one"):
        analysis.Config(n_values=())


def fixture_table() -> pd.DataFrame:
    about = {"task": "mnist", "model": "lenet_300_100", "n_train": 55_000, "n_test": 10_000, "n_classes": 10}
    rows = [
        {
            **about,
            "delta": 0.05,
            "level": level,
            "level_density": 0.5**level,
            "treatment": treatment,
            "init_seed": seed,
            "hypothesis": hypothesis,
            "bound": bound,
            "value": 0.5 + 0.01 * seed,
            "empirical": 0.1,
            "complexity": 0.4 + 0.01 * seed,
            "test_error": 0.12,
        }
        for level, treatment, seed, hypothesis, bound in itertools.product(
            range(3), ("ticket", "reinit"), range(2), HYPOTHESES, BOUNDS
        )
        if level > 0 or treatment == "ticket"
    ]
    return pd.DataFrame(rows)


def test_the_figure_says_what_it_shows(tmp_path):
    drawn = figure.draw({"bounds": fixture_table()})
    found = " | ".join(
        [drawn.get_suptitle()]
        + [text for a in drawn.axes for text in (a.get_title(), a.get_ylabel(), a.get_xlabel())]
        + [t.get_text() for a in drawn.axes if a.get_legend() for t in a.get_legend().get_texts()]
    )
    for text in (
        "n = 2 replicas",
        "55,000 training examples",
        "no certificate",
        "weights kept (%)",
        "filled: certified",
    ):
        assert text in found
    first, second = (save(figure.draw({"bounds": fixture_table()}), tmp_path / name) for name in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    rewound = fixture_table()
    figure.draw({"bounds": rewound[rewound["hypothesis"].isin(["trained", "quantised"])]})
