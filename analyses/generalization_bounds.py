"""What generalisation bounds certify about the tickets of a run, their controls, and masks on untrained weights.

For every network of chosen levels, four hypotheses: ``trained``, its float32 weights; ``quantised``, the same moved
to a few shared values; ``untrained``, its mask on the weights that training started from; ``random_signs``, its mask
on their magnitudes with signs drawn from the seed. Each has its own description, its own training and test error,
and its own bounds. ``mdl`` is the formula k ln d in which sparsity alone tightens the bound; of a trained network it
certifies nothing, and the table says so.

The last two are measured where weights start from what a seed alone fixes: of runs that rewind to step 0, and of
treatments other than ``lr_rewind`` and ``fine_tune``, which start from trained weights. Networks of ``sibling``
(which start as their tickets do), ``frozen_init`` and ``frozen_unless_shrunk`` (whose pruned weights are not zero, so
that their masks do not describe them) are left out.

The sample is the training split. Validation examples take no part: every network is that of the last step, and the
code is fixed in advance. A word of it says everything about a coded network, so that the choice of level, treatment,
seed and number of values is paid for. A mask needs weights to lie on: the choice among those of the run (init seed,
treatment, level, random signs or not) costs its union bits.

With no arguments it makes a run on the bundled digits, in a few minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import OfRun, Tables, chosen_levels, each_network, joined, main, open_run
from figures.generalization_bounds import draw
from ticketlab import bounds
from ticketlab.engine.treatments import TREATMENTS
from ticketlab.errors import Refused
from ticketlab.printed import grouped
from ticketlab.seeds import stream

SEED_FIXED = tuple(name for name, treatment in TREATMENTS.items() if treatment.seed_fixed)
"""Treatments that start from a function of mask, level and seed, where the run itself rewinds to theta_0."""


@dataclass(frozen=True)
class Config(OfRun):
    """Generalisation bounds against density, for every treatment of a run."""

    at_levels: tuple[int, ...] | None = None
    """Levels to measure; None: every second one and the last."""
    n_values: tuple[int, ...] = (2, 3, 5, 8)
    """Numbers of shared values to quantise each tensor to; the one with the least bound is shown."""
    delta: float = 0.05
    """Probability that a bound fails."""

    def __post_init__(self) -> None:
        if not self.n_values:
            raise Refused("n_values must hold at least one number of shared values: got none. Try 2 4 8.")


@dataclass(frozen=True)
class Hypothesis:
    """A deterministic classifier, and what describes it."""

    name: str
    state: tl.State
    description: bounds.Description
    train_error: float
    n_values: int | None = None
    """Shared values of each tensor, where they were rounded."""


@dataclass(frozen=True)
class Measure:
    """What every hypothesis of a run is measured with."""

    model: nn.Module
    task: tl.Task
    choices: dict[str, int]
    """Of seed-fixed weights."""
    config: Config

    def error(self, state: tl.State, network: tl.Level, split: tl.Split) -> float:
        return float(tl.evaluate(self.model, state, split.x, split.y, masks=network.masks)[1])


def run(config: Config) -> Tables:
    """``bounds``: one row per network, hypothesis and bound. ``statements``: what bounds say of hypotheses."""
    study, model, task, levels = open_run(config)
    task = task.to(dtype=torch.float32)  # the code holds float32: so does what is evaluated
    choices = {"init seed": len(study.init_seeds), "treatment": len(study.treatments)}
    choices |= {"level": study.levels + 1, "signs": 2}
    measure = Measure(model, task, choices, config)
    rewinds = study.retraining == "rewind" and study.rewind_step == 0
    wanted = chosen_levels(config.at_levels, study.levels, {*range(0, study.levels + 1, 2), study.levels})
    parts = []
    for level in levels:
        networks = list(_networks(level, task.device)) if level.level in wanted else []
        for about, network in tqdm(networks, desc=f"bounds of level {level.level}", unit="network", disable=None):
            del about["test_error"]  # of the trained network: each hypothesis has its own
            for hypothesis in _hypotheses(measure, network, rewinds and about["treatment"] in SEED_FIXED):
                parts.append(pd.DataFrame([about | row for row in _rows(measure, network, hypothesis)]))
    table = joined(parts)
    said = ["hypothesis", "bound", "certificate", "covers", "assumptions"]
    names = {"task": study.task, "model": study.model, "n_train": len(task.train), "n_test": len(task.test)}
    names |= {"n_classes": task.n_classes, "delta": config.delta}
    return {
        "bounds": table.drop(columns=["covers", "assumptions"]).assign(**names),
        "statements": table[said].drop_duplicates(["hypothesis", "bound"]).reset_index(drop=True),
    }


def _networks(level: tl.Level, device: torch.device) -> Iterator[tuple[dict[str, Any], tl.Level]]:
    """Each replica by itself, in float32, in which values are coded."""
    for about, one in each_network(level):
        yield about, replace(one, start=one.start.to(device, torch.float32), end=one.end.to(device, torch.float32))


def _hypotheses(measure: Measure, network: tl.Level, seed_fixed: bool) -> Iterator[Hypothesis]:
    """Those of the docstring; a mask on weights that were trained is described by no seed."""
    masks, train = network.masks, measure.task.train
    yield Hypothesis("trained", network.end, _coded(network, network.end), measure.error(network.end, network, train))
    yield _quantised(measure, network)
    if not seed_fixed:
        return
    seed = int(network.metrics["init_seed"].iloc[0])
    params, buffers = network.start
    signs = {name: _signs(name, tensor, seed) if name in masks else tensor for name, tensor in params.items()}
    description = bounds.description_length(masks, choices=measure.choices)
    for name, state in (("untrained", network.start), ("random_signs", tl.State(signs, buffers))):
        yield Hypothesis(name, state, description, measure.error(state, network, train))


def _signs(name: str, tensor: Tensor, seed: int) -> Tensor:
    """r * abs(theta_0), r uniform in -1, 1 and a function of the seed."""
    r = torch.rand(tensor.shape, generator=stream(f"random signs {name}", seed)) < 0.5
    return tensor.abs() * (1 - 2 * r.to(tensor))


def _coded(network: tl.Level, state: tl.State) -> bounds.Description:
    """Of every value that the network computes with, batch-norm statistics included."""
    buffers = {name: b for name, b in state.buffers.items() if b.is_floating_point()}
    return bounds.description_length(network.masks, state.params | buffers, "coded")


def _quantised(measure: Measure, network: tl.Level) -> Hypothesis:
    """The number of shared values with the least bound."""
    found = []
    for n_values in measure.config.n_values:
        state = tl.State(bounds.quantise(network.theta_end, network.masks, n_values), network.end.buffers)
        error = measure.error(state, network, measure.task.train)
        found.append(Hypothesis("quantised", state, _coded(network, state), error, n_values))
    return min(found, key=lambda h: float(_bound(measure, h)))


def _bound(measure: Measure, hypothesis: Hypothesis) -> bounds.Bound:
    """The tightest certificate for a deterministic classifier."""
    n, delta, classes = len(measure.task.train), measure.config.delta, measure.task.n_classes
    nats, covers = hypothesis.description.nats, hypothesis.description.covers
    return bounds.binomial_tail(hypothesis.train_error, nats, n, delta, n_classes=classes, covers=covers)


def _rows(measure: Measure, network: tl.Level, hypothesis: Hypothesis) -> Iterator[dict[str, Any]]:
    task, delta = measure.task, measure.config.delta
    n, classes, error, description = len(task.train), task.n_classes, hypothesis.train_error, hypothesis.description
    test_error = measure.error(hypothesis.state, network, task.test)
    kept, total = int(tl.masks.kept(network.masks)), tl.masks.total(network.masks)
    found = [
        bounds.mdl(
            error,
            kept,
            total,
            n,
            delta,
            weights="seed" if description.values == "seed" else "trained",
            choice_nats=description.choice_nats,
            n_classes=classes,
        ),
        bounds.occam_hoeffding(error, description.nats, n, delta, n_classes=classes, covers=description.covers),
        bounds.occam_kl(error, description.nats, n, delta, n_classes=classes, covers=description.covers),
        _bound(measure, hypothesis),
        bounds.held_out(test_error, len(task.test), delta, n_classes=classes),
    ]
    about = {
        "hypothesis": hypothesis.name,
        "n_values": hypothesis.n_values,
        "mask_bits": description.mask_nats / math.log(2),
        "description_bits": description.bits,
        "train_error": error,
        "test_error": test_error,
    }
    fields = ("value", "empirical", "complexity", "vacuous", "certificate", "covers", "assumptions")
    for bound in found:
        yield about | {"bound": bound.name} | {name: getattr(bound, name) for name in fields}


def summary(tables: Tables) -> pd.DataFrame:
    """Certified and true errors where the quantised tickets' bound is least: mean ± sd over n networks."""
    table = tables["bounds"]
    shown = table[(table["bound"] == "binomial_tail") & table["hypothesis"].isin(["quantised", "untrained"])]
    tickets = shown[(shown["treatment"] == "ticket") & (shown["hypothesis"] == "quantised")]
    bound = (shown if tickets.empty else tickets).groupby("level")["value"].mean()
    best = shown[shown["level"] == bound.idxmin()]
    best = best.assign(kilobits=best["description_bits"] / 1000)
    errors = {"train_%": "train_error", "certified_%": "value", "test_%": "test_error"}
    columns = {"density": "density", "kilobits": "kilobits"} | errors
    return grouped(best, ["treatment", "hypothesis"], columns)


if __name__ == "__main__":
    sys.exit(main("generalization_bounds", Config, run, draw, summary))
