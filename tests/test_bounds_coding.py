"""Description lengths against counting, Kraft's inequality by enumeration, and codes that come back as they went."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ticketlab as tl
from tests.cases import build, half_masks, small_conv_bn, small_mlp
from ticketlab import bounds
from ticketlab.bounds import Decoder, Encoder
from ticketlab.errors import Refused

LN2 = math.log(2)
SLACK_BITS = 10


def bits(data: bytes) -> int:
    return 8 * len(data)


def prefix_free(words: list[bytes]) -> bool:
    """No word begins another: neighbours in sorted order tell."""
    ordered = sorted(words)
    return not any(later.startswith(first) for first, later in itertools.pairwise(ordered))


def subsets(d: int) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.tensor(m)} for m in itertools.product((False, True), repeat=d)]


@pytest.mark.parametrize(("kept", "total"), [(0, 5), (5, 5), (2, 5), (30, 266), (500, 1000)])
def test_subset_nats_count_subsets(kept, total):
    expected = math.log(math.comb(total, kept)) + math.log(total + 1)
    assert bounds.subset_nats(kept, total) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_masks_are_priced_in_one_piece_or_by_layer_whichever_is_less():
    skewed = {"a": torch.arange(100) < 90, "b": torch.arange(400) < 4}
    even = {"a": torch.arange(100) < 10, "b": torch.arange(400) < 40}
    by_layer = bounds.subset_nats(90, 100) + bounds.subset_nats(4, 400)
    found = bounds.description_length(skewed)
    assert found.by_layer and found.mask_nats == pytest.approx(by_layer + LN2, rel=1e-12)
    found = bounds.description_length(even, choices={"density": 21, "seed": 5})
    assert not found.by_layer and found.mask_nats == pytest.approx(bounds.subset_nats(50, 500) + LN2, rel=1e-12)
    assert found.choice_nats == pytest.approx(math.log(105)) and found.value_nats == pytest.approx(math.log(3))
    assert found.bits == pytest.approx(found.nats / LN2) and "seed" in found.covers


def test_values_cost_what_they_should():
    mask = {"w": torch.arange(300) < 200}
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(300, generator=generator), "b": torch.randn(7, generator=generator)}
    plain = bounds.description_length(mask, params)
    assert plain.value_nats == pytest.approx(math.log(3))
    signs = bounds.description_length(mask, params, "signs")
    assert signs.value_nats - plain.value_nats == pytest.approx(200 * LN2)
    coded = bounds.description_length(mask, params, "coded")  # two tensors, a bit each, 32 bits a value
    assert coded.value_nats - plain.value_nats == pytest.approx((2 + 32 * 207) * LN2)
    few = bounds.description_length(mask, {"w": params["w"].sign(), "b": torch.zeros(7)}, "coded")
    ones = int((params["w"][:200] > 0).sum())
    # Krichevsky & Trofimov, as a product of the probabilities of one symbol after the other
    sequence = -sum(math.log((seen + 0.5) / (t + 1)) for t, seen in enumerate([*range(ones), *range(200 - ones)]))
    expected = (2 + 3 * 32) * LN2 + 2 * math.log(256) + sequence
    assert few.value_nats - plain.value_nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_ideal_lengths_of_masks_obey_kraft(d):
    assert sum(math.exp(-bounds.subset_nats(int(m["w"].sum()), d)) for m in subsets(d)) == pytest.approx(1, rel=1e-12)
    masks = [{"a": m["w"][: d // 2 + 1], "b": m["w"][d // 2 + 1 :]} for m in subsets(d)]
    total = sum(math.exp(-bounds.description_length(m).nats) for m in masks)
    assert total <= 1
    signed = sum(2 ** int(m["w"].sum()) * math.exp(-bounds.description_length(m, m, "signs").nats) for m in subsets(d))
    assert total + signed <= 1


def test_words_of_masks_are_prefix_free_and_obey_kraft():
    words = [bounds.encode(m) for m in subsets(9)]
    assert len(set(words)) == 512 and prefix_free(words)
    assert sum(2.0 ** -bits(w) for w in words) <= 1
    for mask, word in zip(subsets(9), words, strict=True):
        assert bounds.description_length(mask).bits <= bits(word) + 1e-9
        assert bits(word) < bounds.description_length(mask).bits + SLACK_BITS


@pytest.mark.parametrize("increment", [0, 2])
def test_words_of_symbols_are_prefix_free(increment):
    words = []
    for symbols in itertools.product(range(3), repeat=5):
        encoder = Encoder()
        encoder.symbols(symbols, (5, 1, 1), increment)
        words.append(encoder.finish())
    assert prefix_free(words) and sum(2.0 ** -bits(w) for w in words) <= 1


def test_an_empty_message_is_empty():
    assert Encoder().finish() == b""
    Decoder(b"").finish()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_message_comes_back_in_its_ideal_length(data):
    parts = data.draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("subset"), st.lists(st.booleans(), max_size=60)),
                st.tuples(st.just("kt"), st.lists(st.integers(0, 3), max_size=60)),
                st.tuples(st.just("floats"), st.lists(st.floats(width=32), max_size=4)),
                st.tuples(st.just("uniform"), st.integers(0, 6)),
                st.tuples(st.just("sharp"), st.lists(st.sampled_from([0, 0, 0, 0, 1]), max_size=60)),
            ),
            max_size=6,
        )
    )
    encoder = Encoder()
    for kind, value in parts:
        if kind == "subset":
            encoder.subset(np.array(value, dtype=bool))
        elif kind == "floats":
            encoder.floats(np.array(value, dtype=np.float32))
        elif kind == "uniform":
            encoder.uniform(value, 7)
        else:
            encoder.symbols(value, (1,) * 4 if kind == "kt" else (2**31, 1), 2 if kind == "kt" else 0)
    word = encoder.finish()
    decoder = Decoder(word)
    for kind, value in parts:
        if kind == "subset":
            assert decoder.subset(len(value)).tolist() == value
        elif kind == "floats":
            expected = np.array(value, dtype=np.float32)
            np.testing.assert_array_equal(decoder.floats(len(value)).view(np.uint32), expected.view(np.uint32))
        elif kind == "uniform":
            assert decoder.uniform(7) == value
        else:
            frequencies = (1,) * 4 if kind == "kt" else (2**31, 1)
            assert decoder.symbols(len(value), frequencies, 2 if kind == "kt" else 0).tolist() == value
    decoder.finish()
    assert bits(word) < sum(ideal_bits(kind, value) for kind, value in parts) + SLACK_BITS


def ideal_bits(kind: str, value: object) -> float:
    """-log2 of the probability of a part, one symbol after the other."""
    if kind == "uniform":
        return math.log2(7)
    if kind == "floats":
        return 32 * len(value)
    if kind == "subset":
        return bounds.subset_nats(sum(value), len(value)) / LN2
    if kind == "sharp":
        return sum(-math.log2((2**31, 1)[s] / (2**31 + 1)) for s in value)
    return sum(-math.log2((value[:t].count(s) + 0.5) / (t + 2)) for t, s in enumerate(value))


def test_carries_run_through_bytes_of_255():
    for last in range(40):  # the upper end of the interval, again and again
        encoder = Encoder()
        values = [*[998] * 30, *[999] * 30, last]
        encoder.symbols(values, [1] * 1000)
        assert Decoder(encoder.finish()).symbols(61, [1] * 1000).tolist() == values


def network(seed: int = 0):
    model = build(small_mlp, seed, torch.float32)
    masks = half_masks(model, seed)
    params = {n: p * masks[n] if n in masks else p for n, p in tl.state(model).params.items()}
    return model, masks, params


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["seed", "signs", "coded"]), st.sampled_from([None, 1, 2, 5]))
def test_the_very_network_comes_back(seed, values, n_values):
    model, masks, params = network(seed)
    reference = params
    if values == "coded":
        reference = tl.state(build(small_mlp, seed + 1, torch.float32)).params  # nothing but shapes is taken from it
        params = params if n_values is None else bounds.quantise(params, masks, n_values)
    if values == "signs":
        reference = {n: p.abs() if n in masks else p for n, p in params.items()}
    word = bounds.encode(masks, params, values)
    found_masks, found = bounds.decode(word, reference, tl.masks.prunable(model))
    assert list(found) == list(params)
    for name, tensor in params.items():
        assert torch.equal(found[name], tensor)
        assert name not in masks or torch.equal(found_masks[name], masks[name])
    ideal = bounds.description_length(masks, params, values).bits
    assert ideal <= bits(word) + 1e-6 and bits(word) < ideal + SLACK_BITS


@pytest.mark.parametrize("values", ["seed", "signs", "coded"])
@pytest.mark.parametrize("kept", [0.5, 0.9])  # masks in one piece, and layer by layer
def test_the_order_of_mappings_is_no_part_of_the_message(values, kept):
    model, masks, params = network()
    masks |= {"fc1.weight": torch.rand(masks["fc1.weight"].shape, generator=torch.Generator().manual_seed(0)) < kept}
    params["fc1.weight"] = tl.state(model).params["fc1.weight"] * masks["fc1.weight"]
    word = bounds.encode(masks, params, values)
    for turn in range(1, len(params)):
        order = [*list(params)[turn:], *list(params)[:turn]]
        shuffled = {n: params[n] for n in order}
        prunable = [n for n in order if n in masks]
        assert bounds.encode({n: masks[n] for n in prunable}, shuffled, values) == word
        found_masks, found = bounds.decode(word, shuffled, prunable[::-1])
        assert list(found) == order
        assert all(torch.equal(found[n], p) for n, p in params.items())
        assert all(torch.equal(found_masks[n], m) for n, m in masks.items())


def test_batch_norm_statistics_are_coded_with_the_network():
    model = build(small_conv_bn, 0, torch.float32)
    state = tl.state(model)
    tensors = state.params | {n: b + 0.5 for n, b in state.buffers.items() if b.is_floating_point()}
    masks = half_masks(model, 0)
    masks = {name: masks[name] for name in tl.masks.prunable(model)}
    tensors = {n: t * masks[n] if n in masks else t for n, t in tensors.items()}
    zeros = {n: torch.zeros_like(t) for n, t in tensors.items()}
    _, found = bounds.decode(bounds.encode(masks, tensors, "coded"), zeros, tl.masks.prunable(model))
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_no_bytes_but_a_whole_message_are_decoded():
    model, masks, params = network()
    word = bounds.encode(masks, params, "coded")
    for broken in (word[:-1], word + b"\0", word + b"\1", b"", word[:20]):
        with pytest.raises(ValueError, match="the data must be one whole message"):
            bounds.decode(broken, params, tl.masks.prunable(model))
    for names in (["fc1.weight", "zz"], []):
        with pytest.raises(ValueError, match="prunable must name one or more tensors of the reference"):
            bounds.decode(word, params, names)


def test_quantise_leaves_few_values_and_less_error_than_the_quantiles():
    _, masks, params = network()
    for n_values in (1, 3):
        found = bounds.quantise(params, masks, n_values)
        for name, tensor in found.items():
            where = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
            assert len(tensor[where].unique()) <= n_values and not tensor[~where].any()
    clusters = torch.tensor([-1.0, -1.1, 0.0, 0.1, 2.0, 2.2, 2.1])
    found = bounds.quantise({"w": clusters}, {}, 3)["w"]
    torch.testing.assert_close(found, torch.tensor([-1.05, -1.05, 0.05, 0.05, 2.1, 2.1, 2.1]))
    assert torch.equal(bounds.quantise({"w": clusters}, {}, 7)["w"], clusters)
    assert torch.equal(bounds.quantise({"w": clusters}, {"w": torch.zeros(7, dtype=torch.bool)}, 2)["w"], 0 * clusters)
    with pytest.raises(ValueError, match=r"n_values must lie in 1..256"):
        bounds.quantise({"w": clusters}, {}, 0)
    for params, masks, complaint in (
        ({"w": clusters * math.nan}, {}, r"params\['w'\] must be finite: 7 of 7"),
        ({"w": clusters}, {"w": clusters[:3] > 0}, "in the shape of its mask"),
        ({"w": clusters}, {"v": clusters > 0}, r"not so \['v'\]"),
        (clusters, {}, "params must be a dict of tensors: got Tensor"),
    ):
        with pytest.raises(Refused, match=complaint):
            bounds.quantise(params, masks, 2)
    with pytest.raises(Refused, match=r"n_values must lie in 1..256, an integer: got 2.5"):
        bounds.quantise({"w": clusters}, {}, 2.5)


def test_weights_that_are_no_numbers_have_no_length():
    mask, lost = {"w": torch.ones(3, dtype=torch.bool)}, torch.tensor([1.0, math.nan, 2.0])
    for values in ("coded", "signs", "seed"):
        for call in (bounds.encode, bounds.description_length):
            with pytest.raises(Refused, match=r"params\['w'\] must be finite: 1 of 3"):
                call(mask, {"w": lost}, values)
    buffers = {"w": torch.ones(3), "causal": torch.tensor([0.0, -math.inf])}  # as attention masks have
    assert 8 * len(bounds.encode(mask, buffers, "coded")) >= bounds.description_length(mask, buffers, "coded").bits


def test_what_is_no_network_is_refused():
    mask = {"w": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="values must be one of"):
        bounds.encode(mask, values="float32")
    with pytest.raises(ValueError, match="params must be given"):
        bounds.description_length(mask, values="coded")
    with pytest.raises(ValueError, match="masks must be one or more bool tensors"):
        bounds.encode({"w": torch.ones(4)})
    with pytest.raises(ValueError, match="in the shape of its mask"):
        bounds.encode(mask, {"w": torch.ones(5)}, "coded")
    with pytest.raises(ValueError, match="params must be float32"):
        bounds.encode(mask, {"w": torch.ones(4, dtype=torch.float64)}, "coded")
    for n in (0, 2.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="choices must count"):
            bounds.description_length(mask, choices={"density": n})
    for kept, total in ((4, 3), (2.5, 10), (2, 10.5), (math.nan, 10)):
        with pytest.raises(ValueError, match=rf"kept must lie in 0..{total}"):
            bounds.subset_nats(kept, total)
    with pytest.raises(ValueError, match="float16 or float32"):
        Encoder().floats(np.ones(2))
    with pytest.raises(ValueError, match=r"symbols must be in 0..1"):
        Encoder().symbols([2], (1, 1))
    with pytest.raises(ValueError, match="a symbol must own"):
        Encoder().uniform(3, 3)
