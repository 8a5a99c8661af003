"""The named data sets as unsigned bytes: from files under ``TICKETLAB_DATA``, else fetched from OpenML.

Nothing here unpickles anything: files are read by ``idx``, and OpenML serves ARFF text. Contents are verified before
a pixel is used: another set's files, labels in another order or images on their side have the right names and sizes,
and would be read as if nothing were wrong.
"""

from __future__ import annotations

import hashlib
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
from ticketlab.idx import CIFAR10_FILES, IDX_FILES, Raw, read_cifar10, read_mnist
from ticketlab.seeds import stream

Augmentation = Literal["none", "crop_flip"]


class Facts(NamedTuple):
    """What tells a set from another one of its size. The last two hold for files alone, of which copies are exact."""

    counts: tuple[tuple[int, ...], ...] = ()
    """Training and test examples of each class; equally many where empty."""
    halves: tuple[str, ...] = ()
    """Training and test: per class the mean pixel of each channel's upper half and of the left half, in thousandths."""
    md5: tuple[str, ...] = ()
    """Of images and labels as IDX files, unzipped, in the order of `Raw`."""
    pairs: tuple[str, ...] = ()
    """Of training and test set: a digest of images with their labels, whatever the order of the examples."""


class Source(NamedTuple):
    """What is known of a named set before it is read."""

    n_train: int
    n_test: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]  # one per channel, of the training pixels divided by `largest`
    std: tuple[float, ...]
    n_classes: int = 10
    validation_size: int = 5000
    largest: int = 255
    augmentation: Augmentation = "none"
    openml: str = ""
    folders: tuple[str, ...] = ()  # under TICKETLAB_DATA; the first that exists is read
    files: tuple[str, ...] = ()
    facts: Facts | None = Facts()


_TOLERANCE = 0.002  # of mean pixels in [0, 1]; the JPEG copy of CIFAR-10 is within 0.001

# fmt: off
# The MD5 are those of the files that LeCun et al. published.
_MNIST = Facts(
    counts=((5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
            (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009)),
    halves=("166 166  72  60 122 134 139 120 106 107 127 122 109 132 125  95 147 141 121 103",
            "165 166  73  59 124 135 141 121 108 106 131 125 114 139 124  94 151 143 123 104"),
    md5=("6bbc9ace898e44ae57da46a324031adb", "a25bea736e30d166cdddb491f175f624",
         "2646ac647ad5339dbf082846283269ea", "27ae3e4e09519cfbb04c329615203637"),
)
_FASHION = Facts(
    halves=("350 317 255 217 369 372 244 251 363 378  90 101 322 325 115 121 255 345 219 170",
            "351 320 253 217 366 369 245 253 368 383  91 100 322 325 115 122 253 345 217 169"),
    pairs=("f02993725140dc2bfc38475b16d11b4f", "2be083972c866226bc2174717ab8d188"),
)
_CIFAR = Facts(halves=(
    "553 600 646 558 508 501 496 458 494 502 438 468 487 449 407 456 454 454 380 439 "
    "484 451 403 459 466 438 343 418 497 482 444 468 552 600 642 524 566 569 573 488",
    "559 609 659 571 511 503 498 460 494 506 441 471 484 448 408 457 450 449 372 431 "
    "496 463 413 468 472 443 344 421 505 491 459 473 557 601 642 526 570 573 578 491",
))
_SVHN = Facts(counts=((4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
                      (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595)))
_DIGITS = ("a5adabccf8d3e2540826a202a7bfb422", "497796a0698e25d3920a9422b635bf34")  # images and labels, as IDX files

# The usual published statistics of each training set; those of digits are of its 1,437 training examples here.
# SVHN is not augmented: a mirrored 2 is no 2, and a shifted crop brings the neighbouring house digit to the middle.
SOURCES = {
    "digits": Source(1437, 360, (1, 8, 8), (0.3050,), (0.3763,), validation_size=200, largest=16, facts=None),
    "mnist": Source(60000, 10000, (1, 28, 28), (0.1307,), (0.3081,), facts=_MNIST,
                     openml="mnist_784", folders=("mnist", "MNIST/raw"), files=IDX_FILES),
    "fashion_mnist": Source(60000, 10000, (1, 28, 28), (0.2860,), (0.3530,), facts=_FASHION,
                             openml="Fashion-MNIST", folders=("fashion-mnist", "FashionMNIST/raw"), files=IDX_FILES),
    "cifar10": Source(50000, 10000, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
                       augmentation="crop_flip", facts=_CIFAR,
                       openml="CIFAR_10", folders=("cifar10/cifar-10-batches-bin",), files=CIFAR10_FILES),
    "cifar100": Source(50000, 10000, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
                        n_classes=100, augmentation="crop_flip", openml="CIFAR-100"),
    "svhn": Source(73257, 26032, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), facts=_SVHN,
                    openml="SVHN"),
}
# fmt: on


def read(name: str) -> Raw:
    """The set from wherever it is, checked to be that set.

    Raises:
        Refused: No such folder, files that are missing, damaged or another set's, no network.
    """
    source, root = SOURCES[name], os.environ.get("TICKETLAB_DATA")
    if name == "digits":
        return _read_digits()
    if root and not os.path.isdir(root):
        raise Refused(f"TICKETLAB_DATA must be a folder: got {root!r}. Create it, or unset the variable.")
    folder = next((Path(root, f) for f in source.folders if os.path.isdir(Path(root, f))), None) if root else None
    if folder is None:
        raw = _fetch_openml(name, root)
    elif name == "cifar10":
        raw = read_cifar10(folder, source.n_train // 5, source.n_test)
    else:
        raw = read_mnist(folder, [(n, *side) for n in source[:2] for side in (source.shape[1:], ())])
    _check(raw, name, str(folder or f"OpenML's {source.openml}"), from_files=folder is not None)
    return raw


def _check(raw: Raw, name: str, origin: str, from_files: bool) -> None:
    """Refuse what is not the named set: by its statistics, and files by their content."""
    source = SOURCES[name]
    largest = max(raw.y.max(initial=0), raw.y_test.max(initial=0))
    if largest >= source.n_classes:
        raise Refused(
            f"labels of {name} must be in 0..{source.n_classes - 1}: got {largest} in {origin}. Download it anew."
        )
    if source.facts is None:
        return
    parts = ((raw.x, raw.y), (raw.x_test, raw.y_test))
    differing = [d for part, xy in enumerate(parts) for d in _unlike(*xy, part, source, source.facts)]
    if from_files and not differing:
        names = ("training images", "training labels", "test images", "test labels")
        contents = (raw.x[:, 0], raw.y, raw.x_test[:, 0], raw.y_test)
        differing = [n for n, a, md5 in zip(names, contents, source.facts.md5, strict=False) if _md5(a) != md5]
        pairs = zip(("the training set", "the test set"), parts, source.facts.pairs, strict=False)
        differing += [n for n, xy, digest in pairs if _unordered_md5(*xy) != digest]
    if differing:
        anew = "download the original anew" if from_files else "delete the cached 'openml' folder and try again"
        raise Refused(
            f"{origin} must hold {name}, but differs from it in {'; '.join(differing)}. It is another set, or damaged: "
            f"{anew}, or pass a set of your own to Task.from_tensors."
        )


def _unlike(x: np.ndarray, y: np.ndarray, part: int, source: Source, facts: Facts) -> list[str]:
    """In what statistic the training set (part 0) or the test set (1) first differs from what is known of it."""
    which = ("training", "test")[part]
    counts = np.bincount(y, minlength=source.n_classes).tolist()
    if counts != list(facts.counts[part] if facts.counts else [len(y) // source.n_classes] * source.n_classes):
        return [f"the number of {which} examples per class, {counts}"]
    known = np.array(facts.halves[part].split(), float) / 1000 if facts.halves else None
    if known is not None and np.abs(_halves(x, y, source) - known).max() > _TOLERANCE:
        return [f"the mean {which} images of its classes"]
    mean = x.mean((0, 2, 3)) / source.largest
    if part == 0 and np.abs(mean - source.mean).max() > _TOLERANCE:
        return [f"the mean training pixel, {mean.round(4).tolist()}"]
    return []


def _halves(x: np.ndarray, y: np.ndarray, source: Source) -> np.ndarray:
    """Per class the mean pixel in [0, 1] of each channel's upper half, then that of the left half, one after another.

    Labels that do not belong to the images move all of them toward the overall mean; images on their side swap two.
    """
    half = x.shape[-1] // 2
    of_each = np.column_stack([x[:, :, :half].mean((2, 3)), x[..., :half].mean((1, 2, 3))]) / source.largest
    of_class = [np.bincount(y, column, source.n_classes) for column in of_each.T]
    return (np.stack(of_class, 1) / np.maximum(np.bincount(y, minlength=source.n_classes), 1)[:, None]).flatten()


def _md5(array: np.ndarray) -> str:
    """Of the array as an unzipped IDX file."""
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return hashlib.md5(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes(), usedforsecurity=False).hexdigest()


def _unordered_md5(x: np.ndarray, y: np.ndarray) -> str:
    """The sum, modulo 2^128, of the digests of all examples with their labels."""
    examples = np.concatenate([y[:, None], x.reshape(len(x), -1)], 1)
    digests = (hashlib.md5(one, usedforsecurity=False).digest() for one in examples)
    return f"{sum(int.from_bytes(digest, 'big') for digest in digests) % 2**128:032x}"


def _read_digits() -> Raw:
    """scikit-learn's 1,797 digits. They come in order of writer, so the test set is drawn at random, once."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (takes a second, and only some need it)

    x, y = load_digits(return_X_y=True)
    x, y = x.reshape(-1, 1, 8, 8).astype(np.uint8), y.astype(np.uint8)
    if (_md5(x[:, 0]), _md5(y)) != _DIGITS:
        raise Refused(
            f"scikit-learn's digits must be the 1,797 of its load_digits: got others, of shape {x.shape}. Reinstall it."
        )
    order, n_test = torch.randperm(len(y), generator=stream("digits", 0)).numpy(), SOURCES["digits"].n_test
    return Raw(x[order[n_test:]], y[order[n_test:]], x[order[:n_test]], y[order[:n_test]])


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
