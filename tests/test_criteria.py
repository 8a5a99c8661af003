"""Scores against closed forms and slow references; what a criterion refuses."""

from __future__ import annotations

import math

import pytest
import reference_criteria as slow
import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp
from scipy import stats
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ticketlab import masks as mask_ops
from ticketlab.engine.criteria import (
    CRITERIA,
    ZHOU,
    Evidence,
    ZeroScoresError,
    draw_examples,
    refuse_too_large,
    score,
)
from ticketlab.engine.criteria.gradients import synflow
from ticketlab.engine.criteria.second_order import EXACT_LIMIT
from ticketlab.state import State, stack_states, state

CLOSE = {"rtol": 1e-9, "atol": 1e-14}
NEED_LABELS = ("obd_exact", "obd_fisher", "snip", "grasp")
NEED_DATA = (*NEED_LABELS, "obd_gauss_newton")


def tanh_mlp() -> nn.Module:
    """Curved in each single weight, unlike ReLU networks."""
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


PROBLEMS = {"mlp": (small_mlp, blobs), "tanh": (tanh_mlp, blobs), "conv_bn": (small_conv_bn, images)}


def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """Weights, biases and running statistics off their initial values, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
                tensor.abs_() if tensor.ndim == 1 else None  # variances
    return model


def evidence(problem="mlp", *, masked=True, n=40, **others):
    """A network on its way, half of its weights alive, and a batch."""
    factory, task = PROBLEMS[problem]
    model = build(factory)
    start = state(model)
    end = state(moved(model))
    masks = mask_ops.ones(model)
    if masked:
        masks = {name: mask for name, mask in half_masks(model, 2).items() if name in masks}
    split = task().train
    return Evidence(model, masks, start, end, **{"x": split.x[:n], "y": split.y[:n], **others})


def assert_close(found, expected, masks):
    assert list(found) == list(expected) == list(masks)
    for name, mask in masks.items():
        assert found[name].abs().max() > 0
        torch.testing.assert_close(found[name][mask], expected[name][mask], **CLOSE)


# Against slow references, on the same weights and batch


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_gradient_scores_are_those_of_plain_autograd(name, problem):
    given = evidence(problem)
    assert_close(score(name, given), getattr(slow, name)(given.model, given.masks, given.x, given.y), given.masks)


def test_more_examples_than_fit_in_a_pass_are_averaged(monkeypatch):
    given = evidence(n=40)
    whole = {name: score(name, given) for name in NEED_DATA}
    monkeypatch.setattr("ticketlab.engine.criteria.gradients._BATCH", 7)
    monkeypatch.setattr("ticketlab.engine.criteria.second_order._HESSIAN_COLUMNS", 5)
    monkeypatch.setattr("ticketlab.engine.criteria.second_order._ROW_ELEMENTS", 250)  # two of three rows of an example
    monkeypatch.setattr("ticketlab.derivatives._ROW_ELEMENTS", 3000)
    for name, scores in whole.items():
        assert_close(score(name, given), scores, given.masks)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_synflow_is_that_of_a_network_of_absolute_values(problem):
    given = evidence(problem)
    assert_close(score("synflow", given), slow.synflow(given.model, given.masks, given.x), given.masks)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_optimal_brain_damage_by_loops_over_weights_and_examples(problem):
    given = evidence(problem, n=12)
    at = given.model, given.masks, given.x
    diagonals = {
        "obd_exact": slow.hessian_diagonal(*at, given.y),
        "obd_gauss_newton": slow.gauss_newton_diagonal(*at),
        "obd_fisher": slow.fisher_diagonal(*at, given.y),
    }
    for name, diagonal in diagonals.items():
        expected = {n: h * given.end.params[n] ** 2 / 2 for n, h in diagonal.items()}
        assert_close(score(name, given), expected, given.masks)


class Attention(nn.Module):
    """Five tokens of width 8."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        return self.output(self.encoder(x).mean(1))


def test_attention_has_every_score():
    model, task = build(Attention), blobs(60, (5, 8))
    at, masks, x, y = state(model), mask_ops.ones(model), task.train.x[:6], task.train.y[:6]
    given = Evidence(model, masks, at, at, x, y)
    with sdpa_kernel(SDPBackend.MATH):
        fisher, hessian = (f(model, masks, x, y) for f in (slow.fisher_diagonal, slow.hessian_diagonal))
        expected = {"snip": slow.snip(model, masks, x, y), "grasp": slow.grasp(model, masks, x, y)}
        expected["obd_gauss_newton"] = _saliency(at, slow.gauss_newton_diagonal(model, masks, x))
    expected |= {"obd_fisher": _saliency(at, fisher), "obd_exact": _saliency(at, hessian)}
    for name, scores in expected.items():
        assert_close(score(name, given), scores, masks)


def _saliency(at, diagonal):
    return {n: h * at.params[n] ** 2 / 2 for n, h in diagonal.items()}


# Closed forms


def softmax_regression():
    """Logits W x: the cross-entropy has Hessian p_c (1 - p_c) x_j^2 on its diagonal."""
    model = build(lambda: nn.Linear(6, 3, bias=False))
    split = blobs().train
    at = state(model)
    given = Evidence(model, mask_ops.ones(model), at, at, split.x[:50], split.y[:50])
    p = (given.x @ at.params["weight"].T).softmax(1)
    return given, p


def test_optimal_brain_damage_of_softmax_regression_in_closed_form():
    given, p = softmax_regression()
    w, x = given.end.params["weight"], given.x
    curvature = torch.einsum("nc,nj->cj", p * (1 - p), x**2) / len(x)
    fisher = torch.einsum("nc,nj->cj", (p - torch.eye(3)[given.y]) ** 2, x**2) / len(x)
    for name, h in {"obd_exact": curvature, "obd_gauss_newton": curvature, "obd_fisher": fisher}.items():
        torch.testing.assert_close(score(name, given)["weight"], h * w**2 / 2, **CLOSE)


def test_optimal_brain_damage_is_the_second_order_loss_of_deleting_a_weight():
    given, _ = softmax_regression()

    def remainder(scale):
        """Loss after deletion less its expansion to second order, the weight at ``scale`` times itself."""
        w = given.end.params["weight"].clone()
        w[0, 0] *= scale
        at = State({"weight": w}, {})
        here = Evidence(given.model, given.masks, at, at, given.x, given.y)
        deleted = w.clone()
        deleted[0, 0] = 0
        loss = [nn.functional.cross_entropy(given.x @ one.T, given.y) for one in (deleted, w)]
        g = torch.func.grad(lambda v: nn.functional.cross_entropy(given.x @ v.T, given.y))(w)
        return float(loss[0] - loss[1] + g[0, 0] * w[0, 0] - score("obd_exact", here)["weight"][0, 0])

    assert remainder(0.02) / remainder(0.01) == pytest.approx(8, rel=0.05)  # of third order


def test_with_relu_the_exact_diagonal_is_gauss_newtons_and_with_tanh_it_is_not():
    for problem, same in (("mlp", True), ("conv_bn", True), ("tanh", False)):
        given = evidence(problem, n=10)
        exact, gauss_newton = score("obd_exact", given), score("obd_gauss_newton", given)
        equal = [torch.allclose(exact[n], gauss_newton[n], **CLOSE) for n in exact]
        assert all(equal) == same


@pytest.mark.parametrize("problem", ["mlp", "conv_bn"])
def test_synflow_is_conserved_from_layer_to_layer(problem):
    factory, task = PROBLEMS[problem]
    model = build(factory)
    masks = {n: m for n, m in half_masks(model, 2).items() if n in mask_ops.ones(model)}
    x = task().train.x
    scores = score("synflow", Evidence(model, masks, state(model), state(model), x))
    sums = [float(s.sum()) for s in scores.values()]
    assert sums[0] > 0 and sums == pytest.approx([sums[0]] * len(sums), rel=1e-12)


@pytest.mark.parametrize("factory", [small_mlp, small_conv_bn])
def test_synflow_is_conserved_whatever_biases_and_running_statistics_are(factory):
    """Also beside buffers that are no numbers to compute with."""
    model = moved(build(factory))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("indices", torch.tensor([-1, 2]))
    x = (images() if factory is small_conv_bn else blobs()).train.x
    at = state(model)
    assert any(p.abs().min() > 0 for n, p in at.params.items() if "bias" in n)
    sums = [float(s.sum()) for s in score("synflow", Evidence(model, mask_ops.ones(model), at, at, x)).values()]
    assert sums[0] > 0 and sums == pytest.approx([sums[0]] * len(sums), rel=1e-12)


def test_synflow_is_conserved_at_every_hidden_unit():
    model = build(small_mlp)
    at = state(model)
    scores = score("synflow", Evidence(model, mask_ops.ones(model), at, at, blobs().train.x))
    for before, after in (("fc1.weight", "fc2.weight"), ("fc2.weight", "output.weight")):
        torch.testing.assert_close(scores[before].sum(1), scores[after].sum(0), **CLOSE)


def test_synflow_does_not_overflow_in_deep_networks_of_float32():
    model = build(lambda: nn.Sequential(*[nn.Linear(100, 100) for _ in range(20)]), dtype=torch.float32)
    at = State({n: 100 * p for n, p in state(model).params.items()}, {})
    scores = synflow(Evidence(model, mask_ops.ones(model), at, at, torch.zeros(1, 100)))
    assert all(s.dtype == torch.float64 and s.isfinite().all() and s.sum() > 1e39 for s in scores.values())


def test_magnitude_is_of_the_weights_at_the_end():
    given = one_layer([9.0, 9.0, 9.0, 9.0], [-3.0, 2.0, 0.0, -0.5])
    assert score("magnitude", given)["weight"].flatten().tolist() == [3.0, 2.0, 0.0, 0.5]
    kept = mask_ops.prune(given.masks, score("magnitude", given), 0.5)
    assert kept["weight"].flatten().tolist() == [True, True, False, False]


def one_layer(initial, final):
    model = build(lambda: nn.Linear(len(initial), 1, bias=False))
    start, end = (State({"weight": torch.tensor([w], dtype=torch.float64)}, {}) for w in (initial, final))
    return Evidence(model, mask_ops.ones(model), start, end)


# Zhou et al.


def test_zhous_criteria_by_their_formulas():
    given = evidence()
    w_i, w_f = ({n: s.params[n] * m for n, m in given.masks.items()} for s in (given.start, given.end))
    formulas = {
        "large_final": lambda i, f: f.abs(),
        "small_final": lambda i, f: -f.abs(),
        "large_init": lambda i, f: i.abs(),
        "small_init": lambda i, f: -i.abs(),
        "magnitude_increase": lambda i, f: f.abs() - i.abs(),
        "movement": lambda i, f: (f - i).abs(),
    }
    for name, formula in formulas.items():
        found = score(name, given)
        for layer in given.masks:
            assert torch.equal(found[layer], formula(w_i[layer], w_f[layer]))
    assert CRITERIA["large_final"].score is CRITERIA["magnitude"].score


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("kind", ["large", "small"])
def test_both_ends_together_are_what_bisection_finds(kind, scope):
    given = evidence(scope=scope)
    scores = score(f"{kind}_init_{kind}_final", given)
    sign = 1 if kind == "large" else -1
    groups = [[name] for name in given.masks] if scope == "layer" else [list(given.masks)]
    for names in groups:
        live = torch.cat([given.masks[n].flatten() for n in names])
        ends = (torch.cat([sign * s.params[n].abs().flatten() for n in names])[live] for s in (given.start, given.end))
        one, other = ends
        found = torch.cat([scores[n].flatten() for n in names])[live]
        for n_keep in range(1, len(one), 3):
            expected = slow.above_both_percentiles(one, other, n_keep)
            # Bisection may stop one short: two weights can share a percentile, one at each end.
            n = int(expected.sum())
            kept = torch.zeros_like(expected)
            kept[found.topk(n).indices] = True
            assert n in (n_keep - 1, n_keep) and torch.equal(kept, expected)


@pytest.mark.parametrize("name", ZHOU)
def test_sign_variants_score_their_group_and_give_the_other_0(name):
    given = evidence()
    live = torch.cat([m.flatten() for m in given.masks.values()])

    def flat(scores):
        return torch.cat([scores[n].flatten() for n in given.masks])[live]

    plain = flat(score(name, given))
    same = flat({n: given.start.params[n].sign() == given.end.params[n].sign() for n in given.masks})
    assert 0 < int(same.sum()) < len(same)
    for variant, group in (("same", same), ("different", ~same)):
        found = flat(score(f"{name}_{variant}_sign", given))
        assert (found[~group] == 0).all()
        if name.startswith("small"):  # all scores are negative: by place, from 1, or the zeros would come first
            assert found[group].min() >= 1
            assert (plain[group][found[group].sort(descending=True).indices].diff() <= 0).all()
        else:
            assert torch.equal(found[group], plain[group])


def test_sign_variants_are_those_of_the_paper():
    r"""\max(0, w_i w_f / |w_i|) for large final, same sign, and its twin (Zhou et al. 2019)."""
    given = evidence(masked=False)
    for variant, sign in (("same", 1), ("different", -1)):
        scores = score(f"large_final_{variant}_sign", given)
        for name in given.masks:
            w_i, w_f = given.start.params[name], given.end.params[name]
            torch.testing.assert_close(scores[name], (sign * w_i * w_f / w_i.abs()).clamp(min=0), **CLOSE)
        shrunk = score(f"magnitude_increase_{variant}_sign", given)
        assert any((s < 0).any() for s in shrunk.values())  # of the group, and behind the other: as the authors have it


def test_random_scores_are_noise_of_their_own_for_each_layer_and_seed():
    model = build(lambda: nn.Sequential(nn.Linear(50, 100), nn.Linear(100, 50)))
    at, masks = state(model), mask_ops.ones(model)
    scores = [score("random", Evidence(model, masks, at, at, seed=seed)) for seed in (0, 1)]
    samples = [s[name].flatten().numpy() for s in scores for name in masks]
    for index, sample in enumerate(samples):
        assert stats.kstest(sample, "uniform").pvalue > 1e-3
        for other in samples[:index]:
            assert abs(stats.pearsonr(sample, other).statistic) < 5 / math.sqrt(5000)


# All of them


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_scores_every_weight_and_leaves_the_network_alone(name):
    given = evidence(n=8)
    given.model.train()
    before, rng = state(given.model), torch.random.get_rng_state()
    end = given.end.clone()
    scores, again = score(name, given), score(name, given)
    assert {n: s.shape for n, s in scores.items()} == {n: m.shape for n, m in given.masks.items()}
    assert all(torch.equal(s, again[n]) and not s.requires_grad for n, s in scores.items())
    assert given.model.training and torch.equal(torch.random.get_rng_state(), rng)
    for untouched, now in ((before, state(given.model)), (end, given.end)):
        assert all(torch.equal(t, now.params[n]) for n, t in untouched.params.items())
    finer = mask_ops.prune(given.masks, scores, 0.2)
    kept = int(mask_ops.kept(given.masks))
    assert int(mask_ops.kept(finer)) == kept - mask_ops.n_removed(kept, 0.2)


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_are_taken_at_the_masked_weights(name):
    """What stands at a pruned position of the states does not matter."""
    given = evidence(n=8)
    noisy = [
        State({n: p + 5 * ~given.masks[n] if n in given.masks else p for n, p in s.params.items()}, s.buffers)
        for s in (given.start, given.end)
    ]
    one = score(name, given)
    other = score(name, Evidence(given.model, given.masks, *noisy, given.x, given.y))
    assert all(torch.equal(one[n][mask], other[n][mask]) for n, mask in given.masks.items())


# Refusals


def test_an_unknown_criterion_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'synflow'"):
        score("sinflow", evidence())


@pytest.mark.parametrize("name", CRITERIA)
def test_records_say_what_a_criterion_needs(name):
    """With less it is refused by name, with as much it is scored."""
    given, needs = evidence(n=8), CRITERIA[name].needs
    less = {"x": None, "y": None} if needs in ("inputs", "labels") else None
    if less is not None:
        with pytest.raises(ValueError, match=f"criterion '{name}': it needs inputs: got none"):
            score(name, evidence(**less))
    if needs == "labels":
        with pytest.raises(ValueError, match=f"criterion '{name}': it needs labels: got none"):
            score(name, evidence(n=8, y=None))
    enough = {"weights": {"x": None, "y": None}, "inputs": {"y": None}, "labels": {}}[needs]
    assert_close(score(name, evidence(n=8, **enough)), score(name, given), given.masks)


@pytest.mark.parametrize("name", NEED_DATA)
def test_labels_and_inputs_that_do_not_fit_the_model_are_refused(name):
    x, y = blobs().train.x[:4], torch.tensor([0, 1, 2, 0])
    for wrong in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, -100])):
        with pytest.raises(ValueError, match=rf"'{name}': labels must be in 0\.\.2"):
            score(name, evidence(x=x, y=wrong))
    for wrong in (y.double(), y[:, None], nn.functional.one_hot(y)):
        with pytest.raises(ValueError, match=f"'{name}': labels must"):
            score(name, evidence(x=x, y=wrong))
    with pytest.raises(ValueError, match="x must be what the model takes"):
        score(name, evidence(x=x[:, :5], y=y))
    with pytest.raises(ValueError, match="x must have the dtype of params"):
        score(name, evidence(x=x.float(), y=y))
    with pytest.raises(ValueError, match=r"'synflow': .*x must be what the model takes"):
        score("synflow", evidence(x=x[:, :5], y=None))


@pytest.mark.parametrize("name", [*NEED_DATA, "synflow"])
def test_coupled_outputs_are_refused_where_outputs_are_looked_at(name):
    model = build(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)))
    at, split = state(model), blobs().train
    given = Evidence(model, mask_ops.ones(model), at, at, split.x[:8], split.y[:8])
    assert score("magnitude", given)
    with pytest.raises(ValueError, match=rf"'{name}': .*batch norm '1' keeps no running statistics"):
        score(name, given)


@pytest.mark.parametrize("name", ["movement", "magnitude_increase"])
def test_scores_that_are_zero_all_over_are_refused(name):
    given = evidence()
    still = Evidence(given.model, given.masks, given.end, given.end)
    with pytest.raises(ZeroScoresError, match=r"must have a score that differs from 0: none has in fc1\.weight, fc2"):
        score(name, still)
    last = {n: torch.zeros_like(m) for n, m in given.masks.items()}
    last["fc2.weight"][0, 0] = True
    assert score(name, Evidence(given.model, last, given.end, given.end))  # one weight: nothing to choose


def test_synflow_needs_the_shape_of_floating_inputs_and_no_labels():
    assert score("synflow", evidence(y=None))
    with pytest.raises(ValueError, match="needs floating inputs"):
        score("synflow", evidence(x=torch.ones(3, 6, dtype=torch.int64), y=None))


@pytest.mark.parametrize("name", ["magnitude", "snip", "obd_fisher", "synflow"])
def test_scores_that_are_not_finite_are_refused(name):
    given = evidence()
    given.end.params["fc1.weight"].fill_(math.inf)
    with pytest.raises(ValueError, match=f"'{name}': .* must be finite"):
        score(name, given)


def test_the_exact_hessian_of_a_large_network_is_refused():
    model = build(lambda: nn.Linear(EXACT_LIMIT // 2, 3), dtype=torch.float32)
    at = state(model)
    given = Evidence(model, mask_ops.ones(model), at, at, torch.zeros(2, EXACT_LIMIT // 2), torch.tensor([0, 1]))
    expected = f"'obd_exact' needs at most {EXACT_LIMIT} live weights: got {3 * EXACT_LIMIT // 2}"
    with pytest.raises(ValueError, match=expected):
        score("obd_exact", given)
    with pytest.raises(ValueError, match=expected):
        refuse_too_large("obd_exact", model)
    refuse_too_large("snip", model)


def test_evidence_that_does_not_fit_is_refused():
    given = evidence()
    model, masks, at = given.model, given.masks, given.start
    with pytest.raises(ValueError, match="scores one network: got 2"):
        Evidence(model, masks, stack_states([at, at]), stack_states([at, at]))
    with pytest.raises(ValueError, match="masks must name parameters of the model"):
        Evidence(model, {}, at, at)
    with pytest.raises(ValueError, match="must have the model's names"):
        Evidence(model, masks, at, State({}, {}))
    with pytest.raises(ValueError, match="as many, at least one"):
        Evidence(model, masks, at, at, given.x, given.y[:5])
    with pytest.raises(ValueError, match="as many, at least one"):
        Evidence(model, masks, at, at, given.x[:0])


def test_examples_are_drawn_once_for_a_seed_without_repeats():
    task = blobs()
    x, y = draw_examples(task, 50, 3)
    again, other = draw_examples(task, 50, 3)[0], draw_examples(task, 50, 4)[0]
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert len(torch.unique(x, dim=0)) == 50
    for one, label in zip(x, y, strict=True):
        assert task.train.y[(task.train.x == one).all(1)].tolist() == [label]
    assert len(draw_examples(task, 10_000, 0)[1]) == len(task.train)
