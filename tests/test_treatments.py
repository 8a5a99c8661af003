"""How a level starts: what each treatment takes from the ticket and what it draws anew; the scores that prune."""

from __future__ import annotations

import math

import pytest
import torch
from cases import build, half_masks, small_conv_bn, small_mlp
from scipy import stats
from torch import nn

from ticketlab import masks as mask_ops
from ticketlab.engine.criteria import CRITERIA
from ticketlab.engine.treatments import TREATMENTS, Origin, derived_seed
from ticketlab.functional import State, state

SAME_WEIGHTS = ("ticket", "sibling", "random_mask", "layerwise_shuffle", "dense_restart")
SAME_MASK = ("ticket", "sibling", "reinit")
SAME_ORDER = ("ticket", "reinit", "random_mask", "layerwise_shuffle")


def sevens() -> nn.Module:
    """An initialiser of the user's own: normal weights of standard deviation 3, biases of 7."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))
    for layer in (net[1], net[3]):
        nn.init.normal_(layer.weight, std=3.0)
        nn.init.constant_(layer.bias, 7.0)
    return net


def origin(factory=sevens, *, init_seed=0, order_seed=10, level=3, dtype=torch.float64):
    """A level's findings: weights and statistics moved off initialisation, a mask of uneven layers."""
    model = build(factory, init_seed, dtype)
    taken = state(model)
    rewound = State(
        {n: 1.5 * p + 0.25 for n, p in taken.params.items()},
        {n: b + 1 for n, b in taken.buffers.items()},
    )
    found = {n: m for n, m in half_masks(model, init_seed).items() if n in mask_ops.prunable(model)}
    last = list(found)[-1]
    found[last] = found[last] | True  # the output layer is dense
    return Origin(factory, rewound, found, init_seed, order_seed, level)


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def same_state(a, b):
    return equal(a.params, b.params) and equal(a.buffers, b.buffers)


def counts(masks):
    return [int(m.sum()) for m in masks.values()]


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_treatment_changes_what_it_says_and_nothing_else(name):
    given = origin()
    start = TREATMENTS[name](given)
    assert same_state(start.state, given.rewound) == (name in SAME_WEIGHTS)
    assert equal(start.masks, given.masks) == (name in SAME_MASK)
    assert (start.order_seed == given.order_seed) == (name in SAME_ORDER)
    assert list(start.state.params) == list(given.rewound.params)
    assert list(start.state.buffers) == list(given.rewound.buffers)
    assert all(m.dtype == torch.bool for m in start.masks.values())


def test_every_treatment_is_one_of_these():
    assert set(TREATMENTS) == {*SAME_WEIGHTS, *SAME_MASK, *SAME_ORDER}


@pytest.mark.parametrize("name", TREATMENTS)
def test_a_treatment_is_a_function_of_its_origin_and_leaves_it_alone(name):
    given, untouched = origin(), origin()
    first, again = TREATMENTS[name](given), TREATMENTS[name](origin())
    assert same_state(first.state, again.state)
    assert equal(first.masks, again.masks)
    assert first.order_seed == again.order_seed
    assert same_state(given.rewound, untouched.rewound)
    assert equal(given.masks, untouched.masks)


def test_live_weights_are_counted_as_each_control_promises():
    given = origin()
    kept = {name: counts(TREATMENTS[name](given).masks) for name in TREATMENTS}
    ticket = counts(given.masks)
    assert kept["layerwise_shuffle"] == kept["reinit"] == kept["sibling"] == ticket
    assert sum(kept["random_mask"]) == sum(ticket)
    assert kept["random_mask"] != ticket  # the dense output layer is not dense by chance
    assert kept["dense_restart"] == [m.numel() for m in given.masks.values()]


def test_reinit_draws_from_the_models_own_initialiser():
    given = origin()
    fresh = TREATMENTS["reinit"](given).state
    weight, biases = fresh.params["1.weight"], [fresh.params[n] for n in ("1.bias", "3.bias")]
    assert all((b == 7).all() for b in biases)
    assert weight.std().item() == pytest.approx(3.0, rel=5 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 5 * 3 / math.sqrt(weight.numel())
    for other in (given.rewound.params, state(build(sevens, given.init_seed)).params):
        correlation = torch.corrcoef(torch.stack([weight.flatten(), other["1.weight"].flatten()]))[0, 1]
        assert abs(correlation.item()) < 5 / math.sqrt(weight.numel())
    assert not fresh.buffers["2.running_mean"].any()  # its batch norm starts anew as well
    assert (fresh.buffers["2.running_var"] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reinit_comes_in_the_dtype_of_the_ticket(dtype):
    fresh = TREATMENTS["reinit"](origin(small_conv_bn, dtype=dtype)).state
    assert {p.dtype for p in fresh.params.values()} == {dtype}
    assert fresh.buffers["1.running_mean"].dtype == dtype
    assert fresh.buffers["1.num_batches_tracked"].dtype == torch.int64


def drawn(name, start):
    """What a treatment draws, as something that can be compared."""
    if name in ("dense_restart", "sibling"):
        return start.order_seed
    tensors = start.state.params if name == "reinit" else start.masks
    return tuple(torch.cat([t.flatten() for t in tensors.values()]).tolist())


@pytest.mark.parametrize("name", ["reinit", "random_mask", "layerwise_shuffle", "dense_restart", "sibling"])
def test_levels_and_seeds_draw_apart(name):
    base = origin()
    grid = [
        Origin(base.factory, base.rewound, base.masks, seed, 10 + seed, level)
        for seed in range(4)
        for level in range(1, 5)
    ]
    assert len({drawn(name, TREATMENTS[name](given)) for given in grid}) == len(grid)


def test_batch_orders_of_one_level_are_all_different():
    given = origin()
    orders = {TREATMENTS[name](given).order_seed for name in TREATMENTS}
    assert len(orders) == 3  # the ticket's, the sibling's and the dense restart's


def test_derived_seeds_are_seeds_of_their_own():
    seeds = {derived_seed(purpose, *s) for purpose in ("a", "b") for s in ((0,), (1,), (0, 1), (1, 0))}
    assert len(seeds) == 8
    assert all(1000 < seed < 2**32 for seed in seeds)  # a seed can be derived from a derived one again
    assert derived_seed("a", 0) == derived_seed("a", 0)


# Criteria


def network(seed=0):
    model = build(small_mlp, seed)
    masks = half_masks(model, seed)
    return masks, state(model).params, {n: p + 1 for n, p in state(model).params.items()}


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_cover_the_masks_and_can_be_pruned_by(name):
    masks, theta_start, theta_end = network()
    scores = CRITERIA[name](masks, theta_start, theta_end, 3)
    again = CRITERIA[name](masks, theta_start, theta_end, 3)
    assert {n: s.shape for n, s in scores.items()} == {n: m.shape for n, m in masks.items()}
    assert equal(scores, again)
    finer = mask_ops.prune(masks, scores, 0.2)
    kept = int(mask_ops.kept(masks))
    assert int(mask_ops.kept(finer)) == kept - mask_ops.n_removed(kept, 0.2)


def test_magnitude_is_of_the_trained_weights():
    masks = {"w": torch.ones(4, dtype=torch.bool)}
    start, end = {"w": torch.tensor([9.0, 9.0, 9.0, 9.0])}, {"w": torch.tensor([-3.0, 2.0, 0.0, -0.5])}
    scores = CRITERIA["magnitude"](masks, start, end, 0)
    assert scores["w"].tolist() == [3.0, 2.0, 0.0, 0.5]
    assert mask_ops.prune(masks, scores, 0.5)["w"].tolist() == [True, True, False, False]


def test_random_scores_are_noise_of_their_own_for_each_layer_and_seed():
    masks = {name: torch.ones(5000, dtype=torch.bool) for name in ("a", "b")}
    scores = [CRITERIA["random"](masks, {}, {}, seed) for seed in (0, 1)]
    samples = [s[name].numpy() for s in scores for name in masks]
    for index, sample in enumerate(samples):
        assert stats.kstest(sample, "uniform").pvalue > 1e-3
        for other in samples[:index]:
            assert abs(stats.pearsonr(sample, other).statistic) < 5 / math.sqrt(5000)
