"""Calls in a process of its own, which ends when the caller's does.

A worker of a cluster shares its global generators with the threads that talk to its scheduler, and a network that
draws must share them with nobody. A process that has answered waits for the next call, for it takes seconds to start.
``python -m ticketlab.engine.apart`` is the other end.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

_IDLE: list[subprocess.Popen[bytes]] = []
"""Processes that have answered."""


@atexit.register
def _end() -> None:
    for child in _IDLE:
        child.kill()
        child.communicate()


def apart(call: Callable[[Callable[[], None]], Any], report: Callable[[], None]) -> Any:
    """``call(report)``, elsewhere.

    Raises:
        ChildProcessError: The process ended without an answer, as when it is killed.
        Exception: What the call raised.
    """
    import cloudpickle  # noqa: PLC0415  (of ticketlab[cluster]: functions of a notebook travel too)

    child = _child()
    assert child.stdin is not None and child.stdout is not None
    answered = False
    try:
        child.stdin.write(cloudpickle.dumps(call))
        child.stdin.flush()  # and stays open: its end tells the child that nobody waits any more
        while True:
            kind, value = pickle.load(child.stdout)
            if kind == "part":
                report()
                continue
            answered = True
            if kind == "error":
                raise value
            return value
    except (EOFError, BrokenPipeError) as error:
        raise ChildProcessError(f"the process of a block ended without an answer: exit {child.wait()}.") from error
    finally:
        if answered:
            _IDLE.append(child)
        else:
            child.kill()
            child.communicate()


def _child() -> subprocess.Popen[bytes]:
    with suppress(IndexError):  # none is idle
        while True:
            child = _IDLE.pop()
            if child.poll() is None:
                return child
            child.communicate()  # which closes its pipes
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __name__]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def _main() -> None:
    import cloudpickle  # noqa: PLC0415

    calls: SimpleQueue[Callable[[Callable[[], None]], Any]] = SimpleQueue()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a call prints is no answer

    def listen() -> None:
        try:
            while True:
                calls.put(pickle.load(sys.stdin.buffer))
        except BaseException:  # the end of the input, or what nobody could have sent
            os._exit(1)

    def send(kind: str, value: Any = None) -> None:
        answers.write(cloudpickle.dumps((kind, value)))
        answers.flush()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        call = calls.get()
        try:
            send("answer", call(lambda: send("part")))
        except Exception as error:
            send("error", error)


if __name__ == "__main__":
    _main()
