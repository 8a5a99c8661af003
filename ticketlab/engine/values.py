"""What a live weight may start at in place of its own value: constants, other signs, another live weight's value.

Zhou et al. (2019) take tickets apart with these. Each is a function of one network's parameters; the prunable
weights of the named layers change, everything else is returned as it is. Draws are made on the CPU, one stream
a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ticketlab.seeds import stream
from ticketlab.state import Params


def signed_constants(params: Mapping[str, Tensor], names: Iterable[str]) -> Params:
    r"""Every weight of a layer at one magnitude, with its own sign.

    .. math:: \operatorname{sign}(w_i)\, \operatorname{std}(w)

    The standard deviation is that of all weights of the layer, pruned ones included (Zhou et al. 2019, section 4).
    A weight of exactly zero has no sign and stays zero.

    Args:
        params: One network.
        names: Its layers to change.
    """
    return {**params, **{n: params[n].sign() * params[n].std(correction=0) for n in names}}


def random_signs(params: Mapping[str, Tensor], names: Iterable[str], seed: int) -> Params:
    r"""Every weight with a sign drawn anew, r \circ |w| with r_i uniform in {-1, +1}.

    Args:
        params: One network.
        names: Its layers to change.
        seed: Of the signs.
    """
    return {**params, **{n: _coins(params[n], f"random signs {n}", seed) * params[n].abs() for n in names}}


def with_signs_of(params: Mapping[str, Tensor], signs: Mapping[str, Tensor], names: Iterable[str]) -> Params:
    r"""The magnitudes of one network with the signs of another, |w_i| sign(s_i).

    Args:
        params: One network.
        signs: Another of the same architecture.
        names: Layers to change.
    """
    return {**params, **{n: signs[n].sign() * params[n].abs() for n in names}}


def reshuffled(
    params: Mapping[str, Tensor], masks: Mapping[str, Tensor], seed: int, *, keep_signs: bool = False
) -> Params:
    """The values of a layer's live weights, dealt out among them anew; pruned weights are left as they are.

    With ``keep_signs``, positive values are permuted among positive weights and the others among themselves, so that
    every weight keeps its sign and the layer its values. (Zhou et al. 2019 permute magnitudes over both.)

    Args:
        params: One network.
        masks: True = live, and thereby the layers to change.
        seed: Of the permutations.
        keep_signs: Whether a weight keeps its sign.
    """
    new = dict(params)
    for name, mask in masks.items():
        groups = [mask & (params[name] > 0), mask & (params[name] <= 0)] if keep_signs else [mask]
        generator = stream(f"reshuffle {name}", seed)
        for group in groups:
            new[name] = _permuted(new[name], group, generator)
    return new


def _permuted(
    weight: Float[Tensor, "*shape"], among: Bool[Tensor, "*shape"], generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    values = weight[among]
    order = torch.randperm(len(values), generator=generator).to(weight.device)
    new = weight.clone()
    new[among] = values[order]
    return new


def _coins(like: Tensor, purpose: str, seed: int) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=stream(purpose, seed))
    return (2 * bits - 1).to(like.device, like.dtype)
