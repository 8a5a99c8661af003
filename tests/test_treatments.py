"""How a level starts: what each treatment takes from the ticket and what it draws anew."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import build, half_masks, small_conv_bn
from torch import nn

from ticketlab import masks as mask_ops
from ticketlab.engine.dynamic import layer_counts
from ticketlab.engine.treatments import TREATMENTS as RECORDS
from ticketlab.engine.treatments import Origin
from ticketlab.masks import masked
from ticketlab.seeds import derived_seed
from ticketlab.state import State, state

VALUES = ("reinit_keep_sign", "reshuffle", "reshuffle_keep_sign", "random_sign", "signed_constant", "random_constant")
TRAINED = ("lr_rewind", "fine_tune")
SAME_WEIGHTS = ("ticket", "sibling", "random_mask", "random_erk", "layerwise_shuffle", "dense_restart", "frozen_init")
TREATMENTS = {name: record.start for name, record in RECORDS.items()}
FROZEN = tuple(name for name, record in RECORDS.items() if record.frozen)
SAME_MASK = ("ticket", "sibling", "reinit", *VALUES, *TRAINED, *FROZEN)
SAME_ORDER = ("ticket", "reinit", "random_mask", "random_erk", "layerwise_shuffle", *VALUES, *TRAINED, *FROZEN)


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
    rewound, dense = moved(state(model), 1.5), moved(state(model), 0.5)
    found = {n: m for n, m in half_masks(model, init_seed).items() if n in mask_ops.prunable(model)}
    last = list(found)[-1]
    found[last] = found[last] | True  # the output layer is dense
    before = State(masked(moved(state(model), 2.0).params, found), dense.buffers)
    return Origin(factory, rewound, found, init_seed, order_seed, level, before, dense, last_learning_rate=1e-5)


def moved(taken, factor):
    """Weights and statistics as training might leave them, with some weights across zero."""
    params = {n: factor * p + 0.25 for n, p in taken.params.items()}
    return State(params, {n: b + 1 for n, b in taken.buffers.items()})


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
    assert sum(kept["random_mask"]) == sum(kept["random_erk"]) == sum(ticket)
    erk = layer_counts(build(sevens), sum(ticket) / sum(m.numel() for m in given.masks.values()))
    assert kept["random_erk"] == list(erk.values())  # of two layers here, as many as the ticket has
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


@pytest.mark.parametrize("name", ["reinit", "reinit_keep_sign"])
def test_what_is_not_trained_stays_that_of_the_ticket(name):
    def features():
        net = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 30), nn.Linear(30, 3))
        net[0].requires_grad_(False)
        return net

    given = origin(features)
    fresh = TREATMENTS[name](given).state.params
    assert equal({n: p for n, p in fresh.items() if n[0] == "0"}, {n: given.rewound.params[n] for n in list(fresh)[:2]})
    assert not any(torch.equal(fresh[n], given.rewound.params[n]) for n in list(fresh)[2:])


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
    tensors = start.masks if name in ("random_mask", "random_erk", "layerwise_shuffle") else start.state.params
    return tuple(torch.cat([t.flatten() for t in tensors.values()]).tolist())


@pytest.mark.parametrize(
    "name",
    [
        "reinit",
        "random_mask",
        "random_erk",
        "layerwise_shuffle",
        "dense_restart",
        "sibling",
        *(v for v in VALUES if v != "signed_constant"),
    ],
)
def test_levels_and_seeds_draw_apart(name):
    base = origin()
    grid = [
        replace(base, init_seed=seed, order_seed=10 + seed, level=level) for seed in range(4) for level in range(1, 5)
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
