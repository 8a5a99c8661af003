"""The restricted empirical neural tangent kernel: what a masked network learns with, at the cost of the mask.

problem            one network at m * theta, the coordinates that it is differentiated in, one output or all
  uses             every use of a parameter as a weight in a forward pass, and what the graph says of it
  layers           linear layers and convolutions that meet each example by itself: those with a fast path
  features         their inputs and output deltas for a block of examples, proven against plain autograd
  plan             which method for which layer, in blocks of how many examples
  structured | rows | gather   the three ways to a layer's kernel: nothing pruned, unit by unit, live columns
  generic          rows of the Jacobian of whatever is left, and the oracle
kernel, jacobian   the whole: the kernel, and its factor
spectrum, compare, predict   what is read off it
matrix_free        products with it, and what is read off those
  passes | sketch    a product without rows; traces from random vectors
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
from ticketlab.ntk.jacobian import LiveJacobian, jacobian
from ticketlab.ntk.kernel import kernel
from ticketlab.ntk.matrix_free import Eigenpairs, KernelOperator, operator
from ticketlab.ntk.predict import gradient_flow_prediction, kernel_regression
from ticketlab.ntk.sketch import Estimate
from ticketlab.ntk.spectrum import Spectrum, spectrum

__all__ = [
    "Drift",
    "Eigenpairs",
    "Estimate",
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
