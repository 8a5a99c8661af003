"""Seeds: a stream for each purpose, modules that a seed decides, and nobody's generator moved. And names."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import small_conv_bn, small_mlp
from torch import nn

from ticketlab.errors import nearest
from ticketlab.seeds import derived_seed, initialise, kept_generators, rewinder, stream
from ticketlab.state import state

EXACT = {"rtol": 0, "atol": 0}


def test_initialise_depends_on_the_seed_alone():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = initialise(small_mlp, 7)
        torch.rand(13)
        second, other = initialise(small_mlp, 7), initialise(small_mlp, 8)
    for name, tensor in state(first).params.items():
        torch.testing.assert_close(state(second).params[name], tensor, **EXACT)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_initialise_leaves_the_global_generator_where_it_was():
    before = torch.random.get_rng_state()
    initialise(small_conv_bn, 3)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ZeroDivisionError):
        initialise(lambda: nn.Linear(2, int(1 / 0)), 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_initialise_leaves_the_generators_of_accelerators_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    initialise(small_mlp, 3)
    assert seeded == []


def test_seeds_of_numpy_are_seeds_and_others_are_refused():
    assert torch.equal(initialise(small_mlp, np.int64(3))[1].weight, initialise(small_mlp, 3)[1].weight)
    for seed in (0.5, -1, "0", None):
        with pytest.raises(ValueError, match=r"seeds must be integers in 0\.\.2\^32 - 1: got"):
            initialise(small_mlp, seed)


def test_another_default_device_is_refused_by_whatever_draws():
    with torch.device("meta"), pytest.raises(ValueError, match=r"draws are made on the CPU.*default device is meta"):
        stream("order", 0)


def test_global_generators_and_those_of_a_module_are_put_back():
    ours = [torch.Generator(), np.random.default_rng(0), np.random.RandomState(0), random.Random(0)]

    def draws():
        return [
            torch.rand(2, generator=ours[0]).tolist(),
            *(list(one.random(2)) for one in ours[1:3]),
            ours[3].random(),
        ]

    back = [rewinder(one) for one in ours]
    first = draws()
    for rewind in back:
        rewind()
    assert draws() == first
    before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    with pytest.raises(KeyError), kept_generators():
        torch.rand(1), np.random.rand(), random.random()
        raise KeyError
    assert before == (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())


def test_streams_are_one_a_purpose_and_seeds():
    named = [("order", (1,)), ("order", (1, 0)), ("order", (0, 1)), ("order", (2,)), ("crop", (1,)), ("order", ())]
    draws = [torch.rand(8, generator=stream(purpose, *seeds)) for purpose, seeds in named]
    again = [torch.rand(8, generator=stream(purpose, *seeds)) for purpose, seeds in named]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert len({tuple(d.tolist()) for d in draws}) == len(named)


def test_a_stream_is_the_same_on_every_machine():
    # NumPy promises the values of SeedSequence, PyTorch those of its CPU generator: pinned, for runs depend on them.
    assert stream("order", 0).initial_seed() == 1817707480
    assert stream("order", 2**32 - 1).initial_seed() == 1297899199


@pytest.mark.parametrize("seeds", [(-1,), (2**32,), (0, -3), (1.5,), ("1",)])
def test_seeds_out_of_range_are_refused(seeds):
    with pytest.raises(ValueError, match=r"seeds must be integers in 0\.\.2\^32 - 1: got .* for 'order'"):
        stream("order", *seeds)


def test_seeds_are_derived_from_a_purpose():
    assert derived_seed("order", 0) == stream("order", 0).initial_seed()
    assert len({derived_seed(purpose, seed) for purpose in ("a", "b") for seed in (0, 1)}) == 4


def test_draws_of_numpy_and_random_are_seeded_and_put_back():
    def factory():
        net = nn.Linear(2, 2)
        with torch.no_grad():
            net.bias.copy_(torch.tensor([np.random.rand(), random.random()]))
        return net

    before = np.random.get_state()[1].copy(), random.getstate()
    first, second, other = (initialise(factory, seed) for seed in (3, 3, 4))
    assert np.array_equal(np.random.get_state()[1], before[0]) and random.getstate() == before[1]
    assert torch.equal(first.bias, second.bias) and not torch.equal(first.bias, other.bias)


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (nn.Linear(2, 2), r"got Linear\. Pass the class"),
        (lambda: 3, "got int"),
        (lambda width: nn.Linear(2, width), r"without arguments.*got <lambda>\(width\)\. Pass the class or a lambda"),
    ],
)
def test_what_is_no_factory_is_refused(factory, why):
    with pytest.raises(ValueError, match=why):
        initialise(factory, 0)


def test_an_unknown_name_comes_with_the_nearest():
    message = nearest("model", "conv4", ("conv_4", "lenet"))
    assert message == "unknown model 'conv4'. Did you mean 'conv_4'? Known: conv_4, lenet."
    assert "Did you mean" not in nearest("model", "zzz", ("conv_4", "lenet"))
    assert "unknown model 3." in nearest("model", 3, ("conv_4",))
