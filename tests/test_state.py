"""Networks as dicts of tensors: copied, stacked, selected and taken apart, with the module's own names."""

from __future__ import annotations

import math

import pytest
import torch
from cases import build, small_conv_bn, small_mlp
from torch import nn

from ticketlab.state import State, check_finite, select, stack, stack_states, state


class Tied(nn.Module):
    """Encoder and decoder share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(6, 3, bias=False)
        self.decoder.weight = self.encoder.weight


def test_state_copies_and_detaches():
    model = build(small_conv_bn)
    taken = state(model)
    assert not any(t.requires_grad for part in taken for t in part.values())
    for part in taken:
        for tensor in part.values():
            tensor.add_(1)
    fresh = build(small_conv_bn).state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in model.state_dict().items())
    assert set(taken.params) | set(taken.buffers) == set(fresh)


def test_a_tied_parameter_appears_once():
    assert set(state(build(Tied)).params) == {"encoder.weight", "encoder.bias"}


def test_states_clone_move_and_select():
    states = [state(build(small_conv_bn, s)) for s in range(3)]
    stacked = stack_states(states)
    clone = stacked.clone()
    for part in stacked:
        for tensor in part.values():
            tensor.zero_()
    for r, one in enumerate(states):
        for given, expected in zip(clone.select(r), one, strict=True):
            assert all(torch.equal(given[n], t) for n, t in expected.items())
    two = clone.select([2, 0])
    assert torch.equal(
        two.params["0.weight"], torch.stack([states[2].params["0.weight"], states[0].params["0.weight"]])
    )
    moved = clone.to("cpu", torch.float32)
    assert isinstance(moved, State)
    assert moved.params["0.weight"].dtype == moved.buffers["1.running_var"].dtype == torch.float32
    assert moved.buffers["1.num_batches_tracked"].dtype == torch.int64


def test_select_undoes_stack():
    dicts = [state(build(small_mlp, s)).params for s in range(4)]
    stacked = stack(dicts)
    assert stacked["fc1.weight"].shape == (4, 8, 6)
    for r, one in enumerate(dicts):
        assert all(torch.equal(select(stacked, r)[n], t) for n, t in one.items())
    assert list(select(stacked, 0)) == list(dicts[0])
    assert select(stacked, [1, 3])["fc1.weight"].shape == (2, 8, 6)
    assert select(stacked, slice(1, 4))["fc1.weight"].shape == (3, 8, 6)


def test_stack_refuses_nothing_and_other_names():
    with pytest.raises(ValueError, match="at least one dict of tensors: got none"):
        stack([])
    with pytest.raises(ValueError, match=r"names \['a'\]: number 1 has \['b'\]"):
        stack([{"a": torch.ones(1)}, {"b": torch.ones(1)}])


def test_a_state_repeats_after_itself():
    stacked = stack_states([state(build(small_conv_bn, s)) for s in range(2)]).repeat(2)
    for part in stacked:
        for tensor in part.values():
            assert len(tensor) == 4 and torch.equal(tensor[0], tensor[2])


def test_what_is_not_finite_is_refused_by_name_and_number():
    check_finite("params", {"a": torch.ones(3), "n": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"params\['b'\] must be finite: 2 of 3 entries"):
        check_finite("params", {"a": torch.ones(3), "b": torch.tensor([math.nan, 1.0, -math.inf])})
    with pytest.raises(ValueError, match="x must be finite: 1 of 2 entries"):
        check_finite("x", torch.tensor([1, math.inf], dtype=torch.complex64))
