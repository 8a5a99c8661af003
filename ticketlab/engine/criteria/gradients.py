"""Scores from gradients at one point, made for pruning before training: SNIP, GraSP, SynFlow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vjp

from ticketlab.engine.criteria.evidence import Evidence, Scores
from ticketlab.errors import Refused
from ticketlab.state import Params, State

GRASP_TEMPERATURE = 200.0
_BATCH = 250  # examples in a pass


def snip(evidence: Evidence) -> Scores:
    r"""Connection sensitivity (Lee et al. 2019): what scaling a weight does to the loss.

    .. math:: s_i = |w_i \, \partial L / \partial w_i|
    """
    weights = evidence.final
    return {name: (g * weights[name]).abs() for name, g in _gradient(evidence, "snip", 1.0).items()}


def grasp(evidence: Evidence) -> Scores:
    r"""Gradient flow kept (Wang et al. 2020): what removing a weight does to the squared norm of the gradient.

    .. math:: s_i = w_i (H g)_i

    The weights with the largest -w (H g) go: to first order their removal adds most to g^T g, or takes least.
    g and H are of prunable weights, with the logits divided by 200 as in the paper.
    """
    weights = evidence.final
    gradient = _gradient(evidence, "grasp", GRASP_TEMPERATURE)
    product = {name: torch.zeros_like(w) for name, w in weights.items()}
    for xs, ys, share in _batches(*evidence.examples("grasp")):
        slope = grad(lambda w, xs=xs, ys=ys: F.cross_entropy(evidence.logits(w, xs) / GRASP_TEMPERATURE, ys))
        for name, part in vjp(slope, weights)[1](gradient)[0].items():  # H g, for H is symmetric
            product[name] += share * part
    return {name: w * product[name] for name, w in weights.items()}


def synflow(evidence: Evidence) -> Scores:
    r"""Synaptic flow (Tanaka et al. 2020): no data, and layers keep their sum of scores however many weights they have.

    .. math:: R = 1^\top f(1; |\theta|), \quad s_i = |\theta_i \, \partial R / \partial \theta_i|

    The flow is that of the prunable weights alone: biases and running means, which would add flow of their own at
    every layer, are zero. All else counts by its absolute value, batch norm's scales and running variances included;
    one input of ones, in float64. The criterion is made for many rounds: one round can empty a layer.
    """
    x = evidence.inputs("synflow")
    if not x.is_floating_point():
        raise Refused(f"criterion 'synflow' needs floating inputs, to put ones in their place: got {x.dtype}.")
    absolute = State(*({n: _absolute(n, t) for n, t in part.items()} for part in evidence.end))
    weights = {name: w.double().abs() for name, w in evidence.final.items()}
    ones = torch.ones_like(x[:1], dtype=torch.float64)
    evidence.one_output(weights, ones, absolute)
    flow = grad(lambda w: evidence.logits(w, ones, absolute).sum())(weights)
    return {name: (g * weights[name]).abs() for name, g in flow.items()}


def _absolute(name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer in the network of the flow: nothing is added that does not come through a weight."""
    if not tensor.is_floating_point():
        return tensor
    own = name.rpartition(".")[2]
    added = "bias" in own or own == "running_mean"
    return torch.zeros_like(tensor, dtype=torch.float64) if added else tensor.double().abs()


def _gradient(evidence: Evidence, criterion: str, temperature: float) -> Params:
    """Of the mean cross-entropy, with respect to prunable weights."""
    weights = evidence.final
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for xs, ys, share in _batches(*evidence.examples(criterion)):
        slope = grad(lambda w, xs=xs, ys=ys: F.cross_entropy(evidence.logits(w, xs) / temperature, ys))
        for name, part in slope(weights).items():
            total[name] += share * part
    return total


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    """Parts that fit in memory, each with its share of the examples."""
    return [(xs, ys, len(xs) / len(x)) for xs, ys in zip(x.split(_BATCH), y.split(_BATCH), strict=True)]
