"""Overlap of masks: by hand, against scipy and simulation, and p-values that are uniform under the null."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from cases import build, half_masks, small_conv_bn, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr
from scipy.stats import binomtest, chisquare, hypergeom, kstest
from torch import nn

from ticketlab import overlap, permutation
from ticketlab.masks import layerwise_shuffle, ones
from ticketlab.overlap import null
from ticketlab.overlap.null import exact_p, margin_masks
from ticketlab.overlap.null import random_masks as null_masks
from ticketlab.state import select, stack

COUNTS = ["total", "kept_a", "kept_b", "intersection"]


def layer(*live, total=12, shape=(3, 4)):
    mask = torch.zeros(total, dtype=torch.bool)
    mask[list(live)] = True
    return mask.view(shape)


def of(table, name):
    return table[table["layer"] == name].iloc[0]


def random_masks(n, densities, seed=0, first=(40, 30)):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc1": first, "output": (5, 40)}
    masks = {}
    for (name, shape), density in zip(shapes.items(), densities, strict=True):
        scores = torch.rand(n, shape[0] * shape[1], generator=generator)
        kept = round(density * scores.shape[1])
        masks[name] = (scores.argsort(1) < kept).view(n, *shape)
    return masks


# By hand


def test_a_small_overlap_by_hand():
    a = {"one": layer(0, 1, 2), "two": layer(0, shape=(2, 2), total=4)}
    b = {"one": layer(1, 2, 3, 4), "two": layer(0, 1, shape=(2, 2), total=4)}
    table = overlap.compare(a, b)
    one, whole = of(table, "one"), of(table, "all")
    assert table["layer"].tolist() == ["one", "two", "all"]
    assert one[COUNTS].tolist() == [12, 3, 4, 2] and whole[COUNTS].tolist() == [16, 4, 6, 3]
    assert one["jaccard"] == 2 / 5 and whole["jaccard"] == 3 / 7
    assert one["density_a"] == 3 / 12 and one["density_b"] == 4 / 12
    variance = 3 * 4 * 9 * 8 / (12**2 * 11), 1 * 2 * 3 * 2 / (4**2 * 3)
    assert one["expected"] == 1 and whole["expected"] == 1 + 0.5
    assert one["variance"] == pytest.approx(variance[0]) and whole["variance"] == pytest.approx(sum(variance))
    assert one["z"] == pytest.approx(1 / variance[0] ** 0.5)
    assert one["expected_jaccard"] == 1 / (3 + 4 - 1)
    pmf = hypergeom.pmf(np.arange(4), 12, 3, 4)
    assert one["p_value"] == pytest.approx(2 * pmf[2:].sum())
    # the whole: 3 of at most 4, from the one in "two" (probability 1/2) and at least 2 of "one", or 3 of "one"
    assert whole["p_value"] == pytest.approx(2 * (0.5 * pmf[2:].sum() + 0.5 * pmf[3]))


def test_identical_masks_give_one_and_disjoint_masks_zero():
    model = build(small_mlp)
    masks = half_masks(model, 0)
    assert (overlap.compare(masks, masks)["jaccard"] == 1).all()
    found = overlap.compare(masks, {name: ~mask for name, mask in masks.items()})
    assert (found["jaccard"] == 0).all() and (found["intersection"] == 0).all() and (found["z"] < 0).all()


def test_dense_masks_leave_the_null_no_choice():
    found = overlap.compare(ones(build(small_mlp)), ones(build(small_mlp)))
    assert found["z"].isna().all() and (found["p_value"] == 1).all() and (found["variance"] == 0).all()


def test_given_inputs_or_units_explains_an_overlap_that_they_make():
    """Both masks live in the same half of the inputs: more than chance, and nothing beyond those inputs."""
    generator = torch.Generator().manual_seed(0)
    alive = torch.arange(60) < 30
    a, b = ({"fc": (torch.rand(80, 60, generator=generator) < 0.4) & alive} for _ in range(2))
    assert of(overlap.compare(a, b), "fc")["z"] > 10
    assert abs(of(overlap.compare(a, b, given="input"), "fc")["z"]) < 3
    assert of(overlap.compare(a, b, given="unit"), "fc")["z"] > 10
    transposed = ({"fc": m["fc"].T} for m in (a, b))
    assert abs(of(overlap.compare(*transposed, given="unit"), "fc")["z"]) < 3


def test_a_layer_without_a_live_weight_shares_nothing_and_the_rest_is_compared():
    full, half = ({"fc": layer(*live), "output": layer(0, 1, 5)} for live in ((), (1, 2)))
    rest = {"output": layer(0, 1, 5)}
    for a, b, jaccard in ((full, half, 0), (full, full, np.nan)):
        table = overlap.compare(a, b)
        row = of(table, "fc")
        assert row["intersection"] == row["expected"] == row["variance"] == 0 and row["p_value"] == 1
        assert np.isnan(row["z"]) and row["jaccard"] == pytest.approx(jaccard, nan_ok=True)
        for column in ("intersection", "expected", "z", "p_value"):
            assert of(table, "output")[column] == of(overlap.compare(rest, rest), "output")[column]
            assert of(table, "all")[column] == pytest.approx(of(overlap.compare(rest, rest), "output")[column])
    rows = overlap.survival([half, full, full]).set_index(["layer", "a", "b"])["survival"]
    assert rows["fc", 0, 1] == 0 and np.isnan(rows["fc", 1, 2]) and rows["all", 0, 1] == 3 / 5


# Against scipy and simulation


@given(st.integers(2, 400), st.data())
@settings(max_examples=100, deadline=None)
def test_exact_p_values_equal_scipy(total, data):
    a, b = (data.draw(st.integers(1, total)) for _ in range(2))
    x = data.draw(st.integers(max(0, a + b - total), min(a, b)))
    tails = hypergeom.cdf(x, total, a, b), hypergeom.sf(x - 1, total, a, b)
    count = np.array([x]), np.array([total]), np.array([[a]]), np.array([[b]])
    assert exact_p(*count)[0] == pytest.approx(min(1, 2 * min(tails)), rel=1e-7)
    # beside a layer that is dense the sum is the same
    more = np.array([x + 7]), np.array([total, 7]), np.array([[a, 7]]), np.array([[b, 7]])
    assert exact_p(*more)[0] == pytest.approx(min(1, 2 * min(tails)), rel=1e-7)


def strata_p(x, strata):
    """Two-sided p-value of a sum over strata (d, a, b), from scipy's distributions."""
    pmf = np.ones(1)
    for d, a, b in strata:
        pmf = np.convolve(pmf, hypergeom.pmf(np.arange(min(a, b) + 1), d, a, b))
    return min(1, 2 * min(pmf[: x + 1].sum(), pmf[x:].sum()))


@pytest.mark.parametrize(("kept", "most"), [(2, 3), (5, 5), (9, 9)])
def test_p_values_of_many_strata_are_exact_too(kept, most):
    generator = np.random.default_rng(kept)
    total = np.repeat([9, 30], [30, 120])
    a, b = (np.minimum(generator.integers(0, n + 1, len(total)), total) for n in (kept, most))
    mean = (a * b / total).sum()
    for x in {int(mean * share) for share in (0.3, 0.8, 1, 1.3, 2)}:
        found = exact_p(np.array([x]), total, a[None], b[None])[0]
        assert found == pytest.approx(strata_p(x, zip(total, a, b, strict=True)), rel=1e-7)
    dense = exact_p(np.array([total.sum()]), total, total[None], total[None])
    assert dense == 1  # no stratum leaves a choice


def test_small_counts_given_inputs_are_no_normal():
    """4 shared of 400 live weights each, 0.71 expected: a normal would say 0.0009."""
    x = torch.arange(784)
    a, b = torch.zeros(2, 300, 784, dtype=torch.bool)
    a[x[:400] % 300, x[:400]] = True
    b[(x[187:587] + 7) % 300, x[187:587]] = True
    b[a.nonzero()[200:204, 0], a.nonzero()[200:204, 1]] = True
    row = of(overlap.compare({"fc": a}, {"fc": b}, given="input"), "fc")
    strata = [(300, int(k), int(m)) for k, m in zip(a.sum(0), b.sum(0), strict=True)]
    assert row["intersection"] >= 4 and 0.6 < row["expected"] < 0.8
    assert row["p_value"] == pytest.approx(strata_p(row["intersection"], strata), rel=1e-7) and row["p_value"] > 0.003


def test_p_values_given_inputs_are_uniform_where_counts_are_small():
    mask = {"fc": random_masks(1, (0.01, 0.5), first=(60, 80))["fc1"][0]}
    drawn = stack([null_masks(mask, seed, "input") for seed in range(600)])
    table = overlap.compare(stack([mask] * 600), drawn, stacked=True, given="input").query("layer == 'fc'")
    low = [int((table["p_value"] <= level).sum()) for level in (0.01, 0.05, 0.2)]
    for count, level in zip(low, (0.01, 0.05, 0.2), strict=True):
        assert binomtest(count, 600, level, alternative="greater").pvalue > 1e-4
    expected, variance = table["expected"].iloc[0], table["variance"].iloc[0]
    assert 0.3 < expected < 3 and abs(table["intersection"].mean() - expected) < 5 * (variance / 600) ** 0.5


def test_exact_and_normal_agree_where_they_meet():
    a = random_masks(40, (0.5, 0.5))
    table = overlap.pairs(a)
    rows = table[table["layer"] == "fc1"]  # 1200 weights, variance 75: exact
    assert rows["variance"].max() < 100
    z = (np.abs(rows["intersection"] - rows["expected"]) - 0.5).clip(lower=0) / rows["variance"] ** 0.5
    np.testing.assert_allclose(rows["p_value"], np.minimum(1, 2 * ndtr(-z)), atol=0.01)


@pytest.mark.parametrize("densities", [(0.3, 0.5), (0.05, 0.1)])
def test_the_moments_hold_against_simulation_and_p_values_are_uniform(densities):
    table = overlap.pairs(random_masks(90, densities, first=(200, 150)))
    n = 90 * 89 // 2  # counts of pairs that share a mask are independent too
    for name, rows in table.groupby("layer"):
        assert rows["expected"].nunique() == rows["variance"].nunique() == 1
        mean, variance = rows["expected"].iloc[0], rows["variance"].iloc[0]
        assert abs(rows["intersection"].mean() - mean) < 5 * (variance / n) ** 0.5
        assert rows["intersection"].var() == pytest.approx(variance, rel=0.12), name
        for level in (0.01, 0.05, 0.2):  # of discrete p-values: P(p <= t) <= t
            low = int((rows["p_value"] <= level).sum())
            assert binomtest(low, n, level, alternative="greater").pvalue > 1e-4
        if variance > 1000:  # steps too fine to be seen
            assert kstest(rows["p_value"], "uniform").pvalue > 1e-3
    assert kstest(_randomised(table[table["layer"] == "output"]), "uniform").pvalue > 1e-3


def _randomised(rows):
    """P(p(X) < p) + U P(p(X) = p) for two-sided p-values p of one layer: uniform whatever their steps."""
    total, a, b = rows[["total", "kept_a", "kept_b"]].iloc[0]
    support = np.arange(max(0, a + b - total), min(a, b) + 1)
    pmf = hypergeom.pmf(support, total, a, b)
    tails = np.minimum(hypergeom.cdf(support, total, a, b), hypergeom.sf(support - 1, total, a, b))
    values = np.minimum(1, 2 * tails)
    p = rows["p_value"].to_numpy()[:, None]
    close = np.isclose(values, p, rtol=1e-6, atol=0)
    low, equal = (pmf * ((values < p) & ~close)).sum(1), (pmf * close).sum(1)
    return low + np.random.default_rng(0).random(len(rows)) * equal


def test_all_pairs_at_once_are_the_pairs_one_by_one():
    masks = random_masks(4, (0.3, 0.1))
    for given_ in ("layer", "input", "unit"):
        table = overlap.pairs(masks, given=given_)
        assert len(table) == 6 * 3
        for (a, b), rows in table.groupby(["a", "b"]):
            alone = overlap.compare(select(masks, a), select(masks, b), given=given_)
            pd.testing.assert_frame_equal(rows.drop(columns=["a", "b"]).reset_index(drop=True), alone)
    listed = overlap.pairs([select(masks, r) for r in range(4)])
    pd.testing.assert_frame_equal(listed, overlap.pairs(masks))
    stacked = overlap.compare(select(masks, [0, 1]), select(masks, [2, 3]), stacked=True)
    second = stacked[stacked["replica"] == 1].drop(columns="replica").reset_index(drop=True)
    pd.testing.assert_frame_equal(second, overlap.compare(select(masks, 1), select(masks, 3)))


# Structure


def test_fans_and_dead_units_by_hand():
    model = build(small_mlp)  # 6-8-5-3
    groups = permutation.groups(model, torch.zeros(2, 6, dtype=torch.float64))
    masks = ones(model)
    masks["fc1.weight"][0] = False  # no input
    masks["fc2.weight"][:, 1] = False  # no output
    masks["fc2.weight"][2, 3] = False
    table = overlap.units(groups, masks)
    first, second = (table[table["group"] == g].set_index("unit") for g in ("fc1", "fc2"))
    assert first["fan_in"].tolist() == [0] + [6] * 7 and first["fan_out"].tolist() == [5, 0, 5, 4, 5, 5, 5, 5]
    assert first["dead"].tolist() == [True, True] + [False] * 6
    assert second["fan_in"].tolist() == [7, 7, 6, 7, 7] and not second["dead"].any()
    assert (second["dense_fan_in"] == 8).all() and (second["dense_fan_out"] == 3).all()
    both = overlap.units(groups, stack([masks, ones(model)]))
    assert both.groupby("replica")["dead"].sum().tolist() == [2, 0]


def test_channels_are_dead_with_all_of_their_kernels():
    model = build(small_conv_bn)
    masks = ones(model)
    masks["4.weight"][1] = False
    masks["8.weight"][:, 2] = False
    table = overlap.units(permutation.groups(model, torch.zeros(2, 1, 8, 8, dtype=torch.float64)), masks)
    second = table[table["group"] == "4"].set_index("unit")
    assert second["dead"].tolist() == [False, True, True, False]
    assert second["fan_in"].tolist() == [36, 0, 36, 36] and second["fan_out"].tolist() == [3, 3, 0, 3]
    assert (table[table["group"] == "0"]["fan_out"] == 3 * 9).all()


def test_an_input_map_sums_the_live_weights_of_a_pixel():
    mask = layer(0, 4, 8, 3, total=12, shape=(3, 4))
    assert overlap.input_map(mask, (1, 2, 2)).tolist() == [[[3, 0], [0, 1]]]
    assert overlap.input_map(torch.stack([mask, mask]), (1, 2, 2)).shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match="linear layer on 9 inputs"):
        overlap.input_map(mask, (1, 3, 3))


def test_survival_of_nested_and_of_moved_masks():
    levels = [{"fc": layer(*range(n))} for n in (12, 6, 3)]
    table = overlap.survival(levels).query("layer == 'fc'").set_index(["a", "b"])["survival"]
    assert table.to_dict() == {(0, 0): 1, (0, 1): 0.5, (0, 2): 0.25, (1, 1): 1, (1, 2): 0.5, (2, 2): 1}
    moved = overlap.survival([{"fc": layer(0, 1, 2, 3)}, {"fc": layer(3, 4, 5, 6)}])
    assert moved.query("a == 0 and b == 1")["survival"].tolist() == [0.25, 0.25]
    stacked = overlap.survival([stack([level, level]) for level in levels], stacked=True)
    assert sorted(stacked["replica"].unique()) == [0, 1] and len(stacked) == 2 * 6 * 2


# Up to the order of hidden units


def test_a_permuted_mask_is_found_and_random_masks_are_not(monkeypatch):
    monkeypatch.setattr(null, "_ROUNDS", 20)
    model = build(small_mlp)
    groups = permutation.groups(model, torch.zeros(2, 6, dtype=torch.float64))
    masks = half_masks(model, 0)
    moved = permutation.permute(groups, masks, permutation.random(groups, 1))
    found = overlap.aligned(groups, masks, moved, restarts=4)
    whole = of(found, "all")
    assert (found["jaccard"] == 1).all() and whole["p_value"] == 1 / 20 and whole["z"] > 3
    assert whole["intersection_before"] < whole["intersection"] == whole["kept_a"]
    # the null is aligned too: far above the unaligned expectation, and random masks are nothing special to it
    assert whole["null_mean"] > of(overlap.compare(masks, moved), "all")["expected"] + whole["null_sd"]
    ranks = [
        of(overlap.aligned(groups, masks, layerwise_shuffle(masks, 100 + s), restarts=2), "all") for s in range(12)
    ]
    assert 0.2 < np.mean([r["p_value"] for r in ranks]) < 0.85
    assert abs(np.mean([r["z"] for r in ranks])) < 1.2
    again = overlap.aligned(groups, masks, moved, restarts=4)
    pd.testing.assert_frame_equal(found, again)


def test_random_masks_keep_what_is_given_exactly():
    masks = random_masks(1, (0.3, 0.1))
    masks = select(masks, 0) | {"conv": torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.3}
    for given_, gone in {"input": 0, "unit": 1, "layer": (0, 1)}.items():
        drawn = null_masks(masks, 5, given_)
        for name, mask in masks.items():
            old, new = (m.reshape(len(mask), -1) for m in (mask, drawn[name]))
            assert drawn[name].shape == mask.shape and not torch.equal(old, new)
            assert torch.equal(old.sum(gone), new.sum(gone))
        assert all(torch.equal(m, null_masks(masks, 5, given_)[n]) for n, m in drawn.items())
        assert not torch.equal(drawn["fc1"], null_masks(masks, 6, given_)["fc1"])


@pytest.mark.parametrize("given_", ["input", "unit"])
def test_random_masks_are_uniform_within_each_input_or_unit(given_):
    """2 of 4 live weights in one column, 1 of 4 in another: all 6 x 4 placements are equally likely."""
    mask = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 0]], dtype=torch.bool)
    mask = mask if given_ == "input" else mask.T
    bits = 2 ** torch.arange(8)
    drawn = torch.stack([null_masks({"fc": mask}, seed, given_)["fc"].flatten() for seed in range(2400)])
    _, counts = (drawn * bits).sum(1).unique(return_counts=True)
    assert len(counts) == 24 and chisquare(counts.numpy()).pvalue > 1e-3


def heterogeneous(units, inputs, density, generator, pixels):
    """Live weights whose odds are a product of unit and pixel: uniform once both margins are given."""
    odds = torch.randn(units, 1, generator=generator, dtype=torch.float64) + pixels
    level = torch.sigmoid(odds).quantile(1 - density).logit()
    return torch.rand(units, inputs, generator=generator, dtype=torch.float64) < torch.sigmoid(odds - level)


@pytest.mark.parametrize("given_", ["layer", "unit", "input"])
def test_an_empty_layer_is_aligned_along_with_the_rest(given_):
    model = build(small_mlp)
    groups = permutation.groups(model, torch.zeros(2, 6, dtype=torch.float64))
    a, b = (half_masks(model, seed) for seed in (0, 1))
    a["fc2.weight"][:] = b["fc2.weight"][:] = False
    table = overlap.aligned(groups, a, b, given=given_, draws=3, restarts=1)
    row = of(table, "fc2.weight")
    assert row["intersection"] == row["null_mean"] == 0 and row["p_value"] == 1 and np.isnan(row["ratio"])
    assert of(table, "all")["ratio"] > 0.5


def test_masks_of_both_margins_keep_both_exactly():
    generator = torch.Generator().manual_seed(0)
    masks = {"fc": heterogeneous(9, 20, 0.2, generator, torch.randn(20, generator=generator, dtype=torch.float64))}
    masks["conv"] = torch.rand(6, 4, 3, 3, generator=generator) < 0.3
    masks["one"] = torch.rand(1, 20, generator=generator) < 0.3
    one, other = margin_masks(masks, 3, 2)
    for name, mask in masks.items():
        old, *new = (m.reshape(len(mask), -1) for m in (mask, one[name], other[name]))
        assert one[name].shape == mask.shape
        assert all(torch.equal(old.sum(dim), m.sum(dim)) for m in new for dim in (0, 1))
        assert name == "one" or not (torch.equal(new[0], new[1]) or torch.equal(old, new[0]))
    again = margin_masks(masks, 3, 2)
    assert all(torch.equal(m, again[1][n]) for n, m in other.items())
    assert not torch.equal(margin_masks(masks, 4, 1)[0]["fc"], one["fc"])


@pytest.mark.parametrize(("margin", "units", "n"), [((2, 2, 2, 2), 4, 90), ((1, 1, 1), 3, 6), ((3, 2, 1), 3, 3)])
def test_masks_of_both_margins_are_uniform(margin, units, n, monkeypatch):
    """The 90 masks of 4 x 4 with two live weights in every row and column; the 6 permutations; 3 of unequal columns."""
    monkeypatch.setattr(null, "_ROUNDS", 12)
    columns = len(margin)
    rows = sum(margin) // units
    grid = torch.zeros(units, columns, dtype=torch.bool)
    left = torch.tensor(margin)
    for row in grid:  # the fullest columns first
        row[left.argsort(descending=True, stable=True)[:rows]] = True
        left -= row.long()
    assert (left == 0).all()
    drawn = torch.stack([m["fc"].flatten() for m in margin_masks({"fc": grid}, 0, 15 * n)])
    codes, counts = (drawn * 2 ** torch.arange(units * columns)).sum(1).unique(return_counts=True)
    assert len(codes) == n and chisquare(counts.numpy()).pvalue > 1e-3


def test_independent_masks_of_equal_margins_score_one(monkeypatch):
    """Units and pixels of unequal sizes: aligned, they share more than random masks that lose either margin."""
    monkeypatch.setattr(null, "_ROUNDS", 30)
    model = build(lambda: nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 3)))
    groups = permutation.groups(model, torch.zeros(2, 40, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, generator=generator, dtype=torch.float64)
    found: dict[str, list] = {"layer": [], "unit": [], "input": []}
    for seed in range(30):
        pair = [
            {"0.weight": heterogeneous(16, 40, 0.2, generator, pixels), "2.weight": ones(model)["2.weight"]}
            for _ in range(2)
        ]
        for given_, rows in found.items():
            table = overlap.aligned(groups, *pair, given=given_, draws=9, restarts=1, seed=seed)
            rows.append(of(table, "0.weight"))
    ratio = {given_: np.array([row["ratio"] for row in rows]) for given_, rows in found.items()}
    assert ratio["layer"].mean() > ratio["unit"].mean() > 1.05
    assert abs(ratio["input"].mean() - 1) < 3.5 * ratio["input"].std() / 30**0.5 < 0.03
    z, p = (np.array([row[name] for row in found["input"]]) for name in ("z", "p_value"))
    assert abs(z.mean()) < 0.75 and 0.8 < z.std() < 1.8  # Student's t of 9 draws: 1.2
    assert 0.35 < p.mean() < 0.75  # 0.55, for ranks of 10
    assert {row["p_value"] for row in found["layer"]} == {0.1}


def test_shared_inputs_alone_are_more_than_layer_counts_and_no_more_than_input_counts_explain():
    model = build(lambda: nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 4)))
    groups = permutation.groups(model, torch.zeros(2, 40, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    alive = torch.arange(40) < 20
    found: dict[str, list] = {"layer": [], "input": []}
    for _ in range(5):
        a, b = (
            {"0.weight": (torch.rand(24, 40, generator=generator) < 0.4) & alive, "2.weight": ones(model)["2.weight"]}
            for _ in range(2)
        )
        for given_, rows in found.items():
            rows.append(of(overlap.aligned(groups, a, b, given=given_, restarts=1), "0.weight"))
    assert all(row["z"] > 5 and row["p_value"] == 1 / 20 for row in found["layer"])
    assert abs(np.mean([row["z"] for row in found["input"]])) < 1.5
    assert 0.15 < np.mean([row["p_value"] for row in found["input"]]) < 0.9


# Refusals


def test_what_cannot_be_compared_is_refused():
    masks = {"fc": layer(0, 1)}
    with pytest.raises(ValueError, match=r"of one model: got the layers \['fc'\] and \['fd'\]"):
        overlap.compare(masks, {"fd": layer(0)})
    with pytest.raises(ValueError, match=r"equal shapes and as many replicas: got \(1, 3, 4\) and \(1, 4, 3\)"):
        overlap.compare(masks, {"fc": layer(0, shape=(4, 3))})
    with pytest.raises(ValueError, match=r"must be bool, True = kept: got torch\.float32"):
        overlap.compare(masks, {"fc": layer(0).float()})
    with pytest.raises(ValueError, match="must name at least one layer"):
        overlap.compare({}, {})
    with pytest.raises(ValueError, match="at least two masks: got 1"):
        overlap.pairs([masks])
    with pytest.raises(ValueError, match="equal shapes"):
        overlap.pairs([masks, {"fc": layer(0, shape=(4, 3))}])
    with pytest.raises(ValueError, match=r"one replica axis in front, of one length: got \[3, 4\]"):
        overlap.pairs({"fc": layer(*range(12)), "output": layer(*range(12), shape=(4, 3))})  # one network, no stack
    with pytest.raises(ValueError, match=r"given must be one of \['layer', 'input', 'unit'\]: got 'pixel'"):
        overlap.compare(masks, masks, given="pixel")
    model = build(small_mlp)
    groups = permutation.groups(model, torch.zeros(2, 6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"given must be one of \['layer', 'input', 'unit'\]: got 'pixel'"):
        overlap.aligned(groups, half_masks(model, 0), half_masks(model, 1), given="pixel")
    with pytest.raises(ValueError, match="draws must be at least 2"):
        overlap.aligned(groups, half_masks(model, 0), half_masks(model, 1), draws=1)
