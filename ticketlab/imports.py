"""A user's own function by its name on a command line, ``package.module:function``."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any

from ticketlab.errors import Refused


def is_own(name: str) -> bool:
    """Whether a name is that of a function to import."""
    return isinstance(name, str) and ":" in name


def imported(name: str, what: str) -> Callable[[], Any]:
    """The function behind ``package.module:function``; the module is imported, from the working directory too.

    Args:
        name: Of the function.
        what: What it makes, for the error.

    Raises:
        Refused: No such module or function. An error inside the module is its own and keeps its traceback.
    """
    module, _, function = name.partition(":")
    form = f"{what} of one's own must be package.module:function, which can be imported from here: got {name!r}"
    if not module or not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise Refused(f"{form}. Name a function without arguments.")
    try:
        found = pkgutil.resolve_name(name)
    except AttributeError:
        found = None
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise  # what the module itself imports
        raise Refused(f"{form}, and there is no module {error.name!r}. Start in its folder, or install it.") from error
    if not callable(found):
        raise Refused(f"{form}, and {module} has no function {function!r}.")
    return found
