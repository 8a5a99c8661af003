"""Cross-entropy made fit for bounds that need a loss in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ticketlab.bounds.kl import Value, scalar
from ticketlab.errors import Refused
from ticketlab.losses import CROSS_ENTROPY, probabilities


@dataclass(frozen=True)
class BoundedLoss:
    """A bounded cross-entropy on the scale [0, 1], and the way back to nats."""

    value: float
    """Mean over examples, in [0, 1]: what the bounds take as the training error."""
    low_nats: float
    high_nats: float

    def nats(self, value: Value) -> Value:
        """A loss, or a bound on it, in nats: low + (high - low) value."""
        return self.low_nats + (self.high_nats - self.low_nats) * value


def bounded_cross_entropy(
    logits: Float[Tensor, "n classes"], y: Int[Tensor, " n"], mixing: float = 0.01
) -> BoundedLoss:
    r"""Cross-entropy of predictions mixed with the uniform one, rescaled to [0, 1].

    .. math:: -\ln \big( (1 - a) p_y + a / C \big) \in [-\ln (1 - a + a / C), \; \ln (C / a)]

    The bound then speaks of the mixed predictor's cross-entropy: ``loss.nats(bound.value)``.

    Args:
        logits: Outputs of the network.
        y: Labels in 0..classes - 1.
        mixing: a, in (0, 1], fixed before the sample is seen (or paid for).

    Raises:
        Refused: A mixing outside (0, 1], logits that are not finite, or shapes or labels that do not fit.
    """
    if not 0 < scalar("mixing", mixing) <= 1:
        raise Refused(f"mixing must lie in (0, 1]: got {mixing}. Try 0.01.")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not len(logits) or not logits.isfinite().all():
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Refused(f"logits must be finite [n, classes]: got {given}. Pass the outputs of one network.")
    CROSS_ENTROPY.check(y, len(logits), logits.shape[1:])
    classes = logits.shape[1]
    p = probabilities(logits.detach().double())
    right = p.gather(1, y.to(p.device, torch.int64)[:, None])[:, 0]
    low, high = -math.log(1 - mixing + mixing / classes), math.log(classes / mixing)
    mixed = -torch.log((1 - mixing) * right + mixing / classes).mean()
    share = (float(mixed) - low) / (high - low) if high > low else 0.0
    return BoundedLoss(min(max(share, 0.0), 1.0), low, high)
