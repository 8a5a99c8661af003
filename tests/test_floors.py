"""The dependency rule, read from the imports, and that measures neither print nor write.

A room may import its own floor and those below. Measures never import ``engine``; figures are tables and
matplotlib alone; nothing in ticketlab imports analyses or figures.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = (
    *(
        "errors",
        "seeds",
        "state",
        "losses",
        "lending",
        "precision",
        "probing",
        "network",
        "derivatives",
        "graph",
        "masks",
        "permutation",
        "models",
    ),
    *("idx", "text", "datasets", "arrays", "batches", "mapped", "data", "tokens", "functional", "raw", "version"),
    *("imports", "lanczos", "shown"),
    *("shards", "shard_writer", "image_folder", "to_shards", "commands"),
)
FLOORS = {
    **{f"ticketlab.{room}": 0 for room in GROUND},
    "ticketlab.engine": 1,
    **{
        f"ticketlab.{room}": 2
        for room in ("ntk", "connectivity", "signal", "gradients", "curvature", "bounds", "overlap", "attention")
    },
    "ticketlab.printed": 4,  # tables for a terminal
    "ticketlab.console": 4,
    "ticketlab.plot": 4,
    "ticketlab.__main__": 4,
    "figures": 3,
    "figures.__main__": 4,  # the command that draws them
    "analyses": 4,
    "examples": 4,
}
MEASURES = [room for room, floor in FLOORS.items() if floor == 2]
PACKAGES = ("ticketlab", "analyses", "figures", "examples")
WRITERS = {
    *("to_csv", "to_json", "to_parquet", "to_pickle", "to_feather", "to_excel", "to_hdf"),
    *("write", "write_text", "write_bytes", "writelines", "tofile", "mkdir", "touch"),
    *("save", "savez", "savez_compressed", "savetxt", "save_file", "savefig", "dump"),
}


def sources(root: Path) -> Iterator[tuple[str, bool, ast.Module]]:
    """(dotted name, whether it is a package's __init__, syntax tree) of every file; the public front is exempt."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            if name != "ticketlab":
                yield name, is_package, ast.parse(path.read_text(), str(path))


def imports(name: str, is_package: bool, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in the file, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")
            up = node.level - int(is_package)
            base = base[: len(base) - up] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            for argument in node.args[:1]:
                known = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
                yield node.lineno, argument.value if known else "a name made at run time"


def called(node: ast.Call) -> str | None:
    """The last name of what is called: ``open`` for ``path.open()`` and for ``open()``."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def room(name: str) -> str | None:
    """The room that a dotted name lies in; None where it is not the project's."""
    parts = name.split(".")
    if parts[0] == "ticketlab" or parts[:2] == ["figures", "__main__"]:
        return ".".join(parts[:2])
    return parts[0] if parts[0] in PACKAGES else None


def complaint(own: str, imported: str) -> str | None:
    """Why a file of room ``own`` must not import ``imported``; None where it may."""
    other, name = room(imported), imported.rpartition(".")[2]
    if own == "figures" and imported.partition(".")[0] in ("torch", "ticketlab"):
        return "figures are tables and matplotlib alone"
    if imported == "a name made at run time":
        return "imports must be readable"
    if other is not None and name.startswith("_") and not name.startswith("__"):
        return "an underscore keeps a name to its file"
    if other is None or FLOORS[own] == 4:
        return None  # the roof may use everything, the public front too
    inside = FLOORS[own] == FLOORS.get(other) == 2 and own != other and imported.count(".") > 2
    whys = {
        "it goes through the public front or has no floor: import the room itself": other not in FLOORS,
        "a measure never imports the engine": FLOORS[own] == 2 and FLOORS.get(other) == 1,
        "a measure uses another by its front, never its inside": inside,
        "it lies above": FLOORS.get(other, 0) > FLOORS[own],
    }
    return next((why for why, holds in whys.items() if holds), None)


def violations(root: Path) -> list[str]:
    found = []
    for name, is_package, tree in sources(root):
        own = room(name)
        if own not in FLOORS:
            found.append(f"{name} has no floor: give it one here and in DESIGN.md")
            continue
        for line, imported in imports(name, is_package, tree):
            why = complaint(own, imported)
            if why:
                found.append(f"{name}:{line} imports {imported}: {why}")
    return found


def side_effects(root: Path) -> list[str]:
    """Calls by which a measure would print or write."""
    return [
        f"{name}:{node.lineno} calls {called(node)}"
        for name, _, tree in sources(root)
        if room(name) in MEASURES
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and called(node) in {"print", "open", *WRITERS}
    ]


def test_every_import_goes_down():
    assert violations(ROOT) == []


def test_measures_neither_print_nor_write():
    assert side_effects(ROOT) == []


def test_the_checker_reads_the_whole_house():
    names = [name for name, _, _ in sources(ROOT)]
    assert {"ticketlab.network", "ticketlab.connectivity", "ticketlab.models.mlp", "figures.style"} <= {*names}
    assert any(name.startswith("ticketlab.engine.") for name in names)
    assert "ticketlab" not in names
    used = {imported for *args, tree in sources(ROOT) for _, imported in imports(*args, tree)}
    assert {"torch", "ticketlab.seeds.stream", "ticketlab.models.mlp.mlp"} <= used


def plant(root: Path, file: str, code: str) -> Path:
    for package in PACKAGES:
        (root / package).mkdir(parents=True, exist_ok=True)
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return root


@pytest.mark.parametrize(
    ("file", "code", "why"),
    [
        ("ticketlab/masks.py", "from ticketlab.engine import imp", "imports ticketlab.engine.imp: it lies above"),
        ("ticketlab/masks.py", "import ticketlab.ntk.kernel", "it lies above"),
        ("ticketlab/masks.py", "from . import engine", "imports ticketlab.engine: it lies above"),
        ("ticketlab/masks.py", "from .engine.imp import imp", "imports ticketlab.engine.imp.imp: it lies above"),
        ("ticketlab/models/mlp.py", "from ..overlap import compare", "imports ticketlab.overlap.compare"),
        ("ticketlab/models/__init__.py", "from ..engine import imp", "imports ticketlab.engine.imp"),
        ("ticketlab/engine/imp.py", "def f():\n    from ticketlab import signal", "imp:2 imports ticketlab.signal"),
        ("ticketlab/engine/imp.py", "import figures.style", "it lies above"),
        ("ticketlab/ntk/plan.py", "if True:\n    from ticketlab.engine.cost import x", "never imports the engine"),
        ("ticketlab/bounds.py", "import importlib\nimportlib.import_module('ticketlab.engine')", "never imports"),
        ("ticketlab/bounds.py", "name = 'ticketlab.' + 'engine'\n__import__(name)", "must be readable"),
        ("ticketlab/bounds.py", "import analyses.imp", "it lies above"),
        ("ticketlab/overlap.py", "import ticketlab as tl", "the public front"),
        ("ticketlab/overlap.py", "from ticketlab import Task", "the public front"),
        ("ticketlab/overlap.py", "from . import Task", "the public front"),
        ("figures/barrier.py", "from torch import nn", "tables and matplotlib alone"),
        ("figures/barrier.py", "from ticketlab.masks import kept", "tables and matplotlib alone"),
        ("figures/barrier.py", "import analyses.imp", "it lies above"),
        ("figures/barrier.py", "from figures.__main__ import draw_all", "it lies above"),
        ("ticketlab/utils.py", "", "ticketlab.utils has no floor"),
        ("ticketlab/signal.py", "from ticketlab.gradients.point import check", "by its front, never its inside"),
        ("ticketlab/signal/moments.py", "from ticketlab.signal.jacobian import _ACTIVE", "keeps a name to its file"),
        ("analyses/imp.py", "from ticketlab.engine.store import _flatten", "keeps a name to its file"),
    ],
)
def test_a_planted_violation_is_caught(tmp_path, file, code, why):
    (found,) = violations(plant(tmp_path, file, code))
    assert why in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("ticketlab/__init__.py", "from ticketlab.engine.imp import imp\nfrom ticketlab import ntk"),
        ("ticketlab/engine/imp.py", "from ticketlab import masks\nfrom . import store\nfrom ..data import Task"),
        ("ticketlab/models/__init__.py", "from . import mlp\nfrom .conv import conv\nfrom ..errors import nearest"),
        ("ticketlab/gradients/modes.py", "from ticketlab import ntk\nfrom ticketlab.ntk import kernel"),
        ("ticketlab/ntk/kernel.py", "from ticketlab.masks import kept\nfrom .plan import plan\nimport torch, json"),
        ("figures/barrier.py", "import pandas\nfrom figures import style\nfrom . import style\nimport torchless"),
        ("figures/__main__.py", "from figures.style import save\nfrom ticketlab.commands import guarded"),
        ("analyses/imp.py", "import ticketlab as tl\nfrom figures import style\nimport torch"),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, code):
    assert violations(plant(tmp_path, file, code)) == []


@pytest.mark.parametrize(
    "code",
    [
        "print(1)",
        "def f(path):\n    with open(path, 'w') as file:\n        return file",
        "from pathlib import Path\nPath('x').open('w')",
        "table.to_csv('x')",
        "def f(path):\n    path.write_text('x')",
        "import sys\nsys.stdout.write('x')",
        "import torch\ntorch.save(1, 'x')",
    ],
)
def test_a_planted_print_or_write_is_caught(tmp_path, code):
    assert len(side_effects(plant(tmp_path, "ticketlab/signal.py", code))) == 1
    assert side_effects(plant(tmp_path / "other", "ticketlab/engine/store.py", code)) == []
