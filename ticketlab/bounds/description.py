"""How many nats describe a network, term by term, in a prefix-free code that is fixed before the sample is seen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import gammaln
from torch import Tensor

from ticketlab.bounds.kl import scalar
from ticketlab.errors import Refused
from ticketlab.state import check_finite

Values = Literal["seed", "signs", "coded"]
LARGEST_CODEBOOK = 256


@dataclass(frozen=True)
class Description:
    """Terms of a description length in nats, and what they describe."""

    mask_nats: float
    """Which weights are kept, with the bit that says whether globally or by layer."""
    value_nats: float
    """Their values, and those of every unmasked tensor."""
    choice_nats: float
    """Hyperparameters, seeds and stopping that were chosen after a look at the sample."""
    values: Values
    """What is coded of the values."""
    by_layer: bool
    """Whether the masks are cheaper layer by layer."""
    covers: str
    """The hypotheses that a bound with this description speaks of."""

    @property
    def nats(self) -> float:
        """Length of the whole description in nats."""
        return self.mask_nats + self.value_nats + self.choice_nats

    @property
    def bits(self) -> float:
        """Length of the whole description in bits."""
        return self.nats / math.log(2)


_COVERS: dict[Values, str] = {
    "seed": "masks over weights that a seed fixes before the sample is seen; nothing is trained but the mask",
    "signs": "masks and signs over magnitudes that a seed fixes before the sample is seen",
    "coded": "the network whose masks and every value are coded, however it was trained",
}


def description_length(
    masks: Mapping[str, Tensor],
    params: Mapping[str, Tensor] | None = None,
    values: Values = "seed",
    *,
    choices: Mapping[str, int] | None = None,
) -> Description:
    r"""Length of the shortest description of a network in this library's code, ln 1 / pi(h), term by term.

    .. math:: \ln 3 + \ln 2 + \min \Big( \ln \tbinom{d}{k} + \ln (d + 1), \;
        \sum_l \ln \tbinom{d_l}{k_l} + \ln (d_l + 1) \Big) + \text{values} + \sum_j \ln N_j

    Values cost nothing (``seed``), k ln 2 (``signs``), or what all tensors cost (``coded``): each one bit to say
    how, and then either 32 bits a value, or, where it has few distinct values, ln 256 nats for their number, 32
    bits for each of them and the adaptive code of Krichevsky and Trofimov (1981) for which is where. So quantised
    weights need no other flag. :func:`ticketlab.bounds.encode` writes this code, less the choices, in fewer than
    10 bits more.

    Args:
        masks: True = kept, of one network; call it once for each replica.
        params: Every tensor of the network in float32 (for ``signs`` the masked ones suffice).
        values: ``seed``, ``signs`` or ``coded``.
        choices: How many alternatives there were of each choice made with the sample in sight, such as
            ``{"density": 21, "stopping step": 50}``: the union bound charges ln N for each.

    Returns:
        The terms; :attr:`Description.nats` is what the bounds take.

    Raises:
        Refused: Masks or tensors that do not fit one another, or alternatives that are no count of at least 1.
    """
    check_network(masks, params, values)
    counts = dict(choices or {})
    bad = {name: n for name, n in counts.items() if not (isinstance(n, Real) and n >= 1 and n % 1 == 0)}
    if bad:
        raise Refused(
            f"choices must count the alternatives, whole and at least 1 each: got {bad}. Leave out what was fixed."
        )
    whole, by_layer = mask_lengths(masks)
    value_nats = math.log(len(get_args(Values)))
    if values == "signs":
        value_nats += sum(int(mask.sum()) for mask in masks.values()) * math.log(2)
    elif values == "coded" and params is not None:
        value_nats += sum(tensor_nats(live(t, masks.get(name))) for name, t in params.items())
    choice_nats = sum(math.log(n) for n in counts.values())
    mask_nats = min(whole, by_layer) + math.log(2)
    return Description(mask_nats, value_nats, choice_nats, values, by_layer < whole, _COVERS[values])


def subset_nats(kept: int, total: int) -> float:
    """ln C(d, k) + ln (d + 1): how many of d are kept, each number alike, and then which.

    Raises:
        Refused: A number kept that is no count in 0..total.
    """
    k, d = scalar("kept", kept), scalar("total", total)
    if not (0 <= k <= d and k % 1 == 0 and d % 1 == 0):
        raise Refused(
            f"kept must lie in 0..{total}, the number of weights, both counts: got {kept}. Count them with masks.kept."
        )
    # C(d, k) (d + 1) is 1 / Beta(k + 1, d - k + 1)
    return float(gammaln(total + 2) - gammaln(kept + 1) - gammaln(total - kept + 1))


def mask_lengths(masks: Mapping[str, Tensor]) -> tuple[float, float]:
    """Nats of the masks in one piece, and layer by layer."""
    counts = [(int(mask.sum()), mask.numel()) for mask in masks.values()]
    kept, total = (sum(column) for column in zip(*counts, strict=True))
    return subset_nats(kept, total), sum(subset_nats(k, d) for k, d in counts)


def tensor_nats(values: NDArray[np.float32]) -> float:
    """The bit that says how, and the shorter of the two ways to code float32 values."""
    raw, shared = 32 * len(values) * math.log(2), codebook_nats(values)
    return math.log(2) + min(raw, shared)


def codebook_nats(values: NDArray[np.float32]) -> float:
    """Nats of a codebook and the adaptively coded indices into it; infinite where it would be too large."""
    _, counts = np.unique(values.view(np.uint32), return_counts=True)
    if not 0 < len(counts) <= LARGEST_CODEBOOK:
        return math.inf
    n, size = len(values), len(counts)
    indices = gammaln(n + size / 2) - gammaln(size / 2) - (gammaln(counts + 0.5) - gammaln(0.5)).sum()
    return float(math.log(LARGEST_CODEBOOK) + 32 * size * math.log(2) + indices)


def live(tensor: Tensor, mask: Tensor | None) -> NDArray[np.float32]:
    """The kept values in the order of their index; all of an unmasked tensor."""
    kept = tensor.detach().flatten() if mask is None else tensor.detach()[mask]
    return kept.cpu().numpy()


def check_network(masks: Mapping[str, Tensor], params: Mapping[str, Tensor] | None, values: str) -> None:
    """Refuse masks and tensors that are not those of one network in float32."""
    if values not in get_args(Values):
        raise Refused(f"values must be one of {get_args(Values)}: got {values!r}.")
    if params is None and values != "seed":
        raise Refused(f"params must be given for values={values!r}: got None. Pass the network's tensors.")
    check_masks(masks, params)
    if not masks:
        raise Refused("masks must be one or more bool tensors: got none. Build them with masks.ones(model).")
    other = {n: str(t.dtype) for n, t in (params or {}).items() if t.dtype != torch.float32}
    if other and values == "coded":
        raise Refused(f"params must be float32 to be coded: got {other}. Convert them, and evaluate the converted.")


def check_masks(masks: Mapping[str, Tensor], params: Mapping[str, Tensor] | None) -> None:
    """Refuse masks that are none or do not fit the tensors, and tensors that are not finite; buffers may hold -inf."""
    if not isinstance(masks, Mapping) or any(getattr(m, "dtype", 0) != torch.bool for m in masks.values()):
        raise Refused("masks must be one or more bool tensors, a dict, True = kept. Build them with masks.ones(model).")
    if params is None:
        return
    if not isinstance(params, Mapping) or not all(isinstance(t, Tensor) for t in params.values()):
        raise Refused(f"params must be a dict of tensors: got {type(params).__name__}. Pass state.params.")
    wrong = [
        n for n, m in masks.items() if n not in params or (params[n].shape, params[n].device) != (m.shape, m.device)
    ]
    if wrong:
        raise Refused(f"params must hold every masked tensor in the shape of its mask, on its device: not so {wrong}.")
    check_finite("params", {n: t if n in masks else t.clamp(min=0) for n, t in params.items() if t.is_floating_point()})
