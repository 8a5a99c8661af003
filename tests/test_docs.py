"""The documents: what they show runs, links lead somewhere, every column and every public name is described."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

import ticketlab as tl
from docs import build

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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
    assert 0.1 < names["table"]["confidence"].min() <= names["table"]["confidence"].max() <= 1  # of ten outputs
    assert names["figure"].axes[0].lines
    plt.close(names["figure"])
    live = pd.read_csv("live.csv")  # a look at every tenth step
    assert sorted(live.columns) == ["error", "loss_nats", "replica", "step"] and len(live) == 2 * 5
    assert pd.read_csv("curves_1.csv")["step"].max() == 50


def test_the_blocks_of_scaling_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = re.findall(r"```python\n(.*?)```", (ROOT / "docs/scaling.md").read_text(), flags=re.DOTALL)
    for block, name, n in ((first, "run", 2), (second, "kernel", 40)):
        names = {}
        exec(compile(block, "scaling.md", "exec"), names)
        assert len(names[name]) == n


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder for all notebooks, most of which read one run."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")  # of the Jupyter client's own
def test_notebooks_run_from_top_to_bottom(path, place):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(place)}}).execute()
    outputs = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert outputs and not any(out.output_type == "error" for out in outputs)


@pytest.mark.parametrize("path", build.pages(), ids=lambda p: p.name)
def test_files_and_headings_that_a_page_links_to_exist(path):
    assert build.broken_links([path]) == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `title`, said\n[a](#a-title-said) [b](#none) [c](gone.md) [d](https://x.y#z) `[e](code)`\n")
    assert build.broken_links([page]) == ["page.md: #none", "page.md: gone.md"]


def test_every_column_of_a_committed_table_is_described_and_the_page_says_so():
    words = build.described()
    found = build.tables(words)
    assert build.problems(words, found) == []
    assert (ROOT / "docs/tables.md").read_text() == build.page(words, found), "the page is out of date: run make docs"


def test_columns_without_description_and_descriptions_without_column_are_named():
    words = {"shared": {"level": ["Level", "index"]}, "imp": {"levels": {"about": "Rows.", "gone": ["None", "none"]}}}
    assert build.problems(words, {("imp", "levels"): ["new"]}) == [
        "imp.levels.new has no description",
        "imp.levels.gone is no column",
        "shared.level is used by no table",
    ]


def public(module):
    """Functions and classes that a module offers, by name: those of ``__all__``, or else its own."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for name in names:
        value = getattr(module, name)
        own = getattr(value, "__module__", "") == module.__name__ or hasattr(module, "__all__")
        if own and (inspect.isfunction(value) or inspect.isclass(value)):
            yield f"{module.__name__}.{name}", value


def methods(name, cls):
    for own, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else getattr(value, "func", value)
        field = own in getattr(cls, "__dataclass_fields__", ())
        if not own.startswith("_") and not field and inspect.isfunction(function):
            yield f"{name}.{own}", function


MODULES = [tl, *(value for name in tl.__all__ if inspect.ismodule(value := getattr(tl, name)))]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_every_public_function_class_and_method_is_documented(module):
    names = dict(public(module))
    for name, value in list(names.items()):
        if inspect.isclass(value):
            names |= dict(methods(name, value))
    assert module.__doc__ and names
    # A dataclass without a docstring has its signature for one.
    assert [n for n, v in names.items() if not v.__doc__ or v.__doc__.startswith(f"{v.__name__}(")] == []
