"""A network with frozen weights as a module whose trainable parameters are the scores of its mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ticketlab import masks as mask_ops
from ticketlab.engine.trainable import copied
from ticketlab.errors import Refused, nearest
from ticketlab.seeds import stream
from ticketlab.state import Params, State

Method = Literal["bernoulli", "edge_popup"]

RESCALING: dict[Method, float] = {"bernoulli": 1.0, "edge_popup": 0.5}
"""The power p that each paper's method comes with."""


def rescaled(
    params: Mapping[str, Tensor], masks: Mapping[str, Tensor], power: float, *, stacked: bool = False
) -> Params:
    r"""The masked weights of each layer, times a power of the inverse of its density.

    .. math:: w' = m \circ w \, (\text{size} / \text{kept})^p

    A layer without a live weight is zero.

    Args:
        params: One network, or a stack.
        masks: True = kept, or shares in [0, 1]; with the replica axis if ``stacked``.
        power: p; 0 masks alone.
        stacked: Whether densities are taken replica by replica.
    """
    new = dict(params)
    for name, mask in masks.items():
        shares = mask.to(params[name].dtype)
        size = mask[0].numel() if stacked else mask.numel()
        kept = shares.detach().sum(tuple(range(int(stacked), mask.ndim)), keepdim=True)
        # At most one weight's worth: otherwise an empty layer would be 0 * infinity.
        new[name] = params[name] * shares * (size / kept.clamp(min=1 / size)) ** power
    return new


class Supermask(nn.Module):
    """A network with frozen weights, as a module whose trainable parameters are the scores of its mask.

    In training mode ``bernoulli`` draws a mask at each forward pass, from a seed and a step that are buffers: the
    draw is a function of both alone. Masked weights are put where the network looks for them, under every name, and
    stay there until the next pass: a checkpoint computes with them again on the way back.

    Raises:
        Refused: An unknown method, a density outside (0, 1), or a module that cannot be copied.
    """

    draw_seed: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        density: float,
        power: float | None = None,
        prunable: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if method not in RESCALING:
            raise Refused(nearest("method", method, tuple(RESCALING)))
        if not 0 < density < 1:
            raise Refused(f"density must lie in (0, 1): got {density}.")
        self.method, self.density = method, density
        self.power = RESCALING[method] if power is None else power
        self.names = mask_ops.prunable(model, prunable)
        net = copied(model)
        if net is None:
            raise Refused(f"masks are learned on a copy of the model: {type(model).__name__} cannot be deep-copied.")
        self.net = net.requires_grad_(False)
        weights = dict(net.named_parameters())
        self.frozen = nn.ParameterList([weights[name] for name in self.names])
        self.scores = nn.ParameterList([torch.zeros_like(weights[name]) for name in self.names])
        self.places = {name: _released(net, weights[name]) for name in self.names}
        self.register_buffer("draw_seed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs under the masks of the scores: drawn in training with ``bernoulli``, deterministic otherwise."""
        drawn = self.training and self.method == "bernoulli"
        masks = self._drawn() if drawn else {n: self.kept(s) for n, s in zip(self.names, self.scores, strict=True)}
        frozen = dict(zip(self.names, self.frozen, strict=True))
        for name, weight in rescaled(frozen, masks, self.power).items():
            for module, attribute in self.places[name]:
                setattr(self.net.get_submodule(module), attribute, weight)
        return self.net(x)

    def kept(self, score: Tensor) -> Tensor:
        """The mask of evaluation as numbers; for edge-popup, of training too."""
        if self.method == "bernoulli":
            return (score > 0).to(score.dtype)
        return straight_through(top(score, self.density), score.abs())

    def _drawn(self) -> Params:
        generator = stream("mask draw", int(self.draw_seed), int(self.step))
        self.step.add_(1)
        masks = {}
        for name, score in zip(self.names, self.scores, strict=True):
            noise = torch.rand(score.shape, generator=generator, dtype=score.dtype).to(score.device)
            probability = score.sigmoid()
            masks[name] = straight_through(noise < probability, probability)
        return masks

    def begin(self, frozen: State, seed: int) -> State:
        """One replica's start: the given weights, first scores, and the seed of the draws."""
        weights = [frozen.params[name] for name in self.names]
        first = [self._first_score(weight, stream(f"score {i}", seed)) for i, weight in enumerate(weights)]
        params = {f"scores.{i}": score for i, score in enumerate(first)}
        params |= {f"frozen.{i}": weight for i, weight in enumerate(weights)}
        params |= {f"net.{n}": p for n, p in frozen.params.items() if n not in self.names}
        counters = {"draw_seed": torch.tensor(seed), "step": torch.tensor(0)}
        buffers = {n: t.to(weights[0].device) for n, t in counters.items()}
        return State(params, {**buffers, **{f"net.{n}": b for n, b in frozen.buffers.items()}})

    def _first_score(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        if self.method == "bernoulli":
            return torch.full_like(weight, math.log(self.density / (1 - self.density)))
        score = torch.empty(weight.shape, dtype=weight.dtype)
        return nn.init.kaiming_uniform_(score, a=math.sqrt(5), generator=generator).to(weight.device)


def _released(net: nn.Module, weight: Tensor) -> list[tuple[str, str]]:
    """Every (module, attribute) that has held this parameter, where plain tensors may be put from now on."""
    places = []
    for name, module in net.named_modules():
        for attribute in [key for key, own in module._parameters.items() if own is weight]:
            del module._parameters[attribute]
            setattr(module, attribute, weight.detach())
            places.append((name, attribute))
    return places


def straight_through(hard: Bool[Tensor, "*w"], soft: Tensor) -> Tensor:
    """Exactly ``hard`` in the forward pass; in the backward pass its gradient is that of ``soft``."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def top(score: Tensor, density: float) -> Bool[Tensor, "*w"]:
    """True for the largest magnitudes of a layer: ``density`` of them, as one prune step from dense leaves them."""
    kept = score.numel() - mask_ops.n_removed(score.numel(), 1 - density)
    return mask_ops.top(score.detach().abs(), torch.ones_like(score, dtype=torch.bool), kept)
