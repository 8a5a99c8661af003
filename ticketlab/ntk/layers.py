"""Which weights have a fast path, and what that path starts from: a layer's inputs and its output deltas.

A linear layer or a convolution applies one matrix W at each of T positions, so that its part of the Jacobian
is a sum of outer products over positions,

    J[n o, (u, c)] = sum_t delta[u, o, n, t] * input[c, n, t].

Inputs are recorded in one forward pass and deltas by one backward pass an output. A weight that is used
several times, in one module or in tied ones, has its uses lined up along the position axis: the sum is the
same. A use that the recording does not see leaves a trace in the autograd graph, and the weight then has
no fast path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ticketlab.ntk.problem import Problem


@dataclass(frozen=True)
class Layer:
    """A weight with a fast path, and the bias that goes with it as one more input that is always 1."""

    weight: str
    bias: str | None
    groups: int
    """Of a convolution: unit u sees the inputs of group u // (units / groups) alone."""
    positions: int
    """T, summed over the uses of the weight; 1 for a linear layer used once."""
    live: Bool[Tensor, "unit column"]
    """The inputs of a unit's own group, then the bias if there is one."""

    @property
    def units(self) -> int:
        return self.live.shape[0]

    @property
    def inputs(self) -> int:
        return self.live.shape[1] - (self.bias is not None)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Features:
    """What a layer's kernel is made of, for one block of examples."""

    inputs: Float[Tensor, "column n position"]
    """The inputs of group 0, 1, ..., then a row of ones for the bias and a row of zeros to pad with."""
    deltas: Float[Tensor, "unit out n position"]


@dataclass(frozen=True)
class _Use:
    """One call of ``F.linear`` or a convolution with a parameter of the model as its weight."""

    weight: str
    bias: str | None
    x: Tensor
    version: int
    output: GradientEdge
    convolution: dict[str, Any] | None
    kernel: tuple[int, ...]


class _Recorder(TorchFunctionMode):
    """Notes every use of a parameter as a weight. It sees function calls, so the user's modules stay untouched."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.uses: list[_Use] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._note(output, None, *args, **(kwargs or {}))
        elif func in (F.conv1d, F.conv2d):
            self._note_convolution(output, *args, **(kwargs or {}))
        return output

    def _note_convolution(
        self,
        output: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        if input.ndim == weight.ndim:
            self._note(output, how, input, weight, bias)

    def _note(
        self, output: Tensor, how: dict[str, Any] | None, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> None:
        name = self.names.get(id(weight))
        if name is None or not output.requires_grad:
            return
        self.uses.append(
            _Use(
                weight=name,
                bias=None if bias is None else self.names.get(id(bias), ""),
                x=input.detach(),
                version=input._version,
                # The node, not the tensor: an in-place activation after the layer would change the tensor's.
                output=get_gradient_edge(output),
                convolution=how,
                kernel=tuple(weight.shape[2:]),
            )
        )


def _record(problem: Problem, x: Tensor) -> tuple[Tensor, list[_Use], dict[str, Tensor]]:
    leaves = {n: w.detach().requires_grad_(w.is_floating_point()) for n, w in problem.weights.items()}
    with torch.enable_grad(), _Recorder({id(leaf): name for name, leaf in leaves.items()}) as recorder:
        y = problem.forward(leaves, x.detach())
    return y, recorder.uses, leaves


def find_layers(problem: Problem, x: Tensor) -> tuple[list[Layer], int]:
    """The layers with a fast path, in the order of the parameters, and the number of outputs.

    Everything is read off two small forward passes, of one example and of two: which axis is the batch,
    whether the examples keep apart, and how often each parameter is used.
    """
    one, two = x[:1], torch.cat([x[:1], x[-1:]])
    _, alone, _ = _record(problem, one)
    y, uses, leaves = _record(problem, two)
    if not y.requires_grad:
        return [], y.shape[1]
    reached, edges = _graph(y)
    uses = [use for use in uses if use.output.node in reached]
    batched = len(alone) == len(uses) and _apart(y, uses)
    layers = []
    for name in problem.live:
        mine = [use for use in uses if use.weight == name]
        others = [use for use in alone if use.weight == name]
        if not batched or not mine or len(mine) != edges[id(leaves[name])] or len(others) != len(mine):
            continue
        if not all(_is_plain(b, 2) and _is_plain(a, 1) for a, b in zip(others, mine, strict=True)):
            continue
        if len({_groups(use) for use in mine}) > 1:
            continue
        layers.append(_layer(problem, mine, edges, leaves))
    return layers, y.shape[1]


def _layer(problem: Problem, uses: list[_Use], edges: Counter[int], leaves: dict[str, Tensor]) -> Layer:
    name, bias = uses[0].weight, uses[0].bias
    # The bias comes along only where each of its uses is one of this weight's.
    if not bias or bias not in problem.live or any(u.bias != bias for u in uses) or len(uses) != edges[id(leaves[bias])]:
        bias = None
    live = problem.live[name].flatten(1)
    if bias is not None:
        live = torch.cat([live, problem.live[bias][:, None]], 1)
    positions = sum(_patches(use).shape[-1] for use in uses)
    return Layer(name, bias, _groups(uses[0]), positions, live)


def _graph(y: Tensor) -> tuple[set[Any], Counter[int]]:
    """The nodes below an output, and how many edges lead to each leaf (by id): the number of its uses."""
    seen, stack, edges = {y.grad_fn}, [y.grad_fn], Counter[int]()
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if hasattr(node, "variable"):
                edges[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return seen, edges


def _apart(y: Tensor, uses: Sequence[_Use]) -> bool:
    """Whether the outputs of the first example leave every second row of the recorded layers alone."""
    grads = torch.autograd.grad(y[0].sum(), [u.output for u in uses], retain_graph=True, allow_unused=True)
    return all(g is None or not g[1:].any() for g in grads)


def _is_plain(use: _Use, n: int) -> bool:
    """Whether the first axis of a use is the batch, and its input is still what it was when it was used."""
    return use.x.ndim >= 2 and len(use.x) == n and use.x._version == use.version


def _groups(use: _Use) -> int:
    return use.convolution["groups"] if use.convolution else 1


def _patches(use: _Use) -> Float[Tensor, "n column position"]:
    """The inputs that the weight matrix meets at each position; those of a group lie together."""
    if use.convolution is None:
        return use.x.flatten(1, -2).mT if use.x.ndim > 2 else use.x[..., None]
    kernel, x = use.kernel, use.x
    stride, dilation = (_per_axis(use.convolution[key], len(kernel)) for key in ("stride", "dilation"))
    padding = use.convolution["padding"]
    if padding == "same":
        spare = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        x = F.pad(x, [side for s in reversed(spare) for side in (s // 2, s - s // 2)])
    padding = (0,) * len(kernel) if isinstance(padding, str) else _per_axis(padding, len(kernel))
    if len(kernel) == 1:  # unfold knows images only: a sequence is an image of one row
        x, kernel, stride, dilation, padding = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation), (0, *padding)
    return F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)


def _per_axis(value: int | Sequence[int], n_axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n_axes
    return tuple(value) * n_axes if len(value) == 1 else tuple(value)


def features(problem: Problem, layers: Sequence[Layer], x: Tensor) -> list[Features]:
    """Inputs and deltas of each layer for a block of examples: one forward pass, one backward pass an output."""
    y, uses, _ = _record(problem, x)
    by_layer = [[use for use in uses if use.weight == layer.weight] for layer in layers]
    edges = [use.output for mine in by_layer for use in mine]
    found: list[list[Tensor]] = []
    for o in range(y.shape[1]):
        grads = torch.autograd.grad(y[:, o].sum(), edges, retain_graph=True, allow_unused=True)
        found.append(list(grads))
    parts = iter(zip(*found, strict=True))
    return [_features(layer, mine, parts, len(x)) for layer, mine in zip(layers, by_layer, strict=True)]


def _features(layer: Layer, uses: list[_Use], parts: Iterator[tuple[Tensor | None, ...]], n: int) -> Features:
    patches = [_patches(use) for use in uses]
    like = patches[0]
    columns = layer.groups * layer.inputs
    inputs = like.new_empty(columns + 2, n, layer.positions)
    inputs[columns], inputs[columns + 1] = 1, 0
    per_output = []
    start = 0
    for patch in patches:
        stop = start + patch.shape[-1]
        inputs[:columns, :, start:stop] = patch.transpose(0, 1)
        per_output.append(next(parts))
        start = stop
    deltas = like.new_zeros(layer.units, len(per_output[0]), n, layer.positions)
    start = 0
    for use, patch, grads in zip(uses, patches, per_output, strict=True):
        stop = start + patch.shape[-1]
        for o, grad in enumerate(grads):
            if grad is not None:  # an output that the layer does not reach
                # Units stand last after a linear layer, second after a convolution.
                flat = grad.reshape(n, -1, layer.units).mT if use.convolution is None else grad.flatten(2)
                deltas[:, o, :, start:stop] = flat.transpose(0, 1)
        start = stop
    return Features(inputs, deltas)
