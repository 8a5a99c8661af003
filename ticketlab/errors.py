"""The one error that a user meets: what must hold, what was given, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class Refused(ValueError):
    """Input that the library does not take. Its message is all that a user needs: no traceback goes with it.

    Any other exception is a fault of the library, and keeps its traceback on the command line.
    """


Refused.__name__ = "ValueError"  # to whoever asks an error for its name it is what it says: a bad value


def one_line(text: object) -> str:
    """Text on one line, whatever a file or a stranger put into it: what cannot be printed is written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def check_type(what: str, given: object, kind: type, remedy: str) -> None:
    """Refuse an object of another kind than is meant, such as the name of a task in its place."""
    if not isinstance(given, kind):
        raise Refused(f"{what} must be a {kind.__name__}: got {type(given).__name__}. {remedy}")


def check_fields(record: Any) -> None:
    """Refuse a dataclass one of whose fields is of another kind than its annotation says; a bool is no number."""
    for name, hint in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _is_a(value, hint):
            kind = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else hint
            of, remedy = f"{type(record).__name__}.{name}", "Write a tuple as (0, 1)." if "tuple" in str(hint) else ""
            raise Refused(f"{of} must be {kind}: got {value!r}, a {type(value).__name__}. {remedy}".rstrip())


def _is_a(value: Any, hint: Any) -> bool:
    kinds = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_is_a(value, kind) for kind in kinds)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(part, kinds[0]) for part in value)
    if get_origin(hint) is Literal:  # whoever owns the names says which are meant
        return True
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, hint)


def nearest(kind: str, given: str, known: Sequence[str]) -> str:
    """The message for an unknown name: what was given, the closest known one, and all of them."""
    close = get_close_matches(str(given), known, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {given!r}.{hint} Known: {', '.join(known)}."
