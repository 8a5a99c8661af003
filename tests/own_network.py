"""What a user may have in a file of their own: a network that nobody here wrote, and a task."""

from __future__ import annotations

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import ticketlab as tl


def net() -> nn.Module:
    """A residual network by transformers, four weight layers in stages, its record of outputs taken apart."""
    config = ResNetConfig(
        num_channels=1, embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=10
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ResNetForImageClassification(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).logits

    return Logits()


def task() -> tl.Task:
    """Digits, enlarged so that the strides of an image network leave something."""
    return tl.load_task("digits").limit(train=240, test=80).resize(16, 16)


not_callable = 3


def wrong() -> int:
    return 1
