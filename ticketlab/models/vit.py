"""Vision transformers (Dosovitskiy et al. 2021), pre-norm, with learned positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.models.blocks import free, initialise_, stack
from ticketlab.models.images import check_images

Pool = Literal["class", "mean"]


class VisionTransformer(nn.Module):
    """Patches, positions, blocks, a norm, and a linear layer on the class token or on the mean over patches."""

    def __init__(
        self, channels: int, n_patches: int, n_classes: int, *, patch: int, width: int, blocks: nn.Sequential,
        pool: Pool, registers: int, dropout: float
    ) -> None:  # fmt: skip
        super().__init__()
        self.pool = pool
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.token = free(1, 1, width) if pool == "class" else None
        self.position = free(1, n_patches + (pool == "class"), width)
        self.registers = free(1, registers, width) if registers else None
        self.dropout, self.blocks = nn.Dropout(dropout), blocks
        self.norm, self.output = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, n_classes)
        initialise_(self)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n classes"]:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [n, patches, width]
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.position
        length = x.shape[1]
        if self.registers is not None:
            x = torch.cat([x, self.registers.expand(x.shape[0], -1, -1)], 1)
        x = self.norm(self.blocks(self.dropout(x)))
        return self.output(x[:, 0] if self.pool == "class" else x[:, :length].mean(1))


def vit(
    input_shape: Sequence[int],
    n_classes: int,
    *,
    depth: int,
    width: int,
    heads: int,
    patch: int | None = None,
    mlp_ratio: float = 4.0,
    pool: Pool = "class",
    registers: int = 0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """A ViT. ``vit_tiny`` is DeiT-Ti (Touvron et al. 2021): depth 12, width 192, 3 heads.

    With patches of 16 on 3x224x224 images and 1000 classes it has the published 5,717,416 parameters.

    Args:
        input_shape: (channels, height, width), which the patch divides.
        n_classes: Units of the output layer.
        depth: Number of blocks.
        width: Of the tokens.
        heads: Of attention; they divide the width.
        patch: Pixels a side; None: 4 for images of up to 64 pixels a side, 16 above.
        mlp_ratio: Hidden units of the MLPs over the width.
        pool: What the output layer reads: a class token, or the mean over the patches.
        registers: Further learned tokens, which no output reads (Darcet et al. 2024).
        dropout: Share of dropped entries behind the positions, in attention, in MLPs and behind each branch.
        drop_path: Share of dropped branches in the last block, rising linearly from the first.

    Raises:
        Refused: Inputs that are not images or that the patch does not divide, sizes or shares out of range.
    """
    channels = check_images("a ViT", input_shape, smallest=1)
    height, wide = input_shape[1:]
    patch = patch or (4 if max(height, wide) <= 64 else 16)
    if height % patch or wide % patch:
        raise Refused(
            f"the patch must divide the image: got {patch} for {height} x {wide} pixels. Choose another, such as "
            "vit_tiny_p2 for patches of 2, or resize the images with task.resize."
        )
    if pool not in ("class", "mean") or registers < 0:
        raise Refused(f"pool must be 'class' or 'mean', and registers at least 0: got {pool!r} and {registers}.")
    blocks = stack(depth, width, heads, mlp_ratio=mlp_ratio, causal=False, dropout=dropout, drop_path=drop_path)
    n_patches = (height // patch) * (wide // patch)
    return VisionTransformer(
        channels, n_patches, n_classes, patch=patch, width=width, blocks=blocks, pool=pool, registers=registers,
        dropout=dropout
    )  # fmt: skip
