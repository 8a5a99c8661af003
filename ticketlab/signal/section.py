"""A stretch of a network between two named modules, as a function of what enters it.

Jacobians here are those of a section: from the input, or what module ``source`` returns, to the output, or what
module ``target`` returns. The user's modules carry a hook while a section runs, and none afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ticketlab import masks as mask_ops
from ticketlab.errors import Refused, nearest
from ticketlab.functional import evaluating, fitted, refuse_batch_statistics
from ticketlab.gradients.point import check_finite
from ticketlab.seeds import stream
from ticketlab.state import State, select


@dataclass(frozen=True)
class Section:
    """One network between two places."""

    model: nn.Module
    tensors: dict[str, Tensor]
    source: str | None
    target: str | None

    def entering(self, x: Tensor) -> Tensor:
        """What the section is a function of, at these inputs."""
        if self.source is None:
            return _channels_last(x.detach().clone())
        return self._run(x, None)[1].detach()

    def __call__(self, u: Float[Tensor, "n *shape"], x: Tensor) -> Float[Tensor, "n out"]:
        """The section's value where u enters it, one row an input."""
        y = self._run(u if self.source is None else x, u)[0]
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
            given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise Refused(f"a Jacobian needs one tensor whose first axis is the {len(x)} inputs: got {given}.")
        return y.reshape(len(x), -1)

    def linearised(self, u: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
        """The section's value at u, and the product of J' with a vector."""
        y, *pull = vjp(lambda entering: self(entering, x), u)
        return y, pull[0]

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

        with evaluating(self.model), hooked(self.model, seen, note), sdpa_kernel(SDPBackend.MATH):
            # Fused attentions have no second derivative; what this forward pass records is all that is differentiated.
            y = functional_call(self.model, self.tensors, (x,))
        for name, outputs in seen.items():
            if len(outputs) != 1:
                raise Refused(f"module {name!r} must run once in a forward pass: it runs {len(outputs)} times.")
            check_output("module", name, outputs[0], len(x))
        target = y if self.target is None else seen[self.target][0]
        return target, x if self.source is None else seen[self.source][0]


def check_output(kind: str, name: str, output: object, n: int) -> None:
    """Raise a ValueError unless what a named module returns is one tensor, an entry of its first axis an input."""
    if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != n:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise Refused(
            f"{kind} {name!r} must return one tensor whose first axis is the {n} inputs: it returns {given}. "
            "Name one inside it or after it."
        )


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], note: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """``note(name, output)`` is called as each named module returns; what it returns replaces the output."""
    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda _module, _inputs, output, name=name: note(name, output))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sections(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Tensor,
    masks: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
    source: str | None = None,
    target: str | None = None,
) -> tuple[list[Section], bool]:
    """One section a replica, and whether there is a replica axis.

    Raises:
        Refused: Names, shapes or dtypes that do not fit; weights that are not finite; batch norm that depends on
            the batch; inputs that otherwise act on one another's outputs.
    """
    states, stacked = networks(model, params, x, masks, buffers)
    known = [name for name, _ in model.named_modules() if name]
    for name in (source, target):
        if name is not None and name not in known:
            raise Refused(nearest("module", name, known))
    found = [Section(model, {**state.params, **state.buffers}, source, target) for state in states]
    _check_apart(found[0], x[:2])
    return found, stacked


def networks(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Tensor,
    masks: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
) -> tuple[list[State], bool]:
    """Each replica's m * theta and buffers, detached, and whether there is a replica axis."""
    refuse_batch_statistics(model, "signal statistics need")
    if masks is not None:
        mask_ops.validate(model, masks)
    replicas, state = fitted(model, params, masks, buffers)
    weight = next(iter(state.params.values()))
    if x.ndim == 0 or len(x) == 0 or x.dtype != weight.dtype or x.device != weight.device:
        raise Refused(
            f"x must hold at least one input on its first axis, in {weight.dtype} on {weight.device} as params: "
            f"got shape {tuple(x.shape)}, {x.dtype} on {x.device}."
        )
    check_finite(state.params)
    # Statistics kept in float32 must not pull a float64 Jacobian down with them.
    buffers = {n: b.to(weight.dtype) if b.is_floating_point() else b for n, b in state.buffers.items()}
    plain = State({n: p.detach() for n, p in state.params.items()}, {n: b.detach() for n, b in buffers.items()})
    each = [plain] if replicas is None else [State(*(select(part, r) for part in plain)) for r in range(replicas)]
    laid_out = [State({n: _channels_last(p) for n, p in one.params.items()}, one.buffers) for one in each]
    return laid_out, replicas is not None


def _channels_last(images: Tensor) -> Tensor:
    """Convolutions run a quarter faster in this layout; nothing else changes."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


def _check_apart(section: Section, x: Tensor) -> None:
    """One product gives a row of every input's Jacobian only if neither of two inputs acts on the other's output."""
    with torch.enable_grad():
        u = section.entering(x).requires_grad_()
        y = section(u, x)
        if not y.requires_grad:
            raise Refused(
                f"{section.target or 'the output'} must depend on {section.source or 'the input'}, differentiably: "
                "it does not. Name a source that runs before the target."
            )
        # Weighed at random, for a plain sum may be constant, as softmax's is.
        weights = torch.randn(y.shape[1], generator=stream("weights of outputs", 0)).to(y)
        grads = torch.stack(
            [torch.autograd.grad(one @ weights, u, retain_graph=True, materialize_grads=True)[0] for one in y]
        )
    if not (y.isfinite().all() and grads.isfinite().all()):
        raise Refused(
            "values and derivatives must be finite: those of "
            f"{section.target or 'the output'} at the first inputs are not. Look at x and the buffers."
        )
    if len(x) > 1 and (grads[0, 1].any() or grads[1, 0].any()):
        raise Refused(
            "each input must pass through the network by itself: the output of one depends on another. "
            "Replace what couples a batch, or put such modules in evaluation mode."
        )
