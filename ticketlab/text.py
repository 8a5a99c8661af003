"""Text that is everywhere: the sources of Python's standard library, as passages of bytes.

Two tasks are made of it. ``stdlib_lm`` predicts the next byte; ``stdlib_topics`` says what a passage is about. Both see
passages of one length over one vocabulary, cut alike, and every file is in the same split of both: a network that is
pretrained on the one has seen nothing of what the other is tested on.

The text is that of the running Python, and another version's is another: `stdlib` gives its digest, which goes into the
names of tasks, ``stdlib_lm.1c0ffee5``, and by that name another text is refused.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ticketlab.errors import Refused
from ticketlab.seeds import stream

VOCABULARY = 256
"""Tokens are bytes. UTF-8 has no bytes 0xF8 to 0xFF, so that those are free for what is no text."""
BEGIN, MASK, PAD = 0xFF, 0xFE, 0xFD
"""What stands before a passage; what a masked language model may put over a byte, or behind a text that is short."""
LENGTH = 128
"""Tokens of a passage, `BEGIN` included."""

TOPICS = {
    "archives": "_compression bz2 filecmp fnmatch glob gzip lzma pathlib shutil tarfile tempfile zipfile",
    "asyncio": "asyncio",
    "email": "email imaplib mailbox poplib smtplib",
    "imports": "compileall importlib modulefinder pkgutil py_compile pyclbr runpy zipapp zipimport",
    "markup": "_markupbase html plistlib xml xmlrpc",
    "processes": "_threading_local concurrent multiprocessing queue sched selectors subprocess threading",
    "testing": "bdb cProfile cmd code doctest pdb profile pstats timeit trace unittest",
    "web": "ftplib http socket socketserver ssl urllib webbrowser wsgiref",
}
"""Classes of ``stdlib_topics``: packages and modules of the standard library."""
_TOPIC = {module: topic for topic, modules in TOPICS.items() for module in modules.split()}

# Left out: what some distributions leave out too, what is no text but a table, and tests.
_TABLES = ("encodings", "pydoc_data", "html/entities.py")
_OPTIONAL = ("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo", "venv")
_TESTS = {"test", "tests", "idle_test"}

_SHARE = 0.11
"""Of the bytes of each topic, and of the files of none, that may go to the test set; as much to the validation set."""


class Passages(NamedTuple):
    """Bytes as tokens, uint8, of one split."""

    x: np.ndarray
    """[n, `LENGTH`]: `BEGIN`, then all bytes of a passage but its last."""
    y: np.ndarray
    """[n, `LENGTH`], the bytes of the passage, each the next of what ``x`` shows; or [n], its topic."""


class Sizes(NamedTuple):
    """Passages of each split, at most."""

    train: int
    validation: int
    test: int


SIZES = {"stdlib_lm": Sizes(20000, 1000, 2000), "stdlib_topics": Sizes(16000, 800, 1600)}
NAMES = tuple(SIZES)


class Text(NamedTuple):
    """The standard library, as far as it is used."""

    files: dict[str, bytes]
    """By path, sorted, lines ending in a line feed."""
    digest: str
    """8 hex digits (SHA-256) of paths and contents."""


@lru_cache(maxsize=1)
def stdlib() -> Text:
    """The sources of the running Python's standard library.

    Modules that ``sys.stdlib_module_names`` lists, in UTF-8, without tests, tables, and what distributions leave out.

    Raises:
        Refused: No sources on disk, as in a Python that is packed into one file.
    """
    root, files = Path(sysconfig.get_paths()["stdlib"]), {}
    for name in sorted(_names(root)):
        content = (root / name).read_bytes().replace(b"\r\n", b"\n")
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:  # an old encoding, whose bytes mean something else
            continue
        files[name] = content
    if not set(TOPICS) <= {topic_of(name) for name in files}:
        raise Refused(
            f"the standard library's sources must be on disk for {', '.join(NAMES)}: got {len(files)} files of them in "
            f"{root}. Use a Python that is installed with its .py files."
        )
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return Text(files, digest.hexdigest()[:8])


def _names(root: Path) -> list[str]:
    """Paths of the files that are used; only what is the library's is looked into, for other packages lie beside it."""
    tops = set(sys.stdlib_module_names) - {*_TABLES, *_OPTIONAL, *_TESTS}
    found = [path for top in tops for path in (root / f"{top}.py", *(root / top).rglob("*.py")) if path.is_file()]
    names = [path.relative_to(root) for path in found]
    return [n.as_posix() for n in names if n.as_posix() not in _TABLES and not _TESTS.intersection(n.parts)]


def topic_of(name: str) -> str | None:
    """The topic of a file of the standard library; None where it has none."""
    return _TOPIC.get(name.partition("/")[0].removesuffix(".py"))


def split_name(name: str) -> tuple[str, str]:
    """The name of a task and the digest behind it, "" where there is none."""
    task, _, digest = str(name).partition(".")
    return task, digest


def read(name: str, *, validation_size: int | None = None, split_seed: int = 0) -> tuple[str, list[Passages]]:
    """The full name of a task, its text's digest included, and its training, validation and test passages.

    A file lies in one split as a whole: the test set's are always the same, the validation set's a function of the
    seed. Files are cut into passages of `LENGTH` bytes, a rest is left out, and so is every passage that occurs twice,
    wherever it does. Of the passages of a split a random sample is kept, of topics equally many.

    Args:
        name: One of `NAMES`, or with the digest of the text that it must be behind it.
        validation_size: Validation passages; those of `SIZES` when None.
        split_seed: Of which other files are validated on, and which of their passages.

    Raises:
        Refused: Another text than the name says, or more validation passages than there are.
    """
    task, wanted = split_name(name)
    if validation_size is not None and not (isinstance(validation_size, Integral) and validation_size > 0):
        raise Refused(f"validation_size must be a number of passages, at least 1: got {validation_size}.")
    text = stdlib()
    if wanted not in ("", text.digest):
        raise Refused(
            f"{name} is of the standard library with the digest {wanted}: this Python's, {sys.version.split()[0]}, has "
            f"{text.digest}, and a network trained on the one says nothing of the other. Use that Python, or {task}."
        )
    names = tuple(text.files)
    splits = _split_of_files(names, [len(content) for content in text.files.values()], split_seed)
    passages, owners = _cut(list(text.files.values()))
    topics = np.array([list(TOPICS).index(topic_of(n) or "") if topic_of(n) else -1 for n in names])[owners]
    sizes = SIZES[task]._asdict() | ({} if validation_size is None else {"validation": validation_size})
    found = []
    for split, (kind, size) in enumerate(sizes.items()):
        # The test set is always the same one, as of the other named sets.
        generator = stream("test", 0) if kind == "test" else stream("split", split_seed)
        order = torch.randperm(len(passages), generator=generator).numpy()
        mine = order[splits[owners[order]] == split]
        kept = _balanced(mine, topics, size) if task == "stdlib_topics" else mine[:size]
        if len(kept) < size and validation_size is not None and kind == "validation":
            raise Refused(
                f"validation_size must be at most {len(kept)}, the passages of the files that {task} is validated on: "
                f"got {validation_size}. Lower it."
            )
        x = np.concatenate([np.full((len(kept), 1), BEGIN, np.uint8), passages[kept, :-1]], 1)
        found.append(Passages(x, topics[kept] if task == "stdlib_topics" else passages[kept]))
    return f"{task}.{text.digest}", found


def _split_of_files(names: Sequence[str], sizes: Sequence[int], split_seed: int) -> np.ndarray:
    """0 for files to train on, 1 for validation, 2 for test; each topic, and all other files, divided by itself."""
    of_topic = np.array([topic_of(name) or "" for name in names])
    size, found = np.array(sizes), np.zeros(len(names), int)
    for number, topic in enumerate(("", *TOPICS)):
        mine = np.flatnonzero(of_topic == topic)
        for split, seeds in ((2, (0, number)), (1, (split_seed, number))):
            free = mine[found[mine] == 0]
            order = free[torch.randperm(len(free), generator=stream("files", split, *seeds)).numpy()]
            found[first_fit(order, size, int(_SHARE * size[mine].sum()))] = split
    return found


def first_fit(order: np.ndarray, sizes: np.ndarray, room: int) -> np.ndarray:
    """Of things in an order those that fit into what room is left, one after another; the smallest where none does."""
    kept, left = [], room
    for i in order:
        if sizes[i] <= left:
            kept.append(i)
            left -= sizes[i]
    return np.array(kept or [min(order, key=lambda i: sizes[i])])


def _cut(contents: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Passages [n, LENGTH] that occur once, and the index of the file that each is from."""
    cut = [np.frombuffer(c, np.uint8)[: len(c) // LENGTH * LENGTH].reshape(-1, LENGTH) for c in contents]
    passages, owners = np.concatenate(cut), np.repeat(np.arange(len(cut)), [len(c) for c in cut])
    _, first, times = np.unique(passages.view(f"V{LENGTH}")[:, 0], return_index=True, return_counts=True)
    once = np.sort(first[times == 1])
    return passages[once], owners[once]


def _balanced(passages: np.ndarray, topics: np.ndarray, size: int) -> np.ndarray:
    """The first of each topic, equally many but for one, in the order they came in."""
    mine, n = topics[passages], len(TOPICS)
    fewest = min(int((mine == topic).sum()) for topic in range(n))
    kept = [np.flatnonzero(mine == topic)[: min(fewest, (size + n - 1 - topic) // n)] for topic in range(n)]
    return passages[np.sort(np.concatenate(kept))]
