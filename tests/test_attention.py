"""Heads found from the symmetry alone; their tables against hand-made masks, named slices and the function itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ticketlab as tl
from ticketlab.attention import PROJECTIONS
from ticketlab.errors import Refused

BERT = ("self.query", "self.key", "self.value", "output.dense")
VIT = "vit_tiny_d2_w16_h4_p4"
TEXT = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def made(name, seed=0):
    shape = IMAGES.shape[1:] if name.startswith("vit") else TEXT.shape[1:]
    return tl.initialise(
        lambda: tl.models.build(name, tuple(shape), 10 if name.startswith(("vit", "enc", "bert")) else 256), seed
    )


def half(model, seed, density=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters() if p.ndim == 2}


class Torch(nn.Module):
    """PyTorch's own attention: query, key and value are thirds of one parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.mixing = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x):
        h = self.embed(x)
        return self.last(self.mixing(h, h, h, need_weights=False)[0].mean(1))


class Written(nn.Module):
    """Attention by einsum, with names that say nothing, the value first."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads = heads
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.embed, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        h = self.embed(x)
        v, q, k = (layer(h).unflatten(-1, (self.heads, -1)) for layer in (self.a, self.b, self.c))
        weights = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(-1)
        return self.last(self.d(torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(-2)).mean(1))


def parameters(layer):
    return [getattr(layer, name).parameter.removesuffix(".weight") for name in PROJECTIONS]


@pytest.mark.parametrize(
    ("name", "heads", "names", "last"),
    [
        (VIT, 4, ("q", "k", "v", "out"), "blocks.1.attention"),
        ("encoder_tiny_d2_w16_h2", 2, ("q", "k", "v", "out"), "blocks.1.attention"),
        ("decoder_tiny_d2_w16_h4", 4, ("q", "k", "v", "out"), "blocks.1.attention"),
        ("bert_tiny", 2, BERT, "inner.bert.encoder.layer.1.attention"),
        ("gpt2_tiny", 2, ("c_attn", "c_attn", "c_attn", "c_proj"), "inner.transformer.h.1.attn"),
        ("llama_tiny", 2, ("q_proj", "k_proj", "v_proj", "o_proj"), "inner.model.layers.1.self_attn"),
    ],
)  # fmt: skip
def test_layers_are_found_from_the_symmetry(name, heads, names, last):
    found = tl.attention.layers(made(name), IMAGES if name == VIT else TEXT)
    assert len(found) == 2 and {layer.heads for layer in found} == {heads}
    assert found[1].name == last and parameters(found[1]) == [f"{last}.{name}" for name in names]
    assert [layer.paired for layer in found] == [name != "llama_tiny"] * 2


def test_attention_of_pytorch_and_by_hand():
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    (layer,) = tl.attention.layers(tl.initialise(Torch, 0), x)
    assert layer.name == "mixing" and parameters(layer) == [*["mixing.in_proj_weight"] * 3, "mixing.out_proj"]
    (layer,) = tl.attention.layers(tl.initialise(Written, 0), x)
    assert (layer.name, parameters(layer)) == ("", ["b", "c", "a", "d"])
    for model in (lambda: Written(heads=1), lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))):
        with pytest.raises(Refused, match="attention of two heads or more"):
            tl.attention.layers(tl.initialise(model, 0), x)


def test_heads_are_cut_as_the_forward_pass_cuts_them():
    """One head at a time through named slices of the weights gives the layer's output, whichever form they have."""
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = tl.initialise(Torch, 0).double()
    (layer,) = tl.attention.layers(whole, torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator()))
    params = dict(whole.named_parameters())
    nn.init.zeros_(params["mixing.in_proj_bias"])
    q, k, v, out = (getattr(layer, n).by_head(params[getattr(layer, n).parameter]) for n in PROJECTIONS)
    total = params["mixing.out_proj.bias"]
    for h in range(4):
        scores = (x @ q[h].T) @ (x @ k[h].T).transpose(1, 2) / 2
        total = total + scores.softmax(-1) @ (x @ v[h].T) @ out[h]
    torch.testing.assert_close(whole.mixing(x, x, x, need_weights=False)[0], total)


@pytest.mark.parametrize("name", [VIT, "bert_tiny", "gpt2_tiny"])
def test_tables_are_those_of_named_slices(name):
    model = made(name)
    found = tl.attention.layers(model, IMAGES if name == VIT else TEXT)
    masks = [half(model, seed, 0.1) for seed in (0, 1)]
    stacked = {n: torch.stack([m[n] for m in masks]) for n in masks[0]}
    tables = tl.attention.densities(found, stacked), tl.attention.heads(found, stacked)
    for r, one in enumerate(masks):
        for whole, alone in zip(
            tables, (tl.attention.densities(found, one), tl.attention.heads(found, one)), strict=True
        ):
            part = whole[whole["replica"] == r].drop(columns="replica").reset_index(drop=True)
            assert part.equals(alone)
    plain, by = masks[1], tables[0].query("replica == 1").set_index(["layer", "head", "projection"])
    rows = tables[1].query("replica == 1").set_index(["layer", "head"])
    for layer in found:
        for head in range(layer.heads):
            cut = [_slice(plain, layer, p, head) for p in PROJECTIONS]
            for p, mask in zip(PROJECTIONS, cut, strict=True):
                row = by.loc[(layer.name, head, p)]
                assert (row["kept"], row["prunable"]) == (int(mask.sum()), mask.numel())
                assert row["density"] == mask.double().mean()
            q, k, v, out = (mask.any(1) for mask in cut)
            row = rows.loc[(layer.name, head)]
            assert row["live_dims_qk"] == int((q & k).sum()) and row["live_dims_vo"] == int((v & out).sum())
            assert row["density"] == pytest.approx(float(torch.cat([m.flatten() for m in cut]).double().mean()))


def _slice(masks, layer, projection, head) -> Tensor:
    """[unit, width] of one head, from what the architectures are known to store."""
    mask = masks[getattr(layer, projection).parameter]
    if "c_attn" in getattr(layer, projection).parameter:  # [width, 3 * heads * units]
        mask = mask.T.chunk(3)[PROJECTIONS.index(projection)]
    elif projection == "output" and "c_proj" not in layer.output.parameter:  # [width, heads * units]
        mask = mask.T
    units = len(mask) // layer.heads
    return mask[head * units : (head + 1) * units]


def test_dead_and_blind_heads_are_what_they_say():
    """Float64: the output does not move with what a dead head reads, nor a blind head's output with where it looks."""
    model, x = made(VIT).double(), IMAGES.double()
    found = tl.attention.layers(model, x)
    masks = {n: torch.ones_like(m) for n, m in half(model, 0).items()}
    q, k, v, out = (getattr(found[0], n).by_head(masks[getattr(found[0], n).parameter]) for n in PROJECTIONS)  # views
    v[1, :2], out[1, 2:] = False, False  # units of 4: no unit is live on both sides
    q[2, ::2], k[2, 1::2] = False, False
    v[3], q[0, 0] = False, False
    table = tl.attention.heads(found, masks)
    first = table[table["layer"] == "blocks.0.attention"]
    assert first["dead"].tolist() == [False, True, False, True] and first["blind"].tolist() == [
        False,
        False,
        True,
        False,
    ]
    assert first["live_dims_vo"].tolist() == [4, 0, 4, 0] and first["live_dims_qk"].tolist() == [3, 4, 0, 4]
    assert not table[table["layer"] == "blocks.1.attention"][["dead", "blind"]].any(axis=None)

    def outputs(change):
        moved = {n: p.detach().clone() for n, p in model.named_parameters()}
        change(moved)
        live = {n: p * masks[n] if n in masks else p for n, p in moved.items()}
        return torch.func.functional_call(model, live, (x,))

    def louder(head, *projections):
        def change(params):
            for projection in projections:
                one = getattr(found[0], projection)
                one.by_head(params[one.parameter])[head] *= 3

        return change

    before = outputs(lambda params: None)
    for head, projections, moves in (
        (1, ("query", "key", "value"), False),
        (3, ("query", "key"), False),
        (0, ("query", "key"), True),
        (2, ("value",), True),
    ):
        gap = (outputs(louder(head, *projections)) - before).abs().max()
        assert bool(gap > 1e-6) == moves and (moves or gap < 1e-12)
    assert (outputs(_no_bias(louder(2, "query"))) - outputs(_no_bias(lambda params: None))).abs().max() < 1e-12


def _no_bias(change):
    """A bias of the query still reaches the keys: without it a blind head's scores are equal."""

    def changed(params):
        params["blocks.0.attention.q.bias"].zero_()
        change(params)

    return changed


def test_what_query_and_key_share_against_chance():
    model = made(VIT)
    found = tl.attention.layers(model, IMAGES)
    masks = half(model, 3, 0.3)
    q, k = (p.by_head(masks[p.parameter]) for p in (found[1].query, found[1].key))
    k[2] = q[2]
    table = tl.attention.query_key_overlap(found, masks).set_index(["layer", "of", "head"])
    for head in range(4):
        row = table.loc[("blocks.1.attention", "weights", head)]
        assert row["intersection"] == int((q[head] & k[head]).sum()) and row["total"] == 4 * 16
        assert row["expected"] == pytest.approx(float(q[head].sum() * k[head].sum()) / 64)
        units = table.loc[("blocks.1.attention", "units", head)]
        assert units["intersection"] == int((q[head].any(1) & k[head].any(1)).sum()) and units["total"] == 4
        inputs = table.loc[("blocks.1.attention", "inputs", head)]
        assert inputs["intersection"] == int((q[head].any(0) & k[head].any(0)).sum()) and inputs["total"] == 16
    same = table.loc[("blocks.1.attention", "weights", 2)]
    assert same["jaccard"] == 1 and same["z"] > 4
    assert len(table) == 2 * 3 * 4


def test_what_is_not_pruned_is_kept_and_masks_of_nothing_are_refused():
    model = made(VIT)
    found = tl.attention.layers(model, IMAGES)
    masks = {n: m for n, m in half(model, 0).items() if ".q." in n}
    table = tl.attention.densities(found, masks).groupby("projection")["density"].agg(["min", "max"])
    assert (table.loc[["key", "value", "output"]] == 1).all(axis=None) and table.loc["query", "max"] < 0.8
    with pytest.raises(Refused, match="those of a projection of attention"):
        tl.attention.heads(found, {"blocks.0.mlp.fc1.weight": masks["blocks.0.attention.q.weight"]})
