"""Signal propagation at the start of training: are a ticket's layers, and its Jacobian, special?

For every network of a run, at the point where its training starts: the sigma_w^2 that each layer's live weights
carry, beside the edge of chaos; the singular values of the input-output Jacobian, beside those of Gaussian weights
of the same sigma_w^2; how activations and gradients change from layer to layer.

With no arguments it makes a run on the bundled digits and measures it in a few minutes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import OfRun, Tables, chosen_levels, each_network, joined, main, open_run
from figures.signal_propagation import draw
from ticketlab import signal
from ticketlab.printed import side_by_side

RELU = {"relu"}  # for other activations chi_1 depends on the variance of what arrives, and is left out
_BINS = 40


@dataclass(frozen=True)
class Config(OfRun):
    """Layers in the phase diagram, Jacobians and layer statistics against density, for every treatment of a run."""

    at_levels: tuple[int, ...] | None = None
    """Levels to measure beside level 0; None: all."""
    n_inputs: int = 200
    """Training examples at which signals are followed."""


def run(config: Config) -> Tables:
    """``networks``: one row per network. ``layers``: one per network and layer. ``densities``: singular values."""
    study, model, task, levels = open_run(config)
    data = task.limit(min(config.n_inputs, len(task.train))).to(dtype=torch.float64).train
    relu = signal.applied(model, data.x.to(next(model.parameters()).dtype)) == RELU
    critical = signal.critical_sigma_w2("relu", 0.0) if relu else float("nan")
    wanted = sorted({0} | chosen_levels(config.at_levels, study.levels, range(study.levels + 1)))
    spectra_at = (0, wanted[len(wanted) // 2], wanted[-1])
    networks, layers, densities = [], [], []
    for level in levels:
        level_values: dict[str, list[tuple[Tensor, dict[str, float]]]] = {}
        each = list(each_network(level)) if level.level in wanted else []
        for about, one in tqdm(each, desc=f"signals of level {level.level}", unit="network", disable=None):
            start = one.start.to(data.x.device, torch.float64)
            sigma_w2 = {n: float(v) for n, v in signal.effective_sigma_w2(model, start, masks=one.masks).items()}
            values = signal.jacobian_singular_values(model, start, data.x, masks=one.masks)
            level_values.setdefault(about["treatment"], []).append((values, sigma_w2))
            networks.append({**about, **_jacobian(values), "mean_squared_theory": _mean_squared(model, sigma_w2, relu)})
            layers.append(_layers(model, one, start, data, sigma_w2, relu).assign(**about, critical_sigma_w2=critical))
        if level.level in spectra_at:
            densities += [
                _density(model, found).assign(level=level.level, level_density=level.density, treatment=treatment)
                for treatment, found in level_values.items()
            ]
    names = {"task": study.task, "model": study.model, "n_inputs": len(data), "rewind_step": study.rewind_step}
    return {
        "networks": pd.DataFrame(networks).assign(**names),
        "layers": joined(layers).assign(**names),
        "densities": joined(densities).assign(**names),
    }


def _jacobian(values: Tensor) -> dict[str, float]:
    """Means over inputs; the median of the condition number, which may be infinite for a few."""
    found = signal.isometry(values)
    return {
        "mean_squared": float(found.mean_squared.mean()),
        "condition_number": float(found.condition_number.median()),
        "distance": float(found.distance.mean()),
        "scaled_distance": float(found.scaled_distance.nanmean()),
    }


def _mean_squared(model: nn.Module, sigma_w2: dict[str, float], relu: bool) -> float:
    """Product of chi_1 over the layers, the output layer without activation; fully connected ReLU networks alone."""
    if _widths(model) is None or not relu:
        return float("nan")
    *hidden, output = sigma_w2.values()
    return float(np.prod([signal.chi("relu", 1.0, w2) for w2 in hidden])) * output


def _layers(
    model: nn.Module, one: tl.Level, start: tl.State, data: tl.Split, sigma_w2: dict[str, float], relu: bool
) -> pd.DataFrame:
    table = signal.layer_statistics(model, start, data.x, data.y, masks=one.masks)
    weights = [f"{layer}.weight" for layer in table["layer"]]
    biases = [start.params.get(f"{layer}.bias", torch.zeros(1)) for layer in table["layer"]]
    return table.assign(
        sigma_w2=[sigma_w2[name] for name in weights],
        sigma_b2=[float(bias.square().mean()) for bias in biases],
        chi1=[signal.chi("relu", 1.0, sigma_w2[name]) if relu else float("nan") for name in weights],
    )


def _widths(model: nn.Module) -> list[int] | None:
    """Units of each layer, inputs first, of a fully connected network; None for others."""
    shapes = [tuple(model.get_parameter(name).shape) for name in tl.masks.prunable(model)]
    chained = all(len(s) == 2 for s in shapes) and all(a[0] == b[1] for a, b in pairwise(shapes))
    return [shapes[0][1], *(s[0] for s in shapes)] if chained else None


def _density(model: nn.Module, found: list[tuple[Tensor, dict[str, float]]]) -> pd.DataFrame:
    """Share of singular values per unit of ln s, the lowest (0.2 %, or below 1/1000 of the top) left out.

    No rows for dead networks, whose singular values are all zero.
    """
    values = torch.cat([v.flatten() for v, _ in found]).cpu().numpy()
    positive = values[values > 0]
    if not len(positive):
        return pd.DataFrame({name: np.empty(0) for name in ("singular_value", "density_per_log", "theory_per_log")})
    # A lost direction is zero up to rounding: bins down there would leave none for the spectrum itself.
    low = max(np.quantile(positive, 0.002), positive.max() / 1000)
    edges = np.geomspace(low, positive.max(), _BINS + 1)
    counts, _ = np.histogram(values, edges)
    middle = np.sqrt(edges[1:] * edges[:-1])
    density = counts / len(values) / np.diff(np.log(edges))
    widths, theory = _widths(model), np.full(len(middle), np.nan)
    if widths is not None and min(widths) == widths[-1]:
        sigma_w2 = np.mean([list(w2.values()) for _, w2 in found], 0)
        theory = middle * signal.singular_value_density(middle, widths, sigma_w2.tolist())
    return pd.DataFrame({"singular_value": middle, "density_per_log": density, "theory_per_log": theory})


def summary(tables: Tables) -> pd.DataFrame:
    """Dense networks and those of the sparsest level measured: mean ± sd over n."""
    plain = ("mean_squared", "mean_squared_theory", "condition_number", "scaled_distance")
    return side_by_side(tables["networks"], {n: n for n in plain} | {"test_error_%": "test_error"})


if __name__ == "__main__":
    sys.exit(main("signal_propagation", Config, run, draw, summary))
