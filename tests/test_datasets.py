"""`ticketlab.datasets` and `ticketlab.idx`: the readers, and what tells a named set from another."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketlab import datasets, idx
from ticketlab.data import load
from ticketlab.seeds import stream

DATA = os.environ.get("TICKETLAB_DATA", "")


# ------------------------------------------------------------------------------------------ named sets


def as_idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def images(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), dtype=np.uint8)


MNIST_ARRAYS = (images(30, 28, 28), np.arange(30) % 10, images(12, 28, 28), np.arange(12) % 10)
MNIST_FILES = dict(zip(idx.IDX_FILES, MNIST_ARRAYS, strict=True))


def write_mnist(folder: Path, **changed: np.ndarray) -> Path:
    """A tiny MNIST, its images gzipped, its labels plain."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, array in (MNIST_FILES | changed).items():
        if "images" in file:
            (folder / f"{file}.gz").write_bytes(gzip.compress(as_idx(array)))
        else:
            (folder / file).write_bytes(as_idx(array))
    return folder


def write_cifar10(folder: Path, largest_label: int = 9) -> np.ndarray:
    """Six files of four records each; returns the records [6, 4, 3073]."""
    folder.mkdir(parents=True)
    records = images(24, 3073).reshape(6, 4, 3073)
    records[:, :, 0] %= largest_label
    records[2, 1, 0] = largest_label
    for file, part in zip(idx.CIFAR10_FILES, records, strict=True):
        (folder / file).write_bytes(part.tobytes())
    return records


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty TICKETLAB_DATA, and no network."""

    def unreachable(*_, **__):
        raise URLError("no network in tests")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", unreachable)
    monkeypatch.setenv("TICKETLAB_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def shrink(monkeypatch):
    """Says that a named set is this small, and by what it is known."""

    def shrink(name: str, n_train: int, n_test: int, facts: datasets.Facts | None = None, **others: object) -> None:
        sizes = {"n_train": n_train, "n_test": n_test, "validation_size": 5}
        small = datasets.SOURCES[name]._replace(**sizes, facts=facts, **others)
        monkeypatch.setitem(datasets.SOURCES, name, small)

    return shrink


def serve(monkeypatch, pixels, labels) -> dict:
    """Makes OpenML answer with these; returns what it was asked."""
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return SimpleNamespace(data=pixels, target=labels)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    return asked


def test_digits_needs_no_files(monkeypatch):
    monkeypatch.setenv("TICKETLAB_DATA", "/nowhere")
    task = load("digits")
    assert (len(task.train), len(task.validation), len(task.test)) == (1237, 200, 360)
    assert (task.input_shape, task.n_classes, task.dtype) == ((1, 8, 8), 10, torch.float32)
    training = torch.cat([task.train.x, task.validation.x]).double()
    assert abs(training.mean()) < 1e-3
    assert abs(training.std() - 1) < 1e-3
    assert torch.bincount(task.test.y).min() > 20  # drawn at random, all classes are there


def test_digits_are_scikit_learns():
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    task = load("digits", dtype=torch.float64)
    splits = (task.train, task.validation, task.test)
    pixels = torch.cat([s.x for s in splits]).flatten(1) * 0.3763 + 0.3050
    rows = torch.cat([(16 * pixels).round(), torch.cat([s.y for s in splits])[:, None]], dim=1)
    expected = np.column_stack([x, y])
    assert np.array_equal(np.unique(rows.numpy(), axis=0), np.unique(expected, axis=0))
    assert len(rows) == len(expected)


def test_split_seed_moves_validation_but_never_test():
    one, two = load("digits", split_seed=1), load("digits", split_seed=2)
    assert torch.equal(one.test.x, two.test.x)
    assert not torch.equal(one.validation.x, two.validation.x)
    assert len(load("digits", validation_size=37).validation) == 37


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_sets_from_files(name, folder, root, shrink):
    write_mnist(root / folder)
    shrink(name, 30, 12)
    task = load(name, dtype=torch.float64)
    assert (len(task.train), len(task.validation), len(task.test)) == (25, 5, 12)
    mean, std = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530)}[name]
    x, y, x_test, y_test = (torch.tensor(a) for a in MNIST_FILES.values())
    order = torch.randperm(30, generator=stream("split", 0))
    expected = (x[order, None].double() / 255 - mean) / std
    torch.testing.assert_close(torch.cat([task.validation.x, task.train.x]), expected)
    assert torch.equal(torch.cat([task.validation.y, task.train.y]), y[order])
    order = torch.randperm(12, generator=stream("test", 0))
    torch.testing.assert_close(task.test.x, (x_test[order, None].double() / 255 - mean) / std)
    assert torch.equal(task.test.y, y_test[order])


def test_wrong_size_of_a_named_set(root):
    write_mnist(root / "mnist")
    with pytest.raises(ValueError, match=r"must hold an array of shape \(60000, 28, 28\): got \(30, 28, 28\)"):
        load("mnist")


def test_labels_out_of_range(root, shrink):
    shrink("mnist", 30, 12)
    write_mnist(root / "mnist", **{idx.IDX_FILES[3]: np.arange(12)})
    with pytest.raises(ValueError, match=r"labels of mnist must be in 0\.\.9: got 11 in .*mnist"):
        load("mnist")


def test_missing_files_are_named(root):
    folder = write_mnist(root / "mnist")
    (folder / f"{idx.IDX_FILES[0]}.gz").unlink()
    (folder / idx.IDX_FILES[3]).unlink()
    with pytest.raises(ValueError, match="missing train-images-idx3-ubyte, t10k-labels-idx1-ubyte"):
        load("mnist")


def test_counts_of_images_and_labels_must_agree(tmp_path):
    folder = write_mnist(tmp_path, **{idx.IDX_FILES[1]: np.arange(29) % 10})
    with pytest.raises(ValueError, match=r"train files .* as many labels .*\(30, 28, 28\) and \(29,\)"):
        idx.read_mnist(folder)


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), zipped=st.booleans())
def test_idx_round_trip(shape, zipped, tmp_path_factory):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path_factory.mktemp("idx") / ("a.gz" if zipped else "a")
    path.write_bytes(gzip.compress(as_idx(array)) if zipped else as_idx(array))
    assert np.array_equal(idx.read_idx(path), array)


GOOD = as_idx(images(3, 4, 4))
ZIPPED = gzip.compress(GOOD, mtime=0)  # test names hold it


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("a", b"", "must begin with the header of an IDX file .*: got ''"),
        ("a", b"\0\0\x0d\3" + GOOD[4:], "got '00 00 0d 03 00"),
        ("a", GOOD[:9], "got '00 00 08 03 00 00 00 03 00'"),
        ("a", b"<html>not found</html>", "must begin with the header"),
        ("a", GOOD[:-1], r"a must hold 48 bytes of values, by its header of sizes \(3, 4, 4\): got 47"),
        ("a", GOOD + b"\0", "got more"),
        (
            "a",
            b"\0\0\x08\4" + b"\xff" * 16,
            r"must hold 340282\d*.*got 20 in all, which cannot hold them",
        ),
        ("a.gz", ZIPPED[:-9], r"a\.gz must be a readable, complete gzip file: got EOFError"),
        ("a.gz", ZIPPED[:30] + b"\0\0\0" + ZIPPED[33:], r"a\.gz must be a readable, complete gzip file"),
        ("a.gz", GOOD, r"a\.gz must be .* gzip file: got BadGzipFile"),
    ],
)
def test_damaged_idx(file, content, match, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        idx.read_idx(tmp_path / file)


@pytest.mark.parametrize("sizes", [b"\0\0\0\4" * 2, b"\0\xff\0\0" * 2])
def test_no_more_is_unpacked_than_promised(sizes, tmp_path):
    """A gzip file of 64 kB that unpacks to 64 MB, whatever its header says."""
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\2" + sizes + bytes(2**26)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"a\.gz must hold \d+ bytes of values.*: got (more|\d+ in all)"):
            idx.read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


def test_a_set_of_another_size_is_refused_by_its_header(tmp_path):
    """Before its gigabytes are unpacked: the file holds what it promises."""
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\1" + (2**26).to_bytes(4, "big") + bytes(2**26)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"must hold an array of shape \(30,\): got \(67108864,\) in its header"):
            idx.read_idx(path, (30,))
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    assert idx.read_idx(path).shape == (2**26,)


# -------------------------------------------------------------------------------------- which set is it


def facts_of(arrays, **others) -> datasets.Facts:
    """The facts of a grey set, computed one image after another."""
    counts, halves = [], []
    for x, y in ((arrays[0], arrays[1]), (arrays[2], arrays[3])):
        h, w = x.shape[1] // 2, x.shape[2] // 2
        of_class = [x[y == c] for c in range(10)]
        rows = [[np.mean([i[:h].mean() for i in part]), np.mean([i[:, :w].mean() for i in part])] for part in of_class]
        counts.append(tuple(int((y == c).sum()) for c in range(10)))
        halves.append(" ".join(f"{1000 * v / 255:.1f}" for row in rows for v in row))
    return datasets.Facts(counts=tuple(counts), halves=tuple(halves), **others)


def pair_digest(x, y) -> str:
    examples = [bytes([label]) + image.tobytes() for image, label in zip(x, y, strict=True)]
    return f"{sum(int(hashlib.md5(one).hexdigest(), 16) for one in examples) % 2**128:032x}"


X, Y, X_TEST, Y_TEST = MNIST_ARRAYS
BY_MD5 = {"md5": tuple(hashlib.md5(as_idx(a)).hexdigest() for a in MNIST_ARRAYS)}
BY_PAIRS = {"pairs": (pair_digest(X, Y), pair_digest(X_TEST, Y_TEST))}


@pytest.fixture
def known(shrink):
    """Says that the tiny MNIST is what is known of the set."""

    def known(**exact: tuple[str, ...]) -> None:
        shrink("mnist", 30, 12, facts_of(MNIST_ARRAYS, **exact), mean=(float(X.mean() / 255),))

    return known


def with_pixel(x: np.ndarray) -> np.ndarray:
    changed = x.copy()
    changed[-1, 3, 4] ^= 1
    return changed


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({0: images(31, 28, 28)[:30]}, "the mean training images of its classes"),  # another set
        ({0: 255 - X, 2: 255 - X_TEST}, "the mean training images of its classes; the mean test images of its"),
        ({0: X.transpose(0, 2, 1)}, "the mean training images of its classes"),  # on their side
        ({1: np.roll(Y, 1)}, "the mean training images of its classes"),  # labels in another order
        ({1: (Y + 3) % 10}, "the mean training images of its classes"),  # or of another numbering
        ({3: np.roll(Y_TEST, 10)}, "the number of test|the mean test images of its classes"),
        ({1: np.where(np.arange(30) == 0, 1, Y)}, r"the number of training examples per class, \[2, 4, 3,"),
    ],
)
def test_other_content_under_the_right_names(changed, match, root, known):
    folder = write_mnist(root / "mnist")
    known()
    assert len(load("mnist").train) == 25
    write_mnist(folder, **{idx.IDX_FILES[i]: array for i, array in changed.items()})
    with pytest.raises(ValueError, match=f"mnist must hold mnist, but differs from it in {match}"):
        load("mnist")


@pytest.mark.parametrize(
    ("exact", "i", "match"),
    [
        (BY_MD5, 0, "training images"),
        (BY_MD5, 2, "test images"),
        (BY_PAIRS, 0, "the training set"),
        (BY_PAIRS, 2, "the test set"),
    ],
)
def test_a_single_pixel_of_a_file(exact, i, match, root, known):
    folder = write_mnist(root / "mnist")
    known(**exact)
    assert len(load("mnist").train) == 25
    write_mnist(folder, **{idx.IDX_FILES[i]: with_pixel(MNIST_ARRAYS[i])})
    with pytest.raises(ValueError, match=rf"differs from it in {match}\. It is another set, or damaged"):
        load("mnist")


def test_the_order_of_examples_counts_where_it_is_known(root, known):
    write_mnist(root / "mnist", **{idx.IDX_FILES[i]: MNIST_ARRAYS[i][::-1] for i in (0, 1)})
    known(**BY_PAIRS)
    assert len(load("mnist").train) == 25
    known(**BY_MD5)
    with pytest.raises(ValueError, match="differs from it in training images; training labels"):
        load("mnist")


def test_training_and_test_set_swapped(root, shrink):
    """Of equal sizes; the real ones differ in theirs."""
    half = (X[:12], Y[:12], X_TEST, Y_TEST)
    shrink("mnist", 12, 12, facts_of(half), mean=(float(X[:12].mean() / 255),))
    write_mnist(root / "mnist", **dict(zip(idx.IDX_FILES, half, strict=True)))
    assert len(load("mnist").test) == 12
    write_mnist(root / "mnist", **dict(zip(idx.IDX_FILES, half[2:] + half[:2], strict=True)))
    with pytest.raises(ValueError, match="the mean training images of its classes; the mean test images"):
        load("mnist")


def test_channels_in_another_order(root, shrink):
    """Where only the channel means are known, as of CIFAR-100."""
    folder = root / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    pixels = np.repeat([50, 100, 150], 1024).astype(np.uint8)
    records = np.concatenate([np.arange(20)[:, None] % 10, np.tile(pixels, (20, 1))], 1).astype(np.uint8)
    for i, file in enumerate(idx.CIFAR10_FILES):
        (folder / file).write_bytes(records[:10].tobytes() if i == 5 else records[2 * i : 2 * i + 2].tobytes())
    shrink("cifar10", 10, 10, datasets.Facts(), mean=(150 / 255, 100 / 255, 50 / 255))
    with pytest.raises(ValueError, match=r"differs from it in the mean training pixel, \[0\.1961, 0\.3922, 0\.5882\]"):
        load("cifar10")
    shrink("cifar10", 10, 10, datasets.Facts(), mean=(50 / 255, 100 / 255, 150 / 255))
    assert load("cifar10").input_shape == (3, 32, 32)


def test_copies_from_openml_are_known_by_statistics_alone(root, known, monkeypatch):
    known(**BY_MD5)
    pixels, labels = np.concatenate([with_pixel(X), X_TEST]).reshape(42, 784), np.concatenate([Y, Y_TEST])
    serve(monkeypatch, pixels, labels)
    assert len(load("mnist").train) == 25
    serve(monkeypatch, pixels, np.roll(labels, 10))  # the same numbers of each class, but not theirs
    with pytest.raises(ValueError, match=r"OpenML's mnist_784 must hold mnist, but differs from it in the "):
        load("mnist")


@pytest.mark.parametrize("name", datasets.SOURCES)
def test_what_is_known_is_of_the_right_size(name):
    source = datasets.SOURCES[name]
    facts = source.facts or datasets.Facts()
    assert [sum(counts) for counts in facts.counts] in ([], [source.n_train, source.n_test])
    assert {len(halves.split()) for halves in facts.halves} <= {source.n_classes * (source.shape[0] + 1)}


def test_other_digits_of_scikit_learn(monkeypatch):
    x, y = sklearn.datasets.load_digits(return_X_y=True)
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda **_: (x, np.roll(y, 1)))
    with pytest.raises(ValueError, match="scikit-learn's digits must be"):
        load("digits")


def test_cifar10_from_files(root, shrink):
    records = write_cifar10(root / "cifar10" / "cifar-10-batches-bin")
    shrink("cifar10", 20, 4)
    task = load("cifar10", dtype=torch.float64)
    assert (task.augmentation, task.input_shape, len(task.train)) == ("crop_flip", (3, 32, 32), 15)
    order = torch.randperm(20, generator=stream("split", 0))
    label, pixels = records.reshape(24, 3073)[order[7], 0], records.reshape(24, 3073)[order[7], 1:]
    assert task.train.y[2] == label  # the first 5 are for validation
    for c, (mean, std) in enumerate(zip((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), strict=True)):
        plane = torch.tensor(pixels[1024 * c : 1024 * (c + 1)]).reshape(32, 32).double()
        torch.testing.assert_close(task.train.x[2, c], (plane / 255 - mean) / std)


def test_damaged_cifar10(root, shrink):
    shrink("cifar10", 20, 4)
    folder = root / "cifar10" / "cifar-10-batches-bin"
    write_cifar10(folder, largest_label=10)
    with pytest.raises(ValueError, match=r"labels of cifar10 must be in 0\.\.9: got 10"):
        load("cifar10")
    (folder / "data_batch_4.bin").write_bytes(b"\0" * 3072)
    with pytest.raises(ValueError, match=r"data_batch_4\.bin must hold 12292 bytes .* 4 records of 3073: got 3072"):
        load("cifar10")
    (folder / "test_batch.bin").unlink()
    with pytest.raises(ValueError, match=r"missing test_batch\.bin"):
        load("cifar10")


def test_cifar10_of_another_size(root):
    write_cifar10(root / "cifar10" / "cifar-10-batches-bin")
    with pytest.raises(
        ValueError, match=r"data_batch_1\.bin must hold 30730000 bytes .* 10000 records of 3073: got 12292"
    ):
        load("cifar10")


@pytest.mark.parametrize(
    ("name", "given", "near"),
    [("mnits", "'mnits'", "mnist"), ("fashion-mnist", "'fashion-mnist'", "fashion_mnist"), (10, "10", "cifar10")],
)
def test_unknown_name_gets_the_nearest(name, given, near):
    with pytest.raises(ValueError, match=f"unknown task {given}. Did you mean '{near}'"):
        load(name)


def test_load_refuses_other_arguments(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"dtype must be floating: got torch\.int64"):
        load("digits", dtype=torch.int64)
    with pytest.raises(ValueError, match="validation_size must be"):
        load("digits", validation_size=1437)
    monkeypatch.setenv("TICKETLAB_DATA", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"TICKETLAB_DATA must be a folder: got .*absent"):
        load("mnist")


# --------------------------------------------------------------------------------------------- OpenML


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("mnist", r"Put train-images-idx3-ubyte, .*, t10k-labels-idx1-ubyte in .*/mnist\."),
        ("fashion_mnist", r"Put train-images-idx3-ubyte, .* in .*/fashion-mnist\."),
        ("cifar10", r"Put data_batch_1\.bin, .*test_batch\.bin in .*/cifar10/cifar-10-batches-bin\."),
        ("cifar100", r"copy that machine's 'openml' folder to .*/openml\."),
        ("svhn", r"copy that machine's 'openml' folder to .*/openml\."),
    ],
)
def test_no_network_says_what_to_provide(name, match, root):
    with pytest.raises(ValueError, match=rf"{name} must be .*no network in tests.*{match}"):
        load(name)


@pytest.mark.parametrize(
    "error",
    [
        HTTPError("https://openml.org", 503, "busy", None, None),
        TimeoutError("slow"),
        EOFError("cut"),
        ValueError("md5 checksum"),
    ],
)
def test_every_failure_of_openml_becomes_a_value_error(error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fail)
    monkeypatch.delenv("TICKETLAB_DATA", raising=False)
    with pytest.raises(ValueError, match=r"TICKETLAB_DATA=None .* in \$TICKETLAB_DATA/mnist\."):
        load("mnist")


def test_mnist_from_openml(root, shrink, monkeypatch):
    """Training examples first; strings as labels, as scikit-learn gives them."""
    shrink("mnist", 20, 10)
    pixels, labels = images(30, 784), np.array([str(i % 10) for i in range(30)], dtype=object)
    asked = serve(monkeypatch, pixels.astype(np.int64), labels)
    task = load("mnist")
    assert (asked["name"], asked["data_home"], asked["as_frame"]) == ("mnist_784", str(root), False)
    folder = root / "mnist"
    digits = np.arange(30) % 10
    changed = (pixels[:20].reshape(-1, 28, 28), digits[:20], pixels[20:].reshape(-1, 28, 28), digits[20:])
    write_mnist(folder, **dict(zip(idx.IDX_FILES, changed, strict=True)))
    assert load("mnist").fingerprint() == task.fingerprint()


@pytest.mark.parametrize("interleaved", [False, True])
def test_svhn_from_openml_in_either_layout(interleaved, root, shrink, monkeypatch):
    shrink("svhn", 20, 10)
    ramp = np.add.outer(np.arange(32), np.arange(32))  # smooth, as images are
    x = (ramp + np.array([0, 60, 120])[:, None, None] + np.arange(30)[:, None, None, None]).astype(np.uint8)
    rows = (x.transpose(0, 2, 3, 1) if interleaved else x).reshape(30, 3072)
    serve(monkeypatch, rows, np.arange(30) % 10 + 1)
    raw = datasets.read("svhn")
    assert np.array_equal(np.concatenate([raw.x, raw.x_test]), x)
    assert np.array_equal(np.concatenate([raw.y, raw.y_test]), (np.arange(30) + 1) % 10)  # class 10 is the digit 0
    task = load("svhn")
    assert (task.augmentation, len(task.train), len(task.test)) == ("none", 15, 10)


MNIST_ROWS = images(30, 784).astype(np.float64)


@pytest.mark.parametrize(
    ("pixels", "labels", "match"),
    [
        (MNIST_ROWS[:29], np.zeros(29), r"must have data of shape \(30, 784\) .*: got \(29, 784\) and \(29,\)"),
        (MNIST_ROWS, np.zeros(29), r"a label for each row: got \(30, 784\) and \(29,\)"),
        (MNIST_ROWS + 1, np.zeros(30), r"pixels of OpenML's mnist_784 must be integers in 0\.\.255.*256"),
        (MNIST_ROWS / 255, np.zeros(30), "pixels of OpenML's mnist_784 must be integers"),
        (MNIST_ROWS * np.nan, np.zeros(30), r"none missing: got nan\.\.nan"),
        (MNIST_ROWS, np.full(30, "seven"), "labels of OpenML's mnist_784 must be numbers: got could not convert"),
        (MNIST_ROWS, np.array([None] * 30), "labels of OpenML's mnist_784 must be"),
        (MNIST_ROWS, np.full(30, 10), r"labels of mnist must be in 0\.\.9: got 10 in OpenML's mnist_784"),
    ],
)
@pytest.mark.usefixtures("root")
def test_unexpected_answers_of_openml(pixels, labels, match, shrink, monkeypatch):
    shrink("mnist", 20, 10)
    serve(monkeypatch, pixels, labels)
    with pytest.raises(ValueError, match=match):
        load("mnist")


class Response(io.BytesIO):
    info = staticmethod(dict)  # headers: none


class FakeOpenML:
    """Answers scikit-learn's requests as OpenML would for one data set of rows and labels, or fails."""

    def __init__(self, rows: np.ndarray, labels: list[str]) -> None:
        columns = [f"pixel{i + 1}" for i in range(rows.shape[1])]
        lines = [f"{','.join(map(str, row))},{label}" for row, label in zip(rows, labels, strict=True)]
        header = ["@RELATION set", *(f"@ATTRIBUTE {c} real" for c in columns)]
        values = ",".join(sorted(set(labels)))
        arff = "\n".join([*header, f"@ATTRIBUTE class {{{values}}}", "@DATA", *lines]) + "\n"
        flags = {
            "is_target": "false",
            "is_ignore": "false",
            "is_row_identifier": "false",
            "number_of_missing_values": "0",
        }
        features = [{"index": str(i), "name": c, "data_type": "numeric"} | flags for i, c in enumerate(columns)]
        target = {"index": str(len(columns)), "name": "class", "data_type": "nominal"} | flags | {"is_target": "true"}
        md5 = hashlib.md5(arff.encode()).hexdigest()
        url = "https://api.openml.org/data/v1/download/1/set.arff"
        about = {"id": "1", "name": "set", "version": "1", "format": "ARFF", "status": "active", "description": ""}
        self.answers = {
            "data/list/": {"data": {"dataset": [{"did": 1, "name": "set", "status": "active"}]}},
            "data/features/": {"data_features": {"feature": [*features, target]}},
            "data/qualities/": {
                "data_qualities": {"quality": [{"name": "NumberOfInstances", "value": str(len(rows))}]}
            },
            "data/1": {"data_set_description": about | {"url": url, "md5_checksum": md5}},
            "download": arff,
        }
        self.online = True

    def __call__(self, request, *_, **__):
        if not self.online:
            raise URLError("unplugged")
        answer = next(a for part, a in self.answers.items() if part in request.full_url)
        return Response((answer if isinstance(answer, str) else json.dumps(answer)).encode())


@pytest.mark.parametrize("label", ["{}", "'{}'"])
def test_through_scikit_learn(label, tmp_path, shrink, monkeypatch):
    """All of scikit-learn's own code but the socket: arguments it accepts, types it gives, the cache."""
    shrink("mnist", 20, 10)
    pixels, digits = images(30, 784), np.arange(30) % 10
    server = FakeOpenML(pixels, [label.format(digit) for digit in digits])
    monkeypatch.setattr("sklearn.datasets._openml.urlopen", server)
    monkeypatch.setattr("sklearn.datasets._openml.time.sleep", lambda _: None)
    monkeypatch.setenv("TICKETLAB_DATA", str(tmp_path))
    server.online = False
    with pytest.raises(ValueError, match=r"mnist must be .*unplugged.*Put train-images.* in .*/mnist\."):
        load("mnist")
    server.online = True
    raw = datasets.read("mnist")
    assert np.array_equal(np.concatenate([raw.x, raw.x_test]).reshape(30, 784), pixels)
    assert np.array_equal(np.concatenate([raw.y, raw.y_test]), digits)
    assert (tmp_path / "openml").is_dir()
    server.online = False
    assert np.array_equal(datasets.read("mnist").x, raw.x)  # from the cache
    assert not list(tmp_path.rglob("*.pkl"))


# ------------------------------------------------------------------------------------------ real files


def has(folder: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not DATA or not Path(DATA, folder).is_dir(), reason=f"needs TICKETLAB_DATA with {folder}")


@has("mnist")
def test_real_mnist():
    task = load("mnist")
    assert (len(task.train), len(task.validation), len(task.test)) == (55000, 5000, 10000)
    assert abs(task.train.x.mean()) < 2e-3
    assert abs(task.train.x.std() - 1) < 2e-3
    # class counts of the test set, as published
    assert torch.bincount(task.test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@has("fashion-mnist")
def test_real_fashion_mnist():
    task = load("fashion_mnist")
    assert torch.bincount(torch.cat([task.train.y, task.validation.y])).tolist() == [6000] * 10
    assert abs(task.train.x.mean()) < 2e-3
    assert abs(task.train.x.std() - 1) < 2e-3


@has("cifar10/cifar-10-batches-bin")
def test_real_cifar10():
    assert len(load("cifar10").train) == 45000


@has("fashion-mnist")
def test_one_real_set_in_the_folder_of_another(root):
    (root / "mnist").symlink_to(Path(DATA, "fashion-mnist"))
    with pytest.raises(
        ValueError, match=r"must hold mnist, but differs .* number of training examples per class, \[6000, "
    ):
        load("mnist")


@has("mnist")
@pytest.mark.parametrize(
    ("other", "match"),
    [
        ({0: 2, 1: 3, 2: 0, 3: 1}, r"train-images.* shape \(60000, 28, 28\): got \(10000, 28, 28\)"),
        ({1: 3, 3: 1}, r"train-labels.* shape \(60000,\): got \(10000,\)"),
    ],
)
def test_real_training_and_test_files_swapped(other, match, root):
    (root / "mnist").mkdir()
    for i, file in enumerate(idx.IDX_FILES):
        (root / "mnist" / f"{file}.gz").symlink_to(Path(DATA, "mnist", f"{idx.IDX_FILES[other.get(i, i)]}.gz"))
    with pytest.raises(ValueError, match=match):
        load("mnist")
