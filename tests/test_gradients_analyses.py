"""The gradient analysis at a tiny config, its rank correlations against scipy's, and its figure from a table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import ticketlab as tl
from analyses import gradient_alignment
from analyses.command import DIGITS, main
from analyses.gradient_alignment import MEASURES, dense_twin
from analyses.rank_correlation import bootstrap, p_value, rank_correlation
from figures.gradient_alignment import MEASURES as SHOWN
from figures.gradient_alignment import PANELS, draw
from figures.style import save

TINY = replace(
    DIGITS,
    levels=2,
    init_seeds=(0, 1),
    treatments=("ticket", "reinit", "sibling"),
    recipe=tl.Recipe(steps=40, eval_every=20),
)
RANDOM = np.random.default_rng(0)
A, B = RANDOM.normal(size=(2, 4, 3, 5))


def test_every_network_is_measured_at_its_start(tmp_path, capsys):
    flags = ["--levels", "2", "--init-seeds", "0", "1", "--steps", "40", "--eval-every", "20"]
    flags += ["--treatments", "ticket", "reinit", "sibling", "--n-examples", "60", "--n-batches", "6"]
    flags += ["--n-kernel", "8", "--top", "5", "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    module = gradient_alignment
    assert main("gradient_alignment", module.Config, module.run, module.draw, module.summary, flags) == 0
    out = tmp_path / "results" / "gradient_alignment"
    networks, correlations = pd.read_csv(out / "networks.csv"), pd.read_csv(out / "correlations.csv")
    assert (out / "gradient_alignment.png").exists() and "rho, within level" in capsys.readouterr().out
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


def test_ranks_of_all_networks_are_spearmans():
    assert rank_correlation(A, B, "all") == pytest.approx(stats.spearmanr(A, B, axis=None).statistic, abs=1e-12)
    assert p_value(A, B) == pytest.approx(stats.spearmanr(A, B, axis=None).pvalue, abs=1e-12)


@pytest.mark.parametrize(("within", "shape"), [("level", (4, 15)), ("level and treatment", (12, 5))])
def test_ranks_within_groups_are_the_mean_of_their_correlations(within, shape):
    pairs = zip(A.reshape(shape), B.reshape(shape), strict=True)
    expected = np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
    assert rank_correlation(A, B, within) == pytest.approx(expected, abs=1e-12)


def test_ranks_within_groups_do_not_see_what_differs_between_them():
    shift = np.arange(4.0)[:, None, None] * 100
    assert rank_correlation(A + shift, B + shift, "all") > 0.8
    assert rank_correlation(A + shift, B + shift, "level") == pytest.approx(rank_correlation(A, B, "level"), abs=1e-12)


def test_networks_without_a_value_are_left_out():
    a = A.copy()
    a[:, 1] = np.nan
    kept = [0, 2]
    for within in ("all", "level", "level and treatment"):
        expected = rank_correlation(A[:, kept], B[:, kept], within)
        assert rank_correlation(a, B, within) == pytest.approx(expected, abs=1e-12)
    assert p_value(a, B) == pytest.approx(p_value(A[:, kept], B[:, kept]), abs=1e-12)
    assert np.isnan(rank_correlation(np.ones_like(A), B, "level")) and np.isnan(p_value(np.ones_like(A), B))


def test_the_interval_is_that_of_a_loop_over_drawn_seeds():
    draws = torch.randint(5, (200, 5), generator=tl.functional.stream("bootstrap", 0)).numpy()
    slow = [rank_correlation(A[..., seeds], B[..., seeds], "level") for seeds in draws]
    assert bootstrap(A, B, "level", 200) == pytest.approx(tuple(np.quantile(slow, (0.025, 0.975))), abs=1e-12)
    assert np.isnan(bootstrap(A[..., :1], B[..., :1], "level")).all()
    low, high = bootstrap(A, A, "level and treatment")
    assert low == pytest.approx(1) and high == pytest.approx(1)


def test_bad_numbers_of_batches_are_refused(capsys):
    for n in ("1", "61"):
        flags, module = ["--n-examples", "60", "--n-batches", n], gradient_alignment
        assert main("gradient_alignment", module.Config, module.run, module.draw, module.summary, flags) == 2
        assert f"error: n_batches must lie in 2..n_examples, 60: got {n}." in capsys.readouterr().err


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
    figure = draw(shown)
    found = [figure.get_suptitle(), *(text.get_text() for legend in figure.legends for text in legend.get_texts())]
    found += [part for axes in figure.axes for part in (axes.get_xlabel(), axes.get_ylabel(), axes.get_title())]
    found += [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    whole = " | ".join(found)
    for text in (
        "n = 2 replicas",
        "60 training examples",
        "batches of 10",
        "5 eigenfunctions",
        "reinitialised",
        "p < 0.05",
    ):
        assert text in whole
    assert all(label in whole for label in (*PANELS.values(), *SHOWN.values()))
    assert list(SHOWN) == list(MEASURES)
    first = [path.read_bytes() for path in save(figure, tmp_path / "first")]
    second = [path.read_bytes() for path in save(draw(shown), tmp_path / "second")]
    assert first == second


def test_a_run_without_pruned_levels_is_drawn_without_correlations():
    networks = tables()["networks"].query("level == 0")
    empty = gradient_alignment.correlations(networks)
    assert empty.empty and draw({"networks": networks, "correlations": empty}).axes
