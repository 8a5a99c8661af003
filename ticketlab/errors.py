"""The one error that a user meets: what must hold, what was given, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class Refused(ValueError):
    """Input that the library does not take. Its message is all that a user needs: no traceback goes with it.

    Any other exception is a fault of the library, and keeps its traceback on the command line.
    """


Refused.__name__ = "ValueError"  # to whoever asks an error for its name it is what it says: a bad value


def check_type(what: str, given: object, kind: type, remedy: str) -> None:
    """Refuse an object of another kind than is meant, such as the name of a task in its place."""
    if not isinstance(given, kind):
        raise Refused(f"{what} must be a {kind.__name__}: got {type(given).__name__}. {remedy}")


def nearest(kind: str, given: str, known: Sequence[str]) -> str:
    """The message for an unknown name: what was given, the closest known one, and all of them."""
    close = get_close_matches(str(given), known, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {given!r}.{hint} Known: {', '.join(known)}."
