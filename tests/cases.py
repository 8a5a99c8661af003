"""Small named problems that the tests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ticketlab.data import Task
from ticketlab.engine.start import Start
from ticketlab.models import mlp
from ticketlab.seeds import initialise
from ticketlab.state import Masks, State

FLOAT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def blobs(n: int = 240, shape: tuple[int, ...] = (6,), n_classes: int = 3, dtype: torch.dtype = torch.float64) -> Task:
    """Gaussian clusters that a small network separates in a few steps."""
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(n_classes, *shape, generator=generator, dtype=dtype)
    y = torch.arange(n) % n_classes
    x = centres[y] + torch.randn(n, *shape, generator=generator, dtype=dtype)
    return Task.from_tensors(x, y, name="blobs", validation_size=0.2, test_size=0.2)


def images(dtype: torch.dtype = torch.float64) -> Task:
    """Clusters in the shape of 1x8x8 images, for convolutions."""
    return blobs(180, (1, 8, 8), dtype=dtype)


def small_mlp() -> nn.Module:
    return mlp((6,), 3, hidden=(8, 5))


def small_conv_bn() -> nn.Module:
    """Two narrow convolutions with batch norm: quick in float64.

    No bias before a batch norm: its gradient is zero in exact arithmetic, and Adam would blow up the rounding.
    """
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def build(factory: object, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    return initialise(factory, seed).to(dtype)  # type: ignore[arg-type]


def half_masks(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """About half of the weights of every layer, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.named_parameters() if p.ndim > 1}


def starts(stacked: State, masks: Masks, order_seeds: Sequence[int], **each: Sequence[object] | None) -> list[Start]:
    """One start per replica of a stack; ``each`` has an entry per replica: frozen, learning_rates, dynamics."""
    names = {"frozen": "frozen", "learning_rates": "learning_rate", "dynamics": "dynamics"}
    return [
        Start(
            stacked.select(r),
            {n: m[r] for n, m in masks.items()},
            seed,
            **{names[n]: values[r] for n, values in each.items() if values is not None},  # type: ignore[arg-type]
        )
        for r, seed in enumerate(order_seeds)
    ]


__all__ = ["FLOAT_TOLERANCE", "blobs", "build", "half_masks", "images", "small_conv_bn", "small_mlp", "starts"]
