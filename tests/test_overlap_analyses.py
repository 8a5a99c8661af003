"""The analysis of mask overlap at a tiny config, lines between matched networks, and their figures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import ticketlab as tl
from analyses import mask_overlap, mode_connectivity
from analyses.intervals import holm
from figures import mask_overlap as overlap_figure
from figures import mode_connectivity as connectivity_figure

TINY = tl.Recipe(steps=20, eval_every=20)
ABOUT = {"task": "digits", "model": "mlp_100_50"}


def test_mask_overlap_holds_tickets_against_chance(tmp_path):
    study = tl.ImpConfig(treatments=("ticket",), levels=2, init_seeds=(0, 1), recipe=TINY)
    config = mask_overlap.Config(study=study, at_levels=(1, 2), draws=2, restarts=1, store=tmp_path)
    tables = mask_overlap.run(config)
    pairs = tables["overlap"]
    assert len(pairs) == 6 * 4  # of 2 levels x 2 seeds, for 3 layers and the whole
    same = pairs[(pairs["init_seed_a"] == pairs["init_seed_b"]) & (pairs["layer"] == "all")]
    np.testing.assert_allclose(same["jaccard"], 0.8, atol=1e-3)  # nested: a level keeps 80 % of the last
    aligned = tables["aligned"]
    assert aligned.groupby("given").size().to_dict() == {"layer": 2 * 4, "input": 2 * 4}
    found = aligned.pivot(index=["level", "layer"], columns="given", values=["intersection", "null_mean"])
    assert (found["intersection", "layer"] == found["intersection", "input"]).all()  # one alignment, two nulls
    assert (found["null_mean", "layer"] != found["null_mean", "input"]).any()
    np.testing.assert_allclose(aligned["p_holm"], holm(aligned["p_value"]))
    np.testing.assert_allclose(pairs["p_holm_given_input"], holm(pairs["p_value_given_input"]))
    whole = aligned[aligned["layer"] == "all"]
    assert (whole["intersection"] > whole["intersection_before"]).all()
    assert tables["units"].groupby("group")["units"].unique().map(list).to_dict() == {"fc1": [100], "fc2": [50]}
    assert len(tables["units"]) == 2 * 2 * 2 and len(tables["pixels"]) == 2 * 2 * 64
    levels = list(tl.imp(study, store=tmp_path))
    kept = levels[2].masks["fc1.weight"][0].sum()
    inward = levels[2].masks["fc1.weight"][0].sum(1).double()
    row = tables["units"].query("level == 2 and init_seed == 0 and group == 'fc1'").iloc[0]
    assert row["fan_in_q0"] == inward.min() and row["fan_in_q50"] == inward.quantile(0.5)
    assert tables["pixels"].query("level == 2 and init_seed == 0")["live"].sum() == int(kept)
    survivors = tables["survival"].query("level_a == 1 and level_b == 2 and layer == 'all'")["survival"]
    np.testing.assert_allclose(survivors, 0.8, atol=1e-3)
    short = mask_overlap.summary(tables).sort_index().loc[(2, "all")]
    whole = whole[whole["level"] == 2].set_index("given")
    ratio = whole["intersection"] / whole["null_mean"]
    for given in ("layer", "input"):  # one pair: no spread
        assert float(short["aligned"][given]) == pytest.approx(ratio[given], abs=5e-4)


def test_mask_overlap_refuses_one_seed_and_levels_that_are_not_pruned(tmp_path):
    study = tl.ImpConfig(treatments=("ticket",), levels=1, recipe=TINY)
    with pytest.raises(ValueError, match=r"levels must lie in 1\.\.1, those of the run: got \[0\]"):
        mask_overlap.run(mask_overlap.Config(study=study, at_levels=(0,), store=tmp_path))
    with pytest.raises(ValueError, match="at least two init seeds"):
        mask_overlap.run(mask_overlap.Config(study=replace(study, init_seeds=(0,)), store=tmp_path))


def test_aligned_lines_are_added_and_nothing_else_changes(tmp_path):
    study = tl.ImpConfig(
        treatments=("ticket", "sibling"),
        levels=1,
        recipe=tl.Recipe(steps=80, eval_every=40),
        init_seeds=(0, 1),
    )
    config = mode_connectivity.Config(study=study, store=tmp_path, n_alphas=5)
    plain, both = mode_connectivity.run(config), mode_connectivity.run(replace(config, align=True))
    for name, table in plain.items():
        assert "pairing" not in table
        old = both[name][both[name]["pairing"].isna()].drop(columns="pairing").reset_index(drop=True)
        pd.testing.assert_frame_equal(old, table, check_exact=True)
    paths = both["paths"].dropna(subset="pairing")
    assert paths["pairing"].unique().tolist() == ["0-1"] and len(paths) == 2 * 2 * 2 * 5
    ends = paths[paths["alpha"].isin([0, 1])].pivot(
        index=["level", "split", "alpha"], columns="question", values="loss_nats"
    )
    np.testing.assert_allclose(ends["independent"], ends["independent, matched"], rtol=1e-4)
    heights = both["barriers"].query("split == 'train' and metric == 'loss_nats' and baseline == 'mean'")
    mean = heights.groupby("question")["barrier"].mean()
    assert mean["independent, matched"] < 0.7 * mean["independent"]
    assert {"independent_%", "matched_%"} <= set(mode_connectivity.summary(both))
    assert "independent_%" not in mode_connectivity.summary(plain)
    _the_second_row_shows(connectivity_figure.draw(both).axes, paths, both["barriers"].dropna(subset="pairing"))
    assert len(connectivity_figure.draw(plain).axes) == 4


def _the_second_row_shows(axes, paths, barriers):
    """The mean error along the line before and after matching, one curve a level, then both barriers."""
    errors = paths[paths["split"] == "test"].groupby(["question", "level", "alpha"])["error"].mean()
    shown = [(question, level) for question in ("independent", "independent, matched") for level in (0, 1)]
    for line, (question, level) in zip(axes[2].lines, shown, strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * errors[question, level])
    heights = barriers.query("split == 'test' and metric == 'error' and baseline == 'mean'")
    means = 100 * heights.groupby(["question", "density"])["barrier"].mean()
    drawn = {line.get_label(): line.get_ydata() for line in axes[3].lines}
    np.testing.assert_allclose(drawn["as trained"], means["independent"])
    np.testing.assert_allclose(drawn["matched"], means["independent, matched"])
    assert axes[3].get_title() == "two init seeds, test error, 1 pair"


def test_align_takes_the_levels_it_is_given_and_refuses_others_and_a_single_seed(tmp_path):
    study = tl.ImpConfig(treatments=("ticket", "sibling"), levels=1, recipe=TINY)
    config = mode_connectivity.Config(study=study, store=tmp_path, n_alphas=3, align=True, align_levels=(1,))
    barriers = mode_connectivity.run(config)["barriers"]
    assert barriers.dropna(subset="pairing")["level"].unique().tolist() == [1] and set(barriers["level"]) == {0, 1}
    with pytest.raises(ValueError, match=r"levels must lie in 0\.\.1, those of the run: got \[2\]"):
        mode_connectivity.run(replace(config, align_levels=(2,)))
    with pytest.raises(ValueError, match="says what --align measures"):
        mode_connectivity.run(replace(config, align=False, align_levels=(1,)))
    with pytest.raises(ValueError, match="at least two init seeds to match"):
        mode_connectivity.run(replace(config, study=replace(study, init_seeds=(0,))))


def overlap_tables():
    layers, seeds, levels = ("fc1.weight", "output.weight", "all"), range(3), (1, 4)
    places = list(itertools.product(levels, seeds))
    pairs = [
        {
            **{"level_a": a[0], "init_seed_a": a[1], "level_b": b[0], "init_seed_b": b[1], "layer": layer},
            **{"jaccard": 0.2, "intersection": 30, "expected": 20.0, "variance": 9.0, "expected_given_input": 28.0},
        }
        for (a, b), layer in itertools.product(itertools.combinations(places, 2), layers)
    ]
    aligned = [
        {
            **{"level": level, "density": 0.8**level, "init_seed_a": a, "init_seed_b": b, "layer": layer, "draws": 19},
            **{"given": given, "intersection": 60, "null_mean": mean, "null_sd": 2.0},
        }
        for level, (a, b), (given, mean), layer in itertools.product(
            levels, itertools.combinations(seeds, 2), {"layer": 40.0, "input": 48.0}.items(), layers
        )
    ]
    base = [{"level": level, "density": 0.8**level, "init_seed": s} for level, s in places]
    units = [{**one, "group": "fc1", "units": 4, "dead": 1} for one in base]
    pixels = [{**one, "row": i // 4, "column": i % 4, "live": i, "units": 20} for one in base for i in range(16)]
    survival = [
        {
            "level_a": 1,
            "level_b": one["level"],
            "density_b": one["density"],
            "init_seed": 0,
            "layer": layer,
            "survival": 0.5,
        }
        for one, layer in itertools.product(base, layers)
    ]
    tables = {"overlap": pairs, "aligned": aligned, "units": units, "pixels": pixels, "survival": survival}
    return {name: pd.DataFrame(rows).assign(**ABOUT) for name, rows in tables.items()}


def test_the_overlap_figure_says_n_and_draws_without_pixels_too():
    tables = overlap_tables()
    figure = overlap_figure.draw(tables)
    assert "3 init seeds, 3 pairs per level" in figure.get_suptitle()
    titles = [axes.get_title() for axes in figure.axes]
    assert any("19 draws" in title for title in titles) and any("mean of n = 3" in title for title in titles)
    for panel, ratios in ((0, (30 / 20, 30 / 28)), (1, (60 / 40, 60 / 48))):  # shared over expected, by null
        for ratio in ratios:
            assert any(np.allclose(line.get_ydata(), ratio) for line in figure.axes[panel].lines)
    bare = overlap_figure.draw({name: table for name, table in tables.items() if name != "pixels"})
    assert "no map of pixels" in bare.axes[2].texts[0].get_text() and not bare.axes[2].axison
