"""Scores from gradients at one point, made for pruning before training: SNIP, GraSP, SynFlow."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ticketlab.derivatives import gradient, hessian_product
from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores
from ticketlab.errors import Refused
from ticketlab.network import network
from ticketlab.state import State

GRASP_TEMPERATURE = 200.0
_BATCH = 250  # examples in a pass


def snip(evidence: Evidence) -> Scores:
    r"""Connection sensitivity (Lee et al. 2019): what scaling a weight does to the loss.

    .. math:: s_i = |w_i \, \partial L / \partial w_i|
    """
    (x, y), weights = evidence.examples, evidence.final
    slope = gradient(evidence.network, x, y, evidence.loss, tuple(weights), _BATCH)
    return {name: (g * weights[name]).abs() for name, g in slope.items()}


def grasp(evidence: Evidence) -> Scores:
    r"""Gradient flow kept (Wang et al. 2020): what removing a weight does to the squared norm of the gradient.

    .. math:: s_i = w_i (H g)_i

    The weights with the largest -w (H g) go: to first order their removal adds most to g^T g, or takes least.
    g and H are of masked weights, with the logits divided by 200 as in the paper (outputs that are no logits are not).
    """
    (x, y), weights, loss = evidence.examples, evidence.final, evidence.loss
    if loss.name == "cross_entropy":
        loss = replace(loss, mean=lambda logits, labels: evidence.loss.mean(logits / GRASP_TEMPERATURE, labels))
    slope = gradient(evidence.network, x, y, loss, tuple(weights), _BATCH)
    product = hessian_product(evidence.network, x, y, loss, slope, _BATCH)
    return {name: w * product[name] for name, w in weights.items()}


def synflow(evidence: Evidence) -> Scores:
    r"""Synaptic flow (Tanaka et al. 2020): no data, and layers keep their sum of scores however many weights they have.

    .. math:: R = 1^\top f(1; |\theta|), \quad s_i = |\theta_i \, \partial R / \partial \theta_i|

    The flow is that of the masked weights alone: biases and running means, which would add flow of their own at
    every layer, are zero. All else counts by its absolute value, batch norm's scales and running variances included;
    one input of ones, in float64. The criterion is made for many rounds: one round can empty a layer.

    Raises:
        Refused: Inputs that are not floating, or a model that does not run in float64.
    """
    x = evidence.inputs
    if not x.is_floating_point():
        raise Refused(f"it needs floating inputs, to put ones in their place: got {x.dtype}.")
    absolute = State(*({n: _absolute(n, t) for n, t in part.items()} for part in evidence.end))
    ones = torch.ones_like(x[:1], dtype=torch.float64)
    try:
        net = network(evidence.model, absolute, ones, masks=evidence.masks)
    except Refused as error:
        raise Refused(f"it needs the network of absolute weights in float64, but {error}") from error
    flow = replace(evidence.loss, mean=lambda outputs, _: outputs.sum())
    slope = gradient(net, ones, ones, flow, tuple(evidence.masks))
    return {name: (g * net.params[name]).abs() for name, g in slope.items()}


def _absolute(name: str, tensor: Tensor) -> Tensor:
    """A parameter or buffer in the network of the flow: nothing is added that does not come through a weight."""
    if not tensor.is_floating_point():
        return tensor
    own = name.rpartition(".")[2]
    added = "bias" in own or own == "running_mean"
    return torch.zeros_like(tensor, dtype=torch.float64) if added else tensor.double().abs()


GRADIENTS: dict[str, Criterion] = {
    "snip": Criterion(snip, needs="labels", stage="init", passes=lambda n, outputs, weights: 3 * n),
    "grasp": Criterion(grasp, needs="labels", stage="init", passes=lambda n, outputs, weights: (3 + 6) * n),
    "synflow": Criterion(synflow, needs="inputs", stage="init", passes=lambda n, outputs, weights: 3, rounds=100),
}
