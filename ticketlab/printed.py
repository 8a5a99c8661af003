"""Tables for a terminal: mean ± standard deviation, shares in percent, and no row that wraps.

Columns whose names end in ``%`` or ``_points`` are shares, shown times 100.
"""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

SHARES = ("%", "_points")
"""Ends of the names of columns that are shown in percent, or in percentage points."""


def width() -> int:
    """Columns of the terminal, 100 where the output is none; at least 60."""
    return max(60, shutil.get_terminal_size((100, 24)).columns)


def spread(values: pd.Series, name: str = "", n: int | None = None) -> str:
    """Mean ± standard deviation of the values that are not NaN, to two digits of the deviation; a share to 0.01 %.

    Of one value, and of equal ones that are no share, it is the value; of none, nothing.

    Args:
        values: One per network.
        name: Of the column, which decides on the unit.
        n: How many there should be; where there are fewer, the text says how many there are.
    """
    known = values.dropna()
    share = name.endswith(SHARES)
    fewer = "" if n is None or len(known) in (0, n) else f" (n = {len(known)})"
    if known.nunique() < 2 and not (share and len(known)):
        return "".join(_text(value) for value in known.iloc[:1]) + fewer
    numbers = (100 if share else 1) * known.astype(float)
    mean, sd = numbers.mean(), numbers.std()
    digits = 2 if share else max(0, 1 - math.floor(math.log10(sd)))
    forms = (f".{digits}f",) * 2 if digits < 6 else (".4g", ".2g")
    return f"{mean:{forms[0]}}" + (f" ± {sd:{forms[1]}}" if len(known) > 1 else "") + fewer


def grouped(table: pd.DataFrame, keys: Sequence[str], columns: Mapping[str, str]) -> pd.DataFrame:
    """One row per group: `spread` of each column; and n, the rows of the group.

    Args:
        table: One row per network.
        keys: What groups share; the index of what is returned.
        columns: Name shown -> column of the table.
    """
    groups = table.groupby([*keys], sort=False)
    n = groups.size()
    cells = {name: [spread(values, name, len(values)) for _, values in groups[old]] for name, old in columns.items()}
    return pd.DataFrame(cells, n.index).assign(n=n)


def across(table: pd.DataFrame, keys: Sequence[str], over: str, column: str) -> pd.DataFrame:
    """One row per group and one column per value of ``over``: `spread` of a share in percent; and n, networks of each.

    Args:
        table: One row per network.
        keys: What groups share; the index of what is returned.
        over: What differs from column to column, such as the treatment.
        column: What is shown.
    """
    n = table.groupby([*keys, over], sort=False).size().groupby([*keys], sort=False).max()
    long = grouped(table, [*keys, over], {"text %": column})
    fewer = [
        f" (n = {one})" if one < n[key[:-1] if len(keys) > 1 else key[0]] else "" for key, one in long["n"].items()
    ]
    wide = (long["text %"] + fewer).unstack(over, sort=False).fillna("")
    return wide.rename_axis(columns=None).assign(n=n)


def side_by_side(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """One row per measure; one column for the dense networks, and one per treatment of the sparsest level measured.

    Args:
        table: One row per network, with level, treatment and density.
        columns: Name shown -> column of the table.
    """
    last = table[table["level"].isin([0, table["level"].max()])]
    last = last.assign(networks=last["treatment"].where(last["level"] > 0, "dense"))
    both = {"level": "level", "density": "density", **columns}
    return grouped(last, ["networks"], both).T.rename_axis(index="measure", columns=None)


def as_text(table: pd.DataFrame, title: str = "") -> str:
    """A table with its named index in front; columns beyond the terminal's width go on below, behind the index again.

    Where the index has no name, the first column takes its place. A title stands above.
    """
    keys = [name for name in table.index.names if name is not None]
    shown = table.reset_index() if keys else table
    columns = [_column(shown.iloc[:, i], i < len(keys)) for i in range(shown.shape[1])]
    front, rest = columns[: len(keys) or 1], columns[len(keys) or 1 :]
    blocks = [[*front]]
    for column in rest:
        if sum(len(one[0]) + 2 for one in (*blocks[-1], column)) - 2 > width() and len(blocks[-1]) > len(front):
            blocks.append([*front])
        blocks[-1].append(column)
    texts = ["\n".join("  ".join(line).rstrip() for line in zip(*block, strict=True)) for block in blocks]
    return "\n\n".join([textwrap.fill(title, width())] * bool(title) + texts)


def _column(values: pd.Series, is_key: bool) -> list[str]:
    """Name and cells, all of one length; words of an index stand on the left."""
    texts = [str(values.name), *map(_text, values)]
    longest = max(map(len, texts))
    words = is_key and not pd.api.types.is_numeric_dtype(values)
    return [text.ljust(longest) if words else text.rjust(longest) for text in texts]


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if pd.isna(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
