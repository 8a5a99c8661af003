"""Carrying a ticket to another network of its architecture: the mask alone, or the mask with its weights.

The receiving network may be for another task: where its number of classes differs, its output layer stays as it
is, fresh and dense. Nothing else may differ (Morcos et al. 2019).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ticketlab import graph
from ticketlab.engine.start import Start
from ticketlab.errors import Refused
from ticketlab.state import Masks, State


def carry(
    model: nn.Module,
    fresh: State,
    masks: Masks,
    order_seed: int,
    *,
    weights: State | None = None,
    x: Tensor | None = None,
) -> Start:
    r"""A ticket's mask on another network, and its weights where they are given.

    .. math:: \theta = m_{source} \odot \theta_{fresh} \quad or \quad m_{source} \odot \theta_{source}

    The output layer is the one whose shape differs, and in its first axis alone: there can be no other.

    Args:
        model: The receiving architecture.
        fresh: A state of ``model``, initialised with the receiving seed: all of the start where ``weights`` is
            None, and the output layer (weight and bias) where the numbers of classes differ.
        masks: The source ticket's, one network's, True = kept; what they name is what was pruned. A layer may be
            empty.
        order_seed: Seed of the batches that the network will see.
        weights: The source's theta_0 or theta_k, with its biases, norms and buffers.
        x: Inputs of the receiving task, on which a live path from an input to an output is looked for.

    Returns:
        What `training.train` starts from. Of a fresh output layer every weight is live.

    Raises:
        Refused: A mask or a fresh state of another model, masks that are stacked or not bool, weights that do not
            fit, layers other than the output that differ in shape, a network cut in two.

    Reference:
        Morcos et al. 2019, One ticket to win them all, section 3.
    """
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [n for n in {**own, **fresh.params} if _shape(fresh.params, n) != own.get(n)]
    if wrong:
        raise Refused(
            f"fresh must be one network's state, of the receiving model: {wrong} are not. Take it with state(model)."
        )
    _check_masks(masks, own)
    if weights is not None:
        _check_weights(fresh, weights, masks)
    replaced = _output_layer(masks, {} if weights is None else weights.params, own)
    # In the model's order, on which a random mask depends.
    carried = {n: torch.ones(own[n], dtype=torch.bool, device=masks[n].device) if n in replaced else masks[n]
               for n in own if n in masks}  # fmt: skip
    if not any(bool(mask.any()) for mask in carried.values()):
        raise Refused("a ticket must keep a live weight: all layers are empty. Carry a denser level.")
    if x is not None:
        _check_wiring(model, carried, replaced, x)
    if weights is None:
        return Start(fresh, carried, order_seed)
    params = {n: fresh.params[n] if n in replaced else p for n, p in weights.params.items()}
    return Start(State(params, weights.buffers), carried, order_seed)


def _output_layer(masks: Masks, params: Mapping[str, Tensor], own: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The parameters of one layer that differ in their number of outputs; none where all shapes agree."""
    source = {n: tuple(t.shape) for n, t in (*masks.items(), *params.items())}
    differ = sorted(n for n, shape in source.items() if shape != own[n])
    one_layer = len({graph.owner(n) for n in differ}) < 2
    for name in differ:
        if not one_layer or source[name][1:] != own[name][1:]:
            raise Refused(
                f"only the number of classes may differ between source and target: {name!r} has shape {source[name]} "
                f"in the source, {own[name]} in the receiving model. Use one architecture, and bring inputs of another "
                "size to one size before the source is trained (--resize HEIGHT WIDTH, --grey)."
            )
    return set(differ)


def _check_wiring(model: nn.Module, carried: Masks, output: set[str], x: Tensor) -> None:
    graph.refuse_cut(model, carried, x)
    made = {graph.owner(name) for name in graph.output_layers(model, x)}
    if not {graph.owner(name) for name in output} <= made:
        raise Refused(
            f"only the number of classes may differ between source and target: {sorted(output)} make no outputs of the "
            "receiving model. Use one architecture."
        )


def _check_weights(fresh: State, weights: State, masks: Masks) -> None:
    wrong = [n for own, given in zip(fresh, weights, strict=True) for n in sorted(set(given) ^ set(own))]
    if not wrong:
        wrong = [n for n, p in weights.params.items() if p.ndim != fresh.params[n].ndim]
        wrong += [n for n, mask in masks.items() if mask.shape != weights.params[n].shape]
        wrong += [n for n, b in weights.buffers.items() if b.shape != fresh.buffers[n].shape]
    if wrong:
        raise Refused(
            f"weights must be one network's state, parameters and buffers, of the receiving architecture: {wrong[:6]} "
            "are not, or not in the shapes of the masks. Take them from a level of the same model, cut down to a "
            "replica with level.select."
        )


def _check_masks(masks: Masks, own: Mapping[str, tuple[int, ...]]) -> None:
    unknown = sorted(set(masks) - set(own))
    if unknown or not masks:
        raise Refused(
            f"masks must be of the receiving model, with layers among {sorted(own)}: got {unknown or 'none'}. "
            "Carry tickets between networks of one architecture."
        )
    for name, mask in masks.items():
        given, wanted = tuple(mask.shape), own[name]
        if mask.dtype != torch.bool:
            raise Refused(f"masks[{name!r}] must be bool, True = kept: got {mask.dtype}. Convert it with mask != 0.")
        if len(given) == len(wanted) + 1:
            raise Refused(
                f"masks must be one network's: masks[{name!r}] has shape {given}, the receiving layer {wanted}. "
                "Cut them down to a replica with level.select."
            )


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
