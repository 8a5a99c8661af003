"""Scores of networks as users bring them, against plain autograd; criteria of the user's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference_criteria as slow
import torch
from cases import blobs, build, half_masks, images, small_mlp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ticketlab import masks as mask_ops
from ticketlab.engine.criteria import Criterion, Evidence, as_criterion, find, find_counts, score, second_order
from ticketlab.losses import IGNORED, SQUARED_ERROR
from ticketlab.seeds import stream
from ticketlab.state import state

F64 = torch.float64
CLOSE = {"rtol": 1e-9, "atol": 1e-13}


class Prelu(nn.Sequential):
    """Two nested ``vmap`` over its backward pass are wrong where both have one size: three examples, three outputs."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 7), nn.PReLU(), nn.Linear(7, 5), nn.PReLU(), nn.Linear(5, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(x.view(-1, 3, 2))[0][:, -1])


class Groups(nn.Sequential):
    """In channels-last, which GroupNorm has no ``vmap`` rule for."""

    def __init__(self) -> None:
        layers = (nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(8, 3))
        super().__init__(*layers)

    def forward(self, x):
        return super().forward(x.view(-1, 1, 2, 3).contiguous(memory_format=torch.channels_last))


class Checkpointed(nn.Module):
    """Its activations are computed again on the way back, from the weights that are there by then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        def block(x):
            return self.second(self.first(x).tanh()).tanh()

        return self.head(checkpoint(block, x, use_reentrant=False))


class Closure(nn.Module):
    """A function made at construction holds a parameter, a hook another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        weight, scale = self.second.weight, self.head.weight
        self.middle = lambda x: (x @ weight.T).tanh()
        self.first.register_forward_hook(lambda module, inputs, output: output * (1 + scale.square().sum()))

    def forward(self, x):
        return self.head(self.middle(self.first(x).tanh()))


class Tied(nn.Module):
    """A module under two names, a weight in two modules, a leading operation that writes into the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.other = nn.Linear(6, 6)
        self.other.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.other(self.again(self.first(x.relu_()).tanh()).tanh()).tanh())


class Experts(nn.Module):
    """Prunable by name alone: a 3-D parameter, a weight multiplied by hand, an embedding's product."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.raw = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(4, 3))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head((torch.einsum("ni,eio->no", x, self.experts).tanh() @ self.raw).tanh())


class Rebinds(nn.Module):
    """A buffer that the forward pass puts anew, and an activation that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x):
        self.shift = self.shift.clone()
        self.kept = (self.first(x) + self.shift).tanh()
        return self.head(self.kept)


NETWORKS = [Prelu, Recurrent, Groups, Checkpointed, Closure, Tied, Experts, Rebinds]


def evidence(factory, n=3, **others):
    model = build(factory)
    names = [name for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("head")]
    masks = {name: mask for name, mask in half_masks(model, 2).items() if name in names}
    split = blobs().train
    return Evidence(model, masks, state(model), state(model), **{"x": split.x[:n], "y": split.y[:n], **others})


def plain(given, make, loss=F.cross_entropy, **grasp):
    """Every score by plain autograd on a module of its own."""
    at = make, given.masks, given.x.clone()
    diagonals = {
        "obd_exact": slow.hessian_diagonal(*at, given.y, loss),
        "obd_gauss_newton": slow.gauss_newton_diagonal(*at, given.y, loss),
        "obd_fisher": slow.fisher_diagonal(*at, given.y, loss),
    }
    found = {n: {m: h * given.end.params[m] ** 2 / 2 for m, h in d.items()} for n, d in diagonals.items()}
    return found | {"snip": slow.snip(*at, given.y, loss), "grasp": slow.grasp(*at, given.y, loss, **grasp)}


def assert_scores(given, expected, names=("snip", "grasp", "obd_exact", "obd_gauss_newton", "obd_fisher")):
    for name in names:
        found = score(name, given)
        for layer, mask in given.masks.items():
            torch.testing.assert_close(found[layer][mask], expected[name][layer][mask], **CLOSE, msg=f"{name} {layer}")


@pytest.mark.parametrize("factory", NETWORKS)
def test_scores_are_those_of_plain_autograd(factory):
    given = evidence(factory)
    before, x = dict(given.model.__dict__), given.x.clone()
    assert_scores(given, plain(given, lambda: build(factory)))
    assert torch.equal(given.x, x) and given.model.__dict__ == before
    assert all(p.grad is None and torch.equal(p, given.end.params[n]) for n, p in given.model.named_parameters())


def test_reentrant_checkpoints_are_refused_by_name(monkeypatch):
    def reentrant(block, x, use_reentrant):
        return torch.utils.checkpoint.checkpoint(block, x.requires_grad_(), use_reentrant=True)

    monkeypatch.setitem(Checkpointed.forward.__globals__, "checkpoint", reentrant)
    with pytest.raises(ValueError, match=r"'snip': .*checkpoint\(\.\.\., use_reentrant=False\)"):
        score("snip", evidence(Checkpointed))


def per_token(outputs, labels):
    """Mean over examples of the mean over an example's tokens that count."""
    losses = []
    for z, y in zip(outputs, labels, strict=True):
        losses.append(F.cross_entropy(z[y != IGNORED], y[y != IGNORED]))
    return torch.stack(losses).mean()


class Tokens(nn.Module):
    """Logits of 3 classes for each of 4 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.output = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(self.mix(self.embedding(x)).cumsum(1).tanh())


def test_a_label_per_token_of_which_some_do_not_count():
    model, generator = build(Tokens), stream("tokens", 0)
    x = torch.randint(0, 5, (3, 4), generator=generator)
    y = torch.randint(0, 3, (3, 4), generator=generator)
    y[0, 1:3] = IGNORED
    y[2, 0] = IGNORED
    given = Evidence(model, mask_ops.ones(model), state(model), state(model), x, y)
    assert_scores(given, plain(given, model, per_token))
    unlabelled = score("obd_gauss_newton", replace(given, y=None))  # every token counts
    all_count = plain(replace(given, y=y.clamp(min=0)), model, per_token)["obd_gauss_newton"]
    for name, expected in all_count.items():
        torch.testing.assert_close(unlabelled[name], expected, **CLOSE)


@pytest.mark.parametrize("out", [(3,), ()])
def test_squared_error_has_every_score(out):
    """Its outputs are no logits: GraSP takes them as they are."""
    model = build(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.Flatten(1 if out else 0)))
    if not out:
        model[3] = nn.Identity()
        model[2] = nn.Sequential(build(lambda: nn.Linear(5, 1)), nn.Flatten(0))
    x = blobs().train.x[:4]
    y = torch.randn(4, *out, generator=stream("targets", 0), dtype=F64)
    given = Evidence(model, mask_ops.ones(model), state(model), state(model), x, y, loss=SQUARED_ERROR)
    assert_scores(given, plain(given, model, F.mse_loss, temperature=1))
    with pytest.raises(ValueError, match=r"'snip': targets .* must be a floating tensor"):
        score("snip", replace(given, y=torch.zeros(4, dtype=torch.int64)))


def test_columns_of_the_hessian_that_vmap_gets_wrong_are_computed_one_by_one(monkeypatch):
    given = evidence(Prelu)
    expected = score("obd_exact", given)
    fast = second_order._columns
    monkeypatch.setattr(second_order, "_columns", lambda *a: 2 * fast(*a))
    wrong = score("obd_exact", given)
    monkeypatch.setattr(second_order, "_columns", lambda *a: None)
    for found in (wrong, score("obd_exact", given)):
        assert all(torch.allclose(found[n], s, **CLOSE) for n, s in expected.items())


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5))  # also in evaluation


@pytest.mark.parametrize("name", ["snip", "grasp", "obd_exact", "obd_gauss_newton", "obd_fisher", "synflow"])
def test_dropout_that_is_always_on_is_refused(name):
    given = evidence(lambda: Noisy(nn.Linear(6, 3)))
    with pytest.raises(ValueError, match=f"'{name}': .*each example must pass through the network by itself"):
        score(name, given)
    assert score("magnitude", given)


def test_weights_that_are_not_trained_have_no_gradient_to_score():
    given = evidence(small_mlp)
    given.model.fc1.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'snip': masks must name trained parameters: \['fc1.weight'\] require no"):
        score("snip", given)
    assert score("magnitude", given)


def test_an_operation_without_a_second_derivative_is_refused_by_name():
    given = evidence(lambda: nn.Sequential(nn.Linear(6, 5), nn.Hardsigmoid(), nn.Linear(5, 3)))
    assert score("snip", given)
    for name in ("grasp", "obd_exact"):
        with pytest.raises(ValueError, match=f"'{name}': PyTorch must be able to differentiate"):
            score(name, given)


# SynFlow


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.first(x).to(torch.float32))


def test_synflow_needs_a_model_that_runs_in_float64():
    model = build(Casts, dtype=torch.float32)
    at = state(model)
    given = Evidence(model, mask_ops.ones(model), at, at, torch.ones(2, 6), torch.tensor([0, 1]))
    assert score("snip", given)
    with pytest.raises(
        ValueError, match="'synflow': it needs the network of absolute weights in float64, but x must be"
    ):
        score("synflow", given)


@pytest.mark.parametrize("factory", [Prelu, Checkpointed, Closure, Tied, Experts])
def test_synflow_of_networks_as_users_bring_them(factory):
    given = evidence(factory, y=None)
    expected = slow.synflow(lambda: build(factory), given.masks, given.x)
    found = score("synflow", given)
    for name, mask in given.masks.items():
        torch.testing.assert_close(found[name][mask], expected[name][mask], **CLOSE)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a, self.b, self.shortcut = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.b(self.a(x).relu()) + self.shortcut(x)).relu().mean((2, 3)))


def test_synflow_empties_no_layer_that_every_path_passes():
    """Its scores sum to the same in every cut: a layer that is the whole of a cut keeps the most important weight."""
    model, x = build(Residual), images().train.x[:2]
    at = state(model)
    given = Evidence(model, mask_ops.ones(model), at, at, x)
    sums = {n: float(s.sum()) for n, s in score("synflow", given).items()}
    assert sums["stem.weight"] == pytest.approx(sums["head.weight"], rel=1e-12)
    assert sums["a.weight"] + sums["shortcut.weight"] == pytest.approx(sums["head.weight"], rel=1e-12)
    for kept in (3, 4, 8, 20):
        found = find("synflow", given, kept / mask_ops.total(given.masks))
        assert int(mask_ops.kept(found)) == kept
        assert found["stem.weight"].any() and found["head.weight"].any()
        assert found["shortcut.weight"].any() or (found["a.weight"].any() and found["b.weight"].any())


# Criteria of the user's own


def squared(evidence):
    return {name: w.square() for name, w in evidence.final.items()}


def with_gradients(evidence):
    """Through the network of the evidence, in plain PyTorch."""
    x, y = evidence.examples
    with torch.enable_grad(), evidence.network.lent() as weights:
        F.cross_entropy(evidence.network.forward(x), y).backward()
        return {name: (weights[name] * weights[name].grad).abs() for name in evidence.masks}


def test_a_function_or_a_record_is_a_criterion():
    given = evidence(small_mlp, n=20)
    assert all(torch.equal(s, given.final[n] ** 2) for n, s in score(squared, given).items())
    by_name = find("magnitude", given, 0.3)
    for own in (squared, Criterion(squared), Criterion(squared, rounds=3, stage="init")):
        assert all(torch.equal(mask, by_name[n]) for n, mask in find(own, given, 0.3).items())
    expected = score("snip", given)
    for name, found in score(with_gradients, given).items():
        torch.testing.assert_close(found, expected[name], **CLOSE)
        assert not found.requires_grad
    rounds = find(Criterion(with_gradients, rounds=4), given, 0.2)
    assert all(torch.equal(mask, rounds[n]) for n, mask in find("snip", given, 0.2, rounds=4).items())
    assert as_criterion("snip").rounds == 1 and as_criterion(squared) == Criterion(squared)
    with pytest.raises(ValueError, match="a criterion must be a name, a Criterion, or a function of Evidence: got int"):
        score(3, given)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: None, "scores must be a dict .*: got NoneType"),
        (lambda s: {n: s[n] for n in list(s)[1:]}, r"scores\['fc1.weight'\] must have the mask's shape .*: got none"),
        (lambda s: s | {"fc1.bias": torch.ones(8)}, r"masked weights alone: got \['fc1.bias'\] too"),
        (lambda s: s | {"fc1.weight": s["fc1.weight"].T}, r"the mask's shape \(8, 6\): got \(6, 8\)"),
        (lambda s: s | {"fc1.weight": s["fc1.weight"] > 0}, "must be real numbers on cpu: got torch.bool"),
        (lambda s: s | {"fc1.weight": s["fc1.weight"] * torch.nan}, "must be finite where a weight is alive"),
        (lambda s: s | {"fc1.weight": s["fc1.weight"].tolist()}, "the mask's shape .*: got <class 'list'>"),
    ],
)
def test_scores_of_your_own_that_do_not_fit_are_refused_by_name(change, match):
    def mine(evidence):
        return change(squared(evidence))

    with pytest.raises(ValueError, match=f"criterion 'mine': .*{match}"):
        find(mine, evidence(small_mlp), 0.5)


def test_a_criterion_may_have_a_limit():
    small = Criterion(squared, limit=40)
    with pytest.raises(ValueError, match="criterion 'squared' needs at most 40 live weights: got 52"):
        score(small, evidence(small_mlp))


# Counts


def test_counts_are_exact_in_every_round_and_layers_may_be_empty():
    given = evidence(small_mlp, n=20)
    names = tuple(given.masks)
    for rounds in (1, 4):
        counts = dict(zip(((n,) for n in names), (0, 5, 2), strict=True))
        found = find_counts("magnitude", given, counts, rounds=rounds)
        assert [int(m.sum()) for m in found.values()] == [0, 5, 2]
        counts = dict(zip(((n,) for n in names), (0, 3, 2), strict=True))
        again = find_counts("magnitude", replace(given, masks=found), counts, rounds=rounds)
        assert [int(m.sum()) for m in again.values()] == [0, 3, 2]
    assert int(mask_ops.kept(find_counts("snip", given, {names: 17}, rounds=3))) == 17
