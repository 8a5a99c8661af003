"""``make notebooks``: run every notebook from top to bottom and keep what it prints and draws.

A notebook is its own source. The tests run all of them and hold what comes against what is kept.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

PATHS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?|NaN|nan|inf|True|False")


def executed(path: Path, place: Path) -> Any:
    """A notebook with its new outputs, run in a folder where it may leave files."""
    notebook: Any = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, record_timing=False, resources={"metadata": {"path": str(place)}}).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version of the day
    return notebook


def printed(notebook: Any) -> list[dict[str, str]]:
    """Of every code cell the kinds of its outputs, and the words of those that are text, with # for each number.

    Other machines round otherwise, and training carries a rounding on: numbers may differ, words and shapes may not.
    """
    return [_of_cell(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def _of_cell(outputs: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for out in outputs:
        texts = (
            {"text": out.text} if out.output_type == "stream" else dict(out.get("data", {"error": out.get("evalue")}))
        )
        for kind, text in texts.items():
            words = "" if kind == "image/png" else NUMBER.sub("#", text)
            found[kind] = " ".join(f"{found.get(kind, '')} {words}".split())
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as place:  # most read one run
        for path in PATHS:
            nbformat.write(executed(path, Path(place)), path)
            print(f"{path.name}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
