"""A stretch of a network between two named modules, as a function of what enters it.

Jacobians here are those of a section: from the input, or what module ``source`` returns, to the output, or what
module ``target`` returns. A section runs while its network is lent; hooks say and replace what passes its ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.derivatives import pullback
from ticketlab.errors import Refused, nearest
from ticketlab.network import Network, network
from ticketlab.probing import close
from ticketlab.seeds import stream
from ticketlab.shown import as_line, as_table
from ticketlab.state import State, check_finite


class At(NamedTuple):
    """A section at some inputs, with the graph that leads from one to the other."""

    u: Float[Tensor, "n *shape"]
    """What enters: a leaf."""
    y: Float[Tensor, "n out"]
    """What comes out, one row per input."""


@dataclass(frozen=True)
class Section:
    """One network between two places; it runs inside ``net.lent()``."""

    net: Network
    source: str | None
    target: str | None
    channels_last: bool = False
    """Whether images enter in the layout in which convolutions run a quarter faster."""

    __repr__, _repr_html_ = as_line, as_table

    def at(self, x: Tensor) -> At:
        if self.source is None:
            u = _channels_last(x.clone()) if self.channels_last else x.clone()
        else:
            u = self._run(x, None)[1]
        u = u.detach().requires_grad_()
        y = self._run(u if self.source is None else x, u)[0].reshape(len(x), -1)
        check_finite(f"values of {self.target or 'the output'}", y)  # a rectifier's derivative at NaN is finite
        return At(u, y)

    def laid_out(self) -> Section:
        """The same, with images and kernels in channels-last."""
        kernels = {name: _channels_last(p) for name, p in self.net.params.items()}
        return replace(self, net=replace(self.net, params=kernels), channels_last=True)

    def _run(self, x: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor]:
        """(value at the target, value at the source), with u put in the place of the latter if given."""
        seen: dict[str, list[Tensor]] = {name: [] for name in (self.source, self.target) if name is not None}

        def note(name: str, output: Tensor) -> Tensor | None:
            if name == self.source and u is not None:
                output = u.clone()  # an in-place activation that follows must not write into it
                seen[name].append(output)
                return output
            seen[name].append(output.clone() if isinstance(output, Tensor) else output)
            return None

        with hooked(self.net.model, seen, note):
            y = self.net.forward(x)
        check_outputs("module", seen, len(x))
        target = y if self.target is None else seen[self.target][0]
        return target, x if self.source is None else seen[self.source][0]


def check_outputs(kind: str, seen: Mapping[str, Sequence[object]], n: int) -> None:
    """Raise unless each named module ran once and returned one floating tensor, an entry of its first axis an input."""
    for name, outputs in seen.items():
        if len(outputs) != 1:
            raise Refused(f"{kind} {name!r} must run once in a forward pass: it runs {len(outputs)} times.")
        (y,) = outputs
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != n or not y.is_floating_point():
            given = f"{tuple(y.shape)}, {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise Refused(
                f"{kind} {name!r} must return one tensor whose first axis is the {n} inputs: it returns {given}. "
                "Name one inside it or after it."
            )


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], note: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """``note(name, output)`` is called as each named module returns; what it returns replaces the output."""
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = [
        modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_names(model: nn.Module, names: Iterable[str | None], kind: str) -> None:
    """Raise unless these are modules of the model; "" is the model itself."""
    known = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name in names:
        if name is not None and name not in known:
            raise Refused(nearest(kind, name, [n for n in known if n] or ['""']))


def sections(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Tensor,
    masks: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
    source: str | None = None,
    target: str | None = None,
) -> tuple[list[Section], bool, Float[Tensor, "2 *shape"]]:
    """One section per replica, whether there is a replica axis, and plain slopes of the first.

    The slopes are those of its first and last input's outputs, weighed by `weights_of_outputs`, by plain autograd in
    the default layout: what a fast path has to agree with.

    Raises:
        Refused: As `network`; names of no module; a target that does not depend on the source; inputs that act on one
            another between the two; values or derivatives that are not finite.
    """
    net = network(model, state, x, masks=masks, buffers=buffers)
    check_names(model, (source, target), "module")
    if source is None and not x.is_floating_point():
        embeddings = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
        raise Refused(
            f"x must be floating to be differentiated in: got {x.dtype}. Name source=, the module that embeds it"
            + (f": one of {embeddings}." if embeddings else ".")
        )
    found = [Section(one, source, target) for one in net.each()]
    pair = x[[0, -1]]
    first = _checked(found[0], pair)
    if any(p.ndim == 4 for p in net.params.values()) and _agrees(found[0].laid_out(), pair, first):
        found = [section.laid_out() for section in found]
    return found, net.replicas is not None, first[1][[0, 1], [0, 1]]


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def weights_of_outputs(y: Float[Tensor, "n out"]) -> Float[Tensor, " out"]:
    """Outputs are weighed at random where a plain sum may be constant, as softmax's is."""
    return _weights(y.shape[1]).to(y)


@lru_cache(maxsize=16)
def _weights(n: int) -> Tensor:
    return torch.randn(n, generator=stream("weights of outputs", 0))


def _slopes(section: Section, pair: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and each one's derivative in what enters: [n, out], [n, n, *shape]."""
    with torch.enable_grad(), section.net.lent():
        u, y = section.at(pair)
        if not y.requires_grad:
            return y, u.new_zeros(len(y), *u.shape)
        weights = weights_of_outputs(y)
        slopes = [pullback(one @ weights, [u], retain_graph=True)[0] for one in y]
    return y.detach(), torch.stack(slopes)


def _checked(section: Section, pair: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes at two inputs, refused where one product would not give a row of every input's Jacobian."""
    if section.source is not None or section.target is not None:
        with torch.no_grad(), section.net.lent():
            section.at(pair[[0, 1, 0]])  # an axis of length 2 that is not that of the inputs would pass below
    y, slopes = _slopes(section, pair)
    value, origin = section.target or "the output", section.source or "the input"
    check_finite(f"derivatives of {value}", slopes)
    if slopes[0, 1].any() or slopes[1, 0].any():
        raise Refused(
            f"each input must pass through the network by itself: {value} at one depends on {origin} at another. "
            "Replace what couples a batch."
        )
    if not slopes.any() and not _reaches(section, pair):
        raise Refused(
            f"{value} must depend on {origin}, differentiably: it does not. Name a source that runs before the target."
        )
    return y, slopes


def _reaches(section: Section, pair: Tensor) -> bool:
    """Whether a graph leads from what enters to the value, whose derivative may be zero all the same."""
    with torch.enable_grad(), section.net.lent():
        u, y = section.at(pair)
        found = torch.autograd.grad(y.sum(), u, allow_unused=True) if y.requires_grad else [None]
    return found[0] is not None


def _agrees(section: Section, pair: Tensor, expected: tuple[Tensor, Tensor]) -> bool:
    try:
        return all(map(close, _slopes(section, pair), expected))
    except Exception:  # a view that this layout does not allow, say
        return False
