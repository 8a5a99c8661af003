"""Objects show themselves in a line, and in a small table in a notebook."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import ticketlab as tl
from tests.cases import blobs, small_mlp
from ticketlab.network import network
from ticketlab.shown import as_line, as_table, text

LARGE = re.compile(r"\b(Tensor|ndarray|Array|State|Params|Masks|Buffers|Network|Split|DataFrame)\b")
"""Types in whose default repr a page of numbers may stand."""


def records():
    """Every public dataclass of the package with a field of such a type in its repr."""
    modules = [m.name for m in pkgutil.walk_packages(tl.__path__, "ticketlab.") if not m.name.endswith("__main__")]
    for module in map(importlib.import_module, modules):
        for name, value in vars(module).items():
            own = is_dataclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
            if own and any(f.repr and LARGE.search(re.sub(r"Callable.*", "", str(f.type))) for f in fields(value)):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("record", [*records()])
def test_a_record_of_tensors_has_a_line_of_its_own(record):
    written_by_dataclass = hasattr(record.__repr__, "__wrapped__")
    assert not written_by_dataclass, "add `__repr__, _repr_html_ = as_line, as_table` to its fields"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(0.25), "0.25"),
        (torch.tensor([1, 2, 3]), "[1, 2, 3]"),
        (np.array([0.5, 1.0]), "[0.5, 1]"),
        (torch.arange(6.0).reshape(2, 3), "[2, 3] 0 to 5"),
        (torch.arange(5, dtype=torch.bfloat16), "[5] 0 to 4"),
        (np.arange(5) > 2, "[5] 2 of 5 true"),
        (torch.tensor([1.0, torch.nan, 2.0, 3.0, 4.0]), "[5] nan to nan"),
        (torch.zeros(5, 2, dtype=torch.complex64), "[5, 2]"),
        (torch.zeros(0), "[0]"),
        (np.array(["a", "b"]), "[2]"),
        (np.float64(1 / 3), "0.3333"),
        ({}, "none"),
        ({"w": torch.zeros(40, 50), "b": torch.zeros(3)}, "2 tensors, 2,003 numbers"),
        ({"w": torch.arange(40) < 10}, "1 masks, 10 of 40 kept"),
        ({0: None, 1: None}, "2 entries"),
        (nn.Linear(2, 3), "Linear"),
        (small_mlp, "small_mlp"),
        (pd.DataFrame({"a": [1, 2]}), "table of 2 rows"),
        ((1.0, 2.5), "[1, 2.5]"),
        (tuple(range(50)), "50 entries"),
        ("a < b", "'a < b'"),
    ],
)
def test_a_value_in_a_few_words(value, words):
    assert text(value) == words


@dataclass(frozen=True)
class Pair:
    weights: torch.Tensor
    name: str
    nothing: None = None

    __repr__, _repr_html_ = as_line, as_table


def test_a_record_as_a_line_and_as_a_table():
    pair = Pair(torch.zeros(10, 10), "a < b")
    assert repr(pair) == "Pair(weights=[10, 10] 0 to 0, name='a < b')"
    html: Any = pair._repr_html_()
    assert "<b>Pair</b>" in html and html.count("<tr>") == 2 and "a &lt; b" in html


@pytest.fixture(scope="module")
def shown():
    """What a user meets at a prompt, by the words that each begins with."""
    task = blobs(dtype=torch.float32)
    recipe = tl.Recipe(steps=6, eval_every=3, batch_size=30)
    config = tl.ImpConfig(levels=1, init_seeds=(0, 1), treatments=("ticket", "sibling"), recipe=recipe)
    study = tl.Study(config, model=small_mlp, task=task, device="cpu", progress=False)
    level = list(study.levels(store=None))[-1]
    model, x = small_mlp(), task.train.x[:4]
    a, b = (level.subset(treatment=name) for name in ("ticket", "sibling"))
    path = tl.connectivity.linear_path(model, a.end, b.end, task, masks=a.masks, n_alphas=3)
    kernel = tl.ntk.kernel(model, a.start, x, masks=a.masks)
    return {
        "Study of small_mlp on blobs: 1 levels, 2 init seeds, 2 treatments (ticket, sibling)": study,
        "Level 1: density 0.7961, 4 networks (ticket, sibling), mean test error": level,
        "Level 1: density 0.7961, 1 network (ticket)": level.select(treatment="ticket", init_seed=0),
        "State(params=6 tensors, 476 numbers, buffers=none)": level.start,
        "Task('blobs'": task,
        "Network(model=Sequential, params=6 tensors": network(model, a.end, x, masks=a.masks),
        "Path: 3 alphas; train loss_nats barrier [": path,
        "Spectrum(eigenvalues=[2, 12] ": tl.ntk.spectrum(kernel),
        "Start(state=State(params=": tl.Start(a.start, a.masks, 0),
    }


def test_what_a_prompt_shows_is_one_line_and_what_a_notebook_shows_a_table(shown):
    for words, value in shown.items():
        line, html = repr(value), value._repr_html_()
        assert line.startswith(words) and "\n" not in line and len(line) < 400, line
        assert "<table" in html and "tensor(" not in html and html.count("<tr") < 20


def test_a_stored_run_shows_its_study(tmp_path):
    config = tl.ImpConfig(levels=0, init_seeds=(3,), recipe=tl.Recipe(steps=2, eval_every=1))
    study = tl.Study(config, device="cpu", progress=False)
    list(study.levels(tmp_path))
    html = tl.load_run(study.folder(tmp_path))._repr_html_()
    for words in ("Run of mlp_100_50 on digits", "2 steps of adam at 0.0012 (constant)", "rewind, k = 0", ">3</td>"):
        assert words in html
    assert "2 steps of adam" in config._repr_html_()
