"""``make docs``: docs/tables.md from the committed tables, and pages of every public function in build/docs."""

from __future__ import annotations

import csv
import re
import tomllib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
HEAD = """# Tables

Every analysis writes tidy CSV files, one observation per row, replicas unaggregated. These are all of them and their
columns, from the committed studies in [`figures/data`](../figures/data). Made by `make docs` from `docs/columns.toml`.
"""


def tables() -> dict[str, dict[str, list[str]]]:
    """Analysis -> table -> columns of the committed studies, in the order of the files."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted((ROOT / "figures" / "data").glob("*/*.csv")):
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        known = found.setdefault(path.parent.name.partition("-")[0], {}).setdefault(path.stem, [])
        known += [name for name in header if name not in known]
    return found


def meaning(columns: Mapping[str, Any], analysis: str, table: str, name: str) -> str:
    """The line on a column, from the narrowest section that has it.

    Raises:
        KeyError: No section has it.
    """
    own = columns.get(analysis, {})
    for section in (own.get(table, {}), own, columns):
        for key, text in section.items():
            if isinstance(text, str) and (match := re.fullmatch(key.replace("{q}", r"(\d+)"), name)):
                return text.replace("{q}", match[1]) if match.groups() else text
    raise KeyError(f"docs/columns.toml must say what {name} means in the table {table} of {analysis}.")


def page() -> str:
    """The text of docs/tables.md."""
    columns = tomllib.loads((DOCS / "columns.toml").read_text())
    return "\n".join([HEAD, *_sections(columns)]) + "\n"


def _sections(columns: Mapping[str, Any]) -> Iterator[str]:
    for analysis, found in tables().items():
        yield f"## {analysis}\n"
        for table, names in found.items():
            yield f"### {analysis}: {table}.csv\n\n| column | meaning |\n|---|---|"
            yield from (f"| `{name}` | {meaning(columns, analysis, table, name)} |" for name in names)
            yield ""


def broken_links(pages: Iterable[Path]) -> list[str]:
    """Links of Markdown and HTML pages to files, and to headings, that are not there."""
    found = []
    for path in pages:
        text = path.read_text()
        if path.suffix == ".md":
            text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)" if path.suffix == ".md" else r'href="([^"$]+)"', text):
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if re.match(r"[a-z]+:|//", link):
                continue
            if not target.exists() or (anchor and anchor not in anchors(target)):
                found.append(f"{path.relative_to(ROOT)}: {link}")
    return found


@cache
def anchors(path: Path) -> set[str]:
    """What a link may name in a page: ids of HTML, headings of Markdown as GitHub writes them."""
    if path.suffix == ".html":
        return set(re.findall(r'id="([^"]+)"', path.read_text()))
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def main() -> None:
    """Write both.

    Raises:
        SystemExit: A link of a page leads nowhere.
    """
    import pdoc  # noqa: PLC0415 - of the extra ``docs``, which the page of tables does without

    (DOCS / "tables.md").write_text(page().rstrip() + "\n")
    pdoc.render.configure(docformat="google")
    out = ROOT / "build" / "docs"
    warnings.filterwarnings("ignore", "Error parsing type annotation", module="pdoc")  # shapes, shown as written
    pdoc.pdoc("ticketlab", output_directory=out)
    broken = broken_links([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *out.rglob("*.html")])
    if broken:
        raise SystemExit("broken links:\n" + "\n".join(broken))
    print(
        f"{len(list(out.rglob('*.html')))} pages in {out.relative_to(ROOT)}, {DOCS.name}/tables.md; no link is broken"
    )


if __name__ == "__main__":
    main()
