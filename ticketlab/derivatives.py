"""Derivatives of a network's loss and outputs in its parameters: gradients, curvature products, rows of the Jacobian.

Each takes one `Network` and a `Loss`, goes through the data in batches and differentiates with plain autograd while
the module holds m * theta. `rows` has a fast path by ``vmap``, held against plain autograd each time it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp, vmap

from ticketlab.batches import portion
from ticketlab.errors import Refused
from ticketlab.losses import Loss
from ticketlab.network import Network
from ticketlab.probing import close
from ticketlab.state import Params

Cotangents = Callable[..., Float[Tensor, "c *out"]]
"""Outputs [*out] of one example, and its targets if any -> the vectors that its Jacobian is multiplied with from the
left."""

_ROW_ELEMENTS = 2**24  # of rows held at once
_FAULTS_OF_MODEL = ("not implemented", "once_differentiable", "use_reentrant", "inplace operation", "is not supported")


def gradient(
    net: Network, x: Tensor, y: Tensor, loss: Loss, names: Sequence[str] | None = None, batch_size: int = 500
) -> Params:
    """Gradient of the mean loss at m * theta, pruned coordinates included; zero where the loss does not reach.

    Args:
        net: One network.
        x: Examples [n, ...].
        y: Their targets.
        loss: Of the task.
        names: Parameters; all trainable ones when None.
        batch_size: Examples in a forward pass.
    """
    names = net.trainable if names is None else tuple(names)
    total = {n: torch.zeros_like(net.params[n]) for n in names}
    with torch.enable_grad(), net.lent() as weights:
        for xs, ys, share in batches(x, y, batch_size):
            found = pullback(loss.mean(net.forward(xs), ys), [weights[n] for n in names])
            for name, part in zip(names, found, strict=True):
                total[name] += share * part
    return total


def hessian_product(
    net: Network,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    vector: Mapping[str, Tensor],
    batch_size: int = 500,
) -> Params:
    r"""Product of the Hessian of the mean loss, in the parameters that ``vector`` names, with it.

    .. math:: H v = \nabla (\nabla L \cdot v)

    Raises:
        Refused: An operation without a second derivative.
    """
    names = tuple(vector)
    total = {n: torch.zeros_like(net.params[n]) for n in names}
    with torch.enable_grad(), net.lent() as weights:
        inner = [weights[n] for n in names]
        for xs, ys, share in batches(x, y, batch_size):
            slope = pullback(loss.mean(net.forward(xs), ys), inner, create_graph=True)
            along = sum((g * vector[n]).sum() for n, g in zip(names, slope, strict=True))
            if isinstance(along, Tensor) and along.requires_grad:
                for name, part in zip(names, pullback(along, inner), strict=True):
                    total[name] += share * part
    return total


def gauss_newton_product(
    net: Network,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    vector: Mapping[str, Tensor],
    batch_size: int = 500,
) -> Params:
    r"""Product of the Gauss-Newton matrix of the mean loss, in the parameters that ``vector`` names, with it.

    .. math:: G v = \frac1N \sum_n J_n^\top \frac{\partial^2 \ell_n}{\partial f^2} J_n v

    The generalised one (Schraudolph 2002): the Hessian without the curvature of the network itself. w -> J' w is linear
    in w, and the derivative of v . J' w in w is J v: no forward-mode rule is needed.

    Raises:
        Refused: An operation whose derivative cannot be differentiated, or is wrong then.
    """
    names = tuple(vector)
    total = {n: torch.zeros_like(net.params[n]) for n in names}
    with torch.enable_grad(), net.lent() as weights:
        inner = [weights[n] for n in names]
        for xs, ys, share in batches(x, y, batch_size):
            outputs = net.forward(xs)
            bent = loss.bend(outputs.detach(), ys, _pushed(outputs, inner, [vector[n] for n in names])) / len(xs)
            for name, part in zip(names, pullback(outputs, inner, bent), strict=True):
                total[name] += share * part
    return total


def _pushed(y: Tensor, inner: Sequence[Tensor], vector: Sequence[Tensor]) -> Tensor:
    """J v, held against w . J v = J' w . v: a backward pass that is not differentiable in w gives zeros, no error."""
    w = torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y).requires_grad_()
    products = [p * v for p, v in zip(pullback(y, inner, w, create_graph=True), vector, strict=True)]
    along = torch.stack([p.sum() for p in products]).sum()
    found = pullback(along, [w], retain_graph=True)[0]
    with torch.no_grad():
        directly = w * found
        size = torch.stack([p.square().sum() for p in [*products, directly]]).sum().sqrt()
        if not close(torch.stack([directly.sum(), size]), torch.stack([along, size])):
            raise Refused(
                "PyTorch must be able to differentiate the model's backward pass for this, and what it gives is wrong. "
                "Let the backward pass of a torch.autograd.Function be made of differentiable operations."
            )
    return found


def rows(
    net: Network, x: Float[Tensor, "n *input"], cotangents: Cotangents, names: Sequence[str], *targets: Tensor
) -> Generator[tuple[slice, dict[str, Float[Tensor, "block c *shape"]]], None, None]:
    r"""Rows :math:`J_n^\top r` of each example's Jacobian in the named parameters, block by block of examples.

    Each example goes through the model by itself. Where ``vmap`` has no rule for an operation, or a wrong one, the
    rows come from plain autograd, one after another.

    Args:
        net: One network.
        x: Examples.
        cotangents: The vectors r of an example, as a function of its outputs, and of its own of the targets.
        names: Trainable parameters.
        *targets: Labels or the like, [n, ...] each.
    """
    with torch.enable_grad(), net.lent():
        copies = len(cotangents(net.forward(x[:1]).detach()[0], *(t[0] for t in targets)))
        size = max(1, _ROW_ELEMENTS // (copies * sum(net.params[n].numel() for n in names)))
        fast = True
        for start in range(0, len(x), size):
            block = tuple(part[start : start + size].detach() for part in (x, *targets))
            found = _mapped(net, cotangents, names, *block) if fast else None
            fast = found is not None
            here = slice(start, start + len(block[0]))
            yield here, _looped(net, cotangents, names, *block) if found is None else found


def _mapped(net: Network, cotangents: Cotangents, names: Sequence[str], *block: Tensor) -> dict[str, Tensor] | None:
    """By two nested ``vmap``; None where they fail, or differ from plain autograd on the first and the last example."""

    def of_one(one: Tensor, *target: Tensor) -> dict[str, Tensor]:
        y, pull = vjp(lambda w: net.call(w, one[None])[0], {n: net.params[n] for n in names})  # type: ignore[misc]
        return vmap(pull)(cotangents(y, *target))[0]

    try:
        found = vmap(of_one)(*block)
    except Exception:  # whatever an operation without a rule raises
        return None
    ends = [0, len(block[0]) - 1]
    plain = _looped(net, cotangents, names, *(part[ends] for part in block))
    return found if all(close(found[n][ends], plain[n]) for n in names) else None


def _looped(net: Network, cotangents: Cotangents, names: Sequence[str], *block: Tensor) -> dict[str, Tensor]:
    weights, found = dict(net.model.named_parameters()), []
    # Of all weights at once: where it alone is asked for, that of a GroupNorm in channels-last crashes (torch 2.13).
    inner = [weights[n] for n in net.trainable]
    for one, *target in zip(*block, strict=True):
        y = net.forward(one[None])[0]
        pulled = [pullback(y, inner, r, retain_graph=True) for r in cotangents(y.detach(), *target)]
        found.append([torch.stack(parts) for parts in zip(*pulled, strict=True)])
    every = {n: torch.stack(parts) for n, parts in zip(net.trainable, zip(*found, strict=True), strict=True)}
    return {n: every[n] for n in names}


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Parts that fit in memory, each with its share of the examples."""
    size = portion(x, y, size)
    for xs, ys in zip(x.split(size), y.split(size), strict=True):
        yield xs, ys, len(xs) / len(x)


def pullback(
    y: Tensor,
    inner: Sequence[Tensor],
    r: Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> tuple[Tensor, ...]:
    """Plain autograd, J' r; what is not reached has a zero gradient.

    Raises:
        Refused: An operation of the model that PyTorch does not differentiate in this way.
    """
    if not y.requires_grad:
        return tuple(torch.zeros_like(w) for w in inner)
    try:
        found = torch.autograd.grad(
            y, inner, r, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True
        )
        if any(g is None for g in found):
            _refuse_hidden_backward(y)
        dense = [g.to_dense() if g is not None and g.layout == torch.sparse_coo else g for g in found]  # embeddings
        return tuple(torch.zeros_like(w) if g is None else g for g, w in zip(dense, inner, strict=True))
    except (RuntimeError, NotImplementedError) as error:
        why = str(error).partition("\n")[0]
        if not any(fault in why for fault in _FAULTS_OF_MODEL):
            raise
        raise Refused(
            f"PyTorch must be able to differentiate the model for this: {why[:200]}. Use activations with a second "
            "derivative (SiLU in place of Hardsigmoid), checkpoint(..., use_reentrant=False), and no writes into "
            "tensors that a derivative needs."
        ) from error


def _refuse_hidden_backward(y: Tensor) -> None:
    """A reentrant checkpoint whose inputs depend on nothing that is asked for is passed over: zeros, and no error."""
    stack, seen = [y.grad_fn], {y.grad_fn}
    while stack:
        node = stack.pop()
        if node is not None and node.name() == "CheckpointFunctionBackward":
            raise RuntimeError("use_reentrant=True hides a backward pass in another")
        for child, _ in node.next_functions if node is not None else ():
            if child not in seen:
                seen.add(child)
                stack.append(child)
