"""Transformers on tokens: an encoder that classifies a passage, a causal decoder that predicts each next token.

An example is a row of integer tokens [t]. Pre-norm, with learned positions.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.models.blocks import free, initialise_, stack

BYTES = 256
"""The vocabulary of text as bytes."""


class Transformer(nn.Module):
    """Tokens and positions, blocks, a norm, and a linear layer: on the mean over tokens, or on every token."""

    def __init__(
        self, length: int, vocabulary: int, n_outputs: int, *, width: int, blocks: nn.Sequential, dropout: float,
        pooled: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.pooled = pooled
        self.embedding, self.position = nn.Embedding(vocabulary, width), free(1, length, width)
        self.dropout, self.blocks = nn.Dropout(dropout), blocks
        self.norm, self.output = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, n_outputs)
        initialise_(self)

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n *t outputs"]:
        x = self.embedding(tokens) + self.position[:, : tokens.shape[1]]  # [n, t, width]
        x = self.norm(self.blocks(self.dropout(x)))
        return self.output(x.mean(1) if self.pooled else x)


def encoder(
    input_shape: Sequence[int],
    n_classes: int,
    *,
    depth: int,
    width: int,
    heads: int,
    vocabulary: int = BYTES,
    mlp_ratio: float = 4.0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
) -> nn.Module:
    """Every token attends to all others; the mean over them is classified: tokens [n, t] -> logits [n, classes].

    Args:
        input_shape: (t,), the largest number of tokens.
        n_classes: Units of the output layer.
        depth: Number of blocks.
        width: Of the tokens.
        heads: Of attention; they divide the width.
        vocabulary: Number of different tokens; 256 for bytes.
        mlp_ratio: Hidden units of the MLPs over the width.
        dropout: Share of dropped entries behind the positions, in attention, in MLPs and behind each branch.
        drop_path: Share of dropped branches in the last block, rising linearly from the first.

    Raises:
        Refused: Inputs that are not rows of tokens, sizes or shares out of range.
    """
    return _transformer(
        "an encoder", input_shape, n_classes, vocabulary, depth, width, heads, mlp_ratio, dropout, drop_path,
        causal=False, pooled=True,
    )  # fmt: skip


def decoder(
    input_shape: Sequence[int],
    n_classes: int,
    *,
    depth: int,
    width: int,
    heads: int,
    mlp_ratio: float = 4.0,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    pooled: bool = False,
    vocabulary: int | None = None,
) -> nn.Module:
    """A token attends to itself and those before it: tokens [n, t] -> logits [n, t, vocabulary].

    Its labels are [n, t], the next token at each place. The output layer is not tied to the embedding, which is never
    pruned. ``pooled``, the mean over tokens is classified, as an encoder does it: the network that a pretrained decoder
    is fine-tuned as, of the same parameters but for the output layer.

    Args:
        input_shape: (t,), the largest number of tokens.
        n_classes: Units of the output layer: the vocabulary, unless ``pooled``.
        depth: Number of blocks.
        width: Of the tokens.
        heads: Of attention; they divide the width.
        mlp_ratio: Hidden units of the MLPs over the width.
        dropout: Share of dropped entries behind the positions, in attention, in MLPs and behind each branch.
        drop_path: Share of dropped branches in the last block, rising linearly from the first.
        pooled: Classify the mean over tokens: [n, t] -> logits [n, classes].
        vocabulary: Number of different tokens; ``n_classes`` when None.

    Raises:
        Refused: Inputs that are not rows of tokens, sizes or shares out of range.
    """
    vocabulary = n_classes if vocabulary is None else vocabulary
    return _transformer(
        "a decoder", input_shape, n_classes, vocabulary, depth, width, heads, mlp_ratio, dropout, drop_path,
        causal=True, pooled=pooled,
    )  # fmt: skip


def _transformer(
    what: str,
    input_shape: Sequence[int],
    n_outputs: int,
    vocabulary: int,
    depth: int,
    width: int,
    heads: int,
    mlp_ratio: float,
    dropout: float,
    drop_path: float,
    *,
    causal: bool,
    pooled: bool,
) -> Transformer:
    length = tokens_of(what, input_shape)
    if vocabulary < 2:
        raise Refused(f"{what} needs a vocabulary of 2 tokens at least: got {vocabulary}.")
    blocks = stack(depth, width, heads, mlp_ratio=mlp_ratio, causal=causal, dropout=dropout, drop_path=drop_path)
    return Transformer(length, vocabulary, n_outputs, width=width, blocks=blocks, dropout=dropout, pooled=pooled)


def tokens_of(what: str, input_shape: Sequence[int]) -> int:
    """Number of tokens of an example; raises `Refused` unless its shape is [t]."""
    if len(input_shape) != 1 or input_shape[0] < 1:
        raise Refused(f"{what} needs rows of tokens [t]: got {tuple(input_shape)}. Use a vit for images.")
    return int(input_shape[0])
