"""A short run of the soak: a few of what ``make soak`` does by the hundred."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("kind", ["kills", "flips", "pairs"])  # workers: tests/test_sweep.py
def test_what_is_disturbed_ends_as_undisturbed_or_is_refused(kind, tmp_path):
    """In a process of its own, which has one thread and so can be copied."""
    numbers = {"kills": 3, "flips": 100, "pairs": 1, "workers": 0}
    counts = [part for name, n in numbers.items() for part in (f"--{name}", str(n if name == kind else 0))]
    command = [sys.executable, "-m", "fuzz.soak", *counts, "--out", str(tmp_path / "soak.md")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    (row,) = [line for line in (tmp_path / "soak.md").read_text().splitlines() if line.startswith(f"| {kind} ")]
    _, _, n, same, refused, silent, tracebacks, *_ = (cell.strip() for cell in row.split("|"))
    assert (silent, tracebacks) == ("0", "0") and int(same) + int(refused) >= int(n) == numbers[kind]
