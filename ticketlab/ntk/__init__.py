"""The restricted empirical neural tangent kernel: what a masked network learns with, at the cost of the mask.

:func:`kernel` computes it, :func:`jacobian` and :func:`operator` give its factor where the kernel itself is
too coarse or too large, :func:`spectrum` and the comparisons read it, and the predictions train with it.
"""

from __future__ import annotations

from ticketlab.ntk.compare import (
    Drift,
    Preservation,
    alignment,
    drift,
    preservation,
    rank_one_target_alignment,
    target_alignment,
)
from ticketlab.ntk.jacobian import KernelOperator, LiveJacobian, jacobian, operator
from ticketlab.ntk.kernel import kernel
from ticketlab.ntk.predict import gradient_flow_prediction, kernel_regression
from ticketlab.ntk.spectrum import Spectrum, spectrum

__all__ = [
    "Drift",
    "KernelOperator",
    "LiveJacobian",
    "Preservation",
    "Spectrum",
    "alignment",
    "drift",
    "gradient_flow_prediction",
    "jacobian",
    "kernel",
    "kernel_regression",
    "operator",
    "preservation",
    "rank_one_target_alignment",
    "spectrum",
    "target_alignment",
]
