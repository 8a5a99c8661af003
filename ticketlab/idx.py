"""Binary files of images: IDX, as MNIST comes, and the plain records of CIFAR-10. No more is read than they promise."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from ticketlab.errors import Refused

IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")


class Raw(NamedTuple):
    """A set as its files have it: images [n, c, h, w] and labels [n], both unsigned bytes."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def read_mnist(folder: Path, shapes: Sequence[Sequence[int]] | None = None) -> Raw:
    """The four IDX files of MNIST or of a set in its format, plain or gzipped.

    Args:
        folder: Where they are.
        shapes: Of training images, training labels, test images and test labels; any when None.

    Raises:
        Refused: A file that is missing, damaged or of another shape, or as many images as there are not labels.
    """
    paths = [next((p for p in (folder / f, folder / f"{f}.gz") if p.is_file()), None) for f in IDX_FILES]
    _require(folder, [f for f, path in zip(IDX_FILES, paths, strict=True) if path is None], "(plain or .gz)")
    wanted: Sequence[Sequence[int] | None] = shapes or [None] * len(paths)
    x, y, x_test, y_test = (read_idx(path, shape) for path, shape in zip(paths, wanted, strict=True) if path)
    for images, labels, prefix in ((x, y, "train"), (x_test, y_test, "t10k")):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise Refused(
                f"the {prefix} files in {folder} must hold images [n, h, w] and as many labels [n]: got shapes "
                f"{images.shape} and {labels.shape}. Download both anew, from one place."
            )
    return Raw(x[:, None], y, x_test[:, None], y_test)


def read_idx(path: Path, shape: Sequence[int] | None = None) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or gzipped: magic 0, 0, 8, ndim, then ndim big-endian sizes, then values.

    No more is read, or unpacked, than the header promises and the file can hold.

    Raises:
        Refused: Another magic, a length that the header contradicts, a shape other than ``shape`` where that is
            given, or a gzip stream that is cut or damaged.
    """
    with _opened(path) as file:
        start = file.read(4)
        ndim = start[3] if len(start) == 4 else 0
        header = file.read(4 * ndim) if ndim <= 4 else b""
        if start[:3] != b"\0\0\x08" or not 1 <= ndim <= 4 or len(header) < 4 * ndim:
            raise Refused(
                f"{path} must begin with the header of an IDX file of bytes (0, 0, 8, ndim, sizes): "
                f"got {(start + header).hex(' ')!r}. Download it anew."
            )
        sizes = tuple(int(size) for size in np.frombuffer(header, ">u4"))
        if shape is not None and sizes != tuple(shape):
            raise Refused(
                f"{path} must hold an array of shape {tuple(shape)}: got {sizes} in its header. "
                "Provide the complete original set, or pass your own to Task.from_tensors."
            )
        return _bytes(file, path, math.prod(sizes), f"by its header of sizes {sizes}").reshape(sizes)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file, unzipped as it is read; what goes wrong on the way is refused."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(BinaryIO, file)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(
            f"{path} must be a readable, complete {'gzip ' if path.suffix == '.gz' else ''}file: "
            f"got {error!r}. Download it anew."
        ) from error


def _bytes(file: BinaryIO, path: Path, n: int, why: str) -> np.ndarray:
    """The n bytes that are left of a file, exactly."""
    most = path.stat().st_size * (1032 if path.suffix == ".gz" else 1)  # deflate packs no tighter
    content = bytearray()
    while n <= most and len(content) < n and (part := file.read(min(n - len(content), 2**20))):
        content += part
    more = len(content) == n and file.read(1)  # at its end a gzip stream checks itself
    if len(content) < n or more:
        size = f"{path.stat().st_size} in all, which cannot hold them" if n > most else len(content)
        raise Refused(f"{path} must hold {n} bytes of values, {why}: got {'more' if more else size}. Download it anew.")
    return np.frombuffer(content, np.uint8)


def read_cifar10(folder: Path, n_batch: int = 10000, n_test: int = 10000) -> Raw:
    """The binary version of CIFAR-10: records of a label byte and 3,072 pixels (red, green, blue planes).

    Args:
        folder: Where the six files are.
        n_batch: Records in each of the five training files.
        n_test: Records in the test file.

    Raises:
        Refused: A file that is missing, or that holds something else than so many records.
    """
    _require(folder, [f for f in CIFAR10_FILES if not (folder / f).is_file()], "of CIFAR-10's binary version")
    counts = [n_batch] * (len(CIFAR10_FILES) - 1) + [n_test]
    records = [_read_records(folder / f, n) for f, n in zip(CIFAR10_FILES, counts, strict=True)]
    train, test = np.concatenate(records[:-1]), records[-1]
    return Raw(train[:, 1:].reshape(-1, 3, 32, 32), train[:, 0], test[:, 1:].reshape(-1, 3, 32, 32), test[:, 0])


def _read_records(path: Path, n: int, record: int = 1 + 3 * 32 * 32) -> np.ndarray:
    with _opened(path) as file:
        return _bytes(file, path, n * record, f"{n} records of {record}").reshape(n, record)


def _require(folder: Path, missing: list[str], kind: str) -> None:
    if missing:
        raise Refused(
            f"{folder} must hold all files {kind}: missing {', '.join(missing)}. "
            "Put them there, or remove the folder to fetch the set from OpenML."
        )
