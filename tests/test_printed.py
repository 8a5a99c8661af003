"""Tables on a terminal: what a cell says, and that no line is longer than the terminal, of every committed study."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ticketlab.printed import across, as_text, grouped, side_by_side, spread

STUDIES = sorted((Path(__file__).parent.parent / "figures" / "data").iterdir())
NETWORKS = pd.DataFrame(
    {
        "level": [0, 0, 1, 1, 1, 1],
        "density": [1.0, 1.0, 0.5, 0.5, 0.5, 0.5],
        "treatment": ["ticket", "ticket", "ticket", "ticket", "reinit", "reinit"],
        "test_error": [0.02, 0.04, 0.03, 0.03, 0.10, np.nan],
        "rank": [10.0, 12.0, 9.0, 9.0, 3.0, 5.0],
    }
)


@pytest.mark.parametrize(
    ("values", "name", "n", "text"),
    [
        ([0.02, 0.04], "error_%", 2, "3.00 ± 1.41"),
        ([0.02, 0.02], "error_%", 2, "2.00 ± 0.00"),
        ([0.02, np.nan], "error_%", 2, "2.00 (n = 1)"),
        ([-0.01, 0.03], "above_points", 2, "1.00 ± 2.83"),
        ([np.nan, np.nan], "error_%", 2, ""),
        ([41.0, 43.0], "rank", 2, "42.0 ± 1.4"),
        ([0.2, 0.3], "overlap", 2, "0.250 ± 0.071"),
        ([100.0, 500.0], "condition", 2, "300 ± 283"),
        ([1e-8, 3e-8], "tiny", 2, "2e-08 ± 1.4e-08"),
        ([55000, 55000], "steps", 2, "55000"),
        ([0.25, 0.25, np.nan], "density", 3, "0.25 (n = 2)"),
    ],
)
def test_a_cell_is_mean_and_deviation_in_the_unit_of_its_column(values, name, n, text):
    assert spread(pd.Series(values), name, n) == text


def test_rows_are_groups_and_columns_are_measures_or_treatments():
    table = grouped(NETWORKS, ["level", "treatment"], {"test_error_%": "test_error", "rank": "rank"})
    assert table.loc[(0, "ticket")].tolist() == ["3.00 ± 1.41", "11.0 ± 1.4", 2]
    assert table.loc[(1, "reinit"), "test_error_%"] == "10.00 (n = 1)"
    wide = across(NETWORKS, ["level", "density"], "treatment", "test_error")
    assert wide.loc[(1, 0.5)].tolist() == ["3.00 ± 0.00", "10.00 (n = 1)", 2]
    assert wide.loc[(0, 1.0)].tolist() == ["3.00 ± 1.41", "", 2]
    assert across(NETWORKS, ["level"], "treatment", "test_error").loc[1, "ticket"] == "3.00 ± 0.00"
    measures = side_by_side(NETWORKS, {"rank": "rank"})
    assert measures.columns.tolist() == ["dense", "ticket", "reinit"]
    assert measures.loc["rank"].tolist() == ["11.0 ± 1.4", "9", "4.0 ± 1.4"]


def test_columns_without_room_go_on_below_behind_the_index(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    table = pd.DataFrame({f"column_{i}": ["x" * 20, "y"] for i in range(4)}, pd.Index(["a", "b"], name="key"))
    blocks = as_text(table, "A title " * 10).split("\n\n")
    assert len(blocks) == 3 and all(len(line) <= 60 for block in blocks for line in block.splitlines())
    assert [block.split()[0] for block in blocks[1:]] == ["key", "key"]
    assert sum(block.count("column_") for block in blocks) == 4


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_the_printed_table_of_every_committed_study_fits_and_says_n(study, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    module = import_module(f"analyses.{study.name.partition('-')[0]}")
    tables = {path.stem: pd.read_csv(path) for path in study.glob("*.csv")}
    table = module.summary(tables)
    text = as_text(table)
    assert max(map(len, text.splitlines())) <= 100
    assert "n" in table or "n" in table.index or "correlations" in tables  # rank correlations have intervals alone
