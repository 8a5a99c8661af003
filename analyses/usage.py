"""The short ``--help`` of an analysis: a line for each flag that most studies need, in groups."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from ticketlab.engine.criteria import CRITERIA
from ticketlab.engine.treatments import TREATMENTS
from ticketlab.printed import width

FILES = ("run", "store", "out", "device")
STUDY = ("task", "model", "levels", "prune_fraction", "criterion", "treatments", "init_seeds", "rewind_step")
RECIPE = ("steps", "batch_size", "optimizer", "learning_rate")


def usage(name: str, default: Any) -> str:
    """Groups of flags, a line each with its default and the first words on it; names, and an example.

    Args:
        name: The analysis.
        default: Its config, an instance of a frozen dataclass; whether it has a ``study`` decides on groups.
    """
    command = f"python -m analyses.{name}"
    own = [f.name for f in fields(default) if f.name not in (*FILES, "study")]
    groups = {"this analysis": _lines(default, own)}
    if hasattr(default, "study"):
        preset = "  --preset NAME [--small]   Begin with a paper's study: python -m analyses lists them."
        groups["study"] = [preset, *_lines(default.study, STUDY)]
        groups["recipe"] = _lines(default.study.recipe, RECIPE)
    groups["files"] = _lines(default, [f for f in FILES if hasattr(default, f)])
    parts = [f"{command} [flags]", "", textwrap.fill((type(default).__doc__ or "").partition("\n")[0], width())]
    for title, lines in groups.items():
        parts += ["", f"{title}:", *lines] if lines else []
    example = "--steps 200"
    if hasattr(default, "study"):
        parts += ["", _listed("treatments", TREATMENTS), _listed("criteria", CRITERIA)]
        example = "--model lenet_300_100 --levels 4 --init-seeds 0 1 --steps 500"
    n_all = sum(1 for _ in _flags(default))
    return "\n".join([*parts, "", "example:", f"  {command} {example}", "", f"--help-all describes all {n_all} flags."])


def _flags(config: Any) -> Iterator[str]:
    for f in fields(config):
        value = getattr(config, f.name)
        yield from _flags(value) if is_dataclass(value) else [f.name]


def _lines(config: Any, names: Sequence[str]) -> list[str]:
    """``--flag default  What it is.``, as much of it as the line holds."""
    about = {n: text for part in reversed(type(config).__mro__) for n, text in described(part).items()}
    heads = [f"  --{n.replace('_', '-')} {_shown(getattr(config, n))}".rstrip() for n in names]
    left = min(26, max(map(len, heads), default=0))
    lines = []
    for head, name in zip(heads, names, strict=True):
        first = f"{head:<{left}}  "
        lines.append(first + _cut(about.get(name, ""), width() - len(first)))
    return lines


def _cut(text: str, room: int) -> str:
    """The text, or its first sentence, or the first part of that, or as many words as there is room for."""
    sentence = re.split(r"(?<!\.)\. ", text)[0].rstrip(".")
    whole = [part for part in (text, f"{sentence}.", f"{sentence.partition(';')[0]}.") if len(part) <= room]
    return whole[0] if whole else textwrap.shorten(text, room, placeholder=" ...")


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
    return textwrap.fill(f"{what}: {', '.join(names)}", width(), subsequent_indent="  ")
