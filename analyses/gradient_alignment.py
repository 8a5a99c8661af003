"""First gradients of tickets and their controls: size, direction, reliability, and whether they foretell accuracy.

For every network of every level, at the point where its training starts and on the same training examples: the
norm of its gradient, its cosines with the dense network's gradient and with the way that training then goes, the
signal-to-noise ratio across mini-batches, the predicted and the realised gain of one step, and the overlap with the
leading eigenfunctions of the restricted NTK. Then the rank correlation of each with the final test accuracy.

The dense network of a start is the one that the mask was laid on: for the ticket and for other masks the dense
network of the same init seed at the rewind step, for a reinitialised network its own fresh draw, made again from
its seed. Where neither gives the stored start (a third treatment, or a draw that another version of torch makes
otherwise) that cosine is NaN.

With no arguments it makes a run on the bundled digits and measures it in a few minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import OfRun, Tables, beside, each_network, joined, main, open_run
from analyses.intervals import Within, rank_interval, with_holm
from figures.gradient_alignment import draw
from ticketlab import gradients
from ticketlab.errors import Refused
from ticketlab.seeds import derived_seed

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
class Config(OfRun):
    """First gradients of the ticket and its controls against density, and against the final accuracy."""

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


def run(config: Config) -> Tables:
    """``networks``: one row per network. ``correlations``: one row per measure and group ranked together."""
    if not 2 <= config.n_batches <= config.n_examples:
        raise Refused(f"n_batches must lie in 2..n_examples, {config.n_examples}: got {config.n_batches}.")
    if min(config.n_kernel, config.top) < 1:
        raise Refused(f"n_kernel and top must be at least 1: got {config.n_kernel} and {config.top}.")
    study, model, task, levels = open_run(config)
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
    networks = joined(rows).assign(**about)
    return {"networks": networks, "correlations": correlations(networks)}


def measure_level(
    model: nn.Module, level: tl.Level, dense: tl.Level, factory: Factory, data: tl.Split, config: Config
) -> list[pd.DataFrame]:
    """One row per network of a level."""
    rows = []
    networks = list(each_network(level))
    for about, network in tqdm(networks, desc=f"gradients of level {level.level}", unit="network", disable=None):
        twin = dense_twin(network, dense.select(init_seed=about["init_seed"]).start, factory)
        rows.append(pd.DataFrame([about | _measures(model, network, twin, data, config)]))
    return rows


def dense_twin(network: tl.Level, rewound: tl.State, factory: Factory) -> tl.State | None:
    """The network whose masked weights a start is: the rewound one or a reinitialisation; None if neither."""
    seed, some = int(network.metrics["init_seed"].iloc[0]), next(iter(rewound.params.values()))
    drawn = tl.state(tl.initialise(factory, derived_seed("reinit", seed, network.level))).to(some.device, some.dtype)
    for twin in (rewound, drawn):
        found = tl.masks.masked(twin.params, network.masks)
        if all(torch.allclose(found[name], p) for name, p in network.theta_start.items()):
            return twin
    return None


def _measures(
    model: nn.Module, network: tl.Level, twin: tl.State | None, data: tl.Split, config: Config
) -> dict[str, float]:
    """Of one network in float64."""
    x, y, few, masks = data.x, data.y, slice(min(config.n_kernel, len(data))), network.masks
    start, end = (beside(state, x) for state in (network.start, network.end))
    dense = twin and beside(twin, x)
    found = gradients.alignment(model, start, x, y, masks=masks, dense_params=dense, params_end=end)
    agreement = gradients.batch_statistics(model, start, x, y, masks=masks, batch_size=len(x) // config.n_batches)
    step = gradients.one_step(model, start, x, y, masks=masks, learning_rate=config.step_size)
    modes = gradients.ntk_overlap(model, start, x[few], y[few], masks=masks, top=config.top)
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
    """NaN where a network has diverged, and has no row."""
    wide = table.pivot(index=["level", "treatment"], columns="init_seed", values=column)
    every = pd.MultiIndex.from_product([sorted(table[name].unique()) for name in ("level", "treatment")])
    return wide.reindex(every).to_numpy().reshape(*map(len, every.levels), -1)


def summary(tables: Tables) -> pd.DataFrame:
    """Rank correlations with the final accuracy [95 % interval], between networks of a level or seeds alone."""
    table = tables["correlations"]
    parts = []
    for within in ("level", "level and treatment"):
        rows = table[table["within"] == within].set_index(["within", "measure"])
        rho = [f"{r:.2f} [{low:.2f}, {high:.2f}]" for r, low, high in rows[["rho", "low", "high"]].to_numpy()]
        columns = {"rho": rho, "p_unadjusted": rows["p_value"], f"p_holm_of_{len(rows)}": rows["p_holm"]}
        parts.append(pd.DataFrame(columns, rows.index))
    return pd.concat(parts)


if __name__ == "__main__":
    sys.exit(main("gradient_alignment", Config, run, draw, summary))
