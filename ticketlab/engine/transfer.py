"""Carrying a ticket to another network of its architecture: the mask alone, or the mask with its weights.

The receiving network may be for another task: where its number of classes differs, its output layer stays as it
is, fresh and dense. Nothing else may differ (Morcos et al. 2019).
"""

from __future__ import annotations

import torch
from torch import nn

from ticketlab import masks as mask_ops
from ticketlab.engine.treatments import Start
from ticketlab.errors import Refused
from ticketlab.state import Masks, State


def carry(model: nn.Module, fresh: State, masks: Masks, order_seed: int, *, weights: State | None = None) -> Start:
    r"""A ticket's mask on another network, and its weights where they are given.

    .. math:: \theta = m_{source} \odot \theta_{fresh} \quad or \quad m_{source} \odot \theta_{source}

    Args:
        model: The receiving architecture; its last prunable weight is the output layer's.
        fresh: A state of ``model``, initialised with the receiving seed: all of the start where ``weights`` is
            None, and the output layer (weight and bias) where the numbers of classes differ.
        masks: The source ticket's, one network's, True = kept.
        order_seed: Of the batches that the network will see.
        weights: The source's theta_0 or theta_k, with its biases, norms and buffers.

    Returns:
        What `training.train` starts from, when stacked. Of a fresh output layer every weight is live.

    Raises:
        Refused: A mask or a fresh state of another model, masks that are stacked or not bool, weights that do not
            fit, layers other than the output that differ in shape, a source layer without a live weight.

    Reference:
        Morcos et al. 2019, One ticket to win them all, section 3.
    """
    output = mask_ops.prunable(model)[-1]
    _check(masks, mask_ops.ones(model), output)
    masks = {name: masks[name] for name in mask_ops.prunable(model)}  # random_mask depends on their order
    own = dict(fresh.params)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wrong = [n for n in {**shapes, **own} if n not in shapes or n not in own or own[n].shape != shapes[n]]
    if wrong:
        raise Refused(
            f"fresh must be one network's state, of the receiving model: {wrong} are not. Take it with state(model)."
        )
    if own[output].shape == masks[output].shape:
        replaced: set[str] = set()
        carried = dict(masks)
    else:
        layer = output.rpartition(".")[0]
        replaced = {name for name in own if name.rpartition(".")[0] == layer}
        carried = {**masks, output: masks[output].new_ones(own[output].shape)}
    if weights is None:
        return Start(fresh, carried, order_seed)
    return Start(_with_weights(fresh, weights, replaced), carried, order_seed)


def _with_weights(fresh: State, weights: State, replaced: set[str]) -> State:
    """The source's parameters and buffers, but those of a replaced output layer."""
    for what, own, given in zip(("parameters", "buffers"), fresh, weights, strict=True):
        wrong = [n for n in own if n not in given or (n not in replaced and given[n].shape != own[n].shape)]
        if wrong or set(given) != set(own):
            raise Refused(
                f"the source's {what} must be one network's, of the receiving model: {wrong or sorted(given)} are "
                "not. Take them from a level of the same model, cut down to a replica with level.select."
            )
    return State({n: fresh.params[n] if n in replaced else p for n, p in weights.params.items()}, weights.buffers)


def _check(masks: Masks, expected: Masks, output: str) -> None:
    if set(masks) != set(expected):
        raise Refused(
            f"masks must be of the receiving model, with layers {sorted(expected)}: got {sorted(masks)}. "
            "Carry tickets between networks of one architecture."
        )
    for name, own in expected.items():
        given, wanted = tuple(masks[name].shape), tuple(own.shape)
        if masks[name].dtype != torch.bool:
            raise Refused(
                f"masks[{name!r}] must be bool, True = kept: got {masks[name].dtype}. Convert it with mask != 0."
            )
        if len(given) == len(wanted) + 1:
            raise Refused(
                f"masks must be one network's: masks[{name!r}] has shape {given}, the receiving layer {wanted}. "
                "Cut them down to a replica with level.select."
            )
        if given != wanted and not (name == output and given[1:] == wanted[1:]):
            raise Refused(
                f"only the number of classes may differ between source and target: masks[{name!r}] has shape {given}, "
                f"the receiving layer {wanted}. Use one architecture, and bring inputs of another size to one size "
                "before the source is trained (--resize HEIGHT WIDTH, --grey)."
            )
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        raise Refused(f"every layer of a ticket must keep a live weight: {empty} are empty. Carry a denser level.")
