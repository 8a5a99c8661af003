"""``make docs``: docs/tables.md from docs/columns.toml, API pages from docstrings in build/docs, and a check of links.

The page of tables leans on the headers of the committed tables in ``figures/data`` alone; the tests call its functions.
"""

from __future__ import annotations

import csv
import re
import sys
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
API = ROOT / "build" / "docs"
MODULES = ("ticketlab", *(f"ticketlab.{name}" for name in ("engine", "data", "losses", "network", "seeds", "shards")))
HEAD = """# Tables

Every analysis writes tidy CSV files, one observation per row; [figures/data](../figures/data) holds those of the
committed studies. Errors are shares in [0, 1], losses are in nats, words are those of the [glossary](glossary.md). An
empty field is a value that is not known or does not apply. An older table may lack a column that was added since.

This page is generated: `make docs` writes it from [columns.toml](columns.toml).
"""
Columns = Mapping[tuple[str, str], list[str]]


def described() -> dict[str, Any]:
    """The content of columns.toml: analysis -> table -> column -> [meaning, unit], and the ``shared`` columns."""
    return tomllib.loads((DOCS / "columns.toml").read_text())


def tables(words: Mapping[str, Any]) -> Columns:
    """Columns of every table, those of all its committed studies together; of a table without one, those it lists."""
    known: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / "figures" / "data").glob("*/*.csv")):
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        columns = known.setdefault((path.parent.name.partition("-")[0], path.stem), [])
        columns += [name for name in header if name not in columns]
    listed = {(a, t): about.get("columns", []) for a in words if a != "shared" for t, about in words[a].items()}
    return {key: known.get(key, columns) for key, columns in listed.items()} | {
        key: columns for key, columns in known.items() if key not in listed
    }


def problems(words: Mapping[str, Any], found: Columns) -> list[str]:
    """Columns without a description, and descriptions of columns that no table has."""
    wrong, used = [], set()
    for (analysis, table), columns in found.items():
        own = {name for name in words.get(analysis, {}).get(table, {}) if name not in ("about", "columns")}
        used |= set(columns) - own
        unknown = [name for name in columns if name not in own and name not in words["shared"]]
        wrong += [f"{analysis}.{table}.{name} has no description" for name in unknown]
        wrong += [f"{analysis}.{table}.{name} is no column" for name in sorted(own - set(columns))]
    return wrong + [f"shared.{name} is used by no table" for name in words["shared"] if name not in used]


def page(words: Mapping[str, Any], found: Columns) -> str:
    """The text of docs/tables.md."""
    parts, before = [HEAD], ""
    for (analysis, table), columns in found.items():
        own = words[analysis][table]
        if analysis != before:
            parts.append(f"\n## {analysis}\n")
        before = analysis
        parts.append(f"\n### {analysis}: {table}.csv\n\n{own['about']}\n\n| column | meaning | unit |\n|---|---|---|\n")
        for name in columns:
            meaning, unit = own[name] if name in own else words["shared"][name]
            parts.append(f"| `{name}` | {meaning} | {unit} |\n")
    return "".join(parts)


def pages() -> list[Path]:
    """The Markdown pages of the repository."""
    return sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


def broken_links(paths: Iterable[Path]) -> list[str]:
    """Links of Markdown and HTML pages to files, and to headings, that are not there."""
    found = []
    for path in paths:
        text = path.read_text()
        if path.suffix == ".md":
            text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)" if path.suffix == ".md" else r'href="([^"$]+)"', text):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if re.match(r"[a-z]+:|//", link):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                found.append(f"{path.name}: {link}")
    return found


@cache
def anchors(path: Path) -> set[str]:
    """Places of a page that a link may name: ids of HTML, headings of Markdown as GitHub writes them."""
    text = path.read_text()
    if path.suffix == ".html":
        return set(re.findall(r'id="([^"]+)"', text))
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@dataclass(frozen=True)
class Config:
    """Write docs/tables.md and the reference of every public function, and check all links."""


def main(_: Config) -> int:
    """Write both.

    Raises:
        SystemExit: A column without a description, or a link that leads nowhere.
    """
    import pdoc  # noqa: PLC0415 - of the extra ``docs``, which the page of tables does without

    words = described()
    found = tables(words)
    if wrong := problems(words, found):
        raise SystemExit("docs/columns.toml must describe every column and nothing else:\n" + "\n".join(wrong))
    (DOCS / "tables.md").write_text(page(words, found))
    pdoc.render.configure(docformat="google", math=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="pdoc")
        pdoc.pdoc(*MODULES, output_directory=API)
    html = [*API.rglob("*.html")]
    if broken := broken_links([*pages(), *html]):
        raise SystemExit("links must lead to a file or a heading:\n" + "\n".join(broken))
    print(f"{len(html)} pages in {API.relative_to(ROOT)}, docs/tables.md; no link is broken")
    return 0


if __name__ == "__main__":
    from ticketlab.commands import guarded, parsed

    sys.exit(guarded(lambda: main(parsed(Config, None, prog="python docs/build.py"))))
