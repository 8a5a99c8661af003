"""analyses.dynamic_sparsity at a tiny config, its costs by closed form, and its figure from a fixture table."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

import ticketlab as tl
from analyses import dynamic_sparsity
from analyses.command import main
from analyses.intervals import holm
from figures.dynamic_sparsity import LABELS, LOOKS, draw

STUDY = tl.ImpConfig(
    treatments=("ticket",), levels=2, init_seeds=(0, 1), recipe=tl.Recipe(steps=40, batch_size=16, eval_every=40)
)


def config(tmp_path, **flags):
    flags = {"update_every": 10, **flags}
    return dynamic_sparsity.Config(store=tmp_path / "runs", out=tmp_path / "out", study=STUDY, **flags)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    return dynamic_sparsity.run(config(folder, extend="macs"))


def test_every_method_keeps_as_many_weights_as_the_ticket(tables):
    networks = tables["networks"].query("level > 0")
    methods = {"static", "set", "rigl", "gradual"}
    assert set(networks["method"]) == {"imp", *methods, *(f"{method}_macs" for method in methods)}
    assert networks["kept"].nunique() == 1
    assert len(networks) == 9 * 2
    layers = tables["layers"]
    assert layers["imp"].sum() == layers["others"].sum() == networks["kept"].iloc[0]
    assert (networks.query("method == 'static'")["moved"] == 0).all()
    assert (networks.query("method in ('rigl', 'set')")["moved"] > 0).all()


def test_costs_by_closed_form(tables):
    networks = tables["networks"]
    cost = networks.query("init_seed == 0").set_index("method")["macs"]
    size, kept, batch = 64 * 100 + 100 * 50 + 50 * 10, networks.query("level == 2")["kept"].iloc[0], 16
    updates = 3  # steps 10, 20 and 30
    assert cost["dense"] == 3 * batch * 40 * size
    assert cost["static"] == 3 * batch * 40 * kept
    assert cost["set"] == 3 * batch * (40 - updates) * kept
    assert cost["rigl"] == cost["set"] + updates * batch * (2 * kept + size)
    first = size - round(0.2 * size)
    assert cost["imp"] == 3 * batch * 40 * (size + first + kept)
    # Gradual: 10 dense steps, then 9 descents after each of two updates and the 9 that are left after the last.
    layers = {row.layer: (row.size, row.others) for row in tables["layers"].itertuples()}
    after = [sum(n + np.floor((s - n) * (1 - u / 3) ** 3 + 0.5) for s, n in layers.values()) for u in (1, 2, 3)]
    assert cost["gradual"] == 3 * batch * (10 * size + 9 * sum(after))
    # Stretched to IMP's macs: equal to within one step, or one of gradual pruning's few updates.
    for method, within in (("static", 0.02), ("set", 0.02), ("rigl", 0.02), ("gradual", 0.06)):
        assert abs(cost[f"{method}_macs"] / cost["imp"] - 1) < within
    dense = networks.query("method == 'dense'")["dense_trainings"]
    assert (dense == 1).all()


def test_contrasts_are_paired_by_seed(tables):
    networks, contrasts = tables["networks"], tables["contrasts"]
    wide = networks.query("level == 2").pivot(index="init_seed", columns="method", values="test_error")
    row = contrasts.query("a == 'rigl' and b == 'static'").iloc[0]
    d = wide["rigl"] - wide["static"]
    assert row["error_a_minus_b"] == pytest.approx(d.mean())
    assert row["high"] - row["error_a_minus_b"] == pytest.approx(12.706 * d.std() / np.sqrt(2), rel=1e-3)
    assert len(contrasts) == 36 and (contrasts["n"] == 2).all()


def test_the_command_writes_tables_and_figure_and_extends_by_steps(tmp_path, capsys):
    flags = ["--levels", "1", "--steps", "20", "--eval-every", "20", "--init-seeds", "0", "1", "--update-every", "5"]
    argv = [*flags, "--store", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    module = dynamic_sparsity
    assert main("dynamic_sparsity", module.Config, module.run, module.draw, module.summary, argv) == 0
    (out,) = (tmp_path / "out" / "dynamic_sparsity").iterdir()
    names = ["config.json", "contrasts.csv", "dynamic_sparsity.pdf", "dynamic_sparsity.png", "layers.csv"]
    assert sorted(p.name for p in out.iterdir()) == [*names, "networks.csv"]
    networks = pd.read_csv(out / "networks.csv")
    assert networks.query("method.str.endswith('_steps')")["steps"].tolist() == [40] * 8  # IMP: dense, and one level
    assert networks.query("method == 'imp'")["steps"].tolist() == [40, 40]
    assert json.loads((out / "config.json").read_text())["extend"] == "steps"
    pairs, printed = pd.read_csv(out / "contrasts.csv"), capsys.readouterr().out
    np.testing.assert_allclose(pairs["p_holm"], holm(pairs["p_value"]), rtol=1e-6)
    assert "dense_trainings" in printed and f"p_unadjusted  p_holm_of_{pairs['p_value'].count()}" in printed


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"at_levels": (3,)}, r"levels must lie in 1\.\.2"),
        ({"at_levels": (0,)}, r"levels must lie in 1\.\.2"),
        ({"at_levels": (2,), "extend_at": (1,)}, r"extend_at must be among the compared levels \[2\]"),
        ({"at_levels": (2,), "extend": "none", "extend_at": (2,)}, "says where --extend trains longer"),
        ({"n_seeds": 1}, "n_seeds must be 2 to the run's 2"),
        ({"n_seeds": 3}, "n_seeds must be 2 to the run's 2"),
        ({"update_every": 1}, "every must be at least 2"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tmp_path, flags, match):
    with pytest.raises(ValueError, match=match):
        dynamic_sparsity.run(config(tmp_path, **flags))


def test_the_figure_shows_every_method_and_network():
    methods = ["imp", *(m + end for end in ("", "_steps") for m in LOOKS if m != "imp")]
    rows = [
        {"method": m, "level": level, "density": d, "init_seed": seed, "test_error": 0.02 + 0.01 * i + 0.001 * seed}
        | {"dense_trainings": 5.0 if m == "imp" else d * (i + 1), "task": "mnist", "model": "lenet_300_100"}
        | {"update_every": 100}
        for i, m in enumerate(methods)
        for level, d in ((10, 0.108), (17, 0.023))
        for seed in range(3)
    ]
    rows += [{**row, "method": "dense", "level": 0, "density": 1.0} for row in rows[:3]]
    figure = draw({"networks": pd.DataFrame(rows)})
    *against_density, cost = figure.axes
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {*LABELS.values(), "dense network"}
    assert len(against_density) == 2
    for axes in against_density:
        dots = [line for line in axes.lines if line.get_linestyle() == "None"]
        assert [len(line.get_xdata()) for line in dots] == [6] * len(LOOKS)
    assert len([line for line in cost.lines if len(line.get_xdata()) == 2]) == len(methods) + 1
    plt.close(figure)
