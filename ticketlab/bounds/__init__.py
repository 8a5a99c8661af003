"""Generalisation bounds that say what they certify, and the description lengths that they need.

:func:`binomial_tail` of a :func:`description_length`, or of 8 times the bytes that :func:`encode` writes, is the
tightest certificate for one network; :func:`mdl` is the formula that the literature quotes; :func:`held_out` is
the yardstick. Bounds take numbers or arrays and give a :class:`Bound`.
"""

from __future__ import annotations

from ticketlab.bounds.arithmetic import Decoder, Encoder
from ticketlab.bounds.certificates import (
    Bound,
    binomial_tail,
    held_out,
    mdl,
    occam_hoeffding,
    occam_kl,
    pac_bayes_catoni,
    pac_bayes_kl,
    pac_bayes_mcallester,
)
from ticketlab.bounds.coding import decode, encode
from ticketlab.bounds.description import Description, description_length, subset_nats
from ticketlab.bounds.kl import binary_kl, kl_inverse
from ticketlab.bounds.losses import BoundedLoss, bounded_cross_entropy
from ticketlab.bounds.pick_to_learn import pick_to_learn
from ticketlab.bounds.quantise import quantise

__all__ = [
    "Bound",
    "BoundedLoss",
    "Decoder",
    "Description",
    "Encoder",
    "binary_kl",
    "binomial_tail",
    "bounded_cross_entropy",
    "decode",
    "description_length",
    "encode",
    "held_out",
    "kl_inverse",
    "mdl",
    "occam_hoeffding",
    "occam_kl",
    "pac_bayes_catoni",
    "pac_bayes_kl",
    "pac_bayes_mcallester",
    "pick_to_learn",
    "quantise",
    "subset_nats",
]
