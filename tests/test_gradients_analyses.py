"""The gradient analysis at a tiny config, its rank correlations against scipy's, and its figure from a table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import ticketlab as tl
from analyses import gradient_alignment
from analyses.command import main
from analyses.gradient_alignment import MEASURES, dense_twin
from analyses.intervals import holm, rank_interval
from figures.gradient_alignment import FURTHER, PANELS, draw, supplement
from figures.gradient_alignment import MEASURES as SHOWN
from figures.style import save

TINY = tl.ImpConfig(
    levels=2,
    init_seeds=(0, 1),
    treatments=("ticket", "reinit", "sibling"),
    recipe=tl.Recipe(steps=40, eval_every=20),
)


def test_every_network_is_measured_at_its_start(tmp_path, capsys):
    flags = ["--levels", "2", "--init-seeds", "0", "1", "--steps", "40", "--eval-every", "20"]
    flags += ["--treatments", "ticket", "reinit", "sibling", "--n-examples", "60", "--n-batches", "6"]
    flags += ["--n-kernel", "8", "--top", "5", "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    module = gradient_alignment
    assert main("gradient_alignment", module.Config, module.run, module.draw, module.summary, flags) == 0
    (out,) = (tmp_path / "results" / "gradient_alignment").iterdir()
    networks, correlations = pd.read_csv(out / "networks.csv"), pd.read_csv(out / "correlations.csv")
    assert (out / "gradient_alignment.png").exists() and "within" in capsys.readouterr().out
    # level 0 and two more of ticket and reinit, 2 seeds; a sibling starts as its ticket does
    assert networks.groupby(["level", "treatment"]).size().tolist() == [2] * 5
    assert networks["batch_size"].eq(10).all() and networks["n_kernel"].eq(8).all()
    np.testing.assert_allclose(networks["cosine_with_dense"][networks["level"] == 0], 1, rtol=1e-12)
    pruned = networks[networks["level"] > 0]
    assert pruned["cosine_with_dense"].between(-1, 0.999).all()
    np.testing.assert_allclose(
        networks["norm_per_live_weight"] * networks["n_live"] ** 0.5, networks["norm"], rtol=1e-6
    )
    np.testing.assert_allclose(networks["first_order_nats"], 0.1 * networks["norm"] ** 2, rtol=1e-6)
    assert networks[["residual_share", "gradient_share"]].stack().between(0, 1).all()
    assert correlations.groupby("within").size().to_dict() == {
        "all": len(MEASURES),
        "level": len(MEASURES),
        "level and treatment": len(MEASURES),
        "one level": 2 * len(MEASURES),
    }


def test_the_dense_twin_is_what_the_mask_was_laid_on():
    dense, first, _ = tl.imp(TINY, store=None, device="cpu")
    factory = partial(tl.models.build, TINY.model, (1, 8, 8), 10)
    rewound = dense.select(init_seed=1).start
    ticket, fresh = (first.select(treatment=name, init_seed=1) for name in ("ticket", "reinit"))
    assert dense_twin(ticket, rewound, factory) is rewound
    twin = dense_twin(fresh, rewound, factory)
    name = next(iter(fresh.masks))
    assert bool((twin.params[name][~fresh.masks[name]] != 0).all())
    assert torch.equal(twin.params[name] * fresh.masks[name], fresh.theta_start[name])
    moved = replace(ticket, start=ticket.end)
    assert dense_twin(moved, rewound, factory) is None


def test_correlations_are_tested_over_seeds_and_corrected_for_what_is_ranked_alike():
    generator = np.random.default_rng(0)
    places = [(level, t, seed) for level in (1, 2) for t in ("ticket", "reinit") for seed in range(4)]
    networks = pd.DataFrame(places, columns=["level", "treatment", "init_seed"])
    networks = networks.assign(**{name: generator.normal(size=len(places)) for name in (*MEASURES, "test_error")})
    found = gradient_alignment.correlations(networks)
    grid = {name: networks[name].to_numpy().reshape(2, 2, 4) for name in ("norm", "test_error")}
    grid["norm"] = grid["norm"][:, ::-1]  # treatments in the order of their names
    expected = rank_interval(grid["norm"], 1 - grid["test_error"][:, ::-1], "level")
    row = found.query("measure == 'norm' and within == 'level'").iloc[0]
    assert row[list(expected)].to_dict() == pytest.approx(expected, abs=1e-12) and row["n"] == 16
    sizes = found.groupby("within")["n_family"].first().to_dict()
    n = len(MEASURES)
    assert sizes == {"all": n, "level": n, "level and treatment": n, "one level": 2 * n}
    for _, rows in found.groupby("within"):
        np.testing.assert_allclose(rows["p_holm"], holm(rows["p_value"]))


def test_bad_numbers_of_batches_are_refused(capsys):
    for n in ("1", "61"):
        flags, module = ["--n-examples", "60", "--n-batches", n], gradient_alignment
        assert main("gradient_alignment", module.Config, module.run, module.draw, module.summary, flags) == 2
        assert f"error: n_batches must lie in 2..n_examples, 60: got {n}." in capsys.readouterr().err
    for flag in ("--n-kernel", "--top"):
        assert main("gradient_alignment", module.Config, module.run, module.draw, module.summary, [flag, "-1"]) == 2
        assert "error: n_kernel and top must be at least 1" in capsys.readouterr().err


def tables():
    about = {"task": "digits", "model": "mlp_100_50", "n_examples": 60, "batch_size": 10, "n_kernel": 8, "top": 5}
    about |= {"step_size": 0.1, "rewind_step": 0}
    rows = []
    for level, treatment, seed in itertools.product(range(4), ("ticket", "reinit"), range(2)):
        if level > 0 or treatment == "ticket":
            place = {"level": level, "treatment": treatment, "init_seed": seed, "level_density": 0.6**level}
            values = dict.fromkeys((*MEASURES, "test_error"), 0.1 + 0.1 * level + 0.01 * seed)
            rows.append({**place, **values, **about})
    networks = pd.DataFrame(rows)
    return {"networks": networks, "correlations": gradient_alignment.correlations(networks)}


def test_the_figure_says_what_it_shows(tmp_path):
    shown = tables()
    figure, more = draw(shown), supplement(shown)
    found = [figure.get_suptitle(), *(text.get_text() for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes + more.axes:
        found += [axes.get_xlabel(), axes.get_ylabel(), *(label.get_text() for label in axes.get_yticklabels())]
        found += [axes.get_legend().get_title().get_text()] if axes.get_legend() else []
    whole = " | ".join(found)
    for text in (
        "n = 2 replicas",
        "60 training examples",
        "batches of 10",
        "5 eigenfunctions",
        "reinitialised",
        "p < 0.05 by Holm",
    ):
        assert text in whole
    assert all(label in whole for label in (*PANELS.values(), *FURTHER.values(), *SHOWN.values()))
    assert list(SHOWN) == list(MEASURES)
    first = [path.read_bytes() for path in save(figure, tmp_path / "first")]
    second = [path.read_bytes() for path in save(draw(shown), tmp_path / "second")]
    assert first == second


def test_a_run_without_pruned_levels_is_drawn_without_correlations():
    networks = tables()["networks"].query("level == 0")
    empty = gradient_alignment.correlations(networks)
    assert empty.empty and draw({"networks": networks, "correlations": empty}).axes
