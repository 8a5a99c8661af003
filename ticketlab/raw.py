"""The named data sets as unsigned bytes: from files under ``TICKETLAB_DATA``, else fetched from OpenML.

Nothing here unpickles anything: files are IDX or plain binary records, and OpenML serves ARFF text.
Magic numbers, lengths, counts and ranges are verified before a pixel is used.
"""

from __future__ import annotations

import gzip
import math
import os
import warnings
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ticketlab.errors import Refused
from ticketlab.seeds import stream

Augmentation = Literal["none", "crop_flip"]


class Raw(NamedTuple):
    """A set as its files have it: images [n, c, h, w] and labels [n], both unsigned bytes."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class Source(NamedTuple):
    """What is known of a named set before it is read."""

    n_train: int
    n_test: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]  # one a channel, of the training pixels divided by `largest`
    std: tuple[float, ...]
    n_classes: int = 10
    validation_size: int = 5000
    largest: int = 255
    augmentation: Augmentation = "none"
    openml: str = ""
    folders: tuple[str, ...] = ()  # under TICKETLAB_DATA; the first that exists is read
    files: tuple[str, ...] = ()


_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_CIFAR10 = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")

# fmt: off
# The usual published statistics of each training set; those of digits are of its 1,437 training examples here.
# SVHN is not augmented: a mirrored 2 is no 2, and a shifted crop brings the neighbouring house digit to the middle.
SOURCES = {
    "digits": Source(1437, 360, (1, 8, 8), (0.3050,), (0.3763,), validation_size=200, largest=16),
    "mnist": Source(60000, 10000, (1, 28, 28), (0.1307,), (0.3081,),
                     openml="mnist_784", folders=("mnist", "MNIST/raw"), files=_IDX),
    "fashion_mnist": Source(60000, 10000, (1, 28, 28), (0.2860,), (0.3530,),
                             openml="Fashion-MNIST", folders=("fashion-mnist", "FashionMNIST/raw"), files=_IDX),
    "cifar10": Source(50000, 10000, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
                       augmentation="crop_flip",
                       openml="CIFAR_10", folders=("cifar10/cifar-10-batches-bin",), files=_CIFAR10),
    "cifar100": Source(50000, 10000, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
                        n_classes=100, augmentation="crop_flip", openml="CIFAR-100"),
    "svhn": Source(73257, 26032, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), openml="SVHN"),
}
# fmt: on


def read(name: str) -> Raw:
    """The set from wherever it is, its sizes and labels checked."""
    source, root = SOURCES[name], os.environ.get("TICKETLAB_DATA")
    if name == "digits":
        return _read_digits()
    if root and not Path(root).is_dir():
        raise Refused(f"TICKETLAB_DATA must be a folder: got {root!r}. Create it, or unset the variable.")
    folder = next((Path(root, f) for f in source.folders if Path(root, f).is_dir()), None) if root else None
    origin = str(folder or f"OpenML's {source.openml}")
    raw = (read_cifar10 if name == "cifar10" else read_mnist)(folder) if folder else _fetch_openml(name, root)
    largest = max(raw.y.max(initial=0), raw.y_test.max(initial=0))
    if largest >= source.n_classes:
        raise Refused(
            f"labels of {name} must be in 0..{source.n_classes - 1}: got {largest} in {origin}. Download it anew."
        )
    expected, given = [(n, *source.shape) for n in source[:2]], [raw.x.shape, raw.x_test.shape]
    if given != expected:
        raise Refused(
            f"{name} must have training and test images of shapes {expected}: got {given} in {origin}. "
            "Provide the complete original set, or pass your own to Task.from_tensors."
        )
    return raw


def _read_digits() -> Raw:
    """scikit-learn's 1,797 digits. They come in order of writer, so the test set is drawn at random, once."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (takes a second, and only some need it)

    x, y = load_digits(return_X_y=True)
    x, y = x.reshape(-1, 1, 8, 8).astype(np.uint8), y.astype(np.uint8)
    order, n_test = torch.randperm(len(y), generator=stream("digits", 0)).numpy(), SOURCES["digits"].n_test
    return Raw(x[order[n_test:]], y[order[n_test:]], x[order[:n_test]], y[order[:n_test]])


def read_mnist(folder: Path) -> Raw:
    """The four IDX files of MNIST or of a set in its format, of any size, plain or gzipped.

    Raises:
        Refused: A file that is missing or damaged, or as many images as there are not labels.
    """
    paths = [next((p for p in (folder / f, folder / f"{f}.gz") if p.is_file()), None) for f in _IDX]
    _require(folder, [f for f, path in zip(_IDX, paths, strict=True) if path is None], "(plain or .gz)")
    x, y, x_test, y_test = (read_idx(path) for path in paths if path)
    for images, labels, prefix in ((x, y, "train"), (x_test, y_test, "t10k")):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise Refused(
                f"the {prefix} files in {folder} must hold images [n, h, w] and as many labels [n]: got shapes "
                f"{images.shape} and {labels.shape}. Download both anew, from one place."
            )
    return Raw(x[:, None], y, x_test[:, None], y_test)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or gzipped: magic 0, 0, 8, ndim, then ndim big-endian sizes, then values.

    Raises:
        Refused: Another magic, a length that the header contradicts, or a gzip stream that is cut or damaged.
    """
    content = _read_bytes(path)
    ndim = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or not 1 <= ndim <= 4 or len(content) < 4 + 4 * ndim:
        raise Refused(
            f"{path} must begin with the header of an IDX file of bytes (0, 0, 8, ndim, sizes): "
            f"got {content[:4].hex(' ')!r} in {len(content)} bytes. Download it anew."
        )
    shape = [int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4)]
    expected = 4 + 4 * ndim + math.prod(shape)
    if len(content) != expected:
        raise Refused(
            f"{path} must have {expected} bytes, by its header of sizes {shape}: got {len(content)}. Download it anew."
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(
            f"{path} must be a readable, complete {'gzip ' if path.suffix == '.gz' else ''}file: "
            f"got {error!r}. Download it anew."
        ) from error


def read_cifar10(folder: Path) -> Raw:
    """The binary version of CIFAR-10: records of a label byte and 3,072 pixels (red, green, blue planes).

    Raises:
        Refused: A file that is missing or that is not whole records.
    """
    _require(folder, [f for f in _CIFAR10 if not (folder / f).is_file()], "of CIFAR-10's binary version")
    records = [_read_records(folder / f) for f in _CIFAR10]
    train, test = np.concatenate(records[:-1]), records[-1]
    return Raw(train[:, 1:].reshape(-1, 3, 32, 32), train[:, 0], test[:, 1:].reshape(-1, 3, 32, 32), test[:, 0])


def _read_records(path: Path, record: int = 1 + 3 * 32 * 32) -> np.ndarray:
    content = _read_bytes(path)
    if not content or len(content) % record:
        raise Refused(
            f"{path} must be records of {record} bytes, 10000 of them: got {len(content)} bytes. Download it anew."
        )
    return np.frombuffer(content, np.uint8).reshape(-1, record)


def _require(folder: Path, missing: list[str], kind: str) -> None:
    if missing:
        raise Refused(
            f"{folder} must hold all files {kind}: missing {', '.join(missing)}. "
            "Put them there, or remove the folder to fetch the set from OpenML."
        )


def _fetch_openml(name: str, root: str | None) -> Raw:
    """From OpenML. scikit-learn caches what it fetched, the ARFF text, and parses it each time.

    Tested against a stand-in for OpenML's server, never yet against OpenML itself: that training examples come
    first, and how CIFAR-100 and SVHN number their classes, is from hearsay. Sizes and ranges are checked.
    """
    from sklearn import datasets  # noqa: PLC0415

    source = SOURCES[name]
    try:
        with warnings.catch_warnings():
            # A retry warns, and where warnings are errors that would hide the reason.
            warnings.filterwarnings("ignore", "A network error occurred")
            # scikit-learn itself appends "openml" to data_home. Its column types are overruled, for with
            # scikit-learn 1.9 and pandas 3.1 they end in a TypeError on classes that are numbers.
            bunch = datasets.fetch_openml(
                source.openml,
                version=1,
                data_home=root,
                as_frame=False,
                parser="auto",
                n_retries=1,
                read_csv_kwargs={"dtype": None},
            )
    except (OSError, EOFError, ValueError, HTTPException, zlib.error) as error:
        base = Path(root or "$TICKETLAB_DATA")
        remedy = f"Load it once where there is a network, and copy that machine's 'openml' folder to {base / 'openml'}"
        if source.files:
            remedy = f"Put {', '.join(source.files)} in {base / source.folders[0]}"
        raise Refused(
            f"{name} must be in a folder under TICKETLAB_DATA or come from OpenML, and neither worked: "
            f"got TICKETLAB_DATA={root!r} and {error!r}. {remedy}."
        ) from error
    return _from_bunch(bunch, name)


def _from_bunch(bunch: Any, name: str) -> Raw:
    """Rows of pixels and labels as images, with their number and ranges checked."""
    source, origin = SOURCES[name], f"OpenML's {SOURCES[name].openml}"
    shape = (source.n_train + source.n_test, math.prod(source.shape))
    if bunch.data.shape != shape or np.shape(bunch.target) != shape[:1]:
        raise Refused(
            f"{origin} must have data of shape {shape} and a label for each row: got {bunch.data.shape} and "
            f"{np.shape(bunch.target)}. Delete the cached 'openml' folder, and try again."
        )
    data = bunch.data.toarray() if hasattr(bunch.data, "toarray") else bunch.data  # sparse ARFF is possible
    pixels = _as_bytes(data, f"pixels of {origin}")
    labels = _as_bytes([str(label).strip("'") for label in bunch.target], f"labels of {origin}")
    if name == "svhn":
        labels[labels == 10] = 0  # the original files call the digit 0 class 10
    images, n = _channels_first(pixels, source.shape), source.n_train
    return Raw(images[:n], labels[:n], images[n:], labels[n:])


def _as_bytes(values: Any, what: str) -> np.ndarray:
    """Numbers, or their decimal strings, as unsigned bytes without loss."""
    try:
        numbers = np.asarray(values).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise Refused(f"{what} must be numbers: got {error}. Provide the set as files.") from error
    # written so that a NaN, a missing value, fails too
    if not ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
        raise Refused(
            f"{what} must be integers in 0..255, none missing: got {numbers.min()}..{numbers.max()}. "
            "Delete the cached 'openml' folder, and try again."
        )
    return numbers.astype(np.uint8)


def _channels_first(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Rows as images [n, c, h, w]. OpenML does not say whether a row holds plane after plane or pixel after
    pixel, but neighbours in an image are alike: the smoother reading is the right one.
    """
    c, h, w = shape
    planes, interleaved = pixels.reshape(-1, c, h, w), pixels.reshape(-1, h, w, c).transpose(0, 3, 1, 2)

    def roughness(images: np.ndarray) -> float:
        sample = images[:500].astype(np.float32)
        return float(sum(np.abs(np.diff(sample, axis=axis)).mean() for axis in (2, 3)))

    return min(planes, interleaved, key=roughness)
