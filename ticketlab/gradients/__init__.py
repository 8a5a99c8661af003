"""First gradients: how large, how reliable and how well directed they are in a ticket and in its controls.

Three gradients of the mean loss go by that name and are kept apart:

- the **ticket's gradient**, at m * theta in live coordinates: what SGD on the masked network follows.
  :func:`gradient` gives it, zero where a weight is pruned;
- the **dense network's gradient**, at theta, of which the live coordinates are compared with the ticket's:
  ``masks.masked(gradient(model, theta, x, y), masks)``;
- the gradient at m * theta in **all** coordinates, pruned weights too: ``coordinates="all"``. RigL grows by it.

Weights that are kept and every trainable parameter that has no mask are live, as in the restricted NTK.
"""

from __future__ import annotations

from ticketlab.gradients.align import Alignment, alignment
from ticketlab.gradients.batches import BatchStatistics, batch_statistics
from ticketlab.gradients.gradient import gradient
from ticketlab.gradients.kernel_modes import NtkOverlap, ntk_overlap
from ticketlab.gradients.step import Step, one_step

__all__ = [
    "Alignment",
    "BatchStatistics",
    "NtkOverlap",
    "Step",
    "alignment",
    "batch_statistics",
    "gradient",
    "ntk_overlap",
    "one_step",
]
