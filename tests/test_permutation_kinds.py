"""What users write between layers: every group found is a symmetry in plain PyTorch, or the refusal says why not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import build
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from ticketlab import permutation
from ticketlab.errors import Refused
from ticketlab.permutation.rules import RULES, same
from ticketlab.state import state


class Net(nn.Module):
    """Linear layers of 6, 12, 12 and 3 units, used as a case says."""

    def __init__(self, forward, setup=None):
        super().__init__()
        self.case = forward
        self.a, self.b, self.o = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        if setup:
            setup(self)

    def hidden(self, x):
        return self.a(x).tanh()

    def forward(self, x):
        return self.case(self, x)


def with_layer(make, read=lambda m, x: m.o(m.c(m.hidden(x)).tanh())):
    """A further layer ``c`` between ``a`` and ``o``, or read otherwise."""
    return read, lambda m: setattr(m, "c", make())


def no_grad(m, x):
    h = m.hidden(x)
    with torch.no_grad():
        scale = h.abs().mean(1, keepdim=True)
        with torch.enable_grad():
            again = m.b(h)
    return m.o(again.tanh() / scale)


def autocast(m, x):
    h = m.hidden(x)
    with torch.autocast("cpu", torch.bfloat16):
        h = m.b(h)
    return m.o(h.to(x.dtype).tanh())


def float_island(m, x):
    h = m.hidden(x).float()
    return m.o((h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype))


def out_argument(m, x):
    with torch.no_grad():
        product = torch.empty(len(x), 12, dtype=x.dtype)
        torch.mm(m.hidden(x), m.b.weight, out=product)
    return m.o(product.tanh())


def in_place(m, x):
    h = m.a(x)
    h.relu_().add_(1)
    written = torch.zeros_like(h)
    written.copy_(h)
    return m.o(written)


def in_place_on_a_view(m, x):
    h = m.a(x)
    h[:, :6].mul_(h[:, 6:])
    return m.o(h)


def through_views(m, x):
    """What is written through one view is read through another, in another order."""
    h, other = m.a(x), m.b(m.hidden(x)).view(-1, 4, 3)
    h.view(-1, 3, 4).add_(other.transpose(1, 2))
    return m.o(h * other.flatten(1))


def rows(m, x):
    h = m.a(x)
    h[:, 3] += 1
    return m.o(h)


def transposed_in_place(m, x):
    h = m.b.weight.clone()
    h.t_()
    return m.o((m.hidden(x) @ h).tanh())


def recurrent(m, x):
    h = torch.zeros(len(x), 12, dtype=x.dtype)
    for _ in range(3):
        h = torch.tanh(m.a(x) + m.b(h))
    return m.o(h)


def written_buffer(m, x):
    m.ema.add_(m.hidden(x).mean(0))
    m.ema = m.ema * 2
    return m.o(m.hidden(x) * m.ema)


def kept(m, x):
    m.kept = m.hidden(x)
    m.list.append(m.kept)
    return m.o(m.list[-1])


def tied(m):
    m.c = nn.Linear(12, 12)
    m.c.weight = m.b.weight


def closure(m):
    weight = m.b.weight
    m.c = lambda h: h @ weight


def threes(m, x):
    return m.hidden(x).view(-1, 3, 4)


def single(forward, setup=None):
    return build(lambda: Net(forward, setup), dtype=torch.float32)


def after_three(m, x):
    return m.o(torch.tanh(m.b(m.c(m.hidden(x)).tanh())))


@torch.library.custom_op("ticketlab_tests::relu", mutates_args=())
def named_as_another(h: torch.Tensor) -> torch.Tensor:
    """Of a user's own, by the name of an operation that has a rule."""
    return h.cumsum(1)


@named_as_another.register_fake
def _(h):
    return torch.empty_like(h)


def nothing(m):
    pass


def statistics(m):
    m.register_buffer("ema", torch.zeros(12))


def sequence(m, x):
    return m.o(m.c(threes(m, x))[0].flatten(1))


def last(m, x):
    return m.p(m.c(threes(m, x))[0][:, -1])


def recurrent_layer(make, width):
    def setup(m):
        m.c, m.p = make(), nn.Linear(width, 3)

    return last, setup


SYMMETRIC = {
    # Regions, islands, memory.
    "no_grad": (no_grad, nothing, {"a": 12, "b": 12}),
    "autocast": (autocast, nothing, {"a": 12, "b": 12}),
    "float_island": (float_island, nothing, {"a": 12}),
    "checkpoint": (lambda m, x: m.o(checkpoint(m.hidden, x, use_reentrant=False)), nothing, {"a": 12}),
    "empty_cache": (lambda m, x: m.o(torch.cat([torch.tensor([]), m.hidden(x)], -1)), nothing, {"a": 12}),
    "empty_axis": (lambda m, x: m.o(torch.cat([x[:, :0], m.hidden(x)], 1)), nothing, {"a": 12}),
    # One tensor or module in two places.
    "tied_weights": (after_three, tied, {"a": 12}),
    "two_names": (after_three, lambda m: setattr(m, "c", m.b), {"a": 12}),
    "tied_biases": (lambda m, x: m.o(m.b(m.hidden(x)).tanh()), lambda m: setattr(m.b, "bias", m.a.bias), {"a": 12}),
    "closure": (after_three, closure, {"a": 12, "b": 12}),
    "tied_embedding": (
        lambda m, x: F.linear(m.b(m.c((x > 0).long()).mean(1)).tanh(), m.c.weight),
        lambda m: setattr(m, "c", nn.Embedding(7, 12)),
        {"b": 12},
    ),
    # Writing.
    "in_place": (in_place, nothing, {"a": 12}),
    "in_place_on_a_view": (in_place_on_a_view, nothing, {"a": 6}),
    "out_argument": (out_argument, nothing, {"a": 12, "b": 12}),
    "transposed_in_place": (transposed_in_place, nothing, {"a": 12, "b": 12}),
    "written_buffer": (written_buffer, statistics, {"a": 12}),
    "kept": (kept, lambda m: setattr(m, "list", []), {"a": 12}),
    "masked_fill": (lambda m, x: m.o(m.a(x).masked_fill(m.a(x) < 0, 0.0)), nothing, {"a": 12}),
    # Several results.
    "split": (lambda m, x: m.o(torch.cat(m.hidden(x).split(4, 1)[::-1], 1)), nothing, {"a": 4}),
    "chunk": (
        lambda m, x: m.o(torch.cat([F.glu(m.b(m.hidden(x))), m.a(x).chunk(2, 1)[0]], 1)),
        nothing,
        {"a": 6},
    ),
    "swapaxes": (
        lambda m, x: m.o(m.hidden(x).view(-1, 2, 2, 3).swapaxes(1, 2).mean(1).flatten(1).repeat(1, 2)),
        nothing,
        {"a": 2, "a#2": 2, "a#3": 3, "o": 2},
    ),
    "unbind": (lambda m, x: m.o(torch.cat(threes(m, x).unbind(1)[::-1], 1)), nothing, {"a": 4}),
    "maxout": (
        lambda m, x: m.o(m.b(m.hidden(x)).view(-1, 6, 2).max(2)[0].repeat(1, 2)),
        nothing,
        {"a": 12, "b": 6, "o": 2},
    ),
    "sort_in_the_batch": (lambda m, x: m.o(m.hidden(x).sort(0)[0]), nothing, {"a": 12}),
    "native_layer_norm": (
        lambda m, x: m.o(torch.native_layer_norm(m.a(x), [12], None, None, 1e-5)[0]),
        nothing,
        {"a": 12},
    ),
    "var_mean": (lambda m, x: m.o(m.a(x) - torch.var_mean(m.a(x), 1, keepdim=True)[1]), nothing, {"a": 12}),
    "attention": (
        lambda m, x: m.o(F.scaled_dot_product_attention(*[threes(m, x)] * 3).flatten(1)),
        nothing,
        {"a": 3, "a#2": 4},
    ),
    "causal": (
        lambda m, x: m.o(F.scaled_dot_product_attention(*[threes(m, x)] * 3, is_causal=True).flatten(1)),
        nothing,
        {"a": 4},
    ),
    "multihead": (
        lambda m, x: m.o(m.c(*[threes(m, x)] * 3, need_weights=False)[0].flatten(1)),
        lambda m: setattr(m, "c", nn.MultiheadAttention(4, 2, batch_first=True)),
        {"a": 3, "a#2": 4, "c": 2, "c#2": 2, "c.out_proj": 4},
    ),
    # Recurrence: the gates of one unit move together.
    "recurrent": (recurrent, nothing, {"a": 12}),
    "lstm": (*recurrent_layer(lambda: nn.LSTM(4, 5, batch_first=True), 5), {"a": 4, "c": 5}),
    "gru": (*recurrent_layer(lambda: nn.GRU(4, 5, batch_first=True, bidirectional=True), 10), {"a": 4, "c": 5}),
    "gru_cell": (
        lambda m, x: m.p(m.c(m.hidden(x))),
        recurrent_layer(lambda: nn.GRUCell(12, 5), 5)[1],
        {"a": 12, "c": 5},
    ),
    # Weights that are computed.
    "pruned": (*with_layer(lambda: prune.random_unstructured(nn.Linear(12, 12), "weight", 0.5)), {"a": 12, "c": 12}),
    "weight_norm": (*with_layer(lambda: parametrizations.weight_norm(nn.Linear(12, 12))), {"a": 12, "c": 12}),
    "spectral_norm": (*with_layer(lambda: parametrizations.spectral_norm(nn.Linear(12, 12))), {"a": 12, "c": 12}),
    "orthogonal": (
        *with_layer(lambda: parametrizations.orthogonal(nn.Linear(12, 12, bias=False))),
        {"c.parametrizations.weight.0": 12},
    ),
    # Others.
    "complex": (lambda m, x: m.o(torch.complex(m.a(x), m.b(m.hidden(x))).pow(2).abs()), nothing, {"a": 12}),
    "values_of_items": (lambda m, x: m.o(m.hidden(x) * m.hidden(x).max().item()), nothing, {"a": 12}),
    "picked_rows": (lambda m, x: m.o(m.hidden(x)) + m.o(m.hidden(x)[x[:, 0] > 0]).sum(0), nothing, {"a": 12}),
    "cosine": (lambda m, x: F.linear(F.normalize(m.hidden(x)), F.normalize(m.o.weight)), nothing, {"a": 12}),
    "einsum": (lambda m, x: torch.einsum("...i,oi->...o", m.hidden(x), m.o.weight), nothing, {"a": 12}),
    "bilinear": (
        lambda m, x: m.o(m.c(m.hidden(x), x)),
        lambda m: setattr(m, "c", nn.Bilinear(12, 6, 12)),
        {"a": 12, "c": 12},
    ),
    "copies": (lambda m, x: m.o(threes(m, x).mean(2).repeat_interleave(4, 1) * m.a(x)), nothing, {"a": 3, "a#2": 4}),
    "batch_statistics": (*with_layer(lambda: nn.BatchNorm1d(12, track_running_stats=False)), {"a": 12}),
}


@pytest.mark.parametrize("name", SYMMETRIC)
def test_groups_are_symmetries_in_plain_pytorch(name):
    """Permuted weights are loaded into a second network, which is called as anybody would."""
    forward, setup, sizes = SYMMETRIC[name]
    model, plain = (build(lambda: Net(forward, setup)).eval() for _ in range(2))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x)
    groups = permutation.groups(model, x)
    assert groups.sizes == sizes
    assert groups.refuted == ()  # the rules are right by themselves
    before = state(model)
    for seed in range(3):
        moved = [permutation.permute(groups, part, permutation.random(groups, seed)) for part in before]
        assert any(not torch.equal(moved[0][n], p) for n, p in before.params.items())
        permutation.assert_same_function(model, before, tuple(moved), x)
        plain = build(lambda: Net(forward, setup)).eval()
        plain.load_state_dict({**moved[0], **moved[1]}, strict=False)  # a tied tensor has one name here
        with torch.no_grad():
            tolerance = {"autocast": 0.05, "float_island": 1e-5}.get(name, 1e-10)
            torch.testing.assert_close(plain(x), expected, rtol=tolerance, atol=tolerance)


REFUSED = {
    "sort": (lambda m, x: m.o(m.hidden(x).sort(1)[0]), r"here: sort\)"),
    "topk": (lambda m, x: m.o(m.hidden(x).topk(12, 1)[0]), r"here: topk\)"),
    "uneven": (lambda m, x: m.o(torch.cat(m.hidden(x).split([4, 8], 1)[::-1], 1)), r"here: split_with_sizes\)"),
    "roll": (lambda m, x: m.o(m.hidden(x).roll(1, 1)), r"here: roll\)"),
    "rolled_weights": (lambda m, x: m.o((m.hidden(x) @ m.b.weight.roll(1)).tanh()), r"here: roll\)"),
    "custom": (lambda m, x: m.o(named_as_another(m.hidden(x))), r"here: relu\)"),
    "row": (rows, r"here: select\)"),
    "through_views": (through_views, r"here: none\)"),
    "index_put": (lambda m, x: m.o(m.a(x).index_put((torch.arange(4),), x[0].sum())), r"here: index_put\)"),
    "gather": (lambda m, x: m.o(m.hidden(x).gather(1, torch.arange(12).expand(4, 12))), r"here: gather\)"),
    "fourier": (lambda m, x: m.o(torch.fft.fft(m.hidden(x)).real), r"here: fft_fft\)"),
    "constant": (lambda m, x: m.o(m.hidden(x) * torch.arange(12)), r"a constant"),
    "whole_index": (lambda m, x: m.o(m.hidden(x)) * m.hidden(x).argmax(1, keepdim=True), r"here: argmax\)"),
    "dropout": (lambda m, x: m.o(F.dropout(m.hidden(x), 0.5, True)), "depend on chance"),
    "noise": (lambda m, x: m.o(m.hidden(x) + torch.randn(4, 12)), "depend on chance"),
    "control_flow": (lambda m, x: m.o(m.hidden(x)) if m.a(x).sum() > 0 else m.o(m.a(x)), "must be traceable"),
    "numpy": (lambda m, x: m.o(m.hidden(x) * float(m.a(x).detach().numpy().max())), "must be traceable"),
    "dict": (lambda m, x: {"y": m.o(m.hidden(x))}, "must return one floating tensor .* got dict"),
    "tuple": (lambda m, x: (m.o(m.hidden(x)), x), "must return one floating tensor .* got tuple"),
    "raises": (lambda m, x: {}["a key"], "must be traceable by torch.export .*'a key'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_symmetry_is_refused_by_its_reason(name, capsys):
    forward, reason = REFUSED[name]
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(Refused, match=reason):
        permutation.groups(build(lambda: Net(forward)), x)
    assert "def forward" not in capsys.readouterr().err  # a page of torch's


@pytest.mark.parametrize("x", [torch.ones(0, 6), [1.0], None], ids=["empty", "list", "none"])
def test_no_examples_are_refused(x):
    with pytest.raises(Refused, match="x must hold at least one example"):
        permutation.groups(single(lambda m, x: m.o(m.hidden(x))), x)


@pytest.mark.parametrize("name", ["kept", "written_buffer", "two_names", "closure", "pruned"])
def test_the_users_module_is_left_as_it_was(name):
    forward, setup, _ = SYMMETRIC[name]
    model, x = (
        build(lambda: Net(forward, setup)).train(),
        torch.randn(4, 6, generator=torch.Generator(), dtype=torch.float64),
    )
    kept = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    attributes = [dict(module.__dict__) for module in model.modules()]
    permutation.groups(model, x)
    assert all(torch.equal(t, kept[n]) for n, t in (*model.named_parameters(), *model.named_buffers()))
    for module, before in zip(model.modules(), attributes, strict=True):
        assert module.__dict__.keys() == before.keys() and all(module.__dict__[k] is before[k] for k in before)
    assert name != "kept" or model.list == []


def test_an_input_that_the_model_writes_into_stays_as_it_was():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    permutation.groups(single(lambda m, x: m.o(m.a(x.sub_(1)).tanh())), x)
    assert torch.equal(x, before)


def test_constants_that_are_not_saved_with_the_weights_keep_their_order():
    """As the frequencies of rotary embeddings: a checkpoint of permuted weights does not hold them."""

    def net(persistent):
        scale = torch.arange(1.0, 13.0)
        return single(
            lambda m, x: m.o(m.hidden(x) * m.scale + m.b(m.a(x))),
            lambda m: m.register_buffer("scale", scale, persistent=persistent),
        )

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    saved, fixed = net(True), net(False)
    assert permutation.groups(saved, x).axes["scale"] == ((("a", 12),),)
    with pytest.raises(Refused, match="a constant"):
        permutation.groups(fixed, x)


# The last defence: a trial of what the rules give.


@pytest.mark.parametrize("width", [2, 12])
def test_a_wrong_rule_costs_the_groups_that_it_touches_and_no_others(width, monkeypatch):
    model = build(
        lambda: nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Identity(), nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 3)
        )
    )
    model[2].forward = lambda h: h.cumsum(1)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setitem(RULES, "cumsum", same)
    groups = permutation.groups(model, x)
    assert groups.sizes == {"3": 5} and groups.refuted == ("0",)
    assert groups.axes["0.weight"] == (((None, width),), ((None, 6),))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_initial_zeros_and_ones_hide_nothing_from_the_trial(dtype, monkeypatch):
    """With a bias of zeros and a norm of ones most wrong permutations of them change nothing."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.o = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x)
            return self.o(h) + self.o(self.norm.weight.roll(1, 0) * F.layer_norm(h, (8,)))

    monkeypatch.setitem(RULES, "roll", same)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    with pytest.raises(Refused, match="hidden units that can be permuted"):
        permutation.groups(build(Normed, dtype=dtype), x)


def test_networks_that_do_not_run_in_float64_are_tried_as_they_are(monkeypatch):
    def setup(m):
        m.plain = torch.eye(12)  # stays float32 when the rest is doubled

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert permutation.groups(single(lambda m, x: m.o((m.b(m.hidden(x)) @ m.plain).tanh()), setup), x).sizes == {
        "a": 12
    }
    monkeypatch.setitem(RULES, "cumsum", same)
    cumulative = single(lambda m, x: m.o((m.b(m.hidden(x).cumsum(1)) @ m.plain).tanh()), setup)
    with pytest.raises(Refused, match="hidden units that can be permuted"):
        permutation.groups(cumulative, x)


def test_weights_outside_the_domain_once_perturbed_are_tried_as_they_are():
    model = build(
        lambda: Net(
            lambda m, x: m.o(m.hidden(x) * m.p.log()), lambda m: setattr(m, "p", nn.Parameter(torch.full((12,), 1e-3)))
        )
    )
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert set(permutation.groups(model, x).sizes.values()) == {12}


def test_weights_that_diverged_have_the_groups_of_their_architecture():
    model = build(lambda: Net(lambda m, x: m.o(m.b(m.hidden(x)).tanh())))
    model.b.weight.data.fill_(torch.nan)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert permutation.groups(model, x).sizes == {"a": 12, "b": 12}
    with pytest.raises(Refused, match="outputs must be numbers to be compared: got NaN"):
        permutation.assert_same_function(model, state(model), state(model), x)


def test_functions_are_compared_stack_against_stack():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    models = [build(lambda: Net(lambda m, x: m.o(m.hidden(x))), seed, torch.float32) for seed in range(2)]
    groups = permutation.groups(models[0], x)
    stacked = {n: torch.stack([state(m).params[n] for m in models]) for n in state(models[0]).params}
    moved = permutation.permute(groups, stacked, permutation.random(groups, 0))
    permutation.assert_same_function(models[0], (stacked, None), (moved, None), x)
    moved["o.bias"] = moved["o.bias"] + torch.tensor([[0.0], [1e-6]])
    with pytest.raises(Refused, match="must compute the same function"):
        permutation.assert_same_function(models[0], (stacked, None), (moved, None), x)


def test_surroundings_in_which_nothing_can_be_lent_are_refused():
    model, x = single(lambda m, x: m.o(m.hidden(x))), torch.zeros(4, 6)
    with torch.inference_mode(), pytest.raises(Refused, match="inference_mode"):
        permutation.groups(model, x)
    with torch.autocast("cpu"), pytest.raises(Refused, match="autocast"):
        permutation.groups(model, x)


def test_alignment_wants_the_buffers_that_belong_to_the_weights():
    """Running statistics of another network would give another function, of which the same is shown."""
    model, other = (build(lambda: Net(*with_layer(lambda: nn.BatchNorm1d(12))), seed).eval() for seed in range(2))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = state(model), state(other)
    b.buffers["c.running_mean"].uniform_(generator=torch.Generator().manual_seed(1))
    found = permutation.align(model, x, a, b)
    assert sorted(found.buffers["c.running_mean"].tolist()) == sorted(b.buffers["c.running_mean"].tolist())
    with pytest.raises(Refused, match="reads buffers"):
        permutation.align(model, x, a.params, b.params)
    with pytest.raises(Refused, match="reads buffers"):
        permutation.assert_same_function(model, (b.params, None), (b.params, None), x)


def test_weights_that_are_not_finite_are_not_matched():
    model, x = single(lambda m, x: m.o(m.hidden(x))), torch.zeros(4, 6)
    groups, params = permutation.groups(model, x), state(model).params
    with pytest.raises(Refused, match=r"b\['a.bias'\] must be finite"):
        permutation.match(groups, params, params | {"a.bias": torch.full((12,), torch.nan)})


def test_results_show_themselves_in_a_line():
    model = build(lambda: Net(lambda m, x: m.o(m.hidden(x))))
    x, own = torch.zeros(4, 6, dtype=torch.float64), state(model)
    assert repr(permutation.groups(model, x)) == "Groups(sizes={'a': 12}, refuted=())"
    assert "tensor" not in repr(permutation.align(model, x, own, own))
