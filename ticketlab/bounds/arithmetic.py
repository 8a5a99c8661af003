"""A range coder in exact integers: symbols into bytes and back, the same bits on every machine.

The words of a code are prefix-free, given what the decoder knows: how many symbols of which alphabets come.
:meth:`Encoder.finish` writes the fewest bytes that fix the message whatever follows them, so no length and no end
mark is needed, and 8 times the number of bytes is a description length (Kraft's inequality holds). It exceeds the
ideal length, -log2 of the product of the probabilities, by less than 10 bits.

Hand-written because libraries code with floating-point models and whole words without a prefix-free end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ticketlab.errors import Refused

_TOP = 1 << 56  # the register: seven bytes
_BOTTOM = 1 << 48  # below this width the leading byte is settled
_LARGEST_TOTAL = 1 << 32


class Encoder:
    """Appends symbols to a message; `finish` gives its bytes. Mirror every call by the same one of `Decoder`."""

    def __init__(self) -> None:
        self._low, self._width, self._out = 0, _TOP, bytearray()

    def interval(self, start: int, size: int, total: int) -> None:
        """A symbol that owns [start, start + size) of `total` equal shares: -log2(size / total) bits."""
        if not 0 <= start < start + size <= total <= _LARGEST_TOTAL:
            raise Refused(f"a symbol must own [start, start + size) of total <= 2^32: got {start}, {size}, {total}.")
        low = self._width * start // total
        self._width = self._width * (start + size) // total - low
        self._low += low
        while self._width < _BOTTOM:
            self._settle(1)

    def _settle(self, n_bytes: int) -> None:
        """Move the leading bytes of the register to the output, with the carry that they may hold."""
        for _ in range(n_bytes):
            if self._low >= _TOP:
                self._carry()
            self._out.append(self._low >> 48)
            self._low = (self._low & (_BOTTOM - 1)) << 8
            self._width <<= 8

    def _carry(self) -> None:
        self._low -= _TOP
        at = len(self._out) - 1
        while self._out[at] == 255:
            self._out[at] = 0
            at -= 1
        self._out[at] += 1

    def uniform(self, value: int, alphabet: int) -> None:
        """One of 0..alphabet - 1, all alike: log2(alphabet) bits."""
        self.interval(int(value), 1, alphabet)

    def subset(self, mask: np.ndarray) -> None:
        """Which of d are True: log2(d + 1) bits for how many, k, then log2 C(d, k) for where."""
        flat = np.asarray(mask, dtype=bool).ravel().tolist()
        left = sum(flat)
        self.uniform(left, len(flat) + 1)
        for rest, kept in zip(range(len(flat), 0, -1), flat, strict=True):
            if left in (0, rest):
                return
            # of the `rest` places still open, `left` are kept: the conditional probability given all before
            self.interval(0, left, rest) if kept else self.interval(left, rest - left, rest)
            left -= kept

    def symbols(self, values: Sequence[int] | np.ndarray, frequencies: Sequence[int], increment: int = 0) -> None:
        """Symbols with integer frequencies; with an increment, that of a symbol grows by it after each use.

        All frequencies 1 and increment 0: uniform. All 1 and increment 2: the adaptive code of Krichevsky and
        Trofimov (1981), within (L - 1)/2 ln n + O(1) nats of the empirical entropy.
        """
        table = list(frequencies)
        for value in np.asarray(values).ravel().tolist():
            if not 0 <= value < len(table):
                raise Refused(f"symbols must be in 0..{len(table) - 1}, the alphabet: got {value}.")
            self.interval(sum(table[:value]), table[value], sum(table))
            table[value] += increment

    def floats(self, values: np.ndarray) -> None:
        """float16 or float32 as they are: 16 or 32 bits each."""
        bits = _bits_of(values.dtype)
        for pattern in np.ascontiguousarray(values).ravel().view(f"u{bits // 8}").tolist():
            self.uniform(pattern, 1 << bits)

    def finish(self) -> bytes:
        """The shortest byte string of which every continuation decodes to this message."""
        for n_bytes in range(8):
            unit = _TOP >> (8 * n_bytes)
            point = -(-self._low // unit) * unit  # rounded up
            if point + unit <= self._low + self._width:
                break
        self._low = point
        self._settle(n_bytes)
        return bytes(self._out)


class Decoder:
    """Reads back what an `Encoder` wrote; `finish` refuses bytes that are not a whole message."""

    def __init__(self, data: bytes) -> None:
        self._data, self._width = data, _TOP
        self._offset, self._read = int.from_bytes(data[:7].ljust(7, b"\0")), 7

    def _target(self, total: int) -> int:
        """The share that the data point to."""
        return ((self._offset + 1) * total - 1) // self._width

    def _remove(self, start: int, size: int, total: int) -> None:
        low = self._width * start // total
        self._width = self._width * (start + size) // total - low
        self._offset -= low
        while self._width < _BOTTOM:
            following = self._data[self._read] if self._read < len(self._data) else 0
            self._offset, self._width, self._read = self._offset << 8 | following, self._width << 8, self._read + 1

    def uniform(self, alphabet: int) -> int:
        """One of 0..alphabet - 1."""
        value = self._target(alphabet)
        self._remove(value, 1, alphabet)
        return value

    def subset(self, size: int) -> np.ndarray:
        """[size] bool."""
        mask = np.zeros(size, dtype=bool)
        left = self.uniform(size + 1)
        for index in range(size):
            rest = size - index
            if left in (0, rest):
                mask[index:] = left > 0
                break
            mask[index] = kept = self._target(rest) < left
            self._remove(0, left, rest) if kept else self._remove(left, rest - left, rest)
            left -= kept
        return mask

    def symbols(self, size: int, frequencies: Sequence[int], increment: int = 0) -> np.ndarray:
        """[size] int64."""
        table, found = list(frequencies), np.zeros(size, dtype=np.int64)
        for index in range(size):
            target, value, start = self._target(sum(table)), 0, 0
            while start + table[value] <= target:
                start, value = start + table[value], value + 1
            self._remove(start, table[value], sum(table))
            table[value] += increment
            found[index] = value
        return found

    def floats(self, size: int, dtype: np.dtype | type = np.float32) -> np.ndarray:
        """[size] of that dtype, bit for bit."""
        bits = _bits_of(np.dtype(dtype))
        patterns = [self.uniform(1 << bits) for _ in range(size)]
        return np.array(patterns, dtype=f"u{bits // 8}").view(dtype)

    def finish(self) -> None:
        """Check that the data are one whole word of the code.

        Raises:
            Refused: Bytes left over, or cut off so that others could follow: such a length describes nothing.
        """
        missing = self._read - len(self._data)
        if missing < 0 or self._offset + (1 << 8 * missing) > self._width:
            what = "bytes are left over" if missing < 0 else "the end is missing"
            raise Refused(f"the data must be one whole message: {what}. Decode what Encoder.finish gave.")


def _bits_of(dtype: np.dtype) -> int:
    if dtype not in (np.float16, np.float32):
        raise Refused(f"floats must be float16 or float32: got {dtype}. Convert them, and evaluate the converted.")
    return 8 * dtype.itemsize
