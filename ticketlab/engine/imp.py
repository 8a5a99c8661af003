"""Iterative magnitude pruning: train, prune, rewind, level after level, with its controls in the same stack.

``imp(config)`` is a generator of ``Level``: what is stored is yielded first, the rest is trained, stored
and yielded, so that a caller can stop, log, plot or resume at any level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ticketlab import data, models
from ticketlab import masks as mask_ops
from ticketlab.data import Task
from ticketlab.engine import cost
from ticketlab.engine import store as runs
from ticketlab.engine.config import LATER_FIELDS, ImpConfig
from ticketlab.engine.criteria import ROUNDS, Evidence, draw_examples, find, refuse_too_large, score
from ticketlab.engine.store import Level
from ticketlab.engine.training import train
from ticketlab.engine.treatments import TREATMENTS, Origin, Start
from ticketlab.errors import Refused
from ticketlab.functional import Execution, masked
from ticketlab.seeds import derived_seed, initialise
from ticketlab.state import Masks, State, stack, stack_states, state

Factory = Callable[[], nn.Module]


@dataclass(frozen=True)
class _Study:
    """A config with all that it names made real."""

    config: ImpConfig
    factory: Factory
    model: nn.Module
    task: Task
    execution: Execution
    progress: bool

    @property
    def order_seeds(self) -> tuple[int, ...]:
        return self.config.order_seeds or self.config.init_seeds

    @property
    def environment(self) -> dict[str, str]:
        return runs.environment(self.task.device)

    def description(self) -> dict[str, Any]:
        """What decides every stored bit; not ``levels``, so that a run can be extended."""
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        first = state(initialise(self.factory, self.config.init_seeds[0])).params
        sums = {name: f"{float(p.double().abs().sum()):.5g}" for name, p in first.items()}  # rounding varies by machine
        # A later field at its default is left out, so that runs stored before it keep their name.
        later = {f.name: f.default for f in fields(self.config) if f.name in LATER_FIELDS}
        told = {k: v for k, v in asdict(self.config).items() if k != "levels" and (k not in later or v != later[k])}
        fingerprint = {"task": self.task.fingerprint(), "model": runs.identity({"shapes": shapes, "sums": sums})}
        return _plain({"config": told, "fingerprint": fingerprint})


def imp(
    config: ImpConfig,
    *,
    model: Factory | None = None,
    task: Task | None = None,
    store: str | Path | None = "runs",
    device: torch.device | str | None = None,
    execution: Execution = "auto",
    progress: bool = True,
) -> Iterator[Level]:
    """Find lottery tickets: yield level 0 (dense), 1, ... ``config.levels``, each stored before it is yielded.

    Level 0 trains the dense networks and keeps their weights at the rewind step k. Every further level prunes
    the tickets of the level before, rewinds them to k, and trains them and the other treatments to step T
    (Frankle & Carbin 2019; late rewinding: Frankle et al. 2020). Weights and masks are a function of the config
    and the machine's arithmetic alone: a killed run goes on to the same bits.

    Args:
        config: The study.
        model: Makes a network of your own (no arguments); ``config.model`` when None.
        task: Data of your own; ``config.task`` when None.
        store: Folder of run directories; None keeps nothing.
        device: Where to train; a CUDA device if there is one, otherwise the CPU, when None.
        execution: How replicas are stacked, see ``functional.resolve``.
        progress: Show progress bars where the output is a terminal.

    Raises:
        Refused: Before anything is trained: an unknown name, a run directory of another study or a damaged
            one, or a directory that another process writes. While training: a level that would leave a layer
            without a live weight, or scores that are all zero; what is stored stays.
    """
    study = _prepare(config, model, task, device, execution, progress)
    folder = None if store is None else _open(study, Path(store))
    return _levels(study, folder)


def run_folder(
    config: ImpConfig, store: str | Path = "runs", *, model: Factory | None = None, task: Task | None = None
) -> Path:
    """Where ``imp(config, store=store, model=..., task=...)`` keeps its levels."""
    study = _prepare(config, model, task, "cpu", "auto", False)
    return _folder(study, Path(store))


def model_and_task(config: ImpConfig, *, device: torch.device | str | None = None) -> tuple[nn.Module, Task]:
    """The network, initialised with the first init seed, and the data that a config names.

    Args:
        config: Of a study with a named model and task.
        device: Of both; a CUDA device if there is one, otherwise the CPU, when None.

    Raises:
        Refused: An unknown name, or data that cannot be loaded.
    """
    study = _prepare(config, None, None, device, "auto", False)
    return study.model, study.task


def _task(config: ImpConfig, own: Task | None, device: torch.device | str | None) -> Task:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, config.dtype)
    if own is not None:
        return own.to(device, dtype)
    size, seed = config.validation_size, config.split_seed
    return data.load(config.task, validation_size=size, split_seed=seed, dtype=dtype, device=device)


def _prepare(
    config: ImpConfig,
    model: Factory | None,
    task: Task | None,
    device: torch.device | str | None,
    execution: Execution,
    progress: bool,
) -> _Study:
    loaded = _task(config, task, device)
    shape, n_classes = loaded.input_shape, loaded.n_classes
    factory = model or (lambda: models.build(config.model, shape, n_classes))
    name = getattr(model, "__name__", "custom") if model else config.model
    config = replace(config, model=name, task=task.name if task else config.task)
    if config.recipe.batch_size > len(loaded.train):
        n = len(loaded.train)
        raise Refused(f"batch_size must be at most {n}, the training set: got {config.recipe.batch_size}.")
    net = initialise(factory, config.init_seeds[0]).to(loaded.device, loaded.dtype)
    _check_levels(config, net)
    refuse_too_large(config.criterion, net)
    return _Study(config, factory, net, loaded, execution, progress)


def _check_levels(config: ImpConfig, model: nn.Module) -> None:
    """Refuse levels that counting alone shows to be too many, before hours are spent on them."""
    sizes = {name: mask.numel() for name, mask in mask_ops.ones(model).items()}
    rates = _fractions(config, model)
    # Groups that are pruned together, and how many layers each has to feed.
    if isinstance(rates, dict):
        groups = [([name], n, rates[name]) for name, n in sizes.items()]
    else:
        groups = [(list(sizes), sum(sizes.values()), rates)]
    for level in range(1, config.levels + 1):
        where = f"at level {level} of {config.levels}. Use at most {level - 1} levels, or another prune_fraction."
        before, groups = groups, [(layers, n - mask_ops.n_removed(n, rate), rate) for layers, n, rate in groups]
        if groups == before:
            left = sum(n for _, n, _ in groups)
            raise Refused(f"every level must prune a weight: none of {left} would go {where}")
        for layers, n, _ in groups:
            if n < len(layers):
                short = repr(layers[0]) if len(layers) == 1 else f"{len(layers)} layers"
                raise Refused(f"every layer must keep a live weight: {n} would be left for {short} {where}")


def _fractions(config: ImpConfig, model: nn.Module) -> float | dict[str, float]:
    if config.scope == "global":
        return config.prune_fraction
    return mask_ops.fractions_by_layer(
        model, config.prune_fraction, conv=config.conv_fraction, output=config.output_fraction
    )


def _folder(study: _Study, store: Path) -> Path:
    config = study.config
    return store / f"{config.task}-{config.model}-{runs.identity(study.description())}"


def _open(study: _Study, store: Path) -> Path:
    """The run's folder, checked to be its own; a new one gets its config.json with the first level."""
    folder = _folder(study, store)
    if (folder / runs.CONFIG).exists():
        stored = {k: v for k, v in runs.read_config(folder).items() if k in ("config", "fingerprint")}
        if stored != study.description():
            raise Refused(
                f"{folder} must be a run of this study, but its {runs.CONFIG} is of another: "
                f"{_difference(stored, study.description())}. Move it away, or use another store."
            )
    return folder


def _levels(study: _Study, folder: Path | None) -> Iterator[Level]:
    dense: Level | None = None
    level: Level | None = None
    with ExitStack() as held:
        locked = False
        for number in range(study.config.levels + 1):
            stored = runs.n_stored(folder) if folder else 0
            if folder and number >= stored and not locked:
                held.enter_context(runs.writing(folder, study.description() | {"environment": study.environment}))
                locked, stored = True, runs.n_stored(folder)  # another process may have written in between
            if folder and number < stored:
                level = runs.read_level(folder, number, study.task.device)
                in_order = {name: level.masks[name] for name in mask_ops.prunable(study.model)}
                level = replace(level, masks=in_order)  # a random mask of the next level counts in it
            else:
                level = _dense(study) if dense is None or level is None else _pruned(study, number, dense, level)
                if folder:
                    runs.write_level(folder, level, study.environment)
            dense = dense or level
            yield level


def _dense(study: _Study) -> Level:
    """Level 0: the dense networks, their weights at step k as ``start``."""
    config, k = study.config, study.config.rewind_step
    starts, rows = [], []
    for init_seed, order_seed in zip(config.init_seeds, study.order_seeds, strict=True):
        rows.append({"treatment": "ticket", "init_seed": init_seed, "order_seed": order_seed})
        fresh = state(initialise(study.factory, init_seed)).to(study.task.device, study.task.dtype)
        starts.append(Start(fresh, mask_ops.ones(study.model), order_seed))
    level = _train(study, 0, starts, rows, first_step=0, snapshot_steps={0, k, *config.snapshot_steps})
    return replace(level, start=level.snapshots[k].clone())


def _pruned(study: _Study, number: int, dense: Level, previous: Level) -> Level:
    """Level 1 and on: prune the tickets of the level before, rewind, train them beside their controls."""
    config = study.config
    starts: list[Start] = []
    rows: list[dict[str, Any]] = []
    origins = []
    for init_seed, order_seed in zip(config.init_seeds, study.order_seeds, strict=True):
        first, before = dense.select(init_seed=init_seed), previous.select(treatment="ticket", init_seed=init_seed)
        origin = Origin(
            factory=study.factory,
            rewound=first.start,
            masks=_next_masks(study, before, init_seed, number),
            init_seed=init_seed,
            order_seed=order_seed,
            level=number,
            trained=before.end,
            dense=first.end,
            last_learning_rate=config.recipe.learning_rate_at(config.recipe.steps - 1),
            retraining=config.retraining,
        )
        origins.append(origin)
    for treatment in config.treatments:
        for origin in origins:
            start = TREATMENTS[treatment](origin)
            starts.append(start)
            rows.append({"treatment": treatment, "init_seed": origin.init_seed, "order_seed": start.order_seed})
    return _train(study, number, starts, rows, first_step=config.rewind_step)


def _next_masks(study: _Study, ticket: Level, init_seed: int, number: int) -> Masks:
    config, seed = study.config, derived_seed("criterion", init_seed, number)
    x, y = draw_examples(study.task, config.score_examples, init_seed)
    evidence = Evidence(study.model, ticket.masks, ticket.start, ticket.end, x, y, seed, config.scope)
    fractions = _fractions(config, study.model)
    if ROUNDS.get(config.criterion, 1) == 1:
        return mask_ops.prune(ticket.masks, score(config.criterion, evidence), fractions)
    if isinstance(fractions, dict):
        return find(config.criterion, evidence, {n: _left({n: m}, fractions[n]) for n, m in ticket.masks.items()})
    return find(config.criterion, evidence, _left(ticket.masks, fractions))


def _left(masks: Masks, fraction: float) -> float:
    """The density after a pruning step."""
    alive = int(mask_ops.kept(masks))
    return (alive - mask_ops.n_removed(alive, fraction)) / mask_ops.total(masks)


def _train(
    study: _Study,
    number: int,
    starts: list[Start],
    rows: list[dict[str, Any]],
    *,
    first_step: int,
    snapshot_steps: set[int] | frozenset[int] = frozenset(),
) -> Level:
    config = study.config
    masks = stack([s.masks for s in starts])
    begun = stack_states([_begun(s) for s in starts])
    rates = [s.learning_rate for s in starts]
    density = float(mask_ops.density(starts[0].masks))
    outcome = train(
        study.model,
        begun,
        masks,
        study.task,
        config.recipe,
        [s.order_seed for s in starts],
        first_step=first_step,
        snapshot_steps=sorted(snapshot_steps),
        frozen=[s.frozen for s in starts],
        learning_rates=None if set(rates) == {None} else rates,
        execution=study.execution,
        description=f"level {number}/{config.levels}, density {density:.3g}",
        progress=study.progress,
    )
    results = outcome.metrics.drop(columns="replica")
    table = pd.concat([pd.DataFrame(rows), _costs(study, starts, first_step), results], axis=1)
    table.insert(0, "replica", range(len(starts)))
    table.insert(1, "level", number)
    return Level(
        number, density, masks, begun, outcome.end, table, outcome.curves, outcome.snapshots, outcome.wall_seconds
    )


def _begun(start: Start) -> State:
    """What is trained from: pruned weights zero, unless they are frozen at their values."""
    return start.state if start.frozen else State(masked(start.state.params, start.masks), start.state.buffers)


def _costs(study: _Study, starts: list[Start], first_step: int) -> pd.DataFrame:
    """What each replica keeps and what its training costs."""
    recipe = study.config.recipe
    uses = cost.positions(study.model, study.task.train.x)
    steps = recipe.steps - first_step
    dense = cost.forward_macs(uses, {n: m.numel() for n, m in starts[0].masks.items()})
    rows = []
    for start in starts:
        used = {n: m | (_begun(start).params[n] != 0) for n, m in start.masks.items()}
        live = cost.forward_macs(uses, {n: int(m.sum()) for n, m in used.items()})
        rows.append(
            {
                "density": float(mask_ops.density(start.masks)),
                "kept": int(mask_ops.kept(start.masks)),
                "prunable": mask_ops.total(start.masks),
                "first_step": first_step,
                "steps": steps,
                "macs_dense": cost.training_macs(dense, recipe.batch_size, steps),
                "macs_live": cost.training_macs(live, recipe.batch_size, steps),
            }
        )
    return pd.DataFrame(rows)


def _plain(value: Any) -> Any:
    """As JSON reads it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    flat = [{**d["config"], **d["fingerprint"]} for d in (stored, wanted)]
    changed = [f"{k} {flat[0].get(k)!r} instead of {flat[1].get(k)!r}" for k in flat[1] if flat[0].get(k) != flat[1][k]]
    return "; ".join(changed) or "other fields"
