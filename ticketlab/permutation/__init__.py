"""Hidden-unit permutations: which of them leave a network's function unchanged, and which brings two networks together.

:func:`groups` traces a module, :func:`match` finds a permutation, :func:`permute` applies one to parameters, buffers
and masks alike, :func:`align` does all of it and checks that the function is the same.
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
