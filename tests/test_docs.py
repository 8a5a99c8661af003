"""What the documents show runs: the README's example and the notebooks."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import ticketlab as tl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BUILD = runpy.run_path(str(ROOT / "docs" / "build.py"))


def numbers(lines):
    return [[float(number) for number in re.findall(r"\d+\.\d+", line)] for line in lines]


def test_the_readmes_example_prints_what_it_shows(tmp_path, monkeypatch, capsys):
    """Densities to the digit, the words too; errors and the barrier up to the rounding of other machines."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (shown,) = (text.splitlines() for text in re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL))
    assert len(example.strip().splitlines()) <= 15
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [re.sub(r"\d+\.\d+", "", line) for line in printed] == [re.sub(r"\d+\.\d+", "", line) for line in shown]
    assert [line[:4] for line in printed] == [line[:4] for line in shown]
    for ours, theirs in zip(numbers(printed), numbers(shown), strict=True):
        assert ours == pytest.approx(theirs, abs=0.015)


def test_the_blocks_of_extending_run_in_one_namespace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "extending.md", "exec"), names)
    assert names["pixels"].shape == (2, 3, 8, 8) and len(names["levels"]) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the Jupyter client's own
def test_notebooks_run_from_top_to_bottom(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert outputs and not any(out.output_type == "error" for out in outputs)


def test_no_page_has_a_broken_link():
    assert BUILD["broken_links"]([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]) == []


def test_every_column_of_every_committed_table_is_explained():
    assert (ROOT / "docs/tables.md").read_text() == BUILD["page"]().rstrip() + "\n", "run make docs"
    with pytest.raises(KeyError, match=r"columns.toml must say what gain means in the table levels of imp"):
        BUILD["meaning"]({"loss": "Loss."}, "imp", "levels", "gain")
    columns = {"kept": "wide", "imp": {"kept": "narrow", "levels": {"kept": "narrowest"}}}
    found = [BUILD["meaning"](columns, *place, "kept") for place in (("x", "y"), ("imp", "y"), ("imp", "levels"))]
    assert found == ["wide", "narrow", "narrowest"]


def test_every_public_name_is_there_and_documented():
    for name in tl.__all__:
        assert getattr(tl, name).__doc__, name
