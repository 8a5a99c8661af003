"""What a user may have in a file of their own: a network that nobody here wrote, and a task."""

from __future__ import annotations

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import ticketlab as tl


def net() -> nn.Module:
    """A residual network by transformers, four weight layers in stages, its record of outputs taken apart."""
    config = ResNetConfig(
        num_channels=1, embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return Logits(ResNetForImageClassification(config))


def attentive() -> nn.Module:
    """A vision transformer by transformers, two layers of two heads."""
    config = ViTConfig(
        num_channels=1, image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Logits(ViTForImageClassification(config))


class Logits(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).logits


def task() -> tl.Task:
    """Digits, enlarged so that the strides of an image network leave something."""
    return tl.load_task("digits").limit(train=240, test=80).resize(16, 16)


def passages() -> tl.Task:
    """Which package of the standard library a passage is from."""
    return tl.load_task("stdlib_topics").limit(train=60, validation=20, test=20)


def next_bytes() -> tl.Task:
    """What comes next in them."""
    return tl.load_task("stdlib_lm").limit(train=60, validation=20, test=20)


not_callable = 3


def wrong() -> int:
    return 1
