"""Networks as plain dicts of tensors, keyed by the module's own names: one network, or a stack of replicas.

A *stacked* dict holds R networks of one architecture on a leading replica axis.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ticketlab.errors import Refused
from ticketlab.shown import as_line, as_table

Params = dict[str, Tensor]
Buffers = dict[str, Tensor]
Masks = dict[str, Tensor]


class State(NamedTuple):
    """All that training changes in a network, or in a stack of them."""

    params: Params
    """By name; a stack has the replica axis in front of each."""
    buffers: Buffers
    """By name, likewise."""

    def __repr__(self) -> str:
        return as_line(self)

    def _repr_html_(self) -> str:
        return as_table(self)

    def clone(self) -> "State":
        """Detached copies of all tensors."""
        params, buffers = ({n: t.detach().clone() for n, t in part.items()} for part in self)
        return State(params, buffers)

    def select(self, index: int | Sequence[int]) -> "State":
        """One network of a stack, without the replica axis, for a number; the stack of several for a sequence."""
        return State(select(self.params, index), select(self.buffers, index))

    def repeat(self, times: int) -> "State":
        """A stack after itself, ``times`` times over."""
        params, buffers = ({n: torch.cat([t] * times) for n, t in part.items()} for part in self)
        return State(params, buffers)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "State":
        """On a device; floating tensors in ``dtype``, complex ones in its complex twin, counters as they are."""
        params, buffers = ({n: moved(t, device, dtype) for n, t in part.items()} for part in self)
        return State(params, buffers)


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """On a device; in ``dtype`` if floating, in its complex twin if complex: nothing imaginary is lost."""
    if tensor.is_complex():
        return tensor.to(device, dtype.to_complex())
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)


def state(model: nn.Module) -> State:
    """Copies of the module's parameters and buffers, detached; a tied parameter appears once.

    Raises:
        Refused: As `check_module`.
    """
    check_module(model)
    return State(
        {name: p.detach().clone() for name, p in model.named_parameters()},
        {name: b.detach().clone() for name, b in model.named_buffers()},
    )


def check_module(model: nn.Module) -> None:
    """Raise unless this is a module whose tensors hold numbers.

    Raises:
        Refused: No module, or one with lazy parameters or tensors on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise Refused(f"model must be an nn.Module: got {type(model).__name__}. Of a factory, pass what it returns.")
    empty = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t) or t.is_meta]
    if empty:
        raise Refused(
            f"parameters and buffers must hold numbers: {empty[:4]} of {type(model).__name__} do not. Call lazy modules"
            " once on an example, in the factory; bring others from the meta device with to_empty, and initialise them."
        )


def stack_states(states: Sequence[State]) -> State:
    """Networks of one architecture on a leading replica axis."""
    return State(stack([s.params for s in states]), stack([s.buffers for s in states]))


def stack(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put the tensors of R dicts with equal names on a leading replica axis."""
    if not states:
        raise Refused("stack needs at least one dict of tensors: got none.")
    names = set(states[0])
    for index, other in enumerate(states):
        if set(other) != names:
            raise Refused(f"every dict must have the names {sorted(names)}: number {index} has {sorted(other)}.")
    return {name: torch.stack([s[name] for s in states]) for name in states[0]}


def select(stacked: Mapping[str, Tensor], index: int | Sequence[int] | slice) -> dict[str, Tensor]:
    """The replicas at ``index``: an int drops the replica axis (a view), a list keeps it (a copy)."""
    return {name: tensor[index] for name, tensor in stacked.items()}


def check_finite(what: str, values: Tensor | Mapping[str, Tensor]) -> None:
    """Refuse NaN or infinity in a tensor, or in any of several: statistics of those would be numbers of nothing.

    Raises:
        Refused: It says how many entries of what are not finite.
    """
    for name, tensor in values.items() if isinstance(values, Mapping) else [(None, values)]:
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum first: one pass less
            where = what if name is None else f"{what}[{name!r}]"
            raise Refused(
                f"{where} must be finite: {int((~tensor.isfinite()).sum())} of {tensor.numel()} entries are NaN or "
                f"infinite, in {tensor.dtype}. Leave out what diverged, or use a wider dtype."
            )
