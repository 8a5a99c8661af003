"""A network as bytes, and back: the masks, and of the values what the decoder does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ticketlab.bounds.arithmetic import Decoder, Encoder
from ticketlab.bounds.description import (
    LARGEST_CODEBOOK,
    Values,
    check_network,
    codebook_nats,
    live,
    mask_lengths,
)
from ticketlab.errors import Refused
from ticketlab.state import Masks, Params

KT = 2
"""Increment of a frequency that starts at 1, in the code of Krichevsky and Trofimov."""


def encode(masks: Mapping[str, Tensor], params: Mapping[str, Tensor] | None = None, values: Values = "seed") -> bytes:
    """Bytes from which `decode` rebuilds the very network; 8 times their number is its description length in bits.

    The words are prefix-free for a decoder that knows the architecture and, for ``seed`` and ``signs``, the
    reference weights. :func:`ticketlab.bounds.description_length` gives the terms. Masks and tensors are written in the
    order of their sorted names, whatever that of the mappings.

    Args:
        masks: True = kept, of one network.
        params: Every tensor of the network in float32, batch-norm statistics too where it has them.
        values: ``seed``, the masks alone; ``signs``, one bit more a kept weight; ``coded``, every value.

    Raises:
        Refused: Masks or tensors that do not fit one another, or another dtype than float32.
    """
    check_network(masks, params, values)
    masks = dict(sorted(masks.items()))
    encoder = Encoder()
    encoder.uniform(get_args(Values).index(values), len(get_args(Values)))
    _encode_masks(encoder, masks)
    for name, tensor in sorted((params or {}).items()):
        mask = masks.get(name)
        if values == "signs" and mask is not None:
            encoder.symbols(torch.signbit(tensor[mask]).long().cpu().numpy(), (1, 1))
        elif values == "coded":
            _encode_values(encoder, live(tensor, mask))
    return encoder.finish()


def decode(data: bytes, reference: Mapping[str, Tensor], prunable: Sequence[str]) -> tuple[Masks, Params]:
    """The network that `encode` wrote.

    Args:
        data: What `encode` gave.
        reference: Tensors with the names and shapes of the network's. Their values are the weights that a seed
            fixes: ``seed`` takes them all, ``signs`` the magnitudes and whatever is not masked.
        prunable: Names of the masked tensors: ``masks.prunable(model)``.

    Returns:
        Masks, and tensors with pruned weights zero in the order of ``reference``, on the CPU.

    Raises:
        Refused: Bytes that are not one whole message for this architecture, or masked tensors that the reference
            lacks.
    """
    missing = [name for name in prunable if name not in reference]
    if missing or not prunable:
        raise Refused(
            f"prunable must name one or more tensors of the reference: it lacks {missing} of {list(prunable)}. "
            "Pass every tensor of the network, and masks.prunable(model)."
        )
    decoder = Decoder(data)
    values: Values = get_args(Values)[decoder.uniform(len(get_args(Values)))]
    masks = _decode_masks(decoder, {name: reference[name] for name in sorted(prunable)})
    params: Params = dict.fromkeys(reference, torch.empty(0))
    for name, tensor in sorted(reference.items()):
        known, mask = tensor.detach().cpu(), masks.get(name)
        where = torch.ones_like(known, dtype=torch.bool) if mask is None else mask
        found = known[where]
        if values == "coded":
            found = torch.from_numpy(_decode_values(decoder, len(found)))
        elif values == "signs" and mask is not None:
            found = torch.from_numpy(1 - 2 * decoder.symbols(len(found), (1, 1))).to(found) * found.abs()
        params[name] = torch.zeros_like(known).masked_scatter(where, found.to(known.dtype))
    decoder.finish()
    if encode(masks, params, values) != data:
        raise Refused("the data must be one whole message in its shortest form: this is another. Use encode's bytes.")
    return masks, params


def _encode_masks(encoder: Encoder, masks: Mapping[str, Tensor]) -> None:
    flat = [mask.flatten().cpu().numpy() for mask in masks.values()]
    whole, by_layer = mask_lengths(masks)
    encoder.uniform(int(by_layer < whole), 2)
    for part in flat if by_layer < whole else [np.concatenate(flat)]:
        encoder.subset(part)


def _decode_masks(decoder: Decoder, tensors: Mapping[str, Tensor]) -> Masks:
    sizes = [tensor.numel() for tensor in tensors.values()]
    if decoder.uniform(2):
        parts = [decoder.subset(size) for size in sizes]
    else:
        parts = np.split(decoder.subset(sum(sizes)), np.cumsum(sizes)[:-1])
    shaped = zip(tensors.items(), parts, strict=True)
    return {name: torch.from_numpy(part.copy()).view(tensor.shape) for (name, tensor), part in shaped}


def _encode_values(encoder: Encoder, values: NDArray[np.float32]) -> None:
    """As they are, or as indices into the distinct ones, whichever is shorter."""
    shared = codebook_nats(values) < 32 * len(values) * np.log(2)
    encoder.uniform(int(shared), 2)
    if not shared:
        encoder.floats(values)
        return
    book, indices = np.unique(values.view(np.uint32), return_inverse=True)  # bit patterns: -0 is not 0
    encoder.uniform(len(book) - 1, LARGEST_CODEBOOK)
    encoder.floats(book.view(np.float32))
    encoder.symbols(indices, [1] * len(book), KT)


def _decode_values(decoder: Decoder, size: int) -> NDArray[np.float32]:
    if not decoder.uniform(2):
        return decoder.floats(size)
    book = decoder.floats(decoder.uniform(LARGEST_CODEBOOK) + 1)
    return book[decoder.symbols(size, [1] * len(book), KT)]
