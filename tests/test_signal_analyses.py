"""The signal analysis at a tiny config, and its figure from a table."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import ticketlab as tl
from analyses import signal_propagation
from analyses.command import main
from figures.signal_propagation import draw, supplement
from figures.style import save
from ticketlab import signal

TINY = tl.ImpConfig(
    levels=2,
    init_seeds=(0, 1),
    treatments=("ticket", "reinit", "sibling"),
    recipe=tl.Recipe(steps=20, eval_every=20),
)


def test_every_network_is_measured_at_its_start(tmp_path, capsys):
    flags = ["--levels", "2", "--init-seeds", "0", "1", "--steps", "20", "--eval-every", "20", "--n-inputs", "12"]
    flags += ["--treatments", "ticket", "reinit", "sibling"]
    flags += ["--store", str(tmp_path / "runs"), "--out", str(tmp_path / "results")]
    module = signal_propagation
    assert main("signal_propagation", module.Config, module.run, module.draw, module.summary, flags) == 0
    (out,) = (tmp_path / "results" / "signal_propagation").iterdir()
    networks, layers, densities = (pd.read_csv(out / f"{name}.csv") for name in ("networks", "layers", "densities"))
    # a sibling starts as its ticket does
    assert networks.groupby(["level", "treatment"]).size().to_dict() == {
        **{(0, "ticket"): 2, (1, "ticket"): 2, (1, "reinit"): 2, (2, "ticket"): 2, (2, "reinit"): 2}
    }
    assert len(layers) == 3 * len(networks) and (layers["critical_sigma_w2"] == 2).all()
    np.testing.assert_allclose(layers["chi1"], layers["sigma_w2"] / 2, rtol=1e-6)
    chi = layers.groupby(["level", "treatment", "init_seed"])["chi1"].prod().to_numpy()
    theory = networks.set_index(["level", "treatment", "init_seed"]).sort_index()["mean_squared_theory"].to_numpy()
    np.testing.assert_allclose(2 * chi, theory, rtol=1e-5)  # the output layer has no activation
    assert set(densities["level"]) == {0, 1, 2}
    assert (densities["density_per_log"] >= 0).all() and densities["theory_per_log"].notna().all()
    assert "mean_squared" in capsys.readouterr().out


def test_a_row_holds_what_the_measures_give(tmp_path):
    config = signal_propagation.Config(study=TINY, store=tmp_path, n_inputs=9, at_levels=(2,))
    row = signal_propagation.run(config)["networks"].query("level == 2 and treatment == 'reinit' and init_seed == 1")
    model, task = tl.model_and_task(TINY)
    level = list(tl.imp(TINY, store=tmp_path))[2].select(treatment="reinit", init_seed=1)
    params = {n: p.double() for n, p in level.theta_start.items()}
    s = signal.jacobian_singular_values(model, params, task.train.x[:9].double(), masks=level.masks)
    assert row["mean_squared"].item() == pytest.approx(float((s**2).mean()), rel=1e-10)
    assert row["condition_number"].item() == pytest.approx(float((s[:, 0] / s[:, -1]).median()), rel=1e-8)


def test_networks_that_are_not_fully_connected_have_no_spectral_theory():
    model = tl.initialise(lambda: tl.models.build("conv_2", (1, 8, 8), 10), 0)
    assert signal_propagation._widths(model) is None
    found = signal_propagation._density(model, [(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), {})])
    assert found["theory_per_log"].isna().all()
    widths = np.diff(np.log(found["singular_value"])).mean()
    assert (found["density_per_log"] * widths).sum() == pytest.approx(
        0.5, abs=1e-6
    )  # the zero and the least are not in it


def test_dead_networks_have_no_spectrum():
    model = tl.initialise(lambda: tl.models.build("conv_2", (1, 8, 8), 10), 0)
    found = signal_propagation._density(model, [(torch.zeros(5, 2), {})]).assign(level=1)
    assert len(found) == 0
    assert list(found) == ["singular_value", "density_per_log", "theory_per_log", "level"]


def tables(biases: float = 0.0) -> dict[str, pd.DataFrame]:
    about = {"task": "digits", "model": "mlp_100_50", "n_inputs": 30, "rewind_step": 0}
    networks, layers, densities = [], [], []
    for level, treatment in itertools.product((0, 1, 2), ("ticket", "reinit")):
        if level == 0 and treatment == "reinit":
            continue
        base = {"level": level, "treatment": treatment, "level_density": 0.5**level, **about}
        for seed in (0, 1):
            names = ("mean_squared", "mean_squared_theory", "condition_number", "scaled_distance")
            measured = dict.fromkeys(names, 2.0 + seed)
            networks.append({**base, "init_seed": seed, **measured})
            for depth, layer in enumerate(("fc1", "fc2", "output"), start=1):
                row = {
                    "layer": layer,
                    "depth": depth,
                    "sigma_w2": 0.5**level,
                    "sigma_b2": biases * level,
                    "critical_sigma_w2": 2.0,
                }
                layers.append({**base, "init_seed": seed, **row, "variance": 0.1, "gradient_norm": 0.2 * depth})
        densities += [
            {**base, "singular_value": s, "density_per_log": 0.3, "theory_per_log": 0.2} for s in (0.5, 1.0, 2.0)
        ]
    return {"networks": pd.DataFrame(networks), "layers": pd.DataFrame(layers), "densities": pd.DataFrame(densities)}


def test_the_figure_says_what_it_shows_in_the_same_bytes_each_time(tmp_path):
    main, more = draw(tables()), supplement(tables())
    titles = " | ".join([main.get_suptitle(), *(axes.get_title() for axes in main.axes + more.axes)])
    assert "n = 2 replicas" in titles and "30 training examples" in titles and "at 25 % of the weights" in titles
    notes = [text.get_text() for axes in more.axes for text in axes.texts]
    assert notes.count("edge of\nchaos") == 3  # of the first, the middle and the last layer
    assert [axes.get_title() for axes in more.axes[:3]] == ["fc1", "fc2", "output"]
    dots = [line for line in main.axes[0].lines if line.get_linestyle() == "None"]
    assert {2.0, 3.0} == {*np.concatenate([line.get_ydata() for line in dots])}  # every replica is shown
    first = [path.read_bytes() for path in save(draw(tables()), tmp_path / "first")]
    assert first == [path.read_bytes() for path in save(draw(tables()), tmp_path / "second")]


def test_a_level_of_dead_networks_leaves_its_spectrum_empty():
    given = tables()
    given["densities"] = given["densities"][given["densities"]["level"] == 0]
    assert len(draw(given).axes) == 4 and len(supplement(given).axes) == 6
