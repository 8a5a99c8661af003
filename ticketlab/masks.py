"""Masks: which weights are prunable, how many are kept, and the one prune step.

A mask is a dict of bool tensors, True = kept, one for each prunable parameter. The one currency is a count: fractions
and densities become counts here, rounded once; ties are broken by index, so that a mask is a function of scores alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ticketlab.errors import Refused
from ticketlab.seeds import kept_generators, stream
from ticketlab.state import Masks, Params, check_module

Scope = Literal["global", "layer"]
Groups = dict[tuple[str, ...], int]
"""How many weights each group of layers keeps: those of one group compete with one another."""

_WEIGHTED = (
    *(nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_NEVER = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def prunable(model: nn.Module, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the weights that may be pruned, in the model's order.

    Weights of linear, bilinear, convolution and recurrent layers and attention projections, Hugging Face's ``Conv1D``
    among them; never biases, norms or embeddings. A weight tied to an embedding is left out, and so are frozen ones.
    Under a parametrization (weight norm, spectral norm) it is the underlying tensor, where a zero in it stays a zero.

    Args:
        model: Any module.
        names: What to take instead, with wildcards, such as ``("encoder.*.weight", "experts.*")``: any trainable
            parameter of two axes or more.

    Warns:
        UserWarning: Less than half of all entries of matrices are prunable, with the share: most of the model would
            stay dense, and a density be that of a part.

    Raises:
        Refused: Nothing to prune, a pattern that matches nothing, weights under ``torch.nn.utils.prune``.
    """
    check_module(model)
    named = dict(model.named_parameters())
    matrices = {n: p for n, p in named.items() if p.ndim > 1 and p.requires_grad}
    if names:
        names = (names,) if isinstance(names, str) else names
        lost = [pattern for pattern in names if not any(fnmatchcase(n, pattern) for n in matrices)]
        if lost:
            raise Refused(f"prunable must name trainable matrices: {lost} match none of {list(matrices)}.")
        return tuple(n for n in matrices if any(fnmatchcase(n, pattern) for pattern in names))
    wanted, never = set[int](), set[int]()
    for module in model.modules():
        _refuse_hooks(module)
        if isinstance(module, _NEVER):
            never |= {id(p) for p in module.parameters(recurse=False)}
        wanted |= {id(p) for p in _weights(module)}
    found = tuple(n for n, p in matrices.items() if id(p) in wanted - never)
    if not found:
        raise Refused(
            "the model must have a trainable linear, convolution, recurrent or attention weight to prune: found none "
            f"in {type(model).__name__}. Name others with prunable=, such as {list(matrices)[:3]}."
        )
    share = sum(matrices[n].numel() for n in found) / sum(p.numel() for p in matrices.values())
    if share < 0.5:
        others = sorted(set(matrices) - set(found), key=lambda n: -matrices[n].numel())
        warnings.warn(
            f"only {100 * share:.1f} % of the entries of {type(model).__name__}'s matrices are prunable ({len(found)} "
            f"of {len(matrices)}); not among them, largest first: {others[:4]}. Name what to prune with prunable=.",
            UserWarning,
            stacklevel=2,
        )
    return found


def _weights(module: nn.Module) -> list[Tensor]:
    """The tensors that hold the weight matrices of one module, itself and not its children."""
    if isinstance(module, _RECURRENT):
        return [p for n, p in module.named_parameters(recurse=False) if n.startswith("weight_") and p.ndim == 2]
    names: tuple[str, ...] = _PROJECTIONS if isinstance(module, nn.MultiheadAttention) else ("weight",)
    if not isinstance(module, (*_WEIGHTED, nn.MultiheadAttention)) and type(module).__name__ != "Conv1D":
        return []
    found: list[Any] = []
    for name in names:
        if parametrize.is_parametrized(module, name):
            found += _under_parametrization(module, name)
        elif module._parameters.get(name) is not None:
            found.append(module._parameters[name])
        elif f"{name}_v" in module._parameters:  # the weight norm of torch.nn.utils, by hooks
            found.append(module._parameters[f"{name}_v"])
        elif f"{name}_orig" in module._parameters:  # its spectral norm
            found.append(module._parameters[f"{name}_orig"])
    return found


def _under_parametrization(module: nn.Module, name: str) -> list[Tensor]:
    """The original tensor of the weight's shape, if a zero in it is a zero in the weight."""
    listed: Any = module.parametrizations[name]  # type: ignore[index]
    with torch.no_grad(), kept_generators():
        weight = getattr(module, name)
        same = [p for p in listed.parameters(recurse=False) if p.shape == weight.shape]
        for original in same[-1:]:  # of weight norm's magnitude and direction, the direction
            values = original.clone()
            half = (torch.arange(values.numel(), device=values.device) % 2 == 0).view_as(values)
            original.mul_(half)
            zeros = bool((getattr(module, name)[~half] == 0).all())
            original.copy_(values)
            return [original] if zeros else []
    return []


def _refuse_hooks(module: nn.Module) -> None:
    own, buffers = (dict(named(recurse=False)) for named in (module.named_parameters, module.named_buffers))
    pruned = [stem for stem in (name.removesuffix("_orig") for name in own) if f"{stem}_mask" in buffers]
    if pruned:
        raise Refused(
            f"weights under torch.nn.utils.prune have a mask of their own: {type(module).__name__}.{pruned[0]} does. "
            f"Make it permanent with torch.nn.utils.prune.remove(module, {pruned[0]!r}), and pass the mask as masks=."
        )


_prunable = prunable  # where an argument has its name


def ones(model: nn.Module, prunable: Sequence[str] | None = None) -> Masks:
    """The mask that keeps every prunable weight, or every weight that ``prunable`` names instead."""
    params = dict(model.named_parameters())
    return {name: torch.ones_like(params[name], dtype=torch.bool) for name in _prunable(model, prunable)}


def validate(model: nn.Module, masks: Mapping[str, Tensor], *, stacked: bool = True) -> None:
    """Refuse masks that do not fit the model: names, shapes, dtype, one replica axis; or none, unless ``stacked``."""
    params = dict(model.named_parameters())
    unknown = sorted(set(masks) - set(params)) if isinstance(masks, Mapping) else []
    if unknown or not masks or not isinstance(masks, Mapping):
        raise Refused(
            f"masks must name parameters of the model, in a dict: unknown {unknown}, of {len(masks or ())}. "
            "Build them with masks.ones(model)."
        )
    axes: set[int | None] = set()
    for name, mask in masks.items():
        shape = tuple(params[name].shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise Refused(f"masks[{name!r}] must be bool, True = kept: got {given}. Convert it with mask != 0.")
        if tuple(mask.shape[-len(shape) :]) != shape or mask.ndim > len(shape) + stacked:
            wanted = f"{shape} or [replica, *{shape}]" if stacked else f"{shape}, of one network"
            raise Refused(f"masks[{name!r}] must have shape {wanted}: got {tuple(mask.shape)}.")
        axes.add(mask.shape[0] if mask.ndim > len(shape) else None)
    if len(axes) > 1:
        raise Refused(f"all masks must share one replica axis: got lengths {sorted(map(str, axes))}.")


def masked(params: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> Params:
    """m * theta: the parameters with pruned weights set to zero; unmasked ones as they are."""
    return {n: p * masks[n].to(p.dtype) if masks and n in masks else p for n, p in params.items()}


def kept(masks: Mapping[str, Tensor], *, stacked: bool = False) -> Int[Tensor, "*replica"]:
    """Number of weights kept in the whole network; one number per replica when ``stacked``."""
    if not masks:
        raise Refused("masks must name a layer at least: got none. Build them with masks.ones(model).")
    return torch.stack([mask.flatten(int(stacked)).sum(-1) for mask in masks.values()]).sum(0)


def total(masks: Mapping[str, Tensor], *, stacked: bool = False) -> int:
    """Number of prunable weights of one network."""
    return sum(mask[0].numel() if stacked else mask.numel() for mask in masks.values())


def density(masks: Mapping[str, Tensor], *, stacked: bool = False) -> Tensor:
    """kept / prunable, in [0, 1], float64; one number per replica when ``stacked``."""
    count = kept(masks, stacked=stacked).double()
    return count / torch.full_like(count, total(masks, stacked=stacked))  # a GPU multiplies by 1 / a plain number


# Counts: the one currency.


def n_removed(alive: int, fraction: float) -> int:
    """How many of ``alive`` weights one prune step removes: fraction * alive, halves rounded up.

    Raises:
        Refused: A fraction outside [0, 1], or a negative number of weights.
    """
    if not (0 <= fraction <= 1 and alive >= 0):
        raise Refused(f"fraction must lie in [0, 1] and alive be at least 0: got {fraction} and {alive}.")
    return math.floor(fraction * alive + 0.5)


def counts_after(masks: Mapping[str, Tensor], fractions: float | Mapping[str, float]) -> Groups:
    """What is left after a prune step: a float is one rate for the whole network, a dict each layer's own.

    Raises:
        Refused: A rate outside (0, 1), or other layers than those of ``masks``.
    """
    counts = {}
    for names, fraction in _groups(masks, fractions, "fractions").items():
        if not 0 < fraction < 1:
            raise Refused(f"a prune fraction must lie in (0, 1): got {fraction} for {list(names)}.")
        alive = n_alive(masks, names)
        counts[names] = alive - n_removed(alive, fraction)
    return counts


def counts_at(masks: Mapping[str, Tensor], densities: float | Mapping[str, float]) -> Groups:
    """What is kept at a density, kept / prunable to the nearest, halves up: of the whole network, or of each layer.

    Raises:
        Refused: A density outside (0, 1], above what is alive, or of which no weight is left.
    """
    counts = {}
    for names, share in _groups(masks, densities, "density").items():
        size, alive = sum(masks[name].numel() for name in names), n_alive(masks, names)
        n = math.floor(share * size + 0.5) if 0 < share <= 1 else size + 1
        if n > alive:
            raise Refused(
                f"density must lie in (0, {alive / size:.6g}], as much as is alive of {', '.join(names)}: got {share}."
            )
        if n < 1:
            raise Refused(f"a live weight must be left: density {share} leaves none of {size} for {', '.join(names)}.")
        counts[names] = n
    return counts


def _groups(masks: Mapping[str, Tensor], rates: float | Mapping[str, float], what: str) -> dict[tuple[str, ...], float]:
    if not isinstance(rates, Mapping):
        return {tuple(masks): rates}
    if set(rates) != set(masks):
        raise Refused(f"{what} must name every masked layer: got {sorted(rates)} for {sorted(masks)}.")
    return {(name,): rates[name] for name in masks}


def n_alive(masks: Mapping[str, Tensor], names: Sequence[str]) -> int:
    """Kept weights of the named layers together."""
    return sum(int(masks[name].count_nonzero()) for name in names)


def fractions_by_layer(
    model: nn.Module,
    fraction: float,
    *,
    conv: float | None = None,
    output: float | None = None,
    output_layers: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """The rate of each layer under layer scope (Frankle & Carbin 2019, appendices G and H).

    Args:
        model: Any module.
        fraction: Rate of the fully connected layers.
        conv: Rate of convolutions; ``fraction`` when None.
        output: Rate of the output layer; half of ``fraction`` when None, as in the paper.
        output_layers: The weights that make the outputs, from ``graph.output_layers(model, x)``; when None, the last
            one of a chain of ``nn.Sequential``, in which the order of registration is that of the forward pass.
        names: The prunable weights; the model's own when None.

    Raises:
        Refused: No ``output_layers`` for a module whose forward pass is its own.
    """
    names, params = names or prunable(model), dict(model.named_parameters())
    if output_layers is None:
        inner = [m for m in model.modules() if next(m.children(), None) is not None]
        if not all(isinstance(m, nn.Sequential) for m in inner):
            raise Refused(
                "the output layer is found from a forward pass, for the order of registration does not tell it: pass "
                "output_layers=tl.graph.output_layers(model, x) with some inputs x."
            )
        output_layers = names[-1:]
    rates = {n: conv if conv is not None and params[n].ndim > 2 else fraction for n in names}
    last = fraction / 2 if output is None else output
    return rates | {n: last for n in output_layers if n in rates}


def top(scores: Tensor, among: Tensor, n: int) -> Tensor:
    """The n of highest score among those True, as a bool tensor; of equal scores the one with the lower index.

    Raises:
        Refused: Scores and ``among`` of different shapes, ``among`` that is not bool, a negative n.
    """
    if scores.shape != among.shape or among.dtype != torch.bool or n < 0:
        raise Refused(
            f"top must have scores and a bool tensor of one shape, and n of at least 0: got {tuple(scores.shape)}, "
            f"{tuple(among.shape)} of {among.dtype}, and {n}."
        )
    candidates = among.flatten().nonzero()[:, 0]
    values = scores.flatten()[candidates]
    if 0 < n < len(values) and values.is_floating_point() and not values.isnan().any():
        threshold = values.kthvalue(len(values) - n + 1).values  # far faster than sorting all of them
        above, ties = values > threshold, (values == threshold).nonzero()[:, 0]
        best = torch.cat([above.nonzero()[:, 0], ties[: n - int(above.sum())]])
    else:  # a stable descending sort leaves equal scores in the order of their index
        best = torch.sort(values, descending=True, stable=True).indices[:n]
    chosen = torch.zeros(among.numel(), dtype=torch.bool, device=among.device)
    chosen[candidates[best]] = True
    return chosen.view_as(among)


def keep(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], counts: Mapping[tuple[str, ...], int]) -> Masks:
    """The best-scored of the weights still alive, an exact number in each group of layers; nested in ``masks``.

    One network; call it once for each replica. A layer may end empty: whether the network is then cut in two is the
    graph's to say (``ticketlab.graph``).

    Args:
        masks: True = kept.
        scores: Higher = keep, the shapes of ``masks``; finite where the mask is True.
        counts: How many each group keeps, from `counts_after` or `counts_at`.

    Raises:
        Refused: Scores of other names or shapes, or a non-finite score of a live weight; a count above what is alive,
            or groups that share a layer.
    """
    check_scores(masks, scores)
    named = [name for names in counts for name in names]
    if not set(named) <= set(masks) or len(set(named)) < len(named):
        raise Refused(f"each layer may be in one group of counts, by name: got {list(counts)} for {list(masks)}.")
    new = dict(masks)
    for names, n in counts.items():
        alive = n_alive(masks, names)
        if not isinstance(n, Integral) or not 0 <= n <= alive:
            raise Refused(f"a count must be an integer in 0..{alive}, as many as are alive of {list(names)}: got {n}.")
        flat = [torch.cat([part[name].flatten() for name in names]) for part in (scores, masks)]
        parts = top(flat[0], flat[1], n).split([masks[name].numel() for name in names])
        new |= {name: part.view_as(masks[name]) for name, part in zip(names, parts, strict=True)}
    return new


def prune(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], fractions: float | Mapping[str, float]) -> Masks:
    """Remove the least-scored of the weights still alive: `keep` at the counts that the fractions leave.

    A float prunes with one threshold over the whole network (global scope); a dict each layer at its own rate.

    Raises:
        Refused: As `counts_after` and `keep`, or when no weight at all would be left.
    """
    counts = counts_after(masks, fractions)
    if sum(counts.values()) < 1:
        raise Refused(f"pruning must leave a live weight: none of {int(kept(masks))} would be. Prune less.")
    return keep(masks, scores, counts)


def check_scores(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
    """Raise unless every masked weight has a real number for a score, finite where the weight is alive."""
    if not isinstance(scores, Mapping):
        raise Refused(f"scores must be a dict with a tensor for each of {list(masks)}: got {type(scores).__name__}.")
    for name, mask in masks.items():
        found = scores.get(name)
        if not isinstance(found, Tensor) or found.shape != mask.shape:
            given = tuple(found.shape) if isinstance(found, Tensor) else "none" if found is None else type(found)
            raise Refused(f"scores[{name!r}] must have the mask's shape {tuple(mask.shape)}: got {given}.")
        if found.is_complex() or found.dtype == torch.bool or found.device != mask.device:
            raise Refused(
                f"scores[{name!r}] must be real numbers on {mask.device}: got {found.dtype} on {found.device}."
            )
        bad = int((~found[mask].isfinite()).sum())
        if bad:
            raise Refused(f"scores must be finite where a weight is alive: {bad} in {name!r} are not.")


# Random controls.


def random_mask(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """As many live weights in the whole network, at positions drawn uniformly over all layers.

    Nothing keeps a small layer from losing all of its weights: that is what a random mask does.

    Raises:
        Refused: No mask at all.
    """
    if not masks:
        raise Refused("masks must name a prunable parameter: got none. Build them with masks.ones(model).")
    flat = torch.cat([m.flatten() for m in masks.values()])
    parts = _shuffled(flat, seed, "random_mask").split([m.numel() for m in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def layerwise_shuffle(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """As many live weights in each layer, at positions drawn uniformly within it."""
    return {
        name: _shuffled(mask.flatten(), seed, f"layerwise_shuffle {name}").view_as(mask) for name, mask in masks.items()
    }


def _shuffled(flat: Tensor, seed: int, purpose: str) -> Tensor:
    order = torch.randperm(flat.numel(), generator=stream(purpose, seed))
    return flat[order.to(flat.device)]
