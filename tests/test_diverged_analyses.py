"""What diverged has no result in any analysis, and where nothing is left it says so in one line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import ticketlab as tl
from analyses import (
    dynamic_sparsity,
    generalization_bounds,
    gradient_alignment,
    imp,
    mask_overlap,
    mode_connectivity,
    ntk_spectrum,
    pruning_criteria,
    sign_and_value,
    signal_propagation,
    supermasks,
    transfer,
)
from analyses.command import followed, survivors
from ticketlab.engine import store
from ticketlab.errors import Refused

STUDY = tl.ImpConfig(
    levels=2,
    prune_fraction=0.5,
    treatments=("ticket", "reinit", "sibling"),
    init_seeds=(0, 1, 2),
    recipe=tl.Recipe(steps=12, batch_size=20, eval_every=6),
)
FLAGS = {
    dynamic_sparsity: {"at_levels": (1, 2), "update_every": 3, "extend": "none"},
    generalization_bounds: {"n_values": (2,)},
    gradient_alignment: {"n_examples": 20, "n_batches": 2, "n_kernel": 3, "top": 2},
    imp: {},
    mask_overlap: {"at_levels": (1, 2), "draws": 2, "restarts": 1},
    mode_connectivity: {"n_alphas": 3, "train_examples": 50, "align": True},
    ntk_spectrum: {"n_spectrum": 4, "n_regression": 10},
    pruning_criteria: {"methods": ("magnitude",), "at_levels": (1, 2)},
    sign_and_value: {},
    signal_propagation: {"n_inputs": 5},
    supermasks: {"criteria": ("random",), "densities": (0.5,), "learned_steps": 4, "learned_densities": (), "draws": 1},
    transfer: {"sources": ("digits",), "at_levels": (1, 2), "theta_k": 0},
}
KNOWN = r"density|macs|_trainings$|first_step$|^learning_rate$|^momentum$|^delta$|^step_size$|^dense_error$"
"""Columns that are no result of a network: what was asked for, and what it cost."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("runs"))


def _run(folder):
    list(tl.imp(STUDY, store=folder, device="cpu", progress=False))
    return tl.run_folder(STUDY, folder)


def diverge(monkeypatch, level: int, seeds: set[int]) -> None:
    """Tickets of these seeds diverged at a level; that others follow from them is for the analyses to see."""
    read = store.read_level

    def marked(*arguments, **options):
        found = read(*arguments, **options)
        if "init_seed" not in found.metrics:  # a training of the analysis
            return found
        rows = (found.metrics["treatment"] == "ticket") & found.metrics["init_seed"].isin(
            seeds if found.level == level else ()
        )
        table = found.metrics.copy()
        table.loc[rows, [c for c in table if c.endswith(("_nats", "_error"))]] = np.nan
        table.loc[rows, "diverged_step"] = 6
        return replace(found, metrics=table)

    monkeypatch.setattr(store, "read_level", marked)


def config_of(module, folder):
    places = {"out": folder.parent / "out", "device": "cpu"}
    if module is transfer:
        study = replace(STUDY, treatments=("ticket",))
        return module.Config(runs=(folder,), study=study, **places, **FLAGS[module])
    return module.Config(run=(folder,), **places, **FLAGS[module])


def test_what_follows_from_a_diverged_ticket_has_diverged(stored, monkeypatch):
    diverge(monkeypatch, 1, {1})
    _, first, second = followed(tl.load_run(stored))
    assert survivors(first) == (0, 2) and survivors(first, "reinit") == (0, 1, 2)
    assert survivors(second) == survivors(second, "reinit") == (0, 2)
    rows = second.metrics[second.metrics["init_seed"] == 1]
    assert rows["test_error"].isna().all() and second.metrics["test_error"].notna().sum() == 6


@pytest.mark.parametrize("module", FLAGS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_diverged_line_has_no_finite_result(module, stored, monkeypatch):
    diverge(monkeypatch, 1, {1})
    tables = module.run(config_of(module, stored))
    seeds = {name: table for name, table in tables.items() if {"init_seed", "init_seed_a"} & set(table)}
    assert seeds
    for table in seeds.values():
        lost = _lost(table)
        numbers = table.loc[lost].select_dtypes("float").filter(regex=f"^(?!.*({KNOWN}))")
        assert numbers.isna().to_numpy().all() and not lost.all()
    plt.close(module.draw(tables))
    assert len(module.summary(tables))


def _lost(table: pd.DataFrame) -> pd.Series:
    """Rows of seed 1 at a level from 1 on: of the ticket, and at level 2 of all that follow from it."""
    if "init_seed_a" in table:
        return (table["init_seed_a"] == 1) | (table["init_seed_b"] == 1)
    if "criterion" in table and "values" in table:  # supermasks have densities for levels
        return (table["init_seed"] == 1) & (table["criterion"] == "imp")
    level = table.get("level", table.get("level_a", pd.Series(0, table.index)))
    lost = (table.get("source_seed", table["init_seed"]) == 1) & (level >= 1)
    if "treatment" in table:
        lost &= (table["treatment"] == "ticket") | (level == 2)
    if "method" in table and "imp" in set(table["method"]):  # the others are trained by the analysis
        lost &= table["method"] == "imp"
    return lost


@pytest.mark.parametrize("module", FLAGS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_no_finite_network_is_one_line(module, stored, monkeypatch):
    diverge(monkeypatch, 0, set(STUDY.init_seeds))
    with pytest.raises(Refused, match="all have diverged"):
        module.run(config_of(module, stored))


@pytest.mark.parametrize("module", FLAGS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_where_all_tickets_diverge_later_what_is_left_is_shown(module, stored, monkeypatch):
    diverge(monkeypatch, 1, set(STUDY.init_seeds))
    try:
        tables = module.run(config_of(module, stored))
    except Refused as error:
        assert "finite" in str(error)
        return
    plt.close(module.draw(tables))
    module.summary(tables)
