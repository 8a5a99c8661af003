"""The short ``--help`` of an analysis: a line for each flag that most studies need, in groups."""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from ticketlab.engine.criteria import CRITERIA
from ticketlab.engine.treatments import TREATMENTS

FILES = ("run", "store", "out", "device")
STUDY = ("task", "model", "levels", "prune_fraction", "scope", "criterion", "treatments", "init_seeds", "rewind_step")
RECIPE = ("steps", "batch_size", "optimizer", "learning_rate", "schedule", "eval_every")


def usage(name: str, default: Any) -> str:
    """Groups of flags with their defaults and the first sentence on each, names, and an example.

    Args:
        name: The analysis.
        default: Its config, an instance of a frozen dataclass; whether it has a ``study`` decides on groups.
    """
    own = [f.name for f in fields(default) if f.name not in (*FILES, "study")]
    groups = {"this analysis": _lines(default, own)}
    if hasattr(default, "study"):
        groups["study"] = _lines(default.study, STUDY)
        groups["recipe"] = _lines(default.study.recipe, RECIPE)
    groups["files"] = _lines(default, [f for f in FILES if hasattr(default, f)])
    n_all = sum(1 for _ in _flags(default))
    parts = [f"python -m analyses.{name} [flags]", "", (type(default).__doc__ or "").partition("\n")[0]]
    for title, lines in groups.items():
        parts += ["", f"{title}:", *lines] if lines else []
    if hasattr(default, "study"):
        parts += ["", _listed("treatments", TREATMENTS), _listed("criteria", CRITERIA), "", "example:"]
        parts += [f"  python -m analyses.{name} --model lenet_300_100 --levels 4 --init-seeds 0 1 --steps 500"]
        parts += ["", "--preset NAME [--small] begins with a paper's study; python -m analyses lists them."]
    return "\n".join([*parts, f"--help-all describes all {n_all} flags."])


def _flags(config: Any) -> Iterator[str]:
    for f in fields(config):
        value = getattr(config, f.name)
        yield from _flags(value) if is_dataclass(value) else [f.name]


def _lines(config: Any, names: list[str] | tuple[str, ...]) -> list[str]:
    """``--flag default  What it is.``, to the width of the terminal."""
    about = {n: text for part in reversed(type(config).__mro__) for n, text in described(part).items()}
    heads = {n: f"  --{n.replace('_', '-')} {_shown(getattr(config, n))}".rstrip() for n in names}
    left = min(30, max(map(len, heads.values()), default=0))
    width = min(110, shutil.get_terminal_size((100, 24)).columns)
    lines = []
    for name, head in heads.items():
        text = textwrap.wrap(about.get(name, ""), max(30, width - left - 2)) or [""]
        beside = [f"{head:<{left}}  {text[0]}"] if len(head) <= left else [head, " " * (left + 2) + text[0]]
        lines += [*beside, *(" " * (left + 2) + line for line in text[1:])]
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def described(kind: type) -> dict[str, str]:
    """The first paragraph under each attribute of a class, read from its source."""
    if not is_dataclass(kind):
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for one, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
            text = ast.literal_eval(after.value)
            found[one.target.id] = " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
    return found


def _listed(what: str, names: Mapping[str, Any]) -> str:
    return textwrap.fill(f"{what}: {', '.join(names)}", 100, subsequent_indent="  ")
