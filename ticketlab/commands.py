"""How a command ends: an exit code, and one line where its input, its surroundings or a signal ended it."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import tyro

from ticketlab.errors import Refused, one_line

T = TypeVar("T")


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. Of a plain KeyboardInterrupt that passed an ``exec`` Python dies whatever the exit code is."""

    code = 130


def guarded(action: Callable[[], int]) -> int:
    """The exit code of an action: one line where input or surroundings were at fault, or a signal stopped it.

    Args:
        action: May raise a KeyboardInterrupt whose text says what is left.

    Returns:
        The action's code; 2 where it refused its input, or the disk, a folder or a device failed it; 130 where Ctrl-C
        stopped it and 143 where SIGTERM did; 141 where nobody reads its output.
    """
    try:
        with _signalled():
            _open_output()
            code = action()
            sys.stdout.flush()
            return code
    except Refused as error:
        return _said("error", error, 2)
    except KeyboardInterrupt as stopped:
        print(file=sys.stderr)  # below a bar of progress
        return _said("stopped", str(stopped) or "the same command starts again.", getattr(stopped, "code", 130))
    except BrokenPipeError:
        _give_up_output()
        return 141
    except OSError as error:
        _give_up_output()
        where = error.filename or "the output"
        return _said("error", f"{where} must be usable: {error.strerror or error}. Choose another, or make room.", 2)
    except (MemoryError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", why):
            raise
        return _said("error", f"memory must hold the work: {why or 'it is full'}. Take smaller networks, or fewer.", 2)


def _open_output() -> None:
    """Streams that were closed from the start lead nowhere; the others take names of files that are no text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _said(what: str, why: object, code: int) -> int:
    print(f"{what}: {one_line(why)}", file=sys.stderr)
    return code


def _give_up_output() -> None:
    """Where it takes no more: the interpreter flushes once more at its end, into a place where nothing can fail."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signalled() -> Iterator[None]:
    """Both signals raise `Stopped`, unless they are ignored, where they can be heard: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        stopped = Stopped()
        stopped.code = 128 + number
        raise stopped

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, action in before.items() if action not in (signal.SIG_IGN, None)]
    try:
        for number in heard:
            signal.signal(number, stop)
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def parsed(kind: type[T], argv: Sequence[str] | None, **flags: Any) -> T:
    """``tyro.cli``, whose complaints are one line.

    Args:
        kind: What the flags describe.
        argv: Of the command line; None: those of the process.
        **flags: Of ``tyro.cli``; ``prog`` among them.

    Raises:
        Refused: Flags that it does not take.
    """
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            return tyro.cli(kind, args=argv, **flags)
    except SystemExit as end:
        if not end.code:
            raise
        cause: BaseException | None = end
        while cause is not None and not isinstance(cause, Refused):
            cause = cause.__cause__ or cause.__context__
        raise Refused(str(cause) if cause else _unboxed(complaint.getvalue(), flags["prog"])) from None


def _unboxed(box: str, prog: str) -> str:
    """The sentence below the title of a complaint of tyro, and the first flag that it proposes further down."""
    rows = [re.sub(r"^[─-]+$", "", line.strip("│╰╯ ")) for line in box.splitlines()[1:]]
    sentence, *rest = "\n".join(rows).strip().split("\n\n")
    close = next(iter(re.findall(r"^--[\w-]+", "\n".join(rest), re.MULTILINE)), None)
    words = " ".join(sentence.split()).removeprefix("Error parsing ").rstrip(".")
    return f"{words}. {f'Did you mean {close}? ' if close and f'{close}:' not in words else ''}See {prog} --help."


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Whatever fails while the folder of ``--out`` is written is refused."""
    try:
        yield
    except OSError as error:
        why = f"{folder}: {error.strerror or error}"
        raise Refused(f"--out must be a place to write to: {why}. Choose another, or make room.") from error


def try_folder(folder: Path) -> None:
    """Write a file there and take it away, with every folder that was made for it: before hours are spent.

    Raises:
        Refused: A place that cannot be written.
    """
    with usable(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f".{os.getpid()}").write_bytes(bytes(4096))
        finally:
            (folder / f".{os.getpid()}").unlink(missing_ok=True)
            for path in missing:
                if path.exists():
                    path.rmdir()
