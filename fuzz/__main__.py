"""``python -m fuzz [--seconds 20] [TARGET ...]``: wrong input for so long per target, and a table of what came of it.

Files of bytes are mutated by atheris where it is installed (``pip install '.[fuzz]'``), which follows the coverage of
ticketlab; each target runs in a process of its own, within 8 GB of memory. Exit code 1 where anything went wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import tyro

try:
    import atheris
except ImportError:  # for Linux and Python 3.11 to 3.13
    atheris = None
REPORT = os.environ.get("FUZZ_REPORT")
"""Where the process of one target leaves its tally."""
with atheris.instrument_imports(include=["ticketlab", "examples"]) if atheris and REPORT else contextlib.nullcontext():
    from fuzz import sweeps
    from fuzz.targets import TARGETS, seeds
    from ticketlab.commands import guarded, parsed, try_folder
    from ticketlab.errors import Refused, nearest

TABLE = Path(__file__).parent.parent / "docs" / "fuzz.md"
SWEEPS = {"flags": lambda: sweeps.flags(Path(tempfile.mkdtemp())), "arguments": sweeps.arguments}
PATIENCE = 30
"""Seconds after which an input has no end."""
HEAD = """# Fuzzing

`make fuzz` gives wrong input to everything that reads, so many seconds per target, and writes this page. *Silent*
inputs were taken against the docstring; *tracebacks* are all exceptions but a refusal, and inputs without an end.

| target | inputs | seconds | refused | taken | silent | tracebacks | date |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Config:
    """Wrong input for everything that reads."""

    targets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Some of the targets; none: all."""
    seconds: float = 20
    """For each target; a sweep, in an order drawn at random, ends with its last case."""
    out: Path | None = TABLE
    """Page that gets the table; None: printed alone."""


class Endless(BaseException):
    """An input that has no end within `PATIENCE`; nothing but the tally may catch it."""


@dataclass
class Tally:
    """What came of the inputs of a target."""

    refused: int = 0
    taken: int = 0
    silent: int = 0
    tracebacks: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    """By the place where they happened: the first input of each."""

    def add(self, act: Callable[[], object], words: str) -> None:
        try:
            with _patience(), warnings.catch_warnings(action="ignore"):
                code = act()
        except Refused:
            self.refused += 1
        except AssertionError:
            self.silent += 1
            self.faults.setdefault("silent", words)
        except (Exception, Endless) as error:
            self.tracebacks += 1
            self.faults.setdefault(f"{type(error).__name__} {_place(error)}", words)
        else:
            refused = isinstance(code, int) and code == 2  # a command's
            self.refused += refused
            self.taken += not refused


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    def end(*_: object) -> None:
        raise Endless

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1)  # again, where it was lost in a destructor
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Some bytes of an input changed, taken out or doubled; in the text of JSON as anywhere."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(changed) + 1), draw.choice((1, 1, 2, 8, 100))
        part = changed[at : at + length]
        changed[at : at + length] = draw.choice((b"", part * 2, draw.randbytes(len(part)), b"-1e9,null]}"[:length]))
    return bytes(changed)


def fuzzed(name: str, seconds: float) -> Tally:
    """Inputs near the whole ones of a target, drawn at random."""
    tally, draw, known, end = Tally(), random.Random(name), seeds(name), time.monotonic() + seconds
    for number in count():
        content = known[number] if number < len(known) else mutated(draw.choice(known or [b""]), draw)
        tally.add(lambda content=content: TARGETS[name](content), repr(content[:200]))
        if time.monotonic() > end:
            return tally


def swept(name: str, seconds: float) -> Tally:
    tally, cases, end = Tally(), [*SWEEPS[name]()], time.monotonic() + seconds
    random.Random(name).shuffle(cases)
    for words, act in cases:
        if time.monotonic() > end:
            break
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            tally.add(act, words)
        if len(lines := said.getvalue().splitlines()) > 1 and lines[-1].startswith("error:"):
            tally.tracebacks += 1
            tally.faults.setdefault("more than a line", words)
    return tally


def _guided(name: str, seconds: float, report: Path) -> None:
    """As `fuzzed`, by coverage: atheris never returns, so the tally is written from within."""
    tally, end = Tally(), time.monotonic() + seconds
    for content in seeds(name):
        tally.add(lambda content=content: TARGETS[name](content), repr(content[:200]))

    def one(content: bytes) -> None:
        tally.add(lambda: TARGETS[name](content), repr(content[:200]))
        if time.monotonic() > end:
            report.write_text(json.dumps(vars(tally)))
            os._exit(0)

    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(seeds(name)):
            (Path(folder) / str(number)).write_bytes(content)
        atheris.Setup([sys.argv[0], folder, "-verbosity=0", "-rss_limit_mb=0"], one)
        atheris.Fuzz()


def _apart(name: str, seconds: float) -> Tally:
    """A target in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "fuzz", name, str(seconds)]
        subprocess.run(command, env={**os.environ, "FUZZ_REPORT": str(report)}, stdout=subprocess.DEVNULL, check=False)
        found = json.loads(report.read_text()) if report.exists() else {"tracebacks": 1, "faults": {"died": name}}
    return Tally(**found)


def _run(name: str, seconds: float, report: Path) -> None:
    """In that process, which a terminal signals too: the first one ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    if name in TARGETS and atheris:
        _guided(name, seconds, report)
    report.write_text(json.dumps(vars((fuzzed if name in TARGETS else swept)(name, seconds))))


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 where anything went wrong; otherwise as of ``commands.guarded``."""
    return guarded(lambda: _answer(parsed(Config, argv, prog="python -m fuzz")))


def _answer(config: Config) -> int:
    if not 0 < config.seconds < float("inf"):
        raise Refused(f"--seconds must be positive and finite: got {config.seconds}.")
    for unknown in {*config.targets} - {*TARGETS, *SWEEPS}:
        raise Refused(nearest("target", unknown, (*TARGETS, *SWEEPS)))
    if config.out is not None and not config.targets:
        try_folder(config.out.parent)
    rows, wrong = [], 0
    for name in config.targets or (*TARGETS, *SWEEPS):
        start = time.monotonic()
        tally = _apart(name, config.seconds)
        n, seconds = tally.refused + tally.taken + tally.silent + tally.tracebacks, time.monotonic() - start
        date = datetime.now(UTC).strftime("%Y-%m-%d")
        cells = (name, n, round(seconds), tally.refused, tally.taken, tally.silent, tally.tracebacks, date)
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        print(rows[-1], *(f"\n  {where}: {words}" for where, words in tally.faults.items()), flush=True)
        wrong += tally.silent + tally.tracebacks
    if config.out is not None and not config.targets:
        config.out.write_text(HEAD + "\n".join(rows) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    if REPORT:
        _run(sys.argv[1], float(sys.argv[2]), Path(REPORT))
        sys.exit(0)
    sys.exit(main())
