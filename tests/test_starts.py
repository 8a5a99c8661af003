"""Signs and values of starts, what pruned weights become, and how a ticket goes on from level to level."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from cases import FLOAT_TOLERANCE, blobs, build, images, small_conv_bn, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import loss_and_error, train_alone
from test_treatments import equal, origin

import ticketlab as tl
from ticketlab import masks as mask_ops
from ticketlab.engine import values
from ticketlab.engine.treatments import RETRAINING
from ticketlab.engine.treatments import TREATMENTS as RECORDS
from ticketlab.state import state

SIGNS_KEPT = ("reinit_keep_sign", "reshuffle_keep_sign", "signed_constant")
SIGNS_LOST = ("reinit", "reshuffle", "random_sign", "random_constant")


# Values


@pytest.mark.parametrize("name", SIGNS_KEPT)
def test_signs_kept_are_the_rewound_ones_of_every_live_weight(name):
    given = origin()
    start = TREATMENTS[name](given)
    for layer, mask in given.masks.items():
        assert torch.equal(start.state.params[layer][mask].sign(), given.rewound.params[layer][mask].sign())


@pytest.mark.parametrize("name", SIGNS_LOST)
def test_signs_lost_agree_with_the_rewound_ones_by_chance_alone(name):
    given = origin()
    start = TREATMENTS[name](given)
    layer = "1.weight"
    live = given.masks[layer]
    old, new = (params[layer][live].sign() for params in (given.rewound.params, start.state.params))
    same = float((old == new).double().mean())
    share = float((old > 0).double().mean()), float((new > 0).double().mean())
    by_chance = share[0] * share[1] + (1 - share[0]) * (1 - share[1])
    assert abs(same - by_chance) < 5 * 0.5 / live.sum().sqrt()
    if name != "reshuffle":  # which deals out the rewound values, positive on average here
        assert abs(share[1] - 0.5) < 5 * 0.5 / live.sum().sqrt()


@pytest.mark.parametrize("name", ["reshuffle", "reshuffle_keep_sign"])
def test_reshuffling_deals_out_the_values_of_a_layer_among_its_live_weights(name):
    given = origin()
    start = TREATMENTS[name](given)
    for layer, mask in given.masks.items():
        old, new = given.rewound.params[layer], start.state.params[layer]
        assert torch.equal(old[mask].sort().values, new[mask].sort().values)
        assert torch.equal(old[~mask], new[~mask])
        assert (old[mask] != new[mask]).double().mean() > 0.9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 40), st.booleans())
def test_values_are_a_multiset_per_sign_when_signs_are_kept(seed, size, zeros):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator, dtype=torch.float64)
    if zeros:
        weight[::3] = 0.0
    mask = torch.rand(size, generator=generator) < 0.7
    new = values.reshuffled({"w": weight}, {"w": mask}, seed, keep_signs=True)["w"]
    for sign in (weight > 0, weight <= 0):
        group = sign & mask
        assert torch.equal(weight[group].sort().values, new[group].sort().values)
    assert torch.equal(weight[~mask], new[~mask])


TREATMENTS = {name: record.start for name, record in RECORDS.items()}
FROZEN = tuple(name for name, record in RECORDS.items() if record.frozen)


def test_reinit_and_its_signed_twin_share_magnitudes_biases_and_statistics():
    given = origin()
    fresh, signed = (TREATMENTS[name](given).state for name in ("reinit", "reinit_keep_sign"))
    assert equal({n: p.abs() for n, p in fresh.params.items()}, {n: p.abs() for n, p in signed.params.items()})
    assert equal(fresh.buffers, signed.buffers)
    unmasked = {n: p for n, p in signed.params.items() if n not in given.masks}
    assert equal(unmasked, {n: fresh.params[n] for n in unmasked})


def test_random_signs_keep_every_magnitude():
    given = origin()
    start = TREATMENTS["random_sign"](given)
    old, new = given.rewound.params, start.state.params
    assert equal({n: p.abs() for n, p in old.items()}, {n: p.abs() for n, p in new.items()})
    assert all(torch.equal(old[n], new[n]) for n in old if n not in given.masks)


@pytest.mark.parametrize("name", ["signed_constant", "random_constant"])
def test_constants_are_the_standard_deviation_of_the_whole_layer(name):
    given = origin()
    params = TREATMENTS[name](given).state.params
    for layer in given.masks:
        expected = np.std(given.rewound.params[layer].numpy())  # of all weights, pruned ones too
        np.testing.assert_allclose(params[layer].abs().numpy(), expected, rtol=1e-12)
    assert all(torch.equal(params[n], p) for n, p in given.rewound.params.items() if n not in given.masks)


def test_a_weight_of_exactly_zero_has_no_sign():
    params = {"w": torch.tensor([0.0, 3.0, -3.0])}
    assert values.signed_constants(params, ["w"])["w"].tolist() == pytest.approx([0, 6**0.5, -(6**0.5)])
    assert values.with_signs_of({"w": torch.ones(3)}, params, ["w"])["w"].tolist() == [0, 1, -1]
    assert values.random_signs(params, ["w"], 0)["w"][0] == 0


def test_drawing_values_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    for name in (*SIGNS_KEPT, *SIGNS_LOST):
        TREATMENTS[name](origin())
    assert torch.equal(before, torch.random.get_rng_state())


# What pruned weights become


def test_pruned_weights_freeze_where_dense_training_did_not_shrink_them():
    given = origin()
    start = TREATMENTS["frozen_unless_shrunk"](given)
    rewound, dense = given.rewound.params, given.dense.params
    kinds = set()
    for layer, mask in given.masks.items():
        new = start.state.params[layer]
        for i in np.ndindex(*mask.shape):
            shrank = abs(dense[layer][i]) < abs(rewound[layer][i])
            expected = 0.0 if shrank and not mask[i] else rewound[layer][i]
            assert new[i] == expected
            kinds.add((bool(shrank), bool(mask[i])))
    assert len(kinds) == 4


def test_the_frozen_treatments_are_those_that_say_so():
    given = origin()
    assert set(FROZEN) == {name for name in TREATMENTS if TREATMENTS[name](given).frozen}


RECIPE = tl.Recipe(steps=40, batch_size=16, learning_rate=0.05, optimizer="sgd", eval_every=20)
STUDY = tl.ImpConfig(
    treatments=("ticket",),
    init_seeds=(0, 3),
    levels=2,
    prune_fraction=0.4,
    rewind_step=5,
    recipe=RECIPE,
    dtype="float64",
)


def run(config, factory=small_mlp, task=None):
    return list(tl.imp(config, model=factory, task=task or blobs(), store=None))


def test_frozen_weights_stay_where_they_are_and_count_in_every_evaluation():
    task = blobs()
    config = replace(STUDY, levels=1, treatments=("ticket", *FROZEN))
    dense, level = run(config, task=task)
    for treatment, seed in [(t, s) for t in FROZEN for s in (0, 3)]:
        one, first = level.select(treatment=treatment, init_seed=seed), dense.select(init_seed=seed)
        for name, mask in one.masks.items():
            start = first.theta_start[name]
            shrank = first.theta_end[name].abs() < start.abs()
            expected = torch.where(shrank, 0.0, start) if treatment == "frozen_unless_shrunk" else start
            assert torch.equal(one.theta_start[name][~mask], expected[~mask])
            assert torch.equal(one.theta_end[name][~mask], expected[~mask])
            assert torch.equal(one.theta_start[name][mask], start[mask])
            assert (one.theta_end[name][mask] != start[mask]).double().mean() > 0.5  # but for dead units
        model = build(small_mlp)
        model.load_state_dict(one.theta_end)
        loss, error = loss_and_error(model, task.test.x, task.test.y)
        assert one.metrics["test_loss_nats"].item() == pytest.approx(loss, abs=FLOAT_TOLERANCE[torch.float64])
        assert one.metrics["test_error"].item() == pytest.approx(error)
    kept = level.metrics.groupby("treatment")["kept"].first()
    assert kept["frozen_init"] == kept["ticket"]  # what is trained
    macs = level.metrics.groupby("treatment")["macs_live"].mean()
    assert macs["ticket"] < macs["frozen_unless_shrunk"] < macs["frozen_init"]
    assert macs["frozen_init"] == level.metrics["macs_dense"].iloc[0]  # what is computed with


def test_a_frozen_start_is_the_dense_network_of_step_k():
    dense, level = run(replace(STUDY, levels=1, treatments=("ticket", "frozen_init")))
    assert equal(level.select(treatment="frozen_init").theta_start, dense.theta_start)


def test_weight_decay_and_frozen_weights_are_refused_together():
    with pytest.raises(ValueError, match="weight decay would move the pruned weights of"):
        tl.ImpConfig(treatments=("ticket", "frozen_init"), recipe=tl.Recipe(weight_decay=1e-4))


# How a ticket goes on


STEPPED = replace(RECIPE, optimizer="adam", schedule="step", milestones=(20,), learning_rate=0.02)


@pytest.mark.parametrize("factory", [small_mlp, small_conv_bn])
@pytest.mark.parametrize("retraining", RETRAINING)
def test_a_lineage_equals_a_plain_loop_over_levels(retraining, factory):
    task = blobs() if factory is small_mlp else images()
    config = replace(STUDY, retraining=retraining, recipe=STEPPED)
    levels = run(config, factory, task)
    for seed in config.init_seeds:
        network = build(factory, seed)
        masks = mask_ops.ones(network)
        network = train_alone(network, masks, task, STEPPED, seed)
        rewound = levels[0].select(init_seed=seed).start
        for level in levels[1:]:
            scores = {n: p.detach().abs() for n, p in network.named_parameters() if n in masks}
            masks = mask_ops.prune(masks, scores, config.prune_fraction)
            network = plain_level(network, rewound, masks, task, seed, retraining)
            ticket = level.select(treatment="ticket", init_seed=seed)
            assert equal(ticket.masks, masks)
            for name, expected in state(network).params.items():
                torch.testing.assert_close(ticket.theta_end[name], expected, rtol=0, atol=1e-9)


def plain_level(network, rewound, masks, task, seed, retraining):
    """Prune and train on, spelled out: what is kept of the trained network, and which rate it goes on at."""
    network = copy.deepcopy(network)
    recipe = STEPPED
    if retraining == "rewind":
        network.load_state_dict({**rewound.params, **rewound.buffers})
    if retraining == "fine_tune":
        recipe = replace(STEPPED, schedule="constant", milestones=(), learning_rate=0.02 * 0.1)
    return train_alone(network, masks, task, recipe, seed, first_step=STUDY.rewind_step)


def test_lr_rewinding_and_fine_tuning_beside_the_ticket_start_from_the_ticket_of_the_level_before():
    config = replace(STUDY, treatments=("ticket", "lr_rewind", "fine_tune", "sibling"), recipe=STEPPED)
    levels = run(config)
    for before, level in pairwise(levels):
        ticket = level.select(treatment="ticket")
        ends = before.select(treatment="ticket").theta_end
        for treatment in ("lr_rewind", "fine_tune"):
            one = level.select(treatment=treatment)
            assert equal(one.theta_start, {n: p * ticket.masks[n] if n in ticket.masks else p for n, p in ends.items()})
            assert equal(one.masks, ticket.masks)


def test_siblings_follow_the_lineage_of_the_ticket():
    _, level, _ = run(replace(STUDY, treatments=("ticket", "sibling"), retraining="lr_rewind"))
    ticket, sibling = (level.select(treatment=t) for t in ("ticket", "sibling"))
    assert equal(ticket.theta_start, sibling.theta_start)
    assert not equal(ticket.theta_end, sibling.theta_end)


def test_lineages_are_runs_of_their_own_and_the_default_keeps_its_name(tmp_path):
    folders = {tl.run_folder(replace(STUDY, retraining=r), tmp_path, model=small_mlp, task=blobs()) for r in RETRAINING}
    assert len(folders) == 3
    with pytest.raises(ValueError, match=r"unknown retraining 'finetune'\. Did you mean 'fine_tune'"):
        replace(STUDY, retraining="finetune")


def test_a_lineage_resumes_to_the_same_bits(tmp_path):
    config = replace(STUDY, retraining="fine_tune", treatments=("ticket", "frozen_unless_shrunk", "reshuffle"))
    given = {"model": small_mlp, "task": blobs()}
    whole = list(tl.imp(config, store=None, **given))
    list(tl.imp(replace(config, levels=1), store=tmp_path, **given))
    resumed = list(tl.imp(config, store=tmp_path, **given))
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(p, other.theta_end[n]) for n, p in one.theta_end.items())
        assert all(torch.equal(m, other.masks[n]) for n, m in one.masks.items())
