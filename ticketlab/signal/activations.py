"""Elementwise activations as mean-field theory needs them: value, derivative, and where they bend.

A callable is taken only if it acts on each element by itself and is continuous; its derivative is autograd's. What
makes its Gaussian integrals hard (kinks, steep places) is found once, by refining a mesh until it integrates both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ticketlab.errors import Refused, nearest
from ticketlab.network import network
from ticketlab.seeds import kept_generators
from ticketlab.shown import as_line, as_table
from ticketlab.state import state

Activation = str | Callable[[Tensor], Tensor]

NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "erf": torch.erf,
    "gelu": F.gelu,
    "silu": F.silu,
    "linear": lambda u: u,
}
NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(20))
_FAR = 64.0  # bends are looked for within this distance of 0
_CLOSE = 1e-9  # and located to this


@dataclass(frozen=True)
class Elementwise:
    """An activation that has been checked."""

    name: str
    function: Callable[[Tensor], Tensor]
    edges: Tensor
    """Ascending; between two neighbours 20 Gauss-Legendre nodes integrate phi and phi' to rounding."""
    kinks: Tensor
    """Where phi' jumps."""
    reach: float
    """The mesh is fine enough for |u| up to this: infinite unless phi goes on to vary beyond 64, as sin does."""

    __repr__, _repr_html_ = as_line, as_table

    def __call__(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            return _call(self.function, u)

    def derivative(self, u: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = u.detach().clone().requires_grad_()
            return torch.autograd.grad(_call(self.function, leaf).sum(), leaf)[0]


_APPLIED = {
    *("relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "softplus"),
    *("tanh", "sigmoid", "logsigmoid", "hardtanh", "hardsigmoid", "hardswish", "softsign", "tanhshrink", "hardshrink"),
    *("softshrink", "threshold", "erf", "sin", "cos", "clamp", "clip", "softmax", "log_softmax", "exp"),
}


class _Names(TorchFunctionMode):
    """Names of the functions that are called on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.met: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.met.add(getattr(func, "__name__", "").rstrip("_"))
        return func(*args, **(kwargs or {}))


def applied(model: nn.Module, x: Tensor) -> frozenset[str]:
    """Names of the activations that a forward pass applies, as modules or as functions, such as {"relu"}."""
    with network(model, state(model), x).lent(), torch.no_grad(), _Names() as names:
        model(x[:1].clone())
    return frozenset(names.met & _APPLIED)


def elementwise(activation: Activation) -> Elementwise:
    """A named activation, or a callable that is checked to be elementwise, continuous and differentiable.

    Raises:
        Refused: An unknown name, a callable that mixes elements, draws at random, jumps, or has no gradient.
    """
    if isinstance(activation, Elementwise):
        return activation
    if isinstance(activation, str):
        if activation not in NAMED:
            raise Refused(nearest("activation", activation, tuple(NAMED)))
        if activation not in _CHECKED:
            _CHECKED[activation] = _checked(activation, NAMED[activation])
        return _CHECKED[activation]
    if not callable(activation):
        raise Refused(f"activation must be a name or an elementwise callable on tensors: got {activation!r}.")
    return _checked(getattr(activation, "__name__", type(activation).__name__), activation)


_CHECKED: dict[str, Elementwise] = {}


def _call(function: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    return function(u.clone())  # an in-place activation must not change its argument


def _checked(name: str, function: Callable[[Tensor], Tensor]) -> Elementwise:
    with kept_generators():  # one that draws is refused, and leaves the caller's generator alone
        _check_elementwise(name, function)
    raw = Elementwise(name, function, torch.empty(0), torch.empty(0), math.inf)
    edges, reach = _mesh(raw)
    near = edges[edges.abs() <= _FAR]
    step = _CLOSE * near.abs().clamp(min=1)
    below, above = near - step, near + step
    jumps = (raw(above) - raw(below)).abs() > 1e-5 * raw(near).abs().clamp(min=1)
    if jumps.any():
        at = [float(f"{u:.6g}") for u in near[jumps]]
        raise Refused(
            f"activation {name!r} must be continuous, for phi' stands in every integral: it jumps near u = {at[:5]}."
        )
    slopes = (raw.derivative(above) - raw.derivative(below)).abs()
    # Both sides of a bracketed kink see it: the second of two neighbours is the same kink.
    kinks = near[slopes > 1e-5]
    apart = torch.cat([torch.ones(1, dtype=torch.bool), kinks.diff() > 10 * _CLOSE])[: len(kinks)]
    return Elementwise(name, function, edges, kinks[apart], reach)


def _check_elementwise(name: str, function: Callable[[Tensor], Tensor]) -> None:
    if isinstance(function, nn.Module) and any(p.dtype != torch.float64 for p in function.parameters()):
        raise Refused(f"activation {name!r} must have its parameters in float64: convert it with .double().")
    u = torch.linspace(-2.9, 3.1, 24, dtype=torch.float64).reshape(4, 6)
    must = f"activation {name!r} must be elementwise: a function of each element alone that maps [4, 6] to [4, 6]"
    try:
        leaf = u.clone().requires_grad_()
        y = _call(function, leaf)
        slope = torch.autograd.grad(y.sum(), leaf)[0]
        alone = torch.stack([_call(function, one.reshape(1, 1)).reshape(()) for one in u.flatten()]).reshape(4, 6)
    except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise Refused(
            f"{must} in float64, differentiable by autograd: it fails with {type(error).__name__}: {error}"
        ) from error
    if y.dtype != torch.float64:
        raise Refused(f"activation {name!r} must keep float64: it returns {y.dtype}.")
    if y.shape == u.shape and not (y.isfinite().all() and slope.isfinite().all()):
        raise Refused(f"activation {name!r} must be finite with a finite derivative on [-2.9, 3.1]: it is not.")
    if y.shape != u.shape or not torch.allclose(y, alone, rtol=1e-9, atol=1e-12):
        raise Refused(
            f"{must}, the same each time: got {tuple(y.shape)}, and other values for elements given one by one. "
            "Softmax, normalisation and dropout have no mean-field maps of this kind."
        )


def _mesh(phi: Elementwise) -> tuple[Tensor, float]:
    """Panel edges and their reach: halved until one Gauss-Legendre rule and two halves agree on phi and phi'."""
    powers = 2.0 ** torch.arange(-1, 7, dtype=torch.float64)  # to 64
    edges = torch.cat([-powers.flip(0), torch.zeros(1, dtype=torch.float64), powers])
    done = []
    panels = torch.stack([edges[:-1], edges[1:]], 1)
    while len(panels):
        halves = _halves(panels)
        rough = _rough(phi, panels, halves)
        rough &= panels[:, 1] - panels[:, 0] > _CLOSE / 2
        done.append(panels[~rough].flatten())
        panels = halves.reshape(-1, 4)[rough].reshape(-1, 2)
        if sum(map(len, done)) > 4000 or len(panels) > 4000:
            raise Refused(
                f"activation {phi.name!r} must be piecewise smooth on [-64, 64]: no mesh of 2,000 panels resolves it."
            )
    far = _FAR * 2.0 ** torch.arange(18, dtype=torch.float64)
    far = torch.cat([-far.flip(0), far])
    panels = torch.stack([far[:-1], far[1:]], 1)[far[1:] != _FAR]
    reach = _FAR if _rough(phi, panels, _halves(panels)).any() else math.inf
    return torch.cat([far, *done]).unique(), reach


def _halves(panels: Tensor) -> Tensor:
    middle = panels.mean(1)
    return torch.stack([panels[:, 0], middle, middle, panels[:, 1]], 1).reshape(-1, 2)


def _rough(phi: Elementwise, panels: Tensor, halves: Tensor) -> Tensor:
    """Which panels integrate phi or phi' otherwise than their halves do."""
    rough = torch.zeros(len(panels), dtype=torch.bool)
    for f in (phi, phi.derivative):
        whole, split = _panel_integrals(f, panels), _panel_integrals(f, halves).reshape(-1, 2)
        scale = (panels[:, 1] - panels[:, 0]) * f(panels.flatten()).abs().max().clamp(min=1)
        rough |= (whole - split.sum(1)).abs() > 1e-12 * scale
    return rough


def _panel_integrals(f: Callable[[Tensor], Tensor], panels: Tensor) -> Tensor:
    half = (panels[:, 1:] - panels[:, :1]) / 2
    return (f(panels.mean(1, keepdim=True) + half * NODES) * WEIGHTS * half).sum(1)
