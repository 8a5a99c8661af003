"""Signal propagation: the mean-field theory of wide networks, and what real ones, dense or masked, do.

:func:`mean_field`, :func:`critical_sigma_w2` and :func:`phase_diagram` are the theory; :func:`effective_sigma_w2`
says where a network's layers lie in it. :func:`jacobian_singular_values` and, for large networks,
:func:`jacobian_moments` measure how it stretches its inputs, :func:`layer_statistics` what its layers see.
"""

from __future__ import annotations

from ticketlab.signal.activations import applied
from ticketlab.signal.jacobian import Isometry, isometry, jacobian_singular_values
from ticketlab.signal.layers import layer_statistics
from ticketlab.signal.mean_field import MeanField, c_map, chi, mean_field, q_map
from ticketlab.signal.moments import Moments, jacobian_moments, largest_singular_values
from ticketlab.signal.phase import critical_sigma_w2, effective_sigma_w2, masked_sigma_w2, phase_diagram
from ticketlab.signal.product import fuss_catalan, singular_value_density

__all__ = [
    "Isometry",
    "MeanField",
    "Moments",
    "applied",
    "c_map",
    "chi",
    "critical_sigma_w2",
    "effective_sigma_w2",
    "fuss_catalan",
    "isometry",
    "jacobian_moments",
    "jacobian_singular_values",
    "largest_singular_values",
    "layer_statistics",
    "masked_sigma_w2",
    "mean_field",
    "phase_diagram",
    "q_map",
    "singular_value_density",
]
