"""Intervals over seeds against scipy, slow loops and simulation, and Holm's correction by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analyses.intervals import holm, interval, rank_correlation, rank_interval, with_holm

RANDOM = np.random.default_rng(0)
A, B = RANDOM.normal(size=(2, 4, 3, 5))
WITHIN = ("all", "level", "level and treatment")

# Means


def test_an_interval_is_that_of_a_t_test():
    values = pd.Series(RANDOM.normal(0.4, 1, 6))
    found, expected = interval(values, "gap"), stats.ttest_1samp(values, 0)
    low, high = expected.confidence_interval(0.95)
    assert [found["n"], found["gap"], found["sd"]] == pytest.approx([6, values.mean(), values.std()])
    assert [found["low"], found["high"]] == pytest.approx([low, high])
    assert found["p_value"] == pytest.approx(expected.pvalue)


def test_differences_are_paired_by_seed_and_a_diverged_network_is_left_out():
    a = pd.Series({0: 0.1, 1: 0.3, 2: np.nan, 3: 0.2})
    b = pd.Series({3: 0.1, 2: 0.5, 1: 0.1, 0: 0.05})
    found, expected = interval(a - b), stats.ttest_rel([0.1, 0.3, 0.2], [0.05, 0.1, 0.1])
    assert found["n"] == 3 and found["p_value"] == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("values", [[], [0.3], [0.3, np.nan], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3, 0.3]])
def test_values_that_say_nothing_of_the_spread_have_no_interval(values):
    found = interval(pd.Series(values, dtype=float))
    assert np.isnan([found["low"], found["high"], found["p_value"]]).all()
    assert found["n"] == np.isfinite(values).sum()


# Holm


def test_holm_by_hand():
    p = pd.Series([0.04, 0.01, np.nan, 0.03, 0.6], index=list("abcde"))
    expected = {"a": 0.09, "b": 0.04, "d": 0.09, "e": 0.6}  # 4 x 0.01, 3 x 0.03, 2 x 0.04 raised to it, 1 x 0.6
    found = holm(p)
    assert np.isnan(found["c"]) and found.drop("c").to_dict() == pytest.approx(expected)
    assert holm(pd.Series([0.5, 0.9])).tolist() == [1, 1]


def test_a_family_is_the_table_or_each_group_of_it():
    table = pd.DataFrame({"kind": ["x", "y", "x"], "p_value": [0.01, 0.02, 0.04], "p_value_again": [0.5, np.nan, 0.1]})
    whole = with_holm(table)
    assert whole["p_holm"].tolist() == pytest.approx([0.03, 0.04, 0.04]) and set(whole["n_family"]) == {3}
    split = with_holm(table, by="kind")
    assert split["p_holm"].tolist() == pytest.approx([0.02, 0.02, 0.04]) and split["n_family"].tolist() == [2, 1, 2]
    other = with_holm(table, "p_value_again")
    assert other["p_holm_again"].dropna().tolist() == pytest.approx([0.5, 0.2])
    assert set(other["n_family_again"]) == {2} and "p_holm" not in other


def test_holm_keeps_false_discoveries_of_a_family_rare():
    """40 families of 20 paired comparisons without a difference: unadjusted, most have one below 0.05."""
    generator = np.random.default_rng(1)
    families = [
        pd.Series([interval(pd.Series(d))["p_value"] for d in generator.normal(size=(20, 4))]) for _ in range(40)
    ]
    assert sum((p < 0.05).any() for p in families) > 16
    assert sum((holm(p) < 0.05).any() for p in families) <= 6  # more has a probability of 0.3 % at 5 %


# Ranks


def test_ranks_of_all_networks_are_spearmans():
    assert rank_correlation(A, B, "all") == pytest.approx(stats.spearmanr(A, B, axis=None).statistic, abs=1e-12)
    tied = np.round(A)
    assert rank_correlation(tied, B, "all") == pytest.approx(stats.spearmanr(tied, B, axis=None).statistic, abs=1e-12)


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
    for within in WITHIN:
        expected = rank_correlation(A[:, kept], B[:, kept], within)
        assert rank_correlation(a, B, within) == pytest.approx(expected, abs=1e-12)
        assert rank_interval(a, B, within) == pytest.approx(rank_interval(A[:, kept], B[:, kept], within), abs=1e-12)
    assert np.isnan(rank_correlation(np.ones_like(A), B, "level"))


def test_the_rank_interval_leaves_out_one_seed_after_the_other():
    found = rank_interval(A, B, "level")
    rest = [[s for s in range(5) if s != gone] for gone in range(5)]
    z = np.arctanh([rank_correlation(A[..., seeds], B[..., seeds], "level") for seeds in rest])
    centre, error = np.arctanh(found["rho"]), np.sqrt(4 / 5 * ((z - z.mean()) ** 2).sum())
    reach = 2.7764451 * error  # Student's t with 4 degrees of freedom
    assert [found["low"], found["high"]] == pytest.approx(np.tanh([centre - reach, centre + reach]), rel=1e-6)
    assert found["p_value"] == pytest.approx(2 * stats.t.sf(abs(centre) / error, 4))


@pytest.mark.parametrize(
    ("a", "b", "within"), [(A[..., :1], B[..., :1], "all"), (A, A, "level"), (np.ones_like(A), B, "all")]
)
def test_ranks_that_say_nothing_of_the_spread_have_no_interval(a, b, within):
    found = rank_interval(a, b, within)
    assert np.isnan([found["low"], found["high"], found["p_value"]]).all()


@pytest.mark.parametrize("n_seeds", [3, 5, 10])
def test_rank_intervals_cover_the_truth(n_seeds):
    """Grids with effects of level, treatment and seed, no relation among seeds: the truth within treatments is 0."""
    generator = np.random.default_rng(n_seeds)
    shapes, levels = [(1, 1, n_seeds), (1, 3, n_seeds), (4, 3, n_seeds)], generator.normal(size=(4, 1, 1))
    covered = 0
    for _ in range(120):
        a, b = (levels + sum(generator.normal(size=shape) for shape in shapes) for _ in range(2))
        found = rank_interval(a, b, "level and treatment")
        covered += found["low"] <= 0 <= found["high"]
    assert covered >= 106  # at 95 %, fewer has a probability of 0.1 %
