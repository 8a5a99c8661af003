"""What the fast path of a layer starts from, for a block of examples: its inputs and its output deltas.

Inputs are recorded in one forward pass, deltas by one backward pass per output. Then they are proven: a layer that
meets the examples in another order, only some of them, or in another way than each alone has no fast path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ticketlab.derivatives import pullback
from ticketlab.ntk.blocks import CHUNK_BYTES
from ticketlab.ntk.layers import Features, Layer, Unlike
from ticketlab.ntk.problem import Problem
from ticketlab.ntk.uses import Use, is_plain, n_positions, patches_of, record
from ticketlab.seeds import stream


def features(problem: Problem, layers: Sequence[Layer], x: Tensor) -> list[Features]:
    """Inputs and deltas of each layer for a block of examples.

    One more backward pass, of all outputs mixed, shows that no row of a layer serves another example's outputs, as
    after a sort or a routing. The last example is held against plain autograd, alone.

    Raises:
        Unlike: Layers for which that, or the way that they are used, does not hold.
    """
    if not layers:
        return []
    y, uses, counts = record(problem, x)
    by_layer = [[use for use in uses if use.weight == layer.weight] for layer in layers]
    _require(layers, [_used_alike(la, mine, counts, len(x)) for la, mine in zip(layers, by_layer, strict=True)])
    generator = stream("spot check of the features", 0)
    scales = torch.exp2(8 * torch.rand(len(x), generator=generator) - 4).to(y)
    weights = torch.randn(y.shape[1], generator=generator).to(y)  # at random: a plain sum may be constant
    edges = [use.output for mine in by_layer for use in mine]
    try:
        mixed = torch.autograd.grad(y, edges, scales[:, None] * weights, retain_graph=True, allow_unused=True)
        each = _each_output(y, edges, sum(la.units * la.positions for la in layers))
    except RuntimeError as error:  # `generic` says what it is
        raise Unlike([layer.weight for layer in layers]) from error
    per_use = iter([(*grads, last) for grads, last in zip(each, mixed, strict=True)])
    pairs = [_features(la, mine, per_use, len(x), problem) for la, mine in zip(layers, by_layer, strict=True)]
    _require(layers, [_own_rows(one, mixed, weights, scales, generator) for one, mixed in pairs])
    plain = _alone(problem, layers, x[-1:], weights)
    _require(
        layers, [_as_alone(la, one, weights, plain, generator) for la, (one, _) in zip(layers, pairs, strict=True)]
    )
    return [one for one, _ in pairs]


def _each_output(y: Tensor, edges: Sequence[GradientEdge], entries: int) -> Sequence[Sequence[Tensor | None]]:
    """The gradients of every output [o] at each edge: all at once where they are small, else one after another.

    What is wrong with a rule of ``vmap`` differs from the mixed outputs' gradients, which are plain.
    """
    each = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, None].expand(-1, *y.shape)
    if y.numel() * entries * y.element_size() <= CHUNK_BYTES:
        with suppress(Exception):  # whatever an operation without a rule raises
            at_once = torch.autograd.grad(y, edges, each, retain_graph=True, allow_unused=True, is_grads_batched=True)
            return [[None] * len(each) if grads is None else grads.unbind() for grads in at_once]
    passes = [torch.autograd.grad(y, edges, one, retain_graph=True, allow_unused=True) for one in each]
    return list(zip(*passes, strict=True))


def _require(layers: Sequence[Layer], right: Sequence[bool]) -> None:
    wrong = [layer.weight for layer, fine in zip(layers, right, strict=True) if not fine]
    if wrong:
        raise Unlike(wrong)


def _used_alike(layer: Layer, uses: list[Use], counts: Mapping[str, int], n: int) -> bool:
    """Whether a block meets a layer as the first example alone did."""
    seen = all(len(uses) == counts[name] for name in layer.names) and all(is_plain(use, n) for use in uses)
    return seen and sum(map(n_positions, uses)) == layer.positions


def _features(
    layer: Layer, uses: list[Use], per_use: Iterator[tuple[Tensor | None, ...]], n: int, problem: Problem
) -> tuple[Features, Tensor]:
    """What a layer's kernel is made of, and the deltas [unit, n, position] of the mixed outputs."""
    gradients = [next(per_use) for _ in uses]
    columns, n_out = layer.groups * layer.inputs, len(gradients[0]) - 1
    like = problem.net.params[layer.weight].new_empty(0, dtype=problem.dtype)
    inputs = like.new_empty(columns + 2, n, layer.positions)
    inputs[columns], inputs[columns + 1] = 1, 0
    deltas = like.new_zeros(layer.units, n_out, n, layer.positions)
    mixed = like.new_zeros(layer.units, n, layer.positions)
    start = 0
    for use, grads in zip(uses, gradients, strict=True):
        patch = patches_of(use)
        here = slice(start, start + patch.shape[-1])
        inputs[:columns, :, here] = patch.transpose(0, 1)
        for o, grad in enumerate(grads):
            if grad is not None:  # an output that the layer does not reach
                # Units stand last after a linear layer, second after a convolution.
                flat = grad.reshape(n, -1, layer.units).mT if use.convolution is None else grad.flatten(2)
                (deltas[:, o] if o < n_out else mixed)[:, :, here] = flat.transpose(0, 1)
        start = here.stop
    return Features(inputs, deltas), mixed


def _own_rows(features: Features, mixed: Tensor, weights: Tensor, scales: Tensor, generator: torch.Generator) -> bool:
    """Whether row n of a layer serves the outputs of example n alone: not another's, as after a sort or a routing.

    Where it does, the gradient of sum_n c_n v'y_n in row n is c_n times that of v'y_n. Units are added up with random
    weights, which cost little.
    """
    deltas = features.deltas
    n_out, n = deltas.shape[1:3]
    units = torch.randn(len(deltas), generator=generator).to(deltas)
    plain = (weights.to(deltas) @ (units @ deltas.flatten(1)).view(n_out, -1)).view(n, -1)  # [n, position]
    gap = (units @ mixed.flatten(1)).view(n, -1) / scales.to(deltas)[:, None] - plain
    return not bool((gap.abs() > _rounding(plain.abs().amax())).any())


def _alone(problem: Problem, layers: Sequence[Layer], x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Plain gradients of v'f(x) of one example by itself."""
    own = dict(problem.net.model.named_parameters())
    names = [name for layer in layers for name in layer.names]
    with torch.enable_grad():
        y = (problem.forward(x) @ weights).sum()
    return dict(zip(names, pullback(y, [own[name] for name in names]), strict=True))


def _as_alone(
    layer: Layer, features: Features, weights: Tensor, plain: Mapping[str, Tensor], generator: torch.Generator
) -> bool:
    """Whether the features of the last example give its plain gradients. Inputs are added up with random weights."""
    deltas = (weights.to(features.deltas)[:, None] * features.deltas[:, :, -1]).sum(1)  # [unit, position]
    mix = torch.randn(layer.inputs + 1, generator=generator).to(deltas)
    inputs = features.inputs[: layer.groups * layer.inputs, -1].view(layer.groups, layer.inputs, layer.positions)
    side, gradient = mix[:-1] @ inputs, plain[layer.weight].flatten(1).to(deltas) @ mix[:-1]  # [group, position]
    if layer.bias is not None:
        side, gradient = side + mix[-1], gradient + mix[-1] * plain[layer.bias].to(deltas)
    terms = deltas.view(layer.groups, -1, layer.positions) * side[:, None]
    gap = terms.sum(-1).flatten() - gradient
    return not bool(gap.norm() > _rounding(terms.abs().sum(-1).norm()))  # sums may cancel


def _rounding(size: Tensor) -> Tensor:
    """What two ways to compute a number of this size may differ by; what underflows counts for nothing."""
    kind = torch.finfo(size.dtype)
    return kind.eps ** (1 / 3) * size + kind.tiny
