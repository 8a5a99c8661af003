"""What a network is trained on and how, in one word, and the tickets that IMP finds there.

Such as ``mnist``, ``mnist:0-4`` or ``fashion_mnist@sgd,0.05,0.9``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import ticketlab as tl
from analyses.command import followed
from ticketlab.data import load
from ticketlab.engine.store import read_config
from ticketlab.errors import Refused

_WORD = re.compile(
    r"(?P<task>\w+)(:(?P<low>\d+)-(?P<high>\d+))?(@(?P<optimizer>\w+),(?P<rate>[^,]+)(,(?P<mu>[^,]+))?)?"
)


@dataclass(frozen=True)
class Setting:
    """A task and a recipe: one end of a transfer."""

    name: str
    task: tl.Task
    recipe: tl.Recipe


@dataclass(frozen=True)
class Tickets:
    """What the IMP run of a setting has to give."""

    setting: Setting
    order_seeds: dict[int, int]
    """Of each init seed."""
    dense: tl.Level
    levels: dict[int, tl.Level]
    """Tickets alone."""

    @property
    def pruned(self) -> tuple[str, ...]:
        return tuple(self.dense.masks)


def setting(
    word: str, study: tl.ImpConfig, *, resize: tuple[int, int] | None, grey: bool, device: torch.device | str
) -> Setting:
    """Read ``TASK[:FIRST-LAST][@OPTIMIZER,RATE[,MOMENTUM]]`` and load what it names.

    Args:
        word: A named task, the range of its classes to keep, and how the study's recipe is changed.
        study: Whose recipe, split and dtype hold otherwise.
        resize: Height and width of the images; as they are when None.
        grey: Whether colours are turned into one channel.
        device: Of the task.

    Raises:
        Refused: Another form, or a name, class or number that does not exist.
    """
    found = _WORD.fullmatch(word)
    if found is None:
        raise Refused(
            f"a setting must be TASK[:FIRST-LAST][@OPTIMIZER,RATE[,MOMENTUM]], such as mnist:0-4 or "
            f"mnist@sgd,0.05,0.9: got {word!r}."
        )
    size, seed, dtype = study.validation_size, study.split_seed, getattr(torch, study.dtype)
    task = load(found["task"], validation_size=size, split_seed=seed, dtype=dtype, device=device)
    if found["low"] is not None:
        task = task.of_classes(int(found["low"]), int(found["high"]))
    task = task.grey() if grey else task
    task = task if resize is None else task.resize(*resize)
    return Setting(word, task, _recipe(study.recipe, found))


def _recipe(recipe: tl.Recipe, found: re.Match[str]) -> tl.Recipe:
    if found["optimizer"] is None:
        return recipe
    try:
        rate, momentum = float(found["rate"]), float(found["mu"] or recipe.momentum)
    except ValueError as error:
        raise Refused(f"rate and momentum must be numbers: got {found[0]!r}.") from error
    changes: dict[str, Any] = {"optimizer": found["optimizer"], "learning_rate": rate, "momentum": momentum}
    return replace(recipe, **changes)


def tickets(
    settings: Sequence[Setting],
    study: tl.ImpConfig,
    levels: tuple[int, ...],
    theta_k: int,
    *,
    runs: Sequence[Path],
    store: Path,
) -> dict[str, Tickets]:
    """The tickets of every setting, from the run directories given or from runs made or resumed in ``store``.

    Raises:
        Refused: Settings of different input shapes, a run of no setting, or one that lacks a level, an init
            seed or the weights at step ``theta_k``.
    """
    shapes = {each.name: each.task.input_shape for each in settings}
    if len(set(shapes.values())) > 1:
        raise Refused(
            f"all settings must have inputs of one shape, so that masks fit: got {shapes}. Say how to bring them to "
            "one: --resize HEIGHT WIDTH for another size, --grey for colour beside grey."
        )
    given = {_identity(folder): folder for folder in runs}
    wanted = {each.name: (study.model, each.recipe, each.task.fingerprint()) for each in settings}
    strangers = [str(folder) for key, folder in given.items() if key not in wanted.values()]
    if strangers:
        raise Refused(
            f"runs must be of a setting, with its model, recipe and task: {strangers} are not. "
            "Give the flags that they were made with too (--model, --steps, ...), or leave them out."
        )
    # Before hours are spent on training.
    for key in wanted.values():
        source = tl.load_run(given[key]).config if key in given else study
        _check(source, given.get(key, "the study"), study.init_seeds, levels, theta_k)
    folders = [given.get(wanted[each.name]) or _make(each, study, store) for each in settings]
    return {each.name: _read(each, folder, levels) for each, folder in zip(settings, folders, strict=True)}


def _identity(folder: Path) -> tuple[str, tl.Recipe, str]:
    """What of a stored run must equal a setting's."""
    study = tl.load_run(folder).config
    return study.model, study.recipe, read_config(folder)["fingerprint"]["task"]


def _check(
    run: tl.ImpConfig, name: Path | str, init_seeds: tuple[int, ...], levels: tuple[int, ...], theta_k: int
) -> None:
    steps = {0, run.rewind_step, *run.snapshot_steps}
    checks = {
        f"levels {levels}: it has 0 to {run.levels}": max(levels) <= run.levels,
        f"init seeds {init_seeds}: it has {run.init_seeds}": set(init_seeds) <= set(run.init_seeds),
        f"weights at step theta_k = {theta_k}: it has those at {sorted(steps)}": theta_k in steps,
    }
    for what, holds in checks.items():
        if not holds:
            raise Refused(f"{name} must have {what}. Choose others, or --levels, --init-seeds, --snapshot-steps.")


def _make(each: Setting, study: tl.ImpConfig, store: Path) -> Path:
    made = tl.Study(replace(study, recipe=each.recipe), task=each.task, device=each.task.device)
    print(f"run: {made.folder(store)}", flush=True)
    for _ in made.levels(store):
        pass
    return made.folder(store)


def _read(each: Setting, folder: Path, levels: tuple[int, ...]) -> Tickets:
    run = tl.load_run(folder, device=each.task.device)
    seeds = run.config.init_seeds
    orders = dict(zip(seeds, run.config.order_seeds or seeds, strict=True))
    every = {level.level: level.subset(treatment="ticket") for level in followed(run)}
    return Tickets(each, orders, every[0], {level: every[level] for level in levels})
