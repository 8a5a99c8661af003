"""Masks by any criterion: exact nested counts, rounds, layers, and criteria in studies of levels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import reference_criteria as slow
import torch
from cases import blobs, build, small_mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import prune_sorted
from torch import nn

import ticketlab as tl
from ticketlab import masks as mask_ops
from ticketlab.engine import store
from ticketlab.engine.criteria import CRITERIA, Evidence, ZeroScoresError, find, keep, score
from ticketlab.models import mlp
from ticketlab.state import State, state

RECIPE = tl.Recipe(steps=20, batch_size=16, optimizer="sgd", learning_rate=0.05, eval_every=10)
STUDY = tl.ImpConfig(levels=2, init_seeds=(3, 4), treatments=("ticket",), recipe=RECIPE, dtype="float64")
QUICK = ("magnitude", "random", "snip", "synflow", "large_init_large_final", "movement_same_sign")


def evidence(factory=small_mlp, masks=None, seed=0):
    model = build(factory, seed)
    split = blobs().train
    start, end = state(model), state(build(factory, seed + 100))
    return Evidence(model, mask_ops.ones(model) if masks is None else masks, start, end, split.x[:20], split.y[:20])


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def nested(inner, outer):
    return not any((inner[n] & ~outer[n]).any() for n in outer)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(QUICK), st.floats(0.15, 1), st.integers(1, 5), st.floats(0.5, 1))
def test_the_count_kept_is_exact_and_nested(criterion, density, rounds, before):
    begun = keep(evidence().masks, score("random", evidence()), before)
    if density > before:
        return
    found = find(criterion, evidence(masks=begun), density, rounds=rounds)
    assert int(mask_ops.kept(found)) == int(density * 103 + 0.5)
    assert nested(found, begun)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 1), min_size=3, max_size=3), st.integers(1, 3))
def test_each_layer_keeps_its_own_count(densities, rounds):
    begun = evidence()
    layers = dict(zip(begun.masks, densities, strict=True))
    found = find("snip", begun, layers, rounds=rounds)
    for name, mask in found.items():
        assert int(mask.sum()) == int(layers[name] * mask.numel() + 0.5)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_one_round_removes_the_least_scored(criterion):
    begun = evidence()
    expected = prune_sorted(begun.masks, score(criterion, begun), 103 - 62)
    assert equal(find(criterion, begun, 62 / 103, rounds=1), expected)
    assert equal(keep(begun.masks, score(criterion, begun), 62 / 103), expected)


def test_rounds_score_anew_at_the_weights_still_alive():
    begun, masks = evidence(), evidence().masks
    n = 103
    for i in range(1, 8):
        count = round(103 * (10 / 103) ** (i / 7))
        scores = slow.snip(at(begun), masks, begun.x, begun.y)
        masks, n = prune_sorted(masks, scores, n - count), count
    found = find("snip", begun, 10 / 103, rounds=7)
    assert equal(found, masks) and not equal(found, find("snip", begun, 10 / 103))


def at(begun):
    """The module with the weights of ``end``."""
    model = build(small_mlp)
    model.load_state_dict({**begun.end.params, **begun.end.buffers})
    return model


def test_synflow_takes_100_rounds_and_follows_the_plain_loop():
    begun, masks, n = evidence(), evidence().masks, 103
    for i in range(1, 101):
        count = round(103 * (9 / 103) ** (i / 100))
        masks, n = prune_sorted(masks, slow.synflow(at(begun), masks, begun.x), n - count), count
    assert equal(find("synflow", begun, 9 / 103), masks)


@pytest.mark.parametrize("widths", [(8, 5), (30, 20, 10, 20, 30)])
def test_synflow_never_empties_a_layer(widths):
    """Down to one weight a layer, which makes one path from input to output; magnitude falls apart long before."""
    begun = evidence(lambda: mlp((6,), 3, hidden=widths))
    total, layers = mask_ops.total(begun.masks), len(begun.masks)
    for kept in (layers, 2 * layers, 4 * layers):
        found = find("synflow", begun, kept / total)
        assert int(mask_ops.kept(found)) == kept and all(mask.any() for mask in found.values())
        assert sum(float(s.sum()) for s in score("synflow", replace(begun, masks=found)).values()) > 0
    by_magnitude = find("magnitude", begun, layers / total)
    assert not all(mask.any() for mask in by_magnitude.values())


@pytest.mark.parametrize("seed", range(3))
def test_synflow_with_the_default_biases_of_linear_layers_empties_none(seed):
    """Each of torch's biases would be a source of flow of its own, and the last layers would take all of it."""
    widths = (6, 40, 20, 20, 3)
    begun = evidence(lambda: nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths))), seed=seed)
    assert any(p.any() for n, p in begun.end.params.items() if n.endswith("bias"))
    found = find("synflow", begun, 8 / mask_ops.total(begun.masks))
    assert sum(int(mask.sum()) for mask in found.values()) == 8 and all(mask.any() for mask in found.values())


def test_layer_densities_rank_within_layers():
    """Both ends together: the percentile is of the layer where layers compete by themselves."""
    begun = evidence()
    layers = {name: 0.3 for name in begun.masks}
    found = find("large_init_large_final", begun, layers)
    for name, mask in found.items():
        ends = (begun.start.params[name].flatten(), begun.end.params[name].flatten())
        expected = slow.above_both_percentiles(*(w.abs() for w in ends), int(mask.sum()))
        if int(expected.sum()) == int(mask.sum()):
            assert torch.equal(mask.flatten(), expected)


def test_densities_that_cannot_be_had_are_refused():
    begun = evidence()
    for density in (0.0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
            find("magnitude", begun, density)
    with pytest.raises(ValueError, match=r"a live weight must be left: density 0\.004 leaves none of 103"):
        find("magnitude", begun, 0.004)
    with pytest.raises(ValueError, match="density must name every masked layer"):
        find("magnitude", begun, {"fc1.weight": 0.5})
    with pytest.raises(ValueError, match=r"density must lie in \(0, 0.485"):
        find("magnitude", evidence(masks=find("random", begun, 50 / 103)), 0.6)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        find("magnitude", begun, 0.5, rounds=0)
    assert equal(find("magnitude", begun, 1.0), begun.masks)


def test_scores_that_say_nothing_of_what_is_to_be_pruned_are_refused():
    begun = evidence()
    params = {**begun.end.params, "output.weight": torch.zeros_like(begun.end.params["output.weight"])}
    dead = replace(begun, end=State(params, begun.end.buffers))
    layers = {"fc1.weight": 0.5, "fc2.weight": 0.5}
    with pytest.raises(ZeroScoresError, match=r"differs from 0: none has in output\.weight\."):
        find("magnitude", dead, {**layers, "output.weight": 0.9})
    assert find("magnitude", dead, {**layers, "output.weight": 1.0})["output.weight"].all()
    assert score("magnitude", dead)
    with pytest.raises(ZeroScoresError, match="none has in fc1"):
        keep(begun.masks, {n: torch.zeros(m.shape) for n, m in begun.masks.items()}, 0.5)
    for density in (0.5, 1.0):
        with pytest.raises(ValueError, match=r"must be finite where a weight is alive: 1 in 'fc1\.weight' are not"):
            scores = score("magnitude", begun)
            scores["fc1.weight"][0, 0] = torch.nan
            keep(begun.masks, scores, density)


def test_costs_in_forward_passes():
    def passes(criterion, **options):
        return CRITERIA[criterion].forward_passes(100, 10, 1000, **options)

    assert passes("magnitude") == passes("movement_same_sign") == 0
    assert passes("snip") == passes("obd_fisher") == 3 * 100
    assert passes("snip", rounds=5) == 5 * 3 * 100
    assert passes("grasp") == 9 * 100
    assert passes("obd_gauss_newton") == 21 * 100
    assert passes("obd_exact") == 6 * 1000 * 100
    assert passes("synflow") == 300
    costs_nothing = {name for name, record in CRITERIA.items() if record.needs == "weights"}
    assert costs_nothing == {name for name in CRITERIA if not passes(name)}


# Studies of levels


@pytest.mark.parametrize("criterion", ["snip", "obd_fisher", "movement", "large_init_large_final", "synflow"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_study_prunes_by_any_criterion(criterion, scope):
    config = replace(STUDY, criterion=criterion, scope=scope, score_examples=30)
    levels = list(tl.imp(config, model=small_mlp, task=blobs(), store=None))
    dense = levels[0].select(init_seed=3)
    x, y = tl.criteria.draw_examples(blobs(), 30, 3)
    at_end = Evidence(build(small_mlp), dense.masks, dense.start, dense.end, x, y, scope=scope)
    scores = score(criterion, at_end)
    if criterion == "synflow":  # in its rounds, to the same counts
        left = {n: m.numel() - mask_ops.n_removed(m.numel(), 0.1 if "output" in n else 0.2) for n, m in scores.items()}
        by_layer = {n: kept / dense.masks[n].numel() for n, kept in left.items()}
        expected = find("synflow", at_end, 82 / 103 if scope == "global" else by_layer, rounds=100)
        counts = {n: int(m.sum()) for n, m in expected.items()}
        assert counts == left if scope == "layer" else sum(counts.values()) == 82
    elif scope == "global":
        expected = prune_sorted(dense.masks, scores, mask_ops.n_removed(103, 0.2))
    else:
        expected = {}
        for name, mask in dense.masks.items():
            n = mask_ops.n_removed(mask.numel(), 0.1 if name == "output.weight" else 0.2)
            expected |= prune_sorted({name: mask}, scores, n)
    assert equal(levels[1].select(init_seed=3).masks, expected)
    assert nested(levels[2].select(init_seed=4).masks, levels[1].select(init_seed=4).masks)


def test_a_study_by_synflow_reaches_densities_that_one_round_cannot():
    wide = lambda: mlp((6,), 3, hidden=(30, 20, 10))  # noqa: E731
    total = 6 * 30 + 30 * 20 + 20 * 10 + 10 * 3
    config = replace(STUDY, criterion="synflow", prune_fraction=1 - 8 / total, levels=1, init_seeds=(3,))
    dense, level = tl.imp(config, model=wide, task=blobs(), store=None)
    x, y = tl.criteria.draw_examples(blobs(), config.score_examples, 3)
    one = dense.select(init_seed=3)
    at_end = Evidence(build(wide), one.masks, one.start, one.end, x, y)
    assert not all(mask.any() for mask in find("synflow", at_end, 8 / total, rounds=1).values())
    assert equal(level.select(init_seed=3).masks, find("synflow", at_end, 8 / total))
    assert level.metrics["kept"].tolist() == [8]


def test_a_field_that_came_later_does_not_rename_a_run_that_does_not_use_it(tmp_path):
    def folder(config):
        return tl.run_folder(config, tmp_path, model=small_mlp, task=blobs())

    list(tl.imp(replace(STUDY, levels=0), model=small_mlp, task=blobs(), store=tmp_path))
    stored = store.read_config(folder(STUDY))["config"]
    assert "score_examples" not in stored and "criterion" in stored
    assert tl.load_run(folder(STUDY)).config == replace(STUDY, levels=0, model="small_mlp", task="blobs")
    assert folder(replace(STUDY, score_examples=7)) != folder(STUDY)


def test_criteria_that_cannot_work_are_refused_before_training():
    with pytest.raises(ValueError, match="score_examples must be at least 1"):
        replace(STUDY, score_examples=0)
    with pytest.raises(ValueError, match="'obd_exact' needs at most"):
        tl.imp(replace(STUDY, criterion="obd_exact"), model=lambda: mlp((6,), 3, hidden=(200, 200)), task=blobs())


@pytest.mark.parametrize("criterion", ["magnitude", "synflow"])
def test_a_bias_that_is_not_a_number_is_refused(criterion):
    model = build(small_mlp)
    sick = state(model)
    sick.params["output.bias"][0] = torch.nan
    evidence = Evidence(model, tl.masks.ones(model), state(model), sick, blobs().train.x[:5])
    with pytest.raises(ValueError, match=r"parameters\['output\.bias'\] must be finite"):
        score(criterion, evidence)
