"""ticketlab: an analysis toolkit for the mechanics of lottery tickets.

>>> import ticketlab as tl
>>> config = tl.ImpConfig(task="digits", model="mlp_100_50", levels=4)
>>> for level in tl.imp(config, store="runs"):  # doctest: +SKIP
...     print(level.density, level.metrics["test_error"].mean())
"""

from __future__ import annotations

import sys
from importlib import import_module
from inspect import isfunction
from types import ModuleType

from ticketlab import (
    attention,
    bounds,
    connectivity,
    curvature,
    functional,
    gradients,
    graph,
    masks,
    models,
    ntk,
    overlap,
    permutation,
    signal,
)
from ticketlab.data import Split, Task
from ticketlab.data import load as load_task
from ticketlab.engine import criteria, dynamic, exchange, presets, supermask
from ticketlab.engine.config import ImpConfig
from ticketlab.engine.kept import train as train_starts
from ticketlab.engine.level import Level
from ticketlab.engine.presets import preset
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.run import Run, load_run, runs
from ticketlab.engine.stacks import takes_stacks
from ticketlab.engine.start import Start
from ticketlab.engine.study import Estimate, Study, imp, model_and_task, run_folder
from ticketlab.engine.training import Outcome
from ticketlab.engine.verify import verify
from ticketlab.errors import kinds_told
from ticketlab.image_folder import ImageFolder
from ticketlab.network import apply, evaluate
from ticketlab.seeds import initialise
from ticketlab.shard_writer import write_shards
from ticketlab.shards import load_shards, verify_shards
from ticketlab.state import State, state
from ticketlab.tokens import task_from_text
from ticketlab.version import __version__

train = takes_stacks(train_starts)

__all__ = [
    "Estimate",
    "ImageFolder",
    "ImpConfig",
    "Level",
    "Outcome",
    "Recipe",
    "Run",
    "Split",
    "Start",
    "State",
    "Study",
    "Task",
    "__version__",
    "apply",
    "attention",
    "bounds",
    "connectivity",
    "criteria",
    "curvature",
    "dynamic",
    "evaluate",
    "exchange",
    "functional",
    "gradients",
    "graph",
    "imp",
    "initialise",
    "load_run",
    "load_shards",
    "load_task",
    "masks",
    "model_and_task",
    "models",
    "ntk",
    "overlap",
    "permutation",
    "plot",
    "preset",
    "presets",
    "run_folder",
    "runs",
    "signal",
    "state",
    "supermask",
    "task_from_text",
    "train",
    "verify",
    "verify_shards",
    "write_shards",
]


def _tell_kinds() -> None:
    """Public functions say which argument is of the wrong kind, where they fail over one."""
    rooms = (attention, bounds, connectivity, curvature, gradients, masks, models, ntk, overlap, permutation, signal)
    public = [(room, vars(room), room.__name__) for room in rooms] + [(sys.modules[__name__], __all__, "ticketlab.")]
    for room, names, inside in public:
        for name in [n for n in names if not n.startswith("_") and hasattr(room, n)]:
            function = getattr(room, name)
            if isfunction(function) and function.__module__.startswith(inside):
                told = kinds_told(function)
                told.__module__ = room.__name__
                setattr(room, name, told)


_tell_kinds()


def __getattr__(name: str) -> ModuleType:
    """``plot`` when it is asked for: matplotlib takes longer to import than all else."""
    if name == "plot":
        return import_module("ticketlab.plot")
    raise AttributeError(f"module 'ticketlab' has no attribute {name!r}")
