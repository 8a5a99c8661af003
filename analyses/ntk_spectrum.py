"""The restricted neural tangent kernel of tickets and their controls, against the dense kernel.

For every network of chosen levels, at the point where its training starts: the spectrum of Theta_m in live
coordinates, how much of the dense network's spectrum it has kept, its alignment with the targets, what kernel
regression with it predicts, and how far it has moved when training ends. The dense kernel is that of the same init
seed at the rewind step; a reinitialised network is held against it too, having no dense kernel of its own. Of dense
networks also the kernels of step 0 and of every snapshot are held against one another and against the last.

Kernel regression is that of Theta_m alone, from f = 0. From the network's own outputs at the start it is another
predictor, the linearised network, which a mask that already classifies makes good by itself: both are there, with
the error of those outputs. The target alignment is with YY' x I, the ideal kernel of every output by itself; that with
the targets as one direction is there as ``rank_one_target_alignment``.

With no arguments it makes a run on the bundled digits and measures it in a few minutes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import (
    OfRun,
    Tables,
    beside,
    chosen_levels,
    each_network,
    joined,
    main,
    open_run,
)
from analyses.intervals import interval, with_holm
from figures.ntk_spectrum import draw
from ticketlab import ntk
from ticketlab.printed import side_by_side

COMPARED = (
    *("effective_rank", "log_spectral_distance", "subspace_overlap", "alignment_with_dense"),
    *("target_alignment", "regression_error"),
)
"""Measures whose differences between ticket and controls are tested."""
N_RANKS = 60
"""Ranks of a spectrum that are written, evenly spaced on a log axis: thousands of them say no more."""


@dataclass(frozen=True)
class Config(OfRun):
    """Spectra of the restricted NTK against density, for every treatment of a run."""

    at_levels: tuple[int, ...] | None = None
    """Levels to measure beside level 0; None: every second one and the last."""
    n_spectrum: int = 100
    """Training examples of the full kernel, whose side is n * classes."""
    n_regression: int = 1000
    """Training examples of kernel regression, and at most as many test examples."""


@dataclass(frozen=True)
class Data:
    """Inputs of the kernels."""

    spectrum: tl.Split
    train: tl.Split
    test: tl.Split
    n_classes: int


def run(config: Config) -> Tables:
    """``kernels``: one row per network. ``spectra``: its eigenvalues at ranks that a log axis tells apart.

    ``drift``: one row per dense pair of steps.

    ``contrasts``, where there are controls: one row per level, measure and control.
    """
    study, model, task, levels = open_run(config)
    task = task.to(dtype=torch.float64)  # in which small eigenvalues can be told from rounding
    cut = task.limit(min(config.n_regression, len(task.train)), None, min(config.n_regression, len(task.test)))
    first = task.limit(min(config.n_spectrum, len(task.train))).train
    data = Data(first, cut.train, cut.test, task.n_classes)
    wanted = {0} | chosen_levels(config.at_levels, study.levels, {*range(0, study.levels + 1, 2), study.levels})
    dense: dict[int, tuple[Tensor, ntk.Spectrum]] = {}
    rows, spectra, drifts = [], [], []
    for level in levels:
        networks = list(each_network(level)) if level.level in wanted else []
        for about, network in tqdm(networks, desc=f"kernels of level {level.level}", unit="network", disable=None):
            kernel = _kernel(model, network, network.start, data.spectrum.x)
            spectrum = ntk.spectrum(kernel)
            if level.level == 0:
                dense[about["init_seed"]] = kernel, spectrum
            row = {**about, **_measures(kernel, spectrum, *dense[about["init_seed"]], data)}
            end = _kernel(model, network, network.end, data.spectrum.x)
            row |= _drift(kernel, end) | _regression_errors(model, network, data)
            rows.append(row)
            names = {c: about[c] for c in ("level", "treatment", "init_seed", "level_density")}
            spectra.append(_ranked(spectrum).assign(**names))
            if level.level == 0:
                drifts += _dense_drifts(model, network, study.recipe.steps, data)
    names = {"task": study.task, "model": study.model, "n_spectrum": len(first), "n_regression": len(cut.train)}
    names |= {"n_test": len(cut.test), "rewind_step": study.rewind_step}
    kernels = pd.DataFrame(rows).assign(**names)
    tables = {"kernels": kernels, "spectra": joined(spectra), "drift": pd.DataFrame(drifts)}
    return tables | ({"contrasts": contrasts(kernels)} if set(kernels["treatment"]) > {"ticket"} else {})


def contrasts(kernels: pd.DataFrame) -> pd.DataFrame:
    """Measures of tickets minus those of controls, paired by init seed, with 95 % intervals by Student's t.

    ``p_value`` is unadjusted, ``p_holm`` corrected for the whole table.
    """
    rows = []
    for level, group in kernels[kernels["level"] > 0].groupby("level"):
        for measure, control in product(COMPARED, sorted(set(kernels["treatment"]) - {"ticket"})):
            about = {"level": level, "level_density": group["level_density"].iloc[0], "measure": measure}
            wide = group.pivot(index="init_seed", columns="treatment", values=measure)
            gap = wide.get("ticket", np.nan) - wide.get(control, pd.Series(dtype=float))
            rows.append({**about, "control": control, **interval(gap, "ticket_minus_control")})
    return with_holm(pd.DataFrame(rows))


def _ranked(spectrum: ntk.Spectrum) -> pd.DataFrame:
    """Eigenvalues and their shares of the trace, at the first ten ranks and at `N_RANKS` from the first to the last."""
    values = spectrum.eigenvalues.cpu().numpy()
    ranks = np.unique(np.geomspace(1, len(values), N_RANKS).round().astype(int))
    ranks = np.union1d(ranks, np.arange(1, min(10, len(values)) + 1))
    chosen = values[ranks - 1]
    return pd.DataFrame({"rank": ranks, "eigenvalue": chosen, "share_of_trace": chosen / float(spectrum.trace)})


def _kernel(model: nn.Module, network: tl.Level, at: tl.State, x: Tensor) -> Tensor:
    """Theta_m in the dtype of x."""
    return ntk.kernel(model, beside(at, x), x, masks=network.masks)


def _measures(
    kernel: Tensor, spectrum: ntk.Spectrum, dense: Tensor, reference: ntk.Spectrum, data: Data
) -> dict[str, float]:
    kept = ntk.preservation(reference, spectrum)
    found = {
        "trace": spectrum.trace,
        "effective_rank": spectrum.effective_rank,
        "participation_ratio": spectrum.participation_ratio,
        "condition_number": spectrum.condition_number,
        "log_spectral_distance": kept.log_spectral_distance,
        "n_compared": kept.n_compared,
        "subspace_overlap": kept.subspace_overlap,
        "alignment_with_dense": ntk.alignment(dense, kernel),
        "target_alignment": ntk.target_alignment(kernel, data.spectrum.y),
        "rank_one_target_alignment": ntk.rank_one_target_alignment(kernel, data.spectrum.y),
    }
    return {name: float(value) for name, value in found.items()}


def _drift(start: Tensor, end: Tensor) -> dict[str, float]:
    found = ntk.drift(start, end)
    return {"relative_change": float(found.relative_change), "kernel_distance": float(found.distance)}


def _dense_drifts(model: nn.Module, network: tl.Level, steps: int, data: Data) -> list[dict[str, float]]:
    """From each step that is kept to each later one: theta_0, theta_k and theta_T."""
    kernels = {k: _kernel(model, network, at, data.spectrum.x) for k, at in sorted(network.snapshots.items())}
    kernels[steps] = _kernel(model, network, network.end, data.spectrum.x)
    seed = int(network.metrics["init_seed"].iloc[0])
    return [
        {"init_seed": seed, "from_step": a, "to_step": b, **_drift(kernels[a], kernels[b])}
        for a, b in combinations(kernels, 2)
    ]


def _regression_errors(model: nn.Module, network: tl.Level, data: Data) -> dict[str, float]:
    """Test errors of kernel regression with the trace kernel and one-hot targets, and of the network at its start.

    In float64: in float32 the rounding of the largest eigenvalue drowns the directions that tell digits apart.
    The ridge is 1e-6 of the mean diagonal.
    """
    start, x_train, x_test = beside(network.start, data.train.x), data.train.x, data.test.x
    trace = partial(ntk.kernel, model, start, masks=network.masks, outputs="trace")
    train, across = (trace(x, x_train) / data.n_classes for x in (x_train, x_test))
    f_train, f_test = (tl.apply(model, start, x, masks=network.masks) for x in (x_train, x_test))
    targets = F.one_hot(data.train.y, data.n_classes).to(train.dtype)
    regression = partial(ntk.kernel_regression, train, targets, across, 1e-6 * float(train.diagonal().mean()))
    found = {
        "regression_error": regression(),
        "regression_error_from_start": regression(f_train=f_train, f_test=f_test),
        "start_error": f_test,
    }
    return {name: float((f.argmax(1) != data.test.y).double().mean()) for name, f in found.items()}


def summary(tables: Tables) -> pd.DataFrame:
    """Dense networks and those of the sparsest level measured: mean ± sd over n."""
    plain = ("effective_rank", "log_spectral_distance", "subspace_overlap", "target_alignment")
    errors = ("regression_error", "regression_error_from_start", "start_error", "test_error")
    return side_by_side(tables["kernels"], {n: n for n in plain} | {f"{n}_%": n for n in errors})


if __name__ == "__main__":
    sys.exit(main("ntk_spectrum", Config, run, draw, summary))
