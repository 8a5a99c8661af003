"""The one error that a user meets: what must hold, what was given, what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

F = TypeVar("F", bound=Callable[..., Any])


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


def check_count(what: str, given: object, least: int, most: int) -> None:
    """Refuse what is no integer in a range that somebody can wait for, or hold in memory."""
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise Refused(f"{what} must be an integer: got {given!r:.200}.")
    if not least <= int(given) <= most:
        raise Refused(f"{what} must be at {f'least {least}' if int(given) < least else f'most {most:,}'}: got {given}.")


def kinds_told(function: F) -> F:
    """The same function, whose failures over an argument of the wrong kind are `Refused`; others keep their traceback.

    Arguments are looked at after a failure alone, so that nothing which works is slower or refused.
    """

    @wraps(function)
    def refusing(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Refused:
            raise
        except Exception as error:
            try:
                given = inspect.signature(function).bind(*args, **kwargs).arguments
                hints = get_type_hints(function)
            except (TypeError, NameError):  # an argument is missing, or too many
                raise error from None
            for name, value in given.items():
                if why := _misfit(value, hints.get(name, Any)):
                    raise Refused(
                        f"{name} must be {inspect.signature(function).parameters[name].annotation}: {why}."
                    ) from error
            raise

    return refusing  # type: ignore[return-value]


def _misfit(value: Any, hint: Any) -> str:
    """Why a value is not what an annotation says, as far as can be told; nothing where it is, or may be."""
    if isinstance(value, torch.Tensor) and (value.is_meta or value.is_complex()):
        return f"got a tensor on {value.device} in {value.dtype}"
    try:
        fits = _is_a(value, hint)
    except TypeError:  # a protocol, which cannot be asked
        fits = True
    return "" if fits else f"got {value!r:.200}, a {type(value).__name__}"


def check_fields(record: Any) -> None:
    """Refuse a dataclass one of whose fields is of another kind than its annotation says; a bool is no number."""
    for name, hint in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _is_a(value, hint):
            kind = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else hint
            of, remedy = f"{type(record).__name__}.{name}", "Write a tuple as (0, 1)." if "tuple" in str(hint) else ""
            raise Refused(f"{of} must be {kind}: got {value!r}, a {type(value).__name__}. {remedy}".rstrip())


def _is_a(value: Any, hint: Any) -> bool:
    kind, kinds = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_is_a(value, one) for one in kinds)
    if hint is Any or kind is Literal:  # whoever owns the names says which are meant
        return isinstance(value, Hashable)
    if isinstance(kind, type):
        return _holds(value, kind, kinds)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, getattr(hint, "array_type", hint))  # of a tensor with a shape, which others check


def _holds(value: Any, kind: Any, kinds: Sequence[Any]) -> bool:
    """Whether a tuple, a sequence or a mapping holds parts of their kind; of others, whether it is one."""
    if not isinstance(value, kind):
        return False
    if issubclass(kind, Mapping):
        return all(_is_a(part, kinds[1]) for part in value.values())
    return not issubclass(kind, Sequence) or all(_is_a(part, kinds[0]) for part in value)


def nearest(kind: str, given: str, known: Sequence[str]) -> str:
    """The message for an unknown name: what was given, the closest known one, and all of them."""
    close = get_close_matches(str(given), known, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {given!r}.{hint} Known: {', '.join(known)}."
