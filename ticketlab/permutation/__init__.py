"""Hidden-unit permutations: which of them leave a network's function unchanged, and which brings two networks together.

:func:`groups` traces a module, :func:`match` finds a permutation, :func:`permute` applies one to parameters, buffers
and masks alike, :func:`align` does all of it and checks that the function is the same.

- ``trace``: the operations of a forward pass, run on ``axes`` by ``rules``
- ``groups``: what is left free has a name, and is tried on perturbed weights
- ``permute``: applying, and holding one function against another
- ``matching``: the best permutation
"""

from __future__ import annotations

from ticketlab.permutation.groups import groups
from ticketlab.permutation.matching import Alignment, Matching, align, match
from ticketlab.permutation.permute import Groups, Permutations, assert_same_function, permute, random

__all__ = [
    "Alignment",
    "Groups",
    "Matching",
    "Permutations",
    "align",
    "assert_same_function",
    "groups",
    "match",
    "permute",
    "random",
]
