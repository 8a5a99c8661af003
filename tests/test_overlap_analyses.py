"""The analysis of mask overlap at a tiny config, lines between matched networks, and their figures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import ticketlab as tl
from analyses import mask_overlap, mode_connectivity
from analyses.command import main
from figures import mask_overlap as overlap_figure
from figures import mode_connectivity as connectivity_figure
from figures.style import save

TINY = ["--levels", "2", "--steps", "20", "--eval-every", "20", "--init-seeds", "0", "1"]
ABOUT = {"task": "digits", "model": "mlp_100_50"}


def test_mask_overlap_holds_tickets_against_chance(tmp_path, capsys):
    argv = [*TINY, "--at-levels", "1", "2", "--draws", "2", "--restarts", "1"]
    argv += ["--store", str(tmp_path / "runs"), "--out", str(tmp_path)]
    module = mask_overlap
    assert main("mask_overlap", module.Config, module.run, module.draw, module.summary, argv) == 0
    out = tmp_path / "mask_overlap"
    tables = {name: pd.read_csv(out / f"{name}.csv") for name in ("overlap", "aligned", "units", "survival", "pixels")}
    pairs = tables["overlap"]
    assert len(pairs) == 6 * 4  # of 2 levels x 2 seeds, for 3 layers and the whole
    same = pairs[(pairs["init_seed_a"] == pairs["init_seed_b"]) & (pairs["layer"] == "all")]
    np.testing.assert_allclose(same["jaccard"], 0.8, atol=1e-3)  # nested: a level keeps 80 % of the last
    assert len(tables["aligned"]) == 2 * 4
    aligned = tables["aligned"][tables["aligned"]["layer"] == "all"]
    assert (aligned["intersection"] > aligned["intersection_before"]).all()
    assert len(tables["units"]) == 2 * 2 * 150 and len(tables["pixels"]) == 2 * 2 * 64
    levels = list(
        tl.imp(replace(mask_overlap.STUDY, levels=2, init_seeds=(0, 1), recipe=_tiny()), store=tmp_path / "runs")
    )
    kept = levels[2].masks["fc1.weight"][0].sum()
    assert tables["pixels"].query("level == 2 and init_seed == 0")["live"].sum() == int(kept)
    survivors = tables["survival"].query("level_a == 1 and level_b == 2 and layer == 'all'")["survival"]
    np.testing.assert_allclose(survivors, 0.8, atol=1e-3)
    assert "over_chance" in capsys.readouterr().out


def _tiny():
    return tl.Recipe(steps=20, eval_every=20)


def test_mask_overlap_refuses_one_seed_and_levels_that_are_not_pruned(tmp_path):
    study = replace(mask_overlap.STUDY, levels=1, recipe=_tiny())
    with pytest.raises(ValueError, match=r"at_levels must lie in 1 to 1, the pruned levels: got \[0\]"):
        mask_overlap.run(mask_overlap.Config(study=study, at_levels=(0,), store=tmp_path))
    with pytest.raises(ValueError, match="at least two init seeds"):
        mask_overlap.run(mask_overlap.Config(study=replace(study, init_seeds=(0,)), store=tmp_path))


def test_aligned_lines_are_added_and_nothing_else_changes(tmp_path):
    study = replace(
        mode_connectivity.STUDY,
        levels=1,
        snapshot_steps=(),
        recipe=tl.Recipe(steps=200, eval_every=100),
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
    figure = connectivity_figure.draw(both)
    assert "1 pairs of seeds" in figure.axes[8].get_title() or len(figure.axes) == 9
    assert len(connectivity_figure.draw(plain).axes) == 6


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
            **{"intersection": 50, "null_mean": 40.0, "null_sd": 2.0},
        }
        for level, (a, b), layer in itertools.product(levels, itertools.combinations(seeds, 2), layers)
    ]
    base = [{"level": level, "density": 0.8**level, "init_seed": s} for level, s in places]
    units = [{**one, "group": "fc1", "unit": u, "dead": u == 0} for one in base for u in range(4)]
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


def test_the_overlap_figure_says_n_and_draws_without_pixels_too(tmp_path):
    tables = overlap_tables()
    figure = overlap_figure.draw(tables)
    assert "3 init seeds, 3 pairs a level" in figure.get_suptitle()
    titles = [axes.get_title() for axes in figure.axes]
    assert any("19 draws" in title for title in titles) and any("mean of n = 3" in title for title in titles)
    drawn = figure.axes[1].lines
    assert any(np.allclose(line.get_ydata(), 1.5) for line in drawn)  # 30 shared, 20 expected
    first, second = (save(overlap_figure.draw(tables), tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second
    save(overlap_figure.draw({name: table for name, table in tables.items() if name != "pixels"}), tmp_path / "c")
