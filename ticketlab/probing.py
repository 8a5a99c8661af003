"""A few examples through a module: what comes back, whether two results are equal, whether chance had a part."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.mapped import Mapped
from ticketlab.seeds import stream

_FAULTS_OF_INPUT = (RuntimeError, TypeError, LookupError, AttributeError, ValueError, AssertionError, ArithmeticError)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, relative to the largest entry; NaN equals NaN."""
    # At least 1e-6: many norms compute in float32 whatever the dtype of the network.
    rounding = max(1e-6, torch.finfo(a.dtype).eps ** (1 / 2 if a.device.type == "cpu" else 1 / 3))
    size = float(b.detach().abs().nan_to_num(0, 0, 0).amax()) if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=rounding, atol=rounding * size, equal_nan=True)


def probe(x: Tensor) -> Tensor:
    """Three examples: the first, the last, and one that is in no batch, of entries that occur at their places."""
    check_examples(x)
    x = few(x)
    generator = stream("probe", 0)
    index = torch.randint(0, len(x), x[0].shape, generator=generator).to(x.device)
    other = x.gather(0, index[None])[0]
    if torch.equal(other, x[0]) or torch.equal(other, x[-1]):  # examples that are all alike
        if x.is_floating_point():
            noise = torch.randn(x[0].shape, generator=generator).to(x.device, x.dtype)
            size = x[0].abs().nan_to_num(0, 0, 0).amax() if x[0].numel() else x.new_ones(())
            other = noise * torch.where(size > 0, size, torch.ones_like(size))
        else:
            other = x.flatten()[torch.randint(0, x.numel(), x[0].shape, generator=generator).to(x.device)]
    return torch.stack([x[0], x[-1], other])


def few(x: Tensor) -> Tensor:
    """Inputs as they are; of those on disk a few."""
    return x.few() if isinstance(x, Mapped) else x


@contextmanager
def watching_generators(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Yields a question, also for later: did the block draw from torch's, NumPy's or ``random``'s global generator?

    They are put back at the end.
    """
    # Bytes, for to compare an array of NumPy's takes longer than a forward pass.
    numpys = (lambda: pickle.dumps(np.random.get_state()), lambda state: np.random.set_state(pickle.loads(state)))
    places: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [numpys, (random.getstate, random.setstate)]
    places += [(torch.get_rng_state, torch.set_rng_state)]
    if device.type == "cuda":
        places += [(partial(torch.cuda.get_rng_state, device), lambda state: torch.cuda.set_rng_state(state, device))]
    before, known = [get() for get, _ in places], list[bool]()

    def drawn() -> bool:
        now = [get() for get, _ in places]
        return not all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, now, strict=True))

    try:
        yield lambda: known[0] if known else drawn()
    finally:
        known.append(drawn())
        if known[0]:
            for (_, put_back), state in zip(places, before, strict=True):
                put_back(state)


def attempt(model: nn.Module, x: Tensor, *, writes: bool = False) -> Tensor:
    """The outputs of a module, or a refusal that names what is wrong with the inputs or with what comes back.

    Args:
        model: As it stands.
        x: Inputs [n, ...].
        writes: Let the forward pass write into ``x`` itself.
    """
    shape, dtype, n = tuple(x.shape[1:]), x.dtype, len(x)
    try:
        y = model(x if writes else x.clone())
    except Refused:
        raise
    except _FAULTS_OF_INPUT as error:
        why = str(error).strip().partition("\n")[0]
        raise Refused(
            f"x must be what the model takes: {type(model).__name__} fails on examples of shape {shape} and {dtype}: "
            f"{type(error).__name__}: {why}"
        ) from error
    return check_output(y, n)


def backward(value: Tensor, model: nn.Module) -> None:
    """Plain ``value.backward()``, or a refusal that says why the model has no derivative."""
    if not value.requires_grad:
        raise Refused(
            f"outputs must depend on a trainable parameter, differentiably: those of {type(model).__name__} do not. "
            "Leave torch.no_grad, detach() and .data out of its forward pass, and let a parameter require a gradient."
        )
    try:
        value.backward()
    except _FAULTS_OF_INPUT as error:
        why = str(error).strip().partition("\n")[0]
        raise Refused(
            f"the model must have a derivative: the backward pass of {type(model).__name__} fails: "
            f"{type(error).__name__}: {why}"
        ) from error


def check_output(y: Any, n: int, who: str = "the model") -> Tensor:
    """The outputs, or a refusal unless they are one tensor [n, ...] of numbers."""
    if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != n or not y.is_floating_point():
        given = f"shape {tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise Refused(
            f"{who} must return one floating tensor whose first axis is the {n} examples: got {given}. "
            "Wrap it in a module whose forward returns the logits alone."
        )
    return y


def check_examples(x: Tensor) -> None:
    """Raise unless there is one example at least on the first axis of a tensor."""
    if not isinstance(x, Tensor | Mapped) or x.ndim == 0 or len(x) == 0:
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise Refused(f"x must hold at least one example on its first axis: got {given}. Pass a tensor [n, ...].")
