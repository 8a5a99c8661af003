"""What is installed: ``ticketlab`` and nothing beside it, answering from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def ran(*command, **more):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's content, built from a copy of the sources."""
    pytest.importorskip("setuptools")
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    for package in ("ticketlab", "analyses", "figures"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("data", "paper", "__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    ran("-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(base), cwd=source)
    (wheel,) = base.glob("*.whl")
    ran("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(base / "site"), str(wheel))
    return base / "site"


def test_nothing_but_ticketlab_is_installed(installed):
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"ticketlab", "bin"}
    assert (installed / "ticketlab" / "figures" / "paper.mplstyle").exists()
    assert (installed / "ticketlab" / "py.typed").exists()
    left = [path for path in installed.rglob("*.py") if "python -m analyses" in path.read_text()]
    assert left == []


def test_it_answers_from_any_folder_beside_a_users_own_names(installed, tmp_path):
    for name in ("analyses", "figures"):  # what a user may have in the folder they work in
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} is the user's')")
    env = {**os.environ, "PYTHONPATH": str(installed), "MPLBACKEND": "Agg"}
    flags = ["--steps", "8", "--levels", "1", "--init-seeds", "0", "--eval-every", "4", "--treatments", "ticket"]
    commands = [[], ["mode_connectivity", "--help"], ["imp", *flags]]
    script = "import ticketlab; from ticketlab.console import main; print(ticketlab.__file__)"
    out = ran("-c", f"{script}; print([main(argv) for argv in {commands}])", cwd=tmp_path, env=env)
    assert out.startswith(str(installed)) and out.endswith("[0, 0, 0]\n")
    assert "ticketlab mode_connectivity [flags]" in out and "Test error in percent" in out
    (folder,) = (tmp_path / "results" / "imp").iterdir()
    assert (folder / "imp.png").exists()
    (tmp_path / "data").mkdir()
    folder.rename(tmp_path / "data" / "imp-mine")
    drawn = ran("-m", "ticketlab", "figures", cwd=tmp_path, env=env)
    assert drawn.split() == [str(Path("paper") / "imp-mine.png")]  # here, not among the installed files


def test_a_notebook_runs_on_what_is_installed(installed, tmp_path):
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    env = {**os.environ, "PYTHONPATH": str(installed), "MPLBACKEND": "Agg"}
    said = "import ticketlab\nprint(ticketlab.__file__)"
    assert str(installed) in ran("-c", "\n".join([*cells, said]), cwd=tmp_path, env=env)
