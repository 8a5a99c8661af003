"""Instability against k: children against plain loops, a grid over k against separate studies, claims by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from reference import train_alone
from reference_measures import batchnorm_anew, network_between, path_alone

import ticketlab as tl
from analyses import instability
from analyses.command import main
from analyses.instability import STUDY, Config, claims, run
from ticketlab.engine.treatments import sibling_order
from ticketlab.errors import Refused

RECIPE = tl.Recipe(steps=40, eval_every=20, batch_size=30)
SMALL = replace(STUDY, levels=2, init_seeds=(0, 1), recipe=RECIPE, dtype="float64", validation_size=1000)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    store = tmp_path_factory.mktemp("runs")
    config = Config(
        rewind_steps=(8, 0), n_alphas=5, train_examples=200, test_examples=120, store=store, out=store, study=SMALL
    )
    return config, run(replace(config, device="cpu"))


def test_every_cell_of_the_grid_is_there(measured):
    _, tables = measured
    children, networks = tables["children"], tables["networks"]
    cells = children.groupby(["rewind_step", "level", "treatment"]).size()
    subnetworks = ("ticket", "reinit", "random_erk")
    assert set(cells.index) == {(k, 0, "dense") for k in (0, 8)} | {(k, 2, t) for k in (0, 8) for t in subnetworks}
    assert set(cells) == {2}
    assert len(networks) == 2 * (2 + 2 * 6) and len(tables["paths"]) == len(children) * 2 * 5
    dense = networks[(networks["level"] == 0) & (networks["rewind_step"] == 0)].set_index("init_seed")["test_error"]
    again = networks[(networks["level"] == 0) & (networks["rewind_step"] == 8)].set_index("init_seed")["test_error"]
    pd.testing.assert_series_equal(dense, again)  # trained once


def test_dense_steps_have_the_children_of_dense_networks_alone(measured):
    config, tables = measured
    finer = run(replace(config, rewind_steps=(8,), dense_steps=(0,), device="cpu"))
    for name in ("children", "networks"):
        kept = tables[name][(tables[name]["rewind_step"] == 8) | (tables[name]["level"] == 0)].reset_index(drop=True)
        pd.testing.assert_frame_equal(finer[name], kept)


@pytest.mark.parametrize("treatment", ["dense", "ticket"])
def test_children_are_those_of_plain_loops(measured, treatment):
    config, tables = measured
    folders = sorted(config.store.iterdir())
    run_of = next(r for r in map(tl.load_run, folders) if r.config.rewind_step == 8)
    model, task = tl.model_and_task(run_of.config, device="cpu")
    level = run_of[0 if treatment == "dense" else 2].select(treatment="ticket", init_seed=1)
    start = level.snapshots[8] if treatment == "dense" else level.start
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start.params[name])
    orders = (1, sibling_order(1, level.level))
    ends = [train_alone(model, level.masks, task, RECIPE, order, first_step=8) for order in orders]
    shown = task.limit(train=200, test=120)
    losses, errors = path_alone(*ends, shown, list(np.linspace(0, 1, 5)), masks=level.masks)
    rows = tables["children"].query("treatment == @treatment and init_seed == 1 and rewind_step == 8")
    row = rows.iloc[0]
    assert row["test_barrier_error"] == pytest.approx(max(errors) - (errors[0] + errors[-1]) / 2, abs=1e-9)
    assert row["test_barrier_loss_nats"] == pytest.approx(max(losses) - (losses[0] + losses[-1]) / 2, rel=1e-6)
    assert (row["test_error_a"], row["test_error_b"]) == pytest.approx((errors[0], errors[-1]), abs=1e-9)
    a, b = (torch.cat([p.flatten() for p in end.parameters()]).detach() for end in ends)
    assert row["l2_distance"] == pytest.approx(float((a - b).norm()), rel=1e-6)


def test_curvature_is_that_of_the_whole_hessian():
    """Of a network with batch norm, against all second derivatives at the live weights."""

    def build():
        parts = (torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
        return torch.nn.Sequential(*parts).double()

    model, draw = tl.initialise(build, 0), torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=draw, dtype=torch.float64)
    task = tl.Task.from_tensors(x, torch.arange(60) % 3).limit(train=30)
    masks = {n: torch.rand(model.get_parameter(n).shape, generator=draw) < 0.7 for n in tl.masks.prunable(model)}
    parent = instability.Parent("dense", 0, 0, 1.0, tl.Start(tl.state(model), masks, 0), None)
    found = instability.curvature(model, parent, task)
    net = batchnorm_anew(network_between(model, model, masks, 0.0), task.train.x)
    names, params = zip(*net.named_parameters(), strict=True)
    live = torch.cat([masks.get(n, torch.ones_like(p, dtype=torch.bool)).flatten() for n, p in net.named_parameters()])

    def loss(flat):
        parts = torch.split(flat, [p.numel() for p in params])
        own = {n: part.view_as(p) for n, part, p in zip(names, parts, params, strict=True)}
        return torch.nn.functional.cross_entropy(torch.func.functional_call(net, own, (task.train.x,)), task.train.y)

    whole = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params]))
    assert found["hessian_top"] == pytest.approx(float(torch.linalg.eigvalsh(whole[live][:, live])[-1]), rel=1e-6)
    assert found["gauss_newton_top"] > 0


def test_every_network_that_has_children_has_its_curvature(measured):
    _, tables = measured
    keys = ["rewind_step", "level", "density", "treatment", "init_seed"]
    curvature = tables["curvature"].set_index(keys)
    assert set(curvature.index) == set(tables["children"].set_index(keys).index)
    assert (curvature["gauss_newton_top"] > 0).all() and curvature.notna().all(axis=None)


def test_a_grid_over_k_is_separate_studies(measured):
    _, tables = measured
    alone = replace(SMALL, rewind_step=8, snapshot_steps=(0, 8))
    *_, last = tl.imp(alone, store=None, device="cpu", progress=False)
    rows = tables["networks"].query("rewind_step == 8 and level == 2")
    np.testing.assert_array_equal(rows["test_loss_nats"], last.metrics["test_loss_nats"])
    study = tl.Study(replace(alone, rewind_step=0), device="cpu", progress=False)
    first = next(iter(study.levels(None)))
    assert study.rewound(8, first).identity == tl.Study(alone, device="cpu").identity != study.identity
    with pytest.raises(Refused, match="must be one that level 0 kept: got 5"):
        study.rewound(5, first)


def test_a_level_of_which_all_have_diverged_has_no_children(tmp_path):
    study = tl.Study(replace(SMALL, rewind_step=0), device="cpu", progress=False)
    assert list(instability._pairs(study, [], 0, study.task, 3, tmp_path)) == []


def test_claims_by_hand():
    cell = {"level": 0, "density": 1.0, "treatment": "dense"}
    rows = [
        {**cell, "rewind_step": 0, "init_seed": s, "test_barrier_error": b, "test_error_a": e, "test_error_b": e}
        for s, b, e in ((0, 0.10, 0.30), (1, 0.12, 0.32), (2, 0.14, 0.34))
    ]
    ticket = {"level": 2, "density": 0.2, "treatment": "ticket"}
    rows += [
        {**ticket, "rewind_step": 5, "init_seed": s, "test_barrier_error": 0.01, "test_error_a": e, "test_error_b": e}
        for s, e in ((0, 0.31), (1, 0.34), (2, 0.37))
    ]
    table = claims(pd.DataFrame(rows)).set_index("treatment")
    assert table.loc["dense", "instability"] == pytest.approx(0.12) and not table.loc["dense", "stable"]
    assert table.loc["ticket", "stable"] and table.loc["ticket", "n"] == 3
    assert table.loc["ticket", "error_above_dense"] == pytest.approx(0.02)
    assert table.loc["ticket", "dense_sd"] == pytest.approx(0.02)
    assert table.loc["dense", "matching"] and table.loc["dense", "error_above_dense"] == 0


def test_from_the_command_line(tmp_path, capsys):
    flags = ["--levels", "1", "--steps", "30", "--eval-every", "15", "--init-seeds", "0", "1", "--treatments", "ticket"]
    flags += ["--rewind-steps", "0", "10", "--n-alphas", "3", "--store", str(tmp_path / "runs")]
    flags += ["--out", str(tmp_path / "results"), "--device", "cpu"]
    module = instability
    assert main("instability", module.Config, module.run, module.draw, module.summary, flags) == 0
    (out,) = (tmp_path / "results" / "instability").iterdir()
    assert {p.stem for p in out.glob("*.csv")} == {"children", "paths", "networks", "curvature", "claims"}
    assert (out / "instability.png").exists() and "instability_%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rewind_steps": (0, 0)}, "no step stand twice"),
        ({"rewind_steps": (0, 8), "dense_steps": (8,)}, "no step stand twice"),
        ({"rewind_steps": ()}, "must be one or more steps"),
        ({"at_levels": (0,), "rewind_steps": (0, 8)}, r"levels must lie in 1\.\.2"),
        ({"rewind_steps": (0, 40)}, "rewind_step|snapshot"),
        ({"study": replace(SMALL, levels=10), "rewind_steps": (0, 8)}, "every layer must keep a live weight"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, match, tmp_path):
    with pytest.raises(Refused, match=match):
        run(Config(**{"study": SMALL, "store": tmp_path, "out": tmp_path, "device": "cpu"} | wrong))
