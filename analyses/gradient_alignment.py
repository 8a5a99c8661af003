"""First gradients of tickets and their controls: size, direction, reliability, and whether they foretell accuracy.

For every network of every level, at the point where its training starts and on the same training examples: the
norm of its gradient, its cosines with the dense network's gradient and with the way that training then goes, the
signal-to-noise ratio across mini-batches, the predicted and the realised gain of one step, and the overlap with the
leading eigenfunctions of the restricted NTK. Then the rank correlation of each with the final test accuracy.

The dense network of a start is the one that the mask was laid on: for the ticket and for other masks the dense
network of the same init seed at the rewind step, for a reinitialised network its own fresh draw, made again from
its seed. Where neither gives the stored start (a third treatment, or a draw that another version of torch makes
otherwise) that cosine is NaN.

With no arguments it makes a run on the bundled digits and measures it in about a minute.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import tyro
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import DIGITS, Tables, each_network, main, open_run
from analyses.intervals import Within, rank_interval, with_holm
from figures.gradient_alignment import draw
from ticketlab import gradients
from ticketlab.errors import Refused
from ticketlab.seeds import derived_seed

STUDY = replace(DIGITS, treatments=("ticket", "reinit", "layerwise_shuffle"))

MEASURES = (
    "norm",
    "norm_per_live_weight",
    "cosine_with_dense",
    "cosine_with_displacement",
    "signal_to_noise",
    "pairwise_cosine",
    "first_order_nats",
    "second_order_nats",
    "realised_nats",
    "residual_share",
    "gradient_share",
)

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class Config:
    """First gradients of the ticket and its controls against density, and against the final accuracy."""

    run: Path | None = None
    """Measure this run directory; None: make or resume the run that the flags below describe."""
    n_examples: int = 1000
    """Training examples of all gradients."""
    n_batches: int = 10
    """Mini-batches that they are cut into, for the signal-to-noise ratio."""
    n_kernel: int = 100
    """Training examples of the NTK, whose side is n * classes."""
    top: int = 10
    """Leading eigenfunctions of the NTK."""
    step_size: float = 0.1
    """Learning rate of the one step of gradient descent."""
    store: Path = Path("runs")
    """Folder of run directories."""
    out: Path = Path("results")
    """Folder for tables and figures."""
    device: str | None = None
    """Such as cpu or cuda:1; None: a CUDA device if there is one."""
    study: Annotated[tl.ImpConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: STUDY)


def run(config: Config) -> Tables:
    """``networks``: one row a network. ``correlations``: one row a measure and group of networks ranked together."""
    if not 2 <= config.n_batches <= config.n_examples:
        raise Refused(f"n_batches must lie in 2..n_examples, {config.n_examples}: got {config.n_batches}.")
    study, model, task, levels = open_run(config.run, config.study, config.store, config.device)
    model.eval()
    factory = partial(tl.models.build, study.model, task.input_shape, task.n_classes)
    data = task.limit(min(config.n_examples, len(task.train))).to(dtype=torch.float64).train
    dense: tl.Level | None = None
    rows = []
    for level in levels:
        dense = dense or level
        rows += measure_level(model, level, dense, factory, data, config)
    about = {
        "task": study.task,
        "model": study.model,
        "n_examples": len(data),
        "batch_size": len(data) // config.n_batches,
        "n_kernel": min(config.n_kernel, len(data)),
        "top": config.top,
        "step_size": config.step_size,
        "rewind_step": study.rewind_step,
    }
    networks = pd.DataFrame(rows).assign(**about)
    return {"networks": networks, "correlations": correlations(networks)}


def measure_level(
    model: nn.Module, level: tl.Level, dense: tl.Level, factory: Factory, data: tl.Split, config: Config
) -> list[dict[str, object]]:
    """One row a network of a level."""
    rows = []
    networks = list(each_network(level))
    for network in tqdm(networks, desc=f"gradients of level {level.level}", unit="network", disable=None):
        about = network.metrics[["level", "treatment", "init_seed", "density", "test_error"]].iloc[0].to_dict()
        twin = dense_twin(network, dense.select(init_seed=about["init_seed"]).start, factory)
        rows.append({**about, "level_density": level.density, **_measures(model, network, twin, data, config)})
    return rows


def dense_twin(network: tl.Level, rewound: tl.State, factory: Factory) -> tl.State | None:
    """The network whose masked weights a start is: the rewound one or a reinitialisation; None if neither."""
    seed, some = int(network.metrics["init_seed"].iloc[0]), next(iter(rewound.params.values()))
    drawn = tl.state(tl.initialise(factory, derived_seed("reinit", seed, network.level))).to(some.device, some.dtype)
    for twin in (rewound, drawn):
        found = tl.functional.masked(twin.params, network.masks)
        if all(torch.allclose(found[name], p) for name, p in network.theta_start.items()):
            return twin
    return None


def _measures(
    model: nn.Module, network: tl.Level, twin: tl.State | None, data: tl.Split, config: Config
) -> dict[str, float]:
    """Of one network in float64."""
    device = data.x.device
    start, end = (state.to(device, torch.float64) for state in (network.start, network.end))
    dense = None if twin is None else twin.to(device, torch.float64)
    x, y = data.x, data.y
    few = slice(min(config.n_kernel, len(x)))
    at: dict[str, Any] = {"masks": network.masks, "buffers": start.buffers}
    beside: dict[str, Any] = {} if dense is None else {"dense_params": dense.params, "dense_buffers": dense.buffers}
    found = gradients.alignment(model, start.params, x, y, params_end=end.params, **beside, **at)
    agreement = gradients.batch_statistics(model, start.params, x, y, batch_size=len(x) // config.n_batches, **at)
    step = gradients.one_step(model, start.params, x, y, learning_rate=config.step_size, **at)
    modes = gradients.ntk_overlap(model, start.params, x[few], y[few], top=config.top, **at)
    tensors: dict[str, Tensor] = {
        **{name: getattr(found, name) for name in MEASURES[:4]},
        "n_live": found.n_live,
        "signal_to_noise": agreement.signal_to_noise,
        "noise_scale": agreement.noise_scale,
        "pairwise_cosine": agreement.pairwise_cosine,
        "loss_nats": step.loss_nats,
        "first_order_nats": step.first_order_nats,
        "second_order_nats": step.second_order_nats,
        "realised_nats": step.realised_nats,
        "residual_share": modes.residual_share.sum(),
        "gradient_share": modes.gradient_share.sum(),
    }
    return {name: float(value) for name, value in tensors.items()}


def correlations(networks: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of every measure with the final test accuracy over the pruned levels.

    ``rho`` with a 95 % interval and a p-value by a jackknife over init seeds, for networks of one seed are not
    independent. ``p_value`` is unadjusted; ``p_holm`` is corrected for all rows of the same ``within``: the measures,
    and the levels where each is ranked by itself.
    """
    pruned = networks[networks["level"] > 0]
    if pruned.empty:
        columns = ["measure", "within", "level", "n", "rho", "low", "high", "p_value", "p_holm", "n_family"]
        return pd.DataFrame(columns=columns)
    accuracy = 1 - _grid(pruned, "test_error")
    rows = []
    for measure in MEASURES:
        values = _grid(pruned, measure)
        groups: list[tuple[Within, float, np.ndarray, np.ndarray]]
        groups = [(within, np.nan, values, accuracy) for within in ("all", "level", "level and treatment")]
        numbers = sorted(pruned["level"].unique())
        groups += [("all", n, values[i : i + 1], accuracy[i : i + 1]) for i, n in enumerate(numbers)]
        for within, level, a, b in groups:
            among = within if np.isnan(level) else "one level"
            about = {"measure": measure, "within": among, "level": level, "n": int(np.isfinite(a + b).sum())}
            rows.append(about | rank_interval(a, b, within))
    return with_holm(pd.DataFrame(rows), by="within")


def _grid(table: pd.DataFrame, column: str) -> Float[np.ndarray, "level treatment seed"]:
    wide = table.pivot(index=["level", "treatment"], columns="init_seed", values=column)
    return wide.to_numpy().reshape(table["level"].nunique(), table["treatment"].nunique(), -1)


def summary(tables: Tables) -> pd.DataFrame:
    """Rank correlations with the final accuracy: between all networks of a level, and between seeds alone."""
    table = tables["correlations"].set_index("measure")
    parts = []
    for within in ("level", "level and treatment"):
        rows = table[table["within"] == within][["rho", "low", "high", "p_value", "p_holm"]]
        rows = rows.rename(columns={"p_value": "p unadjusted", "p_holm": f"p Holm of {len(rows)}"})
        parts.append(rows.rename(columns=lambda column, within=within: f"{column}, within {within}"))
    return pd.concat(parts, axis=1).reset_index()


if __name__ == "__main__":
    sys.exit(main("gradient_alignment", Config, run, draw, summary))
