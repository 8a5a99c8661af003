"""Randomness from explicit seeds alone: a stream for each purpose, and modules that a seed decides."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from numbers import Integral

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
        Refused: A seed out of range.
    """
    if not all(isinstance(seed, Integral) and 0 <= seed < 2**32 for seed in seeds):
        raise Refused(f"seeds must be integers in 0..2^32 - 1: got {seeds} for {purpose!r}. Choose others.")
    # As a spawn key, for as entropy a list would equal itself with zeros appended.
    sequence = np.random.SeedSequence(zlib.crc32(purpose.encode()), spawn_key=[int(seed) for seed in seeds])
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def derived_seed(purpose: str, *seeds: int) -> int:
    """A seed of its own for each purpose, far from the small numbers that users give."""
    return stream(purpose, *seeds).initial_seed()


def initialise(factory: Factory, seed: int) -> nn.Module:
    """Build a module whose initial weights depend on ``seed`` alone.

    Initialisers draw from the global generators of torch, NumPy or ``random``; all three are seeded for the call
    and put back after it. The draw is made on the CPU: the same on every device.

    Raises:
        Refused: A factory that is not callable, or one that returns something other than a module.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise Refused(
            f"model must be a factory, a function without arguments that builds a fresh nn.Module: got "
            f"{type(factory).__name__}. Pass the class or a lambda that builds it, not an instance."
        )
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed accelerators too
            np.random.seed(seed)
            random.seed(seed)
            model = factory()
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    if not isinstance(model, nn.Module):
        raise Refused(
            f"the factory must return an nn.Module: got {type(model).__name__}. Return the network it builds."
        )
    return model
