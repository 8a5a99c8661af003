"""Every use of a parameter as a weight in one forward pass, and what the autograd graph says about it.

A ``TorchFunctionMode`` sees the calls of ``F.linear`` and the convolutions themselves, whatever module makes
them, so the user's model carries no hooks. The graph tells how often a parameter is used in all: a use that
is not among the recorded ones cannot go unnoticed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ticketlab.ntk.problem import Problem
from ticketlab.shown import as_line, as_table


@dataclass(frozen=True)
class Use:
    """One call of ``F.linear`` or a convolution with a parameter of the model as its weight."""

    weight: str
    bias: str | None
    x: Tensor
    version: int
    output: GradientEdge
    convolution: dict[str, Any] | None
    kernel: tuple[int, ...]

    __repr__, _repr_html_ = as_line, as_table


class _Recorder(TorchFunctionMode):
    """Notes every use of a parameter as a weight. It sees function calls, so the user's modules stay untouched."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.uses: list[Use] = []

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
        plain = input.layout == torch.strided and not input.is_nested and weight.ndim > 1
        if name is None or not output.requires_grad or not plain:
            return
        self.uses.append(
            Use(
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


def record(problem: Problem, x: Tensor) -> tuple[Tensor, list[Use], dict[str, int]]:
    """The outputs, the uses that they are made of, and how often the graph uses each parameter in all.

    A use for something else, such as an auxiliary head or a detached copy, has no part in the derivatives.
    """
    names = {id(p): name for name, p in problem.net.model.named_parameters()}
    with torch.enable_grad(), _Recorder(names) as recorder:
        y = problem.forward(x)
    reached, edges = _graph(y)
    counts = {name: edges[key] for key, name in names.items()}
    return y, [use for use in recorder.uses if use.output.node in reached], counts


def _graph(y: Tensor) -> tuple[set[Any], Counter[int]]:
    """The nodes below an output, and how many edges lead to each leaf (by id): the number of its uses."""
    root: Any = y.grad_fn
    seen, stack, edges = {root}, [root] if root is not None else [], Counter[int]()
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


def is_plain(use: Use, n: int) -> bool:
    """Whether the first axis of a use is the batch, and its input is still what it was when it was used."""
    return use.x.ndim >= 2 and len(use.x) == n and use.x._version == use.version


def n_groups(use: Use) -> int:
    return use.convolution["groups"] if use.convolution else 1


def n_positions(use: Use) -> int:
    return patches_of(replace(use, x=use.x[:1])).shape[-1]


def patches_of(use: Use) -> Float[Tensor, "n column position"]:
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
