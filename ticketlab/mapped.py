"""Examples that stay on disk: memory-mapped arrays in the place of one tensor, of which a part is read when asked for.

A `Mapped` stands where a `Split` has its inputs. Indexed or split it gives tensors, on its device and in its dtype, the
very bits that the same examples in memory would have; whatever needs all of it at once is refused. ``shards`` writes
the arrays and makes the task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ticketlab.errors import Refused

_FEW = 32


class Scale(NamedTuple):
    """How bytes become numbers: (byte / 255 - mean) / std, channel by channel of [c, h, w]; one for all otherwise."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def table(self, dtype: torch.dtype) -> Float[Tensor, "channel 256"]:
        """What each byte becomes. Made on the CPU: a GPU divides by way of the reciprocal, and the last bit differs."""
        mean, std = (torch.tensor(values, dtype=dtype)[:, None] for values in self)
        return torch.arange(256).to(dtype).expand(len(mean), 256).clone().div_(255).sub_(mean).div_(std)


class NotInMemory(Refused, AttributeError):
    """All of a mapped array at once is asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Mapped:
    """Examples [n, ...] on disk, which behave like a tensor as far as they are indexed, split or moved.

    Attributes:
        shards: Arrays that were opened with ``np.load(..., mmap_mode="r")``, of one shape behind n and one dtype.
        digest: Of what the shards hold, for names of studies.
        scale: Of bytes; None for floating values and tokens.
        rows: Which examples, in which order, int64 on the CPU.
        device: Where parts go.
        dtype: Of the parts: floating, or int64 for tokens.
    """

    shards: tuple[np.ndarray, ...]
    digest: str
    scale: Scale | None
    rows: Tensor
    device: torch.device
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Mapped({tuple(self.shape)}, {self.dtype}, {len(self.shards)} shards of {self.shards[0].dtype})"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), *self.shards[0].shape[1:]))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def __getitem__(self, key: int | slice | Sequence[int] | Tensor) -> Tensor:
        """Examples as a tensor: one, or those of a slice, of indices or of a bool mask [n]."""
        if isinstance(key, tuple) or key is None or key is Ellipsis:
            raise NotInMemory(f"examples on disk are indexed by their first axis alone: got {key}. {_REMEDY}")
        if isinstance(key, Tensor):
            key = key.cpu()
        rows = self.rows[key]
        return self._read(rows[None])[0] if rows.ndim == 0 else self._read(rows)

    def split(self, size: int) -> Iterator[Tensor]:
        """Parts of ``size`` examples in their order, the last one shorter; each is read when it is asked for."""
        return (self[begin : begin + size] for begin in range(0, len(self), size))

    def take(self, index: Tensor) -> Mapped:
        """The examples of indices, or of a bool mask [n], still on disk."""
        return replace(self, rows=self.rows[index.cpu()])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Mapped:
        """The same examples elsewhere or in another floating dtype; None leaves as is."""
        place = self.device if device is None else torch.empty(0, device=device).device
        return replace(self, device=place, dtype=self.dtype if dtype is None else dtype)

    def few(self) -> Tensor:
        """Some of the examples, the first and the last among them, for checks."""
        return self[torch.cat([torch.arange(len(self))[:_FEW], torch.tensor([len(self) - 1])])]

    def fingerprint(self) -> str:
        """Digest of what the examples are, the same on every device, without reading them."""
        told = repr((self.digest, self.scale, tuple(self.shape), self.dtype))
        return hashlib.sha256(told.encode() + self.rows.numpy().tobytes()).hexdigest()

    def _read(self, rows: Tensor) -> Tensor:
        ends = np.cumsum([len(shard) for shard in self.shards])
        wanted = rows.numpy()
        owner = np.searchsorted(ends, wanted, side="right")
        found = np.empty((len(wanted), *self.shards[0].shape[1:]), self.shards[0].dtype.newbyteorder("="))
        for number in np.unique(owner):
            here, begin = owner == number, ends[number] - len(self.shards[number])
            found[here] = self.shards[number][wanted[here] - begin]
        raw = torch.from_numpy(found).to(self.device)
        return raw.to(self.dtype) if self.scale is None else _scaled(raw, self.scale.table(self.dtype).to(self.device))

    def __getattr__(self, name: str) -> Any:
        raise NotInMemory(f"examples on disk have no {name!r}: {_REMEDY}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotInMemory(f"{getattr(func, '__name__', 'this')} needs its examples in memory. {_REMEDY}")


_REMEDY = "Pass some of them, x[:1000], or those of task.limit(train=1000)."


def rows(x: Tensor, index: Tensor) -> Tensor:
    """The examples of indices or of a mask: a tensor of a tensor's, what is on disk still on disk."""
    return x.take(index) if isinstance(x, Mapped) else x[index]


def _scaled(pixels: Tensor, table: Float[Tensor, "channel 256"]) -> Tensor:
    """Every byte looked up, channel by channel."""
    if len(table) == 1:
        return table[0].index_select(0, pixels.flatten().int()).view(pixels.shape)
    planes = zip(table, pixels.unbind(1), strict=True)
    return torch.stack([of.index_select(0, plane.flatten().int()).view(plane.shape) for of, plane in planes], 1)


def digest_of(checksums: Sequence[str]) -> str:
    """One digest of the checksums of shards, in their order."""
    return hashlib.sha256("".join(checksums).encode()).hexdigest()[:16]


def opened(shards: Sequence[np.ndarray], checksums: Sequence[str], scale: Scale | None, dtype: torch.dtype) -> Mapped:
    """All examples of memory-mapped arrays, in order, on the CPU."""
    n = sum(len(shard) for shard in shards)
    kind = dtype if scale is not None or shards[0].dtype.kind == "f" else torch.int64
    return Mapped(tuple(shards), digest_of(checksums), scale, torch.arange(n), torch.device("cpu"), kind)


def bytes_of(x: Tensor) -> int:
    """Memory that examples take: none on disk but for their order."""
    held = x.rows if isinstance(x, Mapped) else x
    return held.numel() * held.element_size()
