"""Two threads, as on the machine that the measured figures come from, and no data but the bundled digits."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads that spin starve a shared machine

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _strict_determinism():
    """Nothing may draw from the global generators: their state is the same after every test."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the library drew from the global generator"


@pytest.fixture(autouse=True)
def _on_the_cpu(request, monkeypatch):
    """Whatever the machine has: a test that compares with plain tensors finds what it computes beside them."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def _figures_are_closed():
    yield
    plt.close("all")
