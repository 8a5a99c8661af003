"""Pre-norm transformer blocks, shared by the ViT, the encoder and the decoder.

Queries, keys, values and output are four linear layers, so that each has a mask of its own name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused

STD = 0.02
"""Of linear weights, positions and tokens at initialisation, as in BERT, GPT-2 and DeiT."""


class Attention(nn.Module):
    r"""Multi-head attention: softmax of :math:`Q K^T / \sqrt{d}` over the keys, times V (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        # [n, t, width] -> [n, heads, t, width / heads]
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}, dropout={self.dropout}"


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.gelu, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        return self.fc2(self.dropout(self.gelu(self.fc1(x))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training a residual branch is left out for some examples.

    What stays is divided by the share that stays, so that evaluation changes nothing.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        if not self.training or not self.p:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, 1), self.p)  # dropout's draws, one per example

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a shortcut (pre-norm, Xiong et al. 2020)."""

    def __init__(
        self, width: int, heads: int, hidden: int, *, causal: bool = False, dropout: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, causal=causal, dropout=dropout)
        self.mlp = Mlp(width, hidden, dropout)
        self.dropout, self.drop_path = nn.Dropout(dropout), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n t width"]) -> Float[Tensor, "n t width"]:
        x = x + self.drop_path(self.dropout(self.attention(self.norm1(x))))
        return x + self.drop_path(self.dropout(self.mlp(self.norm2(x))))


def stack(
    depth: int, width: int, heads: int, *, mlp_ratio: float, causal: bool, dropout: float, drop_path: float
) -> nn.Sequential:
    """``depth`` blocks, in which the share of dropped paths rises linearly to ``drop_path`` in the last.

    Raises:
        Refused: Sizes below 1, a width that the heads do not divide, shares outside [0, 1).
    """
    if min(depth, width, heads) < 1 or width % heads:
        raise Refused(
            f"depth, width and heads must be at least 1, and heads divide the width: got {depth}, {width}, {heads}."
        )
    if not 0 <= dropout < 1 or not 0 <= drop_path < 1:
        raise Refused(f"dropout and drop_path must lie in [0, 1): got {dropout} and {drop_path}.")
    hidden = round(mlp_ratio * width)
    shares = [drop_path * index / depth for index in range(1, depth + 1)]
    return nn.Sequential(*(Block(width, heads, hidden, causal=causal, dropout=dropout, drop_path=p) for p in shares))


def initialise_(net: nn.Module) -> None:
    """Normal weights of standard deviation 0.02 in linear layers, embeddings and free tensors; biases zero, norms one.

    Convolutions, which cut images into patches, are linear layers here.
    """
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(module.weight, std=STD)
        if isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)


def free(*shape: int) -> nn.Parameter:
    """A learned tensor that belongs to no layer: positions, class and register tokens."""
    return nn.Parameter(torch.randn(shape) * STD)
