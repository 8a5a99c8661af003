"""Builds what is generated of the documents: ``docs/tables.md`` from ``docs/columns.toml``, the API pages by pdoc.

``python -m docs.make`` (``make docs``) writes both and checks the links of every page. It leans on the headers of the
committed tables in ``figures/data`` and on docstrings; the tests call the same functions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/tables.md"
API = ROOT / "build/docs"
MODULES = ("ticketlab", *(f"ticketlab.{name}" for name in ("engine", "data", "losses", "network", "seeds", "shards")))
HEAD = """# Tables

Every analysis writes tidy CSV files, one observation per row; [figures/data](../figures/data) holds those of the
committed studies. Errors are shares in [0, 1], losses are in nats, words are those of the [glossary](glossary.md). An
empty field is a value that is not known or does not apply. An older table may lack a column that was added since.

This page is generated: `make docs` writes it from [columns.toml](columns.toml).
"""
Descriptions = Mapping[str, Mapping[str, Any]]


def pages() -> list[Path]:
    """The Markdown pages of the repository."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def described() -> Descriptions:
    """What ``columns.toml`` says: by analysis and table, and of ``shared`` columns."""
    return tomllib.loads((ROOT / "docs/columns.toml").read_text())


def committed() -> dict[tuple[str, str], list[str]]:
    """Columns of the committed tables by analysis and table, those of all its studies together."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / "figures/data").glob("*/*.csv")):
        analysis = path.parent.name.split("-")[0]
        with path.open() as file:
            header = file.readline().strip().split(",")
        found[analysis, path.stem] = list(dict.fromkeys([*found.get((analysis, path.stem), []), *header]))
    return found


def tables(words: Descriptions) -> dict[tuple[str, str], list[str]]:
    """Columns of every table, in the order of ``columns.toml``: the committed ones, or those that it lists itself."""
    known = committed()
    listed = {(a, t): about.get("columns", []) for a in words if a != "shared" for t, about in words[a].items()}
    return {key: known.get(key, columns) for key, columns in listed.items()} | {
        key: columns for key, columns in known.items() if key not in listed
    }


def problems(words: Descriptions, found: Mapping[tuple[str, str], list[str]]) -> list[str]:
    """Columns without a description, and descriptions of columns that no table has."""
    wrong, used = [], set()
    for (analysis, table), columns in found.items():
        own = {name for name in words.get(analysis, {}).get(table, {}) if name not in ("about", "columns")}
        used |= set(columns) - own
        wrong += [
            f"{analysis}.{table}.{name} has no description" for name in columns if name not in own | {*words["shared"]}
        ]
        wrong += [f"{analysis}.{table}.{name} is no column" for name in sorted(own - set(columns))]
    return wrong + [f"shared.{name} is used by no table" for name in words["shared"] if name not in used]


def page(words: Descriptions, found: Mapping[tuple[str, str], list[str]]) -> str:
    """``docs/tables.md``."""
    parts, before = [HEAD], ""
    for (analysis, table), columns in found.items():
        own = words[analysis][table]
        if analysis != before:
            parts.append(f"\n## {analysis}\n\n`python -m analyses.{analysis}`\n")
        before = analysis
        parts.append(f"\n### {analysis}: {table}\n\n{own['about']}\n\n| column | meaning | unit |\n|---|---|---|\n")
        for name in columns:
            meaning, unit = own[name] if name in own else words["shared"][name]
            parts.append(f"| `{name}` | {meaning} | {unit} |\n")
    return "".join(parts)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title).lower()).replace(" ", "-") for title in titles
    }


def broken_links(path: Path) -> list[str]:
    """Relative links of a page to a file or a heading that is not there."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
        place, _, anchor = target.partition("#")
        other = (path.parent / place) if place else path
        if re.match(r"[a-z]+:", target):
            continue
        if not other.exists() or (anchor and anchor not in anchors(other.read_text())):
            broken.append(f"{path.name}: {target}")
    return broken


def main() -> int:
    """Write the page of the tables and the API pages, and check links; 1 where something is wrong."""
    words = described()
    found = tables(words)
    if wrong := problems(words, found):
        print("docs/columns.toml must describe every column and nothing else:", *wrong, sep="\n", file=sys.stderr)
        return 1
    PAGE.write_text(page(words, found))
    if broken := [link for path in pages() for link in broken_links(path)]:
        print("links must lead to a file or a heading:", *broken, sep="\n", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--math", "-o", str(API), *MODULES]
    built = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    print(built.stderr, end="", file=sys.stderr)  # where pdoc warns
    print(PAGE, API / "index.html", sep="\n")
    return int(bool(built.returncode or built.stderr))


if __name__ == "__main__":
    sys.exit(main())
