"""The hidden-unit permutations that leave a network's function unchanged, found by tracing it.

``torch.export`` gives the operations of one forward pass; their rules say which axes of which parameters and buffers
must be permuted together. Residual streams come out as one group, the columns of a linear layer behind a flattening
as channels x positions, and the statistics of a batch norm go with its channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.network import network
from ticketlab.permutation.axes import Axis
from ticketlab.permutation.permute import Factors, Groups, difference, permute
from ticketlab.permutation.trace import Trace, trace
from ticketlab.seeds import stream
from ticketlab.state import State, state


def groups(model: nn.Module, x: Tensor) -> Groups:
    """Trace a network and derive the permutations of hidden units that leave its function unchanged.

    Every operation ties axes together (a linear layer its input to its weight's columns, an addition its two
    summands, a grouped convolution both its ends); the axes of ``x`` and of the output, and all that an unknown
    operation touches, keep their order. What is found is always a symmetry, and was tried: units of perturbed
    weights trade places on ``x``, and a group that changes the outputs is dropped. It can miss some: channels that
    are concatenated to others of another number or zero-padded keep their order, grouped channels may trade places
    only as whole groups and, inside them, in the same way in every group.

    Args:
        model: Any module that ``torch.export`` can trace; not changed.
        x: An example input [n, ...]; its values do not matter.

    Raises:
        Refused: The module cannot be traced, computes something random, or has no hidden units to permute.
    """
    network(model, state(model), finite=False)  # refuses surroundings in which nothing is lent, as inference mode
    traced = trace(model, x)
    found = _confirmed(model, x, _named(traced))
    if not found.sizes:
        difference(model, state(model), state(model), x)  # refuses networks that compute something random, as such
        raise Refused(
            f"{type(model).__name__} must have hidden units that can be permuted: every axis is tied to the input, the "
            "output, a constant, an operation in which order matters or an operation without a rule (here: "
            f"{', '.join(traced.ordered) or 'none'}). Write it as others, or give it a rule in "
            "ticketlab.permutation.rules."
        )
    return found


def _named(traced: Trace) -> Groups:
    """Names for the free atoms: the layer whose first axis they are first."""
    axes, tensors = traced.axes, traced.tensors
    firsts = [(atom, name) for name, own in tensors.items() for axis in own[:1] for atom in axes.atoms(axis)]
    layers = {atom: name.rpartition(".")[0] or name for atom, name in reversed(firsts)}
    names: dict[int, str] = {}
    for name in traced.read:
        for atom in (atom for axis in tensors[name] for atom in axes.atoms(axis)):
            if axes.is_free(atom) and atom not in names:
                stem = layers.get(atom, name.rpartition(".")[0] or name)
                taken = sum(other.partition("#")[0] == stem for other in names.values())
                names[atom] = f"{stem}#{taken + 1}" if taken else stem

    def factors(axis: Axis) -> Factors:
        return tuple((names.get(atom), axes.sizes[atom]) for atom in axes.atoms(axis))

    sizes = {name: axes.sizes[atom] for atom, name in names.items()}
    return Groups(sizes, {name: tuple(factors(axis) for axis in own) for name, own in tensors.items()})


def _confirmed(model: nn.Module, x: Tensor, found: Groups) -> Groups:
    """The groups that stand a trial: one that the rules let through by mistake is found by bisection and dropped."""
    own = state(model)
    try:
        broken = _broken(model, x, found, _perturbed(own, found))
    except Refused:  # the perturbed weights have left the domain, as of a logarithm
        broken = _broken(model, x, found, own)
    if not broken:
        return found
    kept = {name: size for name, size in found.sizes.items() if name not in broken}
    axes = {
        name: tuple(tuple((group if group in kept else None, size) for group, size in axis) for axis in own)
        for name, own in found.axes.items()
    }
    return Groups(kept, axes, tuple(broken))


def _broken(model: nn.Module, x: Tensor, found: Groups, probe: State) -> list[str]:
    """The groups whose units, trading places in the network ``probe``, change its outputs."""

    def change(names: list[str]) -> bool:
        chosen = {name: _moved(found.sizes[name], list(found.sizes).index(name)) for name in names}
        moved = State(*(permute(found, part, chosen) for part in probe))
        gap, scale, rounding = difference(model, probe, moved, x)
        return not gap <= rounding * scale

    def bisected(names: list[str]) -> list[str]:
        if not names or not change(names):
            return []
        half = len(names) // 2
        return names if half == 0 else bisected(names[:half]) + bisected(names[half:])

    broken = bisected(list(found.sizes))
    rest = [name for name in found.sizes if name not in broken]
    return list(found.sizes) if broken and change(rest) else broken


def _perturbed(own: State, found: Groups) -> State:
    """Weights that differ from one another, where initial ones may all be 0 or 1, and statistics that stay positive."""
    generator = stream("perturbed weights", 0)

    def moved(name: str, tensor: Tensor, draw: Callable[..., Tensor]) -> Tensor:
        if not tensor.is_floating_point() or not found.of(name):
            return tensor
        noise = draw(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return tensor.nan_to_num(0, 0, 0) + 0.05 * noise

    return State(
        {name: moved(name, p, torch.randn) for name, p in own.params.items()},
        {name: moved(name, b, torch.rand) for name, b in own.buffers.items()},
    )


def _moved(size: int, seed: int) -> Tensor:
    """A random permutation that leaves no unit in its place: one cycle through all."""
    order = torch.randperm(size, generator=stream("trial permutation", seed))
    return torch.empty_like(order).scatter_(0, order, order.roll(1))
