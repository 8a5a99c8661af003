"""A call in a process of its own, which ends when the caller's does.

A worker of a cluster shares its global generators with the threads that talk to its scheduler, and a network that
draws must share them with nobody. ``python -m ticketlab.engine.apart`` is the other end.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any


def apart(call: Callable[[Callable[[], None]], Any], report: Callable[[], None]) -> Any:
    """``call(report)``, elsewhere.

    Raises:
        ChildProcessError: The process ended without an answer, as when it is killed.
        Exception: What the call raised.
    """
    import cloudpickle  # noqa: PLC0415  (of ticketlab[cluster]: functions of a notebook travel too)

    command = [sys.executable, "-m", __name__]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(cloudpickle.dumps(call))
            child.stdin.flush()  # and stays open: its end tells the child that nobody waits any more
            while True:
                kind, value = pickle.load(child.stdout)
                if kind == "answer":
                    return value
                if kind == "error":
                    raise value
                report()
        except (EOFError, BrokenPipeError) as error:
            raise ChildProcessError(f"the process of a block ended without an answer: exit {child.wait()}.") from error
        finally:
            child.kill()


def _main() -> None:
    import cloudpickle  # noqa: PLC0415

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a call prints is no answer

    def send(kind: str, value: Any = None) -> None:
        answers.write(cloudpickle.dumps((kind, value)))
        answers.flush()

    call = pickle.load(sys.stdin.buffer)
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    try:
        send("answer", call(lambda: send("part")))
    except Exception as error:
        send("error", error)


if __name__ == "__main__":
    _main()
