"""The edge of chaos, the phase diagram, and where the layers of a real network lie in it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ticketlab.errors import Refused
from ticketlab.masks import prunable
from ticketlab.network import network
from ticketlab.signal.activations import Activation, elementwise
from ticketlab.signal.mean_field import check_variances, chi, fixed_points, is_stable, mean_field, resolved
from ticketlab.signal.quadrature import mean
from ticketlab.state import State


def critical_sigma_w2(activation: Activation, sigma_b2: float) -> float:
    r"""The edge of chaos: the sigma_w^2 at which chi_1 = 1 at a stable fixed point (Schoenholz et al. 2017).

    For each q, sigma_w^2 = 1 / E[phi'^2] makes chi_1 one; q is then a fixed point where

    .. math:: q - E[\phi^2] / E[\phi'^2] - \sigma_b^2 = 0.

    Args:
        activation: A name, or an elementwise callable.
        sigma_b2: Bias variance.

    Raises:
        Refused: No such sigma_w^2 (relu has one for sigma_b2 = 0 alone) or several; an activation or a variance
            that ``mean_field`` refuses.
    """
    phi = elementwise(activation)
    check_variances(sigma_b2=sigma_b2)

    def gap(q: float) -> float:
        return 1 - (mean(phi, lambda u: phi(u) ** 2, q) / chi(phi, q, 1.0) + sigma_b2) / q

    lengths, beyond = fixed_points(phi, gap)
    if beyond == 0:  # positively homogeneous: any length does, chi_1 is the same at all
        return 1 / chi(phi, 1.0, 1.0)
    if sigma_b2 == 0 and mean(phi, lambda u: phi(u) ** 2, 0.0) == 0:
        lengths.insert(0, 0.0)
    slopes = {q: chi(phi, q, 1.0) for q in lengths}
    found = [1 / s for q, s in slopes.items() if s > 0 and is_stable(phi, q, 1 / s, sigma_b2)]
    if len(found) != 1:
        limit = (
            "finite length" if math.isinf(phi.reach) else f"length up to q = {resolved(phi)[-1]:.3g}, the last resolved"
        )
        raise Refused(
            f"one sigma_w2 must put {phi.name} at the edge of chaos for sigma_b2 = {sigma_b2:g}: "
            f"{f'{len(found)} do, {found}' if found else f'none does, with a stable {limit}'}."
        )
    return found[0]


def phase_diagram(activation: Activation, sigma_w2: Sequence[float], sigma_b2: Sequence[float]) -> pd.DataFrame:
    """``mean_field`` over a grid: one row per pair, with the columns of ``MeanField`` and ``phase``.

    ``phase`` is ordered, critical or chaotic by chi_1, or ``none`` where there is no single fixed point: then the
    numbers are NaN and ``note`` says why.
    """
    phi = elementwise(activation)
    rows = []
    for w2 in sigma_w2:
        for b2 in sigma_b2:
            check_variances(sigma_w2=w2, sigma_b2=b2)
            row: dict[str, object] = {"activation": phi.name, "sigma_w2": w2, "sigma_b2": b2}
            try:
                found = mean_field(phi, w2, b2)
            except ValueError as error:
                row |= dict.fromkeys(("q_star", "chi1", "c_star", "xi_q", "xi_c"), math.nan)
                row |= {"note": str(error), "phase": "none"}
            else:
                side = 0 if abs(found.chi1 - 1) < 1e-9 else 1 if found.chi1 > 1 else -1
                row |= vars(found) | {"phase": ("critical", "chaotic", "ordered")[side]}
            rows.append(row)
    return pd.DataFrame(rows)


def masked_sigma_w2(sigma_w2: float, density: float) -> float:
    """What a Bernoulli(density) mask makes of sigma_w^2: density * sigma_w^2, in every formula of the theory.

    Raises:
        Refused: A density outside [0, 1], or a negative variance.
    """
    check_variances(sigma_w2=sigma_w2)
    if not 0 <= density <= 1:
        raise Refused(f"density must lie in [0, 1]: got {density}.")
    return density * sigma_w2


def effective_sigma_w2(
    model: nn.Module, state: State | Mapping[str, Tensor], *, masks: Mapping[str, Tensor] | None = None
) -> dict[str, Float[Tensor, "*replica"]]:
    r"""sigma_w^2 as each prunable layer has it: fan_in times the mean square over *all* positions, zeros included.

    .. math:: \hat\sigma_w^2 = \frac{1}{n_{out}} \sum_{ij} (m_{ij} w_{ij})^2

    with n_out the units (channels) of the layer. For an unpruned draw it estimates sigma_w^2, for one under a
    Bernoulli(p) mask p sigma_w^2; for a mask that prefers large weights it is what those weights really carry.

    Args:
        model: Lends its layers; not changed.
        state: One network or a stack, as for :func:`ticketlab.network.network`.
        masks: True = kept; stacked or not. Matrices that they name are layers too.

    Returns:
        By the name of the weight, float64: a scalar, or one value per replica for stacked parameters or masks.

    Raises:
        Refused: Parameters or masks that do not fit the model; a weight that is computed from parameters.
    """
    net = network(model, state, masks=masks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # how much of a model is prunable is no matter here
        wanted = {*prunable(model), *(masks or {})}
    own = dict(model.named_parameters())
    return {n: _sigma_w2(model, n, net.params[n].double(), own[n].ndim) for n in own if n in wanted}


def _sigma_w2(model: nn.Module, name: str, weight: Tensor, ndim: int) -> Float[Tensor, "*replica"]:
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, ParametrizationList) or own.endswith(("_v", "_orig")):
        raise Refused(
            f"sigma_w^2 is that of the weights themselves: {name!r} is what a weight is computed from (weight norm, "
            "spectral norm). Take the parametrisation off with torch.nn.utils.parametrize.remove_parametrizations."
        )
    shape = weight.shape[weight.ndim - ndim :]
    transposed = type(module).__name__ == "Conv1D"  # Hugging Face's, [in, out]
    units = getattr(module, "out_channels", shape[1] if transposed else shape[0])
    return weight.square().flatten(weight.ndim - ndim).sum(-1) / units
