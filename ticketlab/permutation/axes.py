"""Which tensor axes must be permuted together: union-find over axes that may also split into factors.

An axis is a tuple of *atoms*, outer first, as in a row-major flattening: channels x height x width flattened into
one axis of a linear layer are three atoms. Axes that must carry one permutation are joined; an axis on which order
matters, such as the pixels of the input or the classes of the output, is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable

Axis = tuple[int, ...]


class Axes:
    """All atoms of one traced network.

    Atoms of size 1 do not exist: their axis is the empty tuple. An atom of size 0 stands for a length that is not
    known, or for nothing at all, and is pinned.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._pinned: set[int] = set()
        self._became: dict[int, Axis] = {}  # one other atom after a join, several after a split

    def new(self, size: int, *, pinned: bool = False) -> Axis:
        if size == 1:
            return ()
        self.sizes.append(size)
        atom = len(self.sizes) - 1
        if pinned or size == 0:
            self._pinned.add(atom)
        return (atom,)

    def atoms(self, axes: Iterable[int]) -> Axis:
        """What an axis, or several in a row, consists of by now."""
        found: list[int] = []
        for atom in axes:
            found += self.atoms(self._became[atom]) if atom in self._became else [atom]
        return tuple(found)

    def is_free(self, atom: int) -> bool:
        return atom not in self._pinned

    def pin(self, axes: Iterable[int]) -> None:
        self._pinned.update(self.atoms(axes))

    def join(self, one: Iterable[int], other: Iterable[int]) -> None:
        """Give two axes (or two rows of axes) of equal length one permutation, splitting atoms as needed.

        Where no common factorisation exists both are pinned: that is always right, and the least that is.
        """
        left, right = self.atoms(one), self.atoms(other)
        while left and right and all(self.sizes[atom] for atom in left + right):
            a, b = left[0], right[0]
            if a == b or self.sizes[a] == self.sizes[b]:
                self._become(b, (a,))
                left, right = self.atoms(left[1:]), self.atoms(right[1:])
                continue
            large, small = (a, b) if self.sizes[a] > self.sizes[b] else (b, a)
            if self.sizes[large] % self.sizes[small]:
                break
            self._become(large, self.new(self.sizes[small]) + self.new(self.sizes[large] // self.sizes[small]))
            left, right = self.atoms(left), self.atoms(right)
        self.pin(left + right)

    def _become(self, atom: int, parts: Axis) -> None:
        if parts == (atom,):
            return
        self._became[atom] = parts
        if atom in self._pinned:
            self._pinned.update(parts)
