"""How objects show themselves: a line where they are printed, a small table in a notebook, never a page of tensors.

A dataclass or a named tuple takes both: ``__repr__, _repr_html_ = as_line, as_table``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

_ORDERED = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
_FEW = 4
"""Numbers that are shown one by one."""


def as_line(record: Any) -> str:
    """The name of the record's class, and of each field its name and `text`; a field that is None is left out."""
    return f"{type(record).__name__}({', '.join(f'{name}={words}' for name, words in _texts(record).items())})"


def as_table(record: Any) -> str:
    """The same in HTML, a row per field."""
    return table(type(record).__name__, _texts(record))


def table(title: str, rows: Mapping[str, str]) -> str:
    """Names and what stands behind them, in HTML under a title."""
    cell = '<t{0} style="text-align: left">{1}</t{0}>'
    body = "".join(f"<tr>{cell.format('h', escape(n))}{cell.format('d', escape(t))}</tr>" for n, t in rows.items())
    return f"<div><b>{escape(title)}</b><table>{body}</table></div>"


def text(value: Any) -> str:
    """A value in a few words: of an array its shape and range, of a dict of arrays how many numbers it holds."""
    if isinstance(value, Tensor | np.ndarray):
        return _array(value)
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return f"[{', '.join(map(text, value))}]" if len(value) <= _FEW else f"{len(value)} entries"
    return _word(value)


def _word(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    if isinstance(value, pd.DataFrame):
        return f"table of {len(value)} rows"
    if isinstance(value, nn.Module):
        return type(value).__name__
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


def _texts(record: Any) -> dict[str, str]:
    names = [f.name for f in fields(record) if f.repr] if is_dataclass(record) else record._fields
    return {name: text(value) for name in names if (value := getattr(record, name)) is not None}


def _array(values: Tensor | np.ndarray) -> str:
    shape, n, kind = list(values.shape), math.prod(values.shape), str(values.dtype).removeprefix("torch.")
    if n == 0 or kind not in _ORDERED:
        return f"{shape}"
    if kind == "bool":
        return f"{shape} {int(values.sum())} of {n} true"
    if n <= _FEW and len(shape) < 2:
        found = [f"{value:.4g}" for value in values.reshape(-1).tolist()]
        return f"[{', '.join(found)}]" if shape else found[0]
    return f"{shape} {float(values.min()):.4g} to {float(values.max()):.4g}"


def _mapping(value: Mapping[Any, Any]) -> str:
    arrays = [one for one in value.values() if isinstance(one, Tensor | np.ndarray)]
    if not value or len(arrays) < len(value):
        return f"{len(value)} entries" if value else "none"
    n = sum(math.prod(one.shape) for one in arrays)
    if all(isinstance(one, Tensor) and one.dtype == torch.bool for one in arrays):
        return f"{len(arrays)} masks, {sum(int(one.sum()) for one in arrays):,} of {n:,} kept"
    return f"{len(arrays)} tensors, {n:,} numbers"
