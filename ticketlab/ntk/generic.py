"""The oracle: derivatives of any module with respect to its live coordinates, one example at a time.

Slower than the layer-wise methods and independent of them: it knows nothing of layers. They are tested
against it, and it serves the parameters that they cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jacrev, vmap

from ticketlab.functional import transformable
from ticketlab.ntk.problem import Problem


def live_vector(problem: Problem, names: Sequence[str]) -> Float[Tensor, " k"]:
    """The live entries of the named parameters, one after another."""
    return torch.cat([problem.weights[name][problem.live[name]] for name in names])


def scattered(problem: Problem, names: Sequence[str], vector: Float[Tensor, " k"]) -> dict[str, Tensor]:
    """The parameters with ``vector`` in their live entries: the inverse of :func:`live_vector`."""
    weights, start = dict(problem.weights), 0
    for name in names:
        at = problem.live[name].flatten().nonzero()[:, 0]
        part = vector[start : start + len(at)]
        start += len(at)
        # Where everything is live a view is enough: no copy of the weights for each example.
        whole = part if len(at) == weights[name].numel() else weights[name].flatten().index_copy(0, at, part)
        weights[name] = whole.view_as(weights[name])
    return weights


CHUNK_BYTES = 2**28
"""The gradients of so many examples are held at once, before their live entries are picked."""


def jacobian(problem: Problem, names: Sequence[str], n_outputs: int, x: Tensor) -> Float[Tensor, "k out n"]:
    r"""Derivatives of the outputs with respect to the live coordinates of the named parameters.

    .. math:: J_{e, o, n} = \partial f_o(x_n;\, S v) / \partial v_e

    with S the scatter of the live vector v into the parameters. Each example goes through the model alone,
    so nothing is assumed of how the model treats its batch axis. A model that ``vmap`` cannot follow, such
    as one that branches on the values of its activations, is differentiated in a plain loop instead.
    """
    vector = live_vector(problem, names)
    derivative = jacrev(lambda v, one: problem.forward(scattered(problem, names, v), one[None])[0])
    # Twice: backward passes hold a gradient in the shape of each parameter beside the entries picked from it.
    bytes_each = 2 * n_outputs * sum(problem.weights[name].numel() for name in names) * problem.dtype.itemsize
    try:
        chunk = max(1, CHUNK_BYTES // max(1, bytes_each))
        with transformable():
            rows = vmap(derivative, in_dims=(None, 0), chunk_size=chunk)(vector, x)  # [n, out, k]
    except RuntimeError:
        # A true fault of the model is raised again from here, in the user's own terms.
        rows = torch.stack([derivative(vector, one) for one in x])
    return rows.permute(2, 1, 0)
