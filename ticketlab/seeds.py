"""Randomness from explicit seeds alone: a stream for each purpose, and modules that a seed decides."""

from __future__ import annotations

import inspect
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn

from ticketlab.errors import Refused

Factory = Callable[[], nn.Module]


def stream(purpose: str, *seeds: int) -> torch.Generator:
    """A CPU generator of its own for each purpose and seeds, the same on every machine and in every process.

    PyTorch's CPU generator takes 32 bits of seed, so two streams coincide with probability 2^-32.

    Args:
        purpose: What the draws are for, such as ``"order"``.
        seeds: Each in 0..2^32 - 1; ``(1,)`` and ``(1, 0)`` are different.

    Raises:
        Refused: A seed out of range, or another default device than the CPU.
    """
    _check_seeds(purpose, *seeds)
    # As a spawn key, for as entropy a list would equal itself with zeros appended.
    sequence = np.random.SeedSequence(zlib.crc32(purpose.encode()), spawn_key=[int(seed) for seed in seeds])
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def _check_seeds(purpose: str, *seeds: int) -> None:
    if not all(isinstance(seed, Integral) and 0 <= seed < 2**32 for seed in seeds):
        raise Refused(f"seeds must be integers in 0..2^32 - 1: got {seeds} for {purpose!r}. Choose others.")
    if torch.get_default_device().type != "cpu":
        raise Refused(
            f"draws are made on the CPU, the same for every device: the default device is {torch.get_default_device()}."
            " Leave torch.set_default_device and torch.device(...) blocks, and pass device= instead."
        )


@contextmanager
def kept_generators(device: torch.device | str = "cpu") -> Iterator[None]:
    """The global generators of torch, on the CPU and this device, of NumPy and of ``random`` end where they begin."""
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    put_back = [rewinder(random), rewinder(np.random)]
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        for rewind in put_back:
            rewind()


def seed_generators(seed: int, device: torch.device | str = "cpu") -> None:
    """Seed the global generators of torch, on the CPU and this device, of NumPy and of ``random``: inside
    `kept_generators`, for whatever draws from nowhere else."""
    torch.default_generator.manual_seed(seed)
    place = torch.device(device)
    if place.type == "cuda":
        index = torch.cuda.current_device() if place.index is None else place.index
        torch.cuda.default_generators[index].manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def rewinder(generator: Any) -> Callable[[], None]:
    """What puts a generator of torch, NumPy or ``random``, or the module's global one, back to where it is now."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if hasattr(generator, "setstate"):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def derived_seed(purpose: str, *seeds: int) -> int:
    """A seed of its own for each purpose, far from the small numbers that users give."""
    return stream(purpose, *seeds).initial_seed()


def initialise(factory: Factory, seed: int) -> nn.Module:
    """Build a module whose initial weights depend on ``seed`` alone.

    Initialisers draw from the global generators of torch, NumPy or ``random``; all three are seeded for the call
    and put back after it. The draw is made on the CPU: the same on every device.

    Raises:
        Refused: A factory that is not callable without arguments, or one that returns something other than a module.
    """
    _check_seeds("initialise", seed)
    if isinstance(factory, nn.Module) or not callable(factory) or not _takes_nothing(factory):
        raise Refused(
            f"model must be a factory, a function without arguments that builds a fresh nn.Module: got "
            f"{_described(factory)}. Pass the class or a lambda that builds it, not an instance."
        )
    with kept_generators():
        seed_generators(int(seed))  # torch.manual_seed would reseed accelerators too
        model = factory()
    if not isinstance(model, nn.Module):
        raise Refused(
            f"the factory must return an nn.Module: got {type(model).__name__}. Return the network it builds."
        )
    return model


def _takes_nothing(factory: Callable[..., Any]) -> bool:
    try:
        inspect.signature(factory).bind()
    except TypeError:
        return False
    except ValueError:  # of what is built in, no signature is known
        return True
    return True


def _described(factory: Any) -> str:
    if isinstance(factory, nn.Module) or not callable(factory):
        return type(factory).__name__
    return f"{getattr(factory, '__name__', type(factory).__name__)}{inspect.signature(factory)}"
