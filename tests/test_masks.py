"""Masks: what is prunable, counts to the weight, ties by index, controls drawn uniformly."""

from __future__ import annotations

import copy
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import build, small_conv_bn, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import prune_sorted
from scipy import stats
from torch import nn

import ticketlab as tl
from ticketlab import masks
from ticketlab.errors import Refused, kinds_told
from ticketlab.models import build as build_model
from ticketlab.seeds import initialise
from ticketlab.state import stack, state

LENET_LAYERS = {"fc1.weight": 300 * 784, "fc2.weight": 100 * 300, "output.weight": 10 * 100}


def lenet():
    return initialise(lambda: build_model("lenet_300_100", (1, 28, 28), 10), 0)


def rounded_share(fraction: Fraction, alive: int) -> int:
    """fraction * alive to the nearest integer, halves up, in exact arithmetic."""
    return (2 * fraction.numerator * alive + fraction.denominator) // (2 * fraction.denominator)


def scores_of(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(tuple(mask.shape), generator=generator) for name, mask in shapes.items()}


def counts(given):
    return {name: int(mask.sum()) for name, mask in given.items()}


# What is prunable


class Everything(nn.Module):
    """One of each: what is pruned and what never is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(7, 4), nn.Parameter(torch.zeros(3, 4))
        self.conv1d, self.conv2d, self.conv3d = nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv3d(2, 2, 3)
        self.up = nn.ConvTranspose2d(2, 3, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.cross = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
        self.batch_norm, self.layer_norm, self.group_norm = nn.BatchNorm1d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.linear, self.same = nn.Linear(4, 4), nn.Linear(4, 4)
        self.same.weight = self.linear.weight
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


def test_prunable_is_linear_convolution_and_attention():
    assert masks.prunable(initialise(Everything, 0)) == (
        "conv1d.weight",
        "conv2d.weight",
        "conv3d.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "cross.q_proj_weight",
        "cross.k_proj_weight",
        "cross.v_proj_weight",
        "cross.out_proj.weight",
        "linear.weight",
    )


def test_prunable_weights_of_the_papers_networks():
    assert {n: m.numel() for n, m in masks.ones(lenet()).items()} == LENET_LAYERS
    assert masks.prunable(build(small_conv_bn)) == ("0.weight", "4.weight", "8.weight")
    assert masks.prunable(initialise(lambda: nn.Linear(2, 2), 0)) == ("weight",)


@pytest.mark.parametrize("model", [nn.BatchNorm1d(3), nn.Flatten(), nn.Sequential(nn.ReLU(), nn.LayerNorm(2))])
def test_a_model_with_nothing_to_prune_is_refused(model):
    with pytest.raises(ValueError, match=rf"trainable linear, .* to prune: found none in {type(model).__name__}"):
        masks.prunable(model)


# Counts


def test_ones_density_and_counts():
    model = build(small_mlp)
    single = masks.ones(model)
    assert all(m.dtype == torch.bool and m.all() for m in single.values())
    assert int(masks.kept(single)) == masks.total(single) == 6 * 8 + 8 * 5 + 5 * 3
    half = {n: m.clone() for n, m in single.items()}
    half["fc1.weight"][:4] = False
    assert masks.density(half).item() == (103 - 24) / 103
    assert masks.density(half).dtype == torch.float64
    both = stack([single, half])
    assert masks.kept(both, stacked=True).tolist() == [103, 79]
    assert masks.total(both, stacked=True) == 103
    assert masks.density(both, stacked=True).tolist() == [1.0, 79 / 103]


@pytest.mark.parametrize(
    ("alive", "fraction", "expected"),
    [(266_200, 0.2, 53_240), (10, 0.2, 2), (12, 0.2, 2), (13, 0.2, 3), (2, 0.25, 1), (6, 0.25, 2), (1, 0.2, 0)],
)
def test_n_removed_rounds_halves_up(alive, fraction, expected):
    assert masks.n_removed(alive, fraction) == expected


def test_lenet_counts_at_every_level_of_a_global_study():
    mask = masks.ones(lenet())
    score, expected = scores_of(mask, 0), 266_200
    assert int(masks.kept(mask)) == expected
    for _ in range(24):
        finer = masks.prune(mask, score, 0.2)
        expected -= rounded_share(Fraction(1, 5), expected)
        assert int(masks.kept(finer)) == expected
        assert all((finer[n] <= mask[n]).all() for n in mask)
        mask = finer
    assert expected == pytest.approx(266_200 * 0.8**24, abs=3)


def test_lenet_counts_at_every_level_by_layer_are_the_papers():
    model, published = lenet(), {3: 51.3, 7: 21.1, 12: 7.0, 15: 3.6, 18: 1.9}  # per cent left, Frankle & Carbin (2019)
    mask, expected = masks.ones(model), dict(LENET_LAYERS)
    rates = masks.fractions_by_layer(model, 0.2)
    assert rates == {"fc1.weight": 0.2, "fc2.weight": 0.2, "output.weight": 0.1}
    score = scores_of(mask, 1)
    for level in range(1, 21):
        mask = masks.prune(mask, score, rates)
        for name, alive in expected.items():
            rate = Fraction(1, 10) if name == "output.weight" else Fraction(1, 5)
            expected[name] = alive - rounded_share(rate, alive)
        assert counts(mask) == expected
        if level in published:
            assert round(100 * masks.density(mask).item(), 1) == published[level]


def test_rates_by_layer():
    net = build(small_conv_bn)
    names = masks.prunable(net)
    assert masks.fractions_by_layer(net, 0.2) == dict(zip(names, (0.2, 0.2, 0.1), strict=True))
    assert masks.fractions_by_layer(net, 0.2, conv=0.15) == dict(zip(names, (0.15, 0.15, 0.1), strict=True))
    assert masks.fractions_by_layer(net, 0.2, conv=0.1, output=0.3)["8.weight"] == 0.3
    six = initialise(lambda: build_model("conv_6", (3, 8, 8), 10), 0)
    rates = masks.fractions_by_layer(six, 0.2, conv=0.15)  # Frankle & Carbin (2019), figure 2
    assert list(rates.values()) == [0.15] * 6 + [0.2, 0.2, 0.1]


# The prune step


@st.composite
def problems(draw):
    """Layers of small integer scores, full of ties, some weights dead already, and a rate for each layer."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    mask, score = {}, {}
    for layer, size in enumerate(sizes):
        live = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
        mask[f"w{layer}"] = torch.tensor(live)
        values = st.lists(st.integers(-1, 2), min_size=size, max_size=size)
        score[f"w{layer}"] = torch.tensor(draw(values), dtype=torch.float32)
    rates = draw(st.lists(st.integers(1, 15), min_size=len(sizes), max_size=len(sizes)))
    return mask, score, [Fraction(rate, 16) for rate in rates]


def check(mask, found, expected):
    """``found()`` is ``expected``, or refused where that would leave nothing; a layer may end empty."""
    if not any(m.any() for m in expected.values()):
        with pytest.raises(ValueError, match="must leave a live weight"):
            found()
        return
    new = found()
    assert list(new) == list(mask)
    for name, kept in expected.items():
        assert torch.equal(new[name], kept)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_one_threshold_is_removal_one_by_one(problem):
    mask, score, (rate, *_) = problem
    n = rounded_share(rate, sum(counts(mask).values()))
    check(mask, lambda: masks.prune(mask, score, float(rate)), prune_sorted(mask, score, n))


@given(problems())
@settings(max_examples=150, deadline=None)
def test_a_rate_for_each_layer_is_removal_in_each(problem):
    mask, score, rates = problem
    expected = {}
    for (name, one), rate in zip(mask.items(), rates, strict=True):
        expected |= prune_sorted({name: one}, score, rounded_share(rate, int(one.sum())))
    by_name = {name: float(rate) for name, rate in zip(mask, rates, strict=True)}
    check(mask, lambda: masks.prune(mask, score, by_name), expected)


def test_of_equal_scores_the_lower_index_stays():
    mask = {"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.ones(4, dtype=torch.bool)}
    flat = {name: torch.zeros(m.shape) for name, m in mask.items()}
    new = masks.prune(mask, flat, 0.3)
    assert new["a"].all()
    assert new["b"].tolist() == [True, False, False, False]
    new = masks.prune(mask, flat, {"a": 0.5, "b": 0.5})
    assert new["a"].tolist() == [[True] * 3, [False] * 3]
    assert new["b"].tolist() == [True, True, False, False]


def test_dead_weights_neither_count_nor_come_back():
    mask = {"a": torch.tensor([False, True, True, True, True, False])}
    score = {"a": torch.tensor([9.0, 1.0, 4.0, 3.0, 2.0, float("nan")])}
    assert masks.prune(mask, score, 0.5)["a"].tolist() == [False, False, True, True, False, False]
    assert mask["a"].sum() == 4  # the mask that came in is not written to


def test_signs_and_integers_are_scores_too():
    mask = {"a": torch.ones(4, dtype=torch.bool)}
    assert masks.prune(mask, {"a": torch.tensor([-3, 1, -2, 0])}, 0.5)["a"].tolist() == [False, True, False, True]


@pytest.mark.parametrize("fraction", [0, 1, 0.0, 1.0, -0.2, 1.2, float("nan")])
def test_rates_outside_0_and_1_are_refused(fraction):
    mask = masks.ones(build(small_mlp))
    with pytest.raises(ValueError, match=r"prune fraction must lie in \(0, 1\): got"):
        masks.prune(mask, scores_of(mask, 0), fraction)
    with pytest.raises(ValueError, match=r"prune fraction must lie in \(0, 1\): got"):
        masks.prune(mask, scores_of(mask, 0), dict.fromkeys(mask, fraction))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_refused(value):
    mask = masks.ones(build(small_mlp))
    score = scores_of(mask, 0)
    score["fc2.weight"][0, :2] = value
    with pytest.raises(ValueError, match=r"finite where a weight is alive: 2 in 'fc2.weight' are not"):
        masks.prune(mask, score, 0.2)


def test_scores_and_rates_of_other_layers_are_refused():
    mask = masks.ones(build(small_mlp))
    score = scores_of(mask, 0)
    with pytest.raises(ValueError, match=r"scores\['fc1.weight'\] must have the mask's shape \(8, 6\): got \(6, 8\)"):
        masks.prune(mask, score | {"fc1.weight": score["fc1.weight"].T}, 0.2)
    del score["fc2.weight"]
    with pytest.raises(ValueError, match=r"scores\['fc2.weight'\] must have .*: got none"):
        masks.prune(mask, score, 0.2)
    with pytest.raises(ValueError, match="fractions must name every masked layer"):
        masks.prune(mask, scores_of(mask, 0), {"fc1.weight": 0.2})


def test_a_layer_may_end_empty_and_the_network_not():
    mask = masks.ones(build(small_mlp))
    score = {n: torch.full(m.shape, float(n == "fc1.weight")) for n, m in mask.items()}
    assert counts(masks.prune(mask, score, 0.6)) == {"fc1.weight": 41, "fc2.weight": 0, "output.weight": 0}
    last = {"a": torch.tensor([True, False])}
    with pytest.raises(ValueError, match="pruning must leave a live weight: none of 1 would be"):
        masks.prune(last, {"a": torch.ones(2)}, 0.9)


@given(st.lists(st.sampled_from([-0.0, 0.0, 1.0, 2.0, -1.0, math.inf, math.nan]), min_size=1, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_top_is_a_stable_sort_whatever_the_scores(values, data):
    """Of equal scores the lower index; NaN above all, so that the count is exact where a network has diverged."""
    among = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    n = data.draw(st.integers(0, sum(among)))
    rank = {i: (math.isnan(v), 0.0 if math.isnan(v) else v) for i, v in enumerate(values) if among[i]}
    expected = sorted(rank, key=lambda i: (not rank[i][0], -rank[i][1], i))[:n]
    found = masks.top(torch.tensor(values), torch.tensor(among), n)
    assert found.nonzero()[:, 0].tolist() == sorted(expected)


def test_counts_are_rounded_once_and_checked():
    mask = {"a": torch.ones(5, dtype=torch.bool), "b": torch.arange(4) < 3}
    assert masks.counts_after(mask, 0.5) == {("a", "b"): 4}
    assert masks.counts_after(mask, {"a": 0.5, "b": 0.5}) == {("a",): 2, ("b",): 1}
    assert masks.counts_at(mask, 0.5) == {("a", "b"): 5}
    assert masks.counts_at(mask, {"a": 0.5, "b": 0.75}) == {("a",): 3, ("b",): 3}
    with pytest.raises(ValueError, match=r"density must lie in \(0, 0\.75\], as much as is alive of b: got 0\.9"):
        masks.counts_at(mask, {"a": 0.5, "b": 0.9})
    with pytest.raises(ValueError, match=r"a live weight must be left: density 0\.01 leaves none of 9"):
        masks.counts_at(mask, 0.01)


# Controls


@pytest.fixture
def uneven():
    """Layers of densities 1/2, 1/8 and 1: 18 of 40."""
    mask = {"a": torch.zeros(4, 4, dtype=torch.bool), "b": torch.zeros(16, dtype=torch.bool)}
    mask["a"][:2], mask["b"][5:7] = True, True
    return mask | {"c": torch.ones(2, 2, 2, dtype=torch.bool)}


def test_controls_keep_their_counts_and_are_functions_of_the_seed(uneven):
    before = copy.deepcopy(uneven)
    for control in (masks.random_mask, masks.layerwise_shuffle):
        first, again, other = control(uneven, 3), control(uneven, 3), control(uneven, 4)
        assert list(first) == list(uneven)
        assert all(m.dtype == torch.bool and m.shape == uneven[n].shape for n, m in first.items())
        assert int(masks.kept(first)) == int(masks.kept(other)) == 18
        assert all(torch.equal(first[n], again[n]) for n in first)
        assert any(not torch.equal(first[n], other[n]) for n in first)
    assert all(counts(masks.layerwise_shuffle(uneven, s)) == counts(uneven) for s in range(20))
    assert len({tuple(counts(masks.random_mask(uneven, s)).values()) for s in range(20)}) > 3
    assert all(torch.equal(uneven[n], m) for n, m in before.items())
    with pytest.raises(ValueError, match="seeds must be integers"):
        masks.random_mask(uneven, -1)


def frequency(control, mask, n):
    drawn = [control(mask, seed) for seed in range(n)]
    return {name: torch.stack([d[name] for d in drawn]).double().flatten(1).numpy() for name in mask}


def uniform_p_value(draws):
    """Chi-square of the counts at each position, for draws without replacement of a fixed number."""
    n, size = draws.shape
    p = draws[0].mean()
    statistic = ((draws.sum(0) - n * p) ** 2).sum() / (n * p * (1 - p)) * (size - 1) / size
    return stats.chi2.sf(statistic, size - 1)


def test_random_masks_are_uniform_over_the_whole_network(uneven):
    draws = frequency(masks.random_mask, uneven, 2000)
    whole = np.concatenate(list(draws.values()), axis=1)
    assert (whole.sum(1) == 18).all()
    assert 1e-3 < uniform_p_value(whole) < 1 - 1e-3
    for name, size in (("a", 16), ("b", 16), ("c", 8)):  # live weights of a layer: hypergeometric
        law, live = stats.hypergeom(40, 18, size), draws[name].sum(1)
        assert abs(live.mean() - law.mean()) < 4 * law.std() / len(live) ** 0.5
        assert live.var() == pytest.approx(law.var(), rel=0.15)


def test_shuffles_are_uniform_within_each_layer(uneven):
    draws = frequency(masks.layerwise_shuffle, uneven, 2000)
    for name in ("a", "b"):
        assert 1e-3 < uniform_p_value(draws[name]) < 1 - 1e-3
    assert draws["c"].all()


def test_layers_of_one_shape_are_shuffled_apart():
    half = torch.arange(200) < 100
    shuffled = masks.layerwise_shuffle({"a": half, "b": half}, 0)
    together = int((shuffled["a"] & shuffled["b"]).sum())  # hypergeometric: 50 +- 3.5
    assert abs(together - 50) < 4 * 3.6


# validate


def test_masks_that_fit_pass():
    model = build(small_conv_bn)
    masks.validate(model, masks.ones(model))
    masks.validate(model, stack([masks.ones(model)] * 3))
    masks.validate(model, {"1.weight": torch.ones(4) > 0})  # what they name is what may be pruned


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.clear(), r"unknown \[\], of 0\. Build them with masks.ones\(model\)"),
        (lambda m: m.update({"fc3.weight": torch.ones(8) > 0}), r"unknown \['fc3.weight'\], of 4"),
        (lambda m: m.update({"fc1.weight": torch.ones(8, 6)}), r"must be bool, True = kept: got torch.float32.*!= 0"),
        (lambda m: m.update({"fc1.weight": [[True]]}), r"must be bool, True = kept: got list"),
        (lambda m: m.update({"fc1.weight": torch.ones(6, 8) > 0}), r"shape \(8, 6\) or .*: got \(6, 8\)"),
        (lambda m: m.update({"fc1.weight": torch.ones(6) > 0}), r"shape \(8, 6\) or .*: got \(6,\)"),
        (lambda m: m.update({"fc1.weight": torch.ones(1, 1, 8, 6) > 0}), r"shape \(8, 6\) or .*: got \(1, 1, 8, 6\)"),
        (lambda m: m.update({"fc1.weight": torch.ones(2, 8, 6) > 0}), r"one replica axis: got lengths \['2', 'None'\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, match):
    model = build(small_mlp)
    given = masks.ones(model)
    change(given)
    with pytest.raises(ValueError, match=match):
        masks.validate(model, given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: [*s.values()], r"scores must be a dict .* for each of \['fc1.weight', .*: got list"),
        (lambda s: {**s, "fc1.weight": None}, r"scores\['fc1.weight'\] must have the mask's shape .*: got none"),
        (lambda s: {**s, "fc1.weight": np.ones((8, 6))}, r"the mask's shape .*: got <class 'numpy.ndarray'>"),
        (lambda s: {**s, "fc1.weight": torch.ones(8, 6) > 0}, "must be real numbers on cpu: got torch.bool"),
        (lambda s: {**s, "fc1.weight": torch.ones(8, 6) * 1j}, "must be real numbers on cpu: got torch.complex64"),
    ],
)
def test_scores_that_are_none_are_refused(change, match):
    mask = masks.ones(build(small_mlp))
    with pytest.raises(ValueError, match=match):
        masks.prune(mask, change(scores_of(mask, 0)), 0.2)


@pytest.mark.parametrize(
    ("counts", "match"),
    [
        ({("fc1.weight", "fc2.weight"): 500}, r"count must be an integer in 0\.\.88, as many as are alive .*: got 500"),
        ({("fc1.weight",): -1}, r"in 0\.\.48, .*: got -1"),
        ({("fc1.weight",): 2.5}, r"must be an integer .*: got 2\.5"),
        ({("fc9.weight",): 2}, r"in one group of counts, by name: got \[\('fc9\.weight',\)\]"),
        ({("fc1.weight",): 2, ("fc1.weight", "fc2.weight"): 2}, "each layer may be in one group of counts"),
    ],
)
def test_counts_that_make_no_sense_are_refused(counts, match):
    mask = masks.ones(build(small_mlp))
    with pytest.raises(ValueError, match=match):
        masks.keep(mask, scores_of(mask, 0), counts)
    with pytest.raises(ValueError, match="masks must name a layer at least: got none"):
        masks.kept({})


def test_scripted_modules_are_read_by_their_names():
    model = build(small_mlp)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.trace(model, torch.zeros(2, 6, dtype=torch.float64))
    assert masks.prunable(scripted, "*.weight") == masks.prunable(model)
    with pytest.raises(ValueError, match=r"found none in .*Name others with prunable="):
        masks.prunable(scripted)


def test_masks_of_the_model_are_no_views_of_it():
    model = build(small_mlp)
    before = state(model).params
    for mask in masks.ones(model).values():
        mask.zero_()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_counts_and_shapes_that_cannot_be_are_refused():
    for alive, fraction in ((10, math.nan), (10, 1.5), (10, -0.1), (-1, 0.5)):
        with pytest.raises(Refused, match=r"fraction must lie in \[0, 1\] and alive be at least 0"):
            masks.n_removed(alive, fraction)
    scores = torch.arange(4.0)
    for among, n in ((torch.ones(3).bool(), 1), (torch.ones(4), 1), (torch.ones(4).bool(), -1)):
        with pytest.raises(Refused, match="scores and a bool tensor of one shape, and n of at least 0"):
            masks.top(scores, among, n)
    with pytest.raises(Refused, match="masks must name a prunable parameter"):
        masks.random_mask({}, 0)
    with pytest.raises(Refused, match="n_classes must be at least 1: got -1"):
        tl.models.build("mlp_100_50", (1, 8, 8), -1)


def test_a_failure_over_an_argument_of_the_wrong_kind_names_it():
    for wrong, words in (("x", "'x', a str"), (3, "3, a int"), ({"a": None}, "{'a': None}, a dict")):
        with pytest.raises(Refused, match=rf"^masks must be Mapping\[str, Tensor\]: got {words}\.$"):
            tl.masks.kept(wrong)


def test_a_failure_of_another_kind_keeps_its_traceback():
    def broken(n: int) -> int:
        return n + int("no number")

    assert kinds_told(broken).__name__ == "broken"
    with pytest.raises(ValueError, match="invalid literal"):
        kinds_told(broken)(1)
    with pytest.raises(Refused, match="n must be int: got 'x', a str"):
        kinds_told(broken)("x")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        kinds_told(broken)()
