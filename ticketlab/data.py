"""Data sets as tensors on one device: a `Task` with its splits, the seeded batch order, augmentation.

Named sets are read from files under the folder in the environment variable ``TICKETLAB_DATA``, else
fetched once from OpenML through scikit-learn. Nothing here unpickles anything: files are IDX or plain
binary records, and OpenML serves ARFF text. All randomness comes from `stream`.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import math
import os
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPException
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

Augmentation = Literal["none", "crop_flip"]


@dataclass(frozen=True)
class Split:
    """Examples and their labels.

    Attributes:
        x: Inputs, floating.
        y: Labels in 0..n_classes - 1, int64.

    Raises:
        ValueError: No examples, or a number of labels that differs.
    """

    x: Float[Tensor, " n *input"]
    y: Int64[Tensor, " n"]

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or self.x.ndim < 1 or not 0 < len(self.x) == len(self.y):
            raise ValueError(
                "a split must hold at least one example and one label for each: got x of shape "
                f"{tuple(self.x.shape)} and y of shape {tuple(self.y.shape)}. Pass y as [n]."
            )

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Task:
    """A classification problem held in memory, all splits on one device.

    Attributes:
        name: Of the set; goes into the names of run folders.
        train: What is trained on.
        validation: Split from the training data; early stopping looks here.
        test: Never selected on.
        n_classes: Number of outputs of a model for this task.
        augmentation: ``crop_flip`` where training batches pass through `crop_flip`.

    Raises:
        ValueError: Splits that differ in input shape, dtype or device, an x that is not floating, a y
            that is not int64, an unknown augmentation or one that the input shape does not allow.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    n_classes: int
    augmentation: Augmentation = "none"

    def __post_init__(self) -> None:
        splits = (self.train, self.validation, self.test)
        kinds = {(tuple(s.x.shape[1:]), s.x.dtype, s.y.dtype, s.x.device, s.y.device) for s in splits}
        labels = (torch.int64, self.device)
        if len(kinds) > 1 or not self.dtype.is_floating_point or (self.train.y.dtype, self.train.y.device) != labels:
            raise ValueError(
                "the splits of a task must share input shape, device and a floating dtype, with labels in int64: "
                f"got (shape, x dtype, y dtype, x device, y device) {kinds}. Build it with Task.from_tensors."
            )
        if self.augmentation not in get_args(Augmentation):
            known = get_args(Augmentation)
            raise ValueError(f"augmentation must be one of {known}: got {self.augmentation!r}. Use 'none' if unsure.")
        if self.augmentation == "crop_flip" and len(self.input_shape) != 3:
            raise ValueError(
                f"inputs must be images [c, h, w] for crop_flip: got shape {self.input_shape}. "
                "Reshape them, or use augmentation='none'."
            )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, such as (1, 28, 28)."""
        return tuple(self.train.x.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where all tensors are."""
        return self.train.x.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs; labels are always int64."""
        return self.train.x.dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Task:
        """The same task elsewhere or in another floating dtype; None leaves as is."""

        def move(split: Split) -> Split:
            return Split(split.x.to(device=device, dtype=dtype), split.y.to(device=device))

        return replace(self, train=move(self.train), validation=move(self.validation), test=move(self.test))

    def limit(self, train: int | None = None, validation: int | None = None, test: int | None = None) -> Task:
        """The first n examples of each split; None keeps all.

        The first n are a random sample, for splits are shuffled when they are made. The one exception
        is a test set of one's own given to `from_tensors`, which keeps the order it came in.

        Raises:
            ValueError: An n outside 1..length of its split.
        """

        def cut(what: str, split: Split, n: int | None) -> Split:
            n = len(split) if n is None else n
            if not 1 <= n <= len(split):
                raise ValueError(f"the limit of {what} must be in 1..{len(split)}: got {n}. Use None to keep all.")
            return Split(split.x[:n].clone(), split.y[:n].clone())  # views would keep the whole set in memory

        return replace(
            self,
            train=cut("train", self.train, train),
            validation=cut("validation", self.validation, validation),
            test=cut("test", self.test, test),
        )

    def fingerprint(self) -> str:
        """16 hex digits (SHA-256) of all that makes the task what it is, the same on every device."""
        digest = hashlib.sha256(repr((self.name, self.n_classes, self.augmentation)).encode())
        for split in (self.train, self.validation, self.test):
            for tensor in (split.x, split.y):
                digest.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
                # as bytes, because numpy has no bfloat16
                digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    @classmethod
    def from_tensors(
        cls,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        x_test: Tensor | np.ndarray | None = None,
        y_test: Tensor | np.ndarray | None = None,
        *,
        name: str = "custom",
        validation_size: int | float = 0.1,
        test_size: int | float = 0.2,
        split_seed: int = 0,
        n_classes: int | None = None,
        augmentation: Augmentation = "none",
    ) -> Task:
        """A task from arrays. The inputs are *not* normalised: pass them as the model should see them.

        Args:
            x: Inputs [n, *input], floating and finite.
            y: Labels [n], integers in 0..n_classes - 1.
            x_test: Test inputs, kept in their order. If None, a test set is split off first, with the same seed.
            y_test: Their labels.
            name: Of the task.
            validation_size: Number (int), or fraction (float), of the training examples to validate on.
            test_size: The same for the test set; ignored when x_test is given.
            split_seed: Decides who goes where.
            n_classes: The largest label + 1 if None.
            augmentation: ``none`` or ``crop_flip``.

        Raises:
            ValueError: Lengths that differ, NaN or infinity, labels out of range, an empty split.
        """
        if (x_test is None) != (y_test is None):
            raise ValueError("x_test and y_test must be given together: got one of them. Pass both or neither.")
        rest = _split("", x, y)
        if x_test is not None and y_test is not None:
            test = _split("_test", x_test, y_test)
        else:
            test, rest = _split_off(rest, test_size, "test_size", stream("test", split_seed))
        labels = torch.cat([rest.y.cpu(), test.y.cpu()])
        low, high = int(labels.min()), int(labels.max())
        n_classes = high + 1 if n_classes is None else n_classes
        if low < 0 or high >= n_classes:
            raise ValueError(
                f"labels must be in 0..{n_classes - 1} for n_classes = {n_classes}: got {low}..{high}. "
                "Number the classes from 0, or raise n_classes."
            )
        validation, train = _split_off(rest, validation_size, "validation_size", stream("split", split_seed))
        return cls(name, train, validation, test, n_classes, augmentation)


def _split(suffix: str, x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> Split:
    """Arrays checked for what needs a look at their values."""
    # arrays are copied: torch warns on read-only ones and refuses negative strides
    inputs, labels = (a.detach() if isinstance(a, Tensor) else torch.from_numpy(np.array(a)) for a in (x, y))
    if not inputs.is_floating_point() or not inputs.isfinite().all():
        raise ValueError(
            f"x{suffix} must be floating and finite: got {inputs.dtype} with {int((~inputs.isfinite()).sum())} values "
            "NaN or infinite. Convert it with .float(), and drop or fill those."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"y{suffix} must be integer class labels: got {labels.dtype}. Convert it with .long().")
    return Split(inputs, labels.to(inputs.device, torch.int64))


def _split_off(split: Split, size: int | float, what: str, generator: torch.Generator) -> tuple[Split, Split]:
    """`size` examples drawn at random, and the others, both in shuffled order."""
    n = len(split)
    count = max(1, round(size * n)) if isinstance(size, float) and 0 < size < 1 else size
    if not isinstance(count, Integral) or not 1 <= count < n:
        raise ValueError(
            f"{what} must be a number of examples in 1..{n - 1} or a fraction that leaves some of {n}: "
            f"got {size}. Choose another, or give more data."
        )
    order = torch.randperm(n, generator=generator).to(split.y.device)
    first, others = order[: int(count)], order[int(count) :]
    return Split(split.x[first], split.y[first]), Split(split.x[others], split.y[others])


# ---------------------------------------------------------------------------------------------- named sets


class Raw(NamedTuple):
    """A set as its files have it: images [n, c, h, w] and labels [n], both unsigned bytes."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


class _Source(NamedTuple):
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
_SOURCES = {
    "digits": _Source(1437, 360, (1, 8, 8), (0.3050,), (0.3763,), validation_size=200, largest=16),
    "mnist": _Source(60000, 10000, (1, 28, 28), (0.1307,), (0.3081,),
                     openml="mnist_784", folders=("mnist", "MNIST/raw"), files=_IDX),
    "fashion_mnist": _Source(60000, 10000, (1, 28, 28), (0.2860,), (0.3530,),
                             openml="Fashion-MNIST", folders=("fashion-mnist", "FashionMNIST/raw"), files=_IDX),
    "cifar10": _Source(50000, 10000, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
                       augmentation="crop_flip",
                       openml="CIFAR_10", folders=("cifar10/cifar-10-batches-bin",), files=_CIFAR10),
    "cifar100": _Source(50000, 10000, (3, 32, 32), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
                        n_classes=100, augmentation="crop_flip", openml="CIFAR-100"),
    "svhn": _Source(73257, 26032, (3, 32, 32), (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), openml="SVHN"),
}
# fmt: on
NAMES = tuple(_SOURCES)


def load(
    name: str,
    *,
    validation_size: int | None = None,
    split_seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Task:
    """A named set, normalised channel by channel, its validation set split from the training data.

    The test set is always the same one, shuffled once; for digits, which has none of its own, it is
    a fixed 360 of the 1,797 examples. Files are looked for under ``TICKETLAB_DATA``: the four IDX files, gzipped
    or plain, in ``mnist`` or ``MNIST/raw`` and ``fashion-mnist`` or ``FashionMNIST/raw``, the binary version of
    CIFAR-10 in ``cifar10/cifar-10-batches-bin``. Otherwise the set comes from OpenML and is cached in
    ``TICKETLAB_DATA/openml``, or in scikit-learn's own folder when the variable is not set.

    Args:
        name: One of `NAMES`.
        validation_size: 5,000 if None, and 200 for digits.
        split_seed: Of the split between training and validation.
        device: Of all tensors.
        dtype: Of the images [n, c, h, w].

    Raises:
        ValueError: An unknown name, files that are missing, damaged or of another size, no network.
    """
    if name not in _SOURCES:
        near = difflib.get_close_matches(str(name), NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"task must be one of {', '.join(NAMES)}: got {name!r}. Did you mean {near!r}?")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating: got {dtype}. Use torch.float32.")
    source = _SOURCES[name]
    raw = _read(name)
    shuffled = torch.randperm(len(raw.y_test), generator=stream("test", 0)).numpy()
    # Normalised before it moves: a GPU divides by way of the reciprocal, and the last bit would differ.
    return Task.from_tensors(
        _normalised(raw.x, source, dtype),
        raw.y,
        _normalised(raw.x_test[shuffled], source, dtype),
        raw.y_test[shuffled],
        name=name,
        validation_size=source.validation_size if validation_size is None else validation_size,
        split_seed=split_seed,
        n_classes=source.n_classes,
        augmentation=source.augmentation,
    ).to(device)


def _normalised(images: np.ndarray, source: _Source, dtype: torch.dtype) -> Tensor:
    mean, std = (torch.tensor(values, dtype=dtype).reshape(-1, 1, 1) for values in (source.mean, source.std))
    return torch.from_numpy(images.copy()).to(dtype).div_(source.largest).sub_(mean).div_(std)


def _read(name: str) -> Raw:
    """The set from wherever it is, its sizes and labels checked."""
    source, root = _SOURCES[name], os.environ.get("TICKETLAB_DATA")
    if name == "digits":
        return _read_digits()
    if root and not Path(root).is_dir():
        raise ValueError(f"TICKETLAB_DATA must be a folder: got {root!r}. Create it, or unset the variable.")
    folder = next((Path(root, f) for f in source.folders if Path(root, f).is_dir()), None) if root else None
    origin = str(folder or f"OpenML's {source.openml}")
    raw = (read_cifar10 if name == "cifar10" else read_mnist)(folder) if folder else _fetch_openml(name, root)
    largest = max(raw.y.max(initial=0), raw.y_test.max(initial=0))
    if largest >= source.n_classes:
        raise ValueError(
            f"labels of {name} must be in 0..{source.n_classes - 1}: got {largest} in {origin}. Download it anew."
        )
    expected, given = [(n, *source.shape) for n in source[:2]], [raw.x.shape, raw.x_test.shape]
    if given != expected:
        raise ValueError(
            f"{name} must have training and test images of shapes {expected}: got {given} in {origin}. "
            "Provide the complete original set, or pass your own to Task.from_tensors."
        )
    return raw


def _read_digits() -> Raw:
    """scikit-learn's 1,797 digits. They come in order of writer, so the test set is drawn at random, once."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (takes a second, and only some need it)

    x, y = load_digits(return_X_y=True)
    x, y = x.reshape(-1, 1, 8, 8).astype(np.uint8), y.astype(np.uint8)
    order, n_test = torch.randperm(len(y), generator=stream("digits", 0)).numpy(), _SOURCES["digits"].n_test
    return Raw(x[order[n_test:]], y[order[n_test:]], x[order[:n_test]], y[order[:n_test]])


def read_mnist(folder: Path) -> Raw:
    """The four IDX files of MNIST or of a set in its format, of any size, plain or gzipped.

    Raises:
        ValueError: A file that is missing or damaged, or as many images as there are not labels.
    """
    paths = [next((p for p in (folder / f, folder / f"{f}.gz") if p.is_file()), None) for f in _IDX]
    _require(folder, [f for f, path in zip(_IDX, paths, strict=True) if path is None], "(plain or .gz)")
    x, y, x_test, y_test = (read_idx(path) for path in paths if path)
    for images, labels, prefix in ((x, y, "train"), (x_test, y_test, "t10k")):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"the {prefix} files in {folder} must hold images [n, h, w] and as many labels [n]: got shapes "
                f"{images.shape} and {labels.shape}. Download both anew, from one place."
            )
    return Raw(x[:, None], y, x_test[:, None], y_test)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or gzipped: magic 0, 0, 8, ndim, then ndim big-endian sizes, then values.

    Raises:
        ValueError: Another magic, a length that the header contradicts, or a gzip stream that is cut or damaged.
    """
    content = _read_bytes(path)
    ndim = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or not 1 <= ndim <= 4 or len(content) < 4 + 4 * ndim:
        raise ValueError(
            f"{path} must begin with the header of an IDX file of bytes (0, 0, 8, ndim, sizes): "
            f"got {content[:4].hex(' ')!r} in {len(content)} bytes. Download it anew."
        )
    shape = [int(size) for size in np.frombuffer(content, ">u4", ndim, offset=4)]
    expected = 4 + 4 * ndim + math.prod(shape)
    if len(content) != expected:
        raise ValueError(
            f"{path} must have {expected} bytes, by its header of sizes {shape}: got {len(content)}. Download it anew."
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} must be a readable, complete {'gzip ' if path.suffix == '.gz' else ''}file: "
            f"got {error!r}. Download it anew."
        ) from error


def read_cifar10(folder: Path) -> Raw:
    """The binary version of CIFAR-10: records of a label byte and 3,072 pixels (red, green, blue planes).

    Raises:
        ValueError: A file that is missing or that is not whole records.
    """
    _require(folder, [f for f in _CIFAR10 if not (folder / f).is_file()], "of CIFAR-10's binary version")
    records = [_read_records(folder / f) for f in _CIFAR10]
    train, test = np.concatenate(records[:-1]), records[-1]
    return Raw(train[:, 1:].reshape(-1, 3, 32, 32), train[:, 0], test[:, 1:].reshape(-1, 3, 32, 32), test[:, 0])


def _read_records(path: Path, record: int = 1 + 3 * 32 * 32) -> np.ndarray:
    content = _read_bytes(path)
    if not content or len(content) % record:
        raise ValueError(
            f"{path} must be records of {record} bytes, 10000 of them: got {len(content)} bytes. Download it anew."
        )
    return np.frombuffer(content, np.uint8).reshape(-1, record)


def _require(folder: Path, missing: list[str], kind: str) -> None:
    if missing:
        raise ValueError(
            f"{folder} must hold all files {kind}: missing {', '.join(missing)}. "
            "Put them there, or remove the folder to fetch the set from OpenML."
        )


def _fetch_openml(name: str, root: str | None) -> Raw:
    """From OpenML. scikit-learn caches what it fetched, the ARFF text, and parses it each time.

    Nothing of this could be tried with a network. The names, that training examples come first, and the
    numbering of SVHN's classes are from descriptions of these sets; what can be checked of them is checked.
    """
    from sklearn import datasets  # noqa: PLC0415

    source = _SOURCES[name]
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
        raise ValueError(
            f"{name} must be in a folder under TICKETLAB_DATA or come from OpenML, and neither worked: "
            f"got TICKETLAB_DATA={root!r} and {error!r}. {remedy}."
        ) from error
    return _from_bunch(bunch, name)


def _from_bunch(bunch: Any, name: str) -> Raw:
    """Rows of pixels and labels as images, with their number and ranges checked."""
    source, origin = _SOURCES[name], f"OpenML's {_SOURCES[name].openml}"
    shape = (source.n_train + source.n_test, math.prod(source.shape))
    if bunch.data.shape != shape or np.shape(bunch.target) != shape[:1]:
        raise ValueError(
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
        raise ValueError(f"{what} must be numbers: got {error}. Provide the set as files.") from error
    # written so that a NaN, a missing value, fails too
    if not ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
        raise ValueError(
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


# ------------------------------------------------------------------------------------ order and augmentation


def stream(purpose: str, *seeds: int) -> torch.Generator:
    """A CPU generator of its own for each purpose and seeds, the same on every machine and in every process.

    PyTorch's CPU generator takes 32 bits of seed, so two streams coincide with probability 2^-32.

    Args:
        purpose: What the draws are for, such as ``"order"``.
        seeds: Each in 0..2^32 - 1; ``(1,)`` and ``(1, 0)`` are different.

    Raises:
        ValueError: A seed out of range.
    """
    if not all(isinstance(seed, Integral) and 0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds must be integers in 0..2^32 - 1: got {seeds} for {purpose!r}. Choose others.")
    # As a spawn key, for as entropy a list would equal itself with zeros appended.
    sequence = np.random.SeedSequence(zlib.crc32(purpose.encode()), spawn_key=[int(seed) for seed in seeds])
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def epoch_order(n: int, order_seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """The order in which an epoch visits n examples: a permutation of 0..n - 1, on the CPU."""
    return torch.randperm(n, generator=stream("order", order_seed, epoch))


# One entry a replica and epoch, so that many replicas can step in turn: 60 MB on MNIST, when full.
_recent_order: Callable[[int, int, int], Tensor] = lru_cache(maxsize=128)(epoch_order)


def batch_indices(n: int, batch_size: int, order_seed: int, step: int) -> Int64[Tensor, " batch"]:
    """Which of n training examples a step sees, as a function of the step alone: a resumed run needs no state.

    Epochs have n // batch_size steps; the incomplete batch at the end of an epoch is dropped.

    Args:
        n: Number of training examples.
        batch_size: In 1..n.
        order_seed: Of the replica.
        step: From 0.

    Returns:
        Indices on the CPU, all different.

    Raises:
        ValueError: A batch size out of range or a negative step.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be in 1..{n}, the number of examples: got {batch_size}. Lower it.")
    if step < 0:
        raise ValueError(f"step must not be negative: got {step}. Count steps from 0.")
    epoch, batch = divmod(step, n // batch_size)
    order = _recent_order(n, order_seed, epoch)
    return order[batch * batch_size : (batch + 1) * batch_size].clone()  # the cached one must stay as it is


def crop_flip(
    x: Float[Tensor, "batch c h w"], order_seed: int, step: int, padding: int = 4
) -> Float[Tensor, "batch c h w"]:
    """Each image shifted by up to `padding` pixels and mirrored with probability 1/2, as is usual on CIFAR.

    The border is filled with 0 *after* normalisation, which is the mean colour, not black. Draws are made on
    the CPU, so that CPU and GPU agree, and are a function of the seed and the step alone.

    Args:
        x: A training batch.
        order_seed: Of the replica.
        step: From 0.
        padding: Largest shift, at least 0.

    Raises:
        ValueError: An x that is not four-dimensional, or a negative padding.
    """
    if x.ndim != 4 or padding < 0:
        raise ValueError(
            f"x must be [batch, c, h, w] and padding >= 0: got shape {tuple(x.shape)} and {padding}. Reshape x."
        )
    n, c, h, w = x.shape
    generator = stream("augment", order_seed, step)
    shifts = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    flips = torch.randint(0, 2, (1, n, 1), generator=generator)
    top, left, flip = torch.cat([shifts, flips]).to(x.device)  # [n, 1] each, in one transfer
    rows = top + torch.arange(h, device=x.device)  # [n, h]
    column = torch.arange(w, device=x.device)
    columns = left + torch.where(flip.bool(), w - 1 - column, column)  # [n, w]
    source = rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]  # [n, h, w], into the padded image
    padded = F.pad(x, (padding,) * 4).flatten(2)
    return padded.gather(2, source.reshape(n, 1, h * w).expand(n, c, h * w)).reshape(x.shape)
