"""A config made real, once: network, data, what is pruned, identity and folder. ``imp`` is one line over it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticketlab import data, graph, models, shown
from ticketlab import masks as mask_ops
from ticketlab.data import Task
from ticketlab.engine import cost, ranks
from ticketlab.engine import store as runs
from ticketlab.engine.config import ImpConfig, described, in_words
from ticketlab.engine.criteria import CRITERIA, Criterion, Evidence, as_criterion, refuse_too_large
from ticketlab.engine.dynamic.spread import spread_over
from ticketlab.engine.identity import (
    behaviour,
    criterion_effect,
    optimizer_effect,
    schedule_effect,
    treatment_effect,
)
from ticketlab.engine.imp import levels
from ticketlab.engine.level import Level
from ticketlab.engine.recipe import own_name
from ticketlab.engine.start import Start
from ticketlab.engine.training import train
from ticketlab.engine.treatments import TREATMENTS, Origin, Treatment
from ticketlab.errors import Refused, check_type, nearest
from ticketlab.imports import is_own
from ticketlab.lending import lent
from ticketlab.mapped import bytes_of
from ticketlab.network import Execution
from ticketlab.probing import attempt
from ticketlab.seeds import Factory, derived_seed, initialise, kept_generators, seed_generators
from ticketlab.state import State, moved, state

OwnCriteria = Mapping[str, Criterion | Callable[[Evidence], dict[str, Tensor]]]
OwnTreatments = Mapping[str, Treatment | Callable[[Origin], Start]]


@dataclass(frozen=True)
class Estimate:
    """What a study costs, before anything starts."""

    trainings: int
    """Networks trained, dense ones and controls included."""
    steps: int
    """Optimizer steps of all of them."""
    hours: float
    """On this device, from a few steps of level 1; evaluation included."""
    memory_bytes: int
    """Weights, gradients, optimizer state and copies of the largest stack, and the data; not activations."""
    disk_bytes: int
    """Of the whole run directory."""


class Study:
    """An IMP study, checked and ready: nothing is trained before `levels`.

    Args:
        config: The study.
        model: Makes a network of your own (no arguments); ``config.model`` when None.
        task: Data of your own; ``config.task`` when None.
        device: Where to train; a CUDA device if there is one, otherwise the CPU, when None.
        start: Weights and buffers that every replica starts from, such as pretrained ones; the factory's draws when
            None. Replicas then differ in their batch order; ``reinit`` still draws from the factory.
        criteria: Criteria of your own by name, one of which ``config.criterion`` names.
        treatments: Treatments of your own by name, trained beside those of the config.
        execution: How replicas are stacked, see ``network.resolve``. With ``loop`` the bits of a seed do not depend on
            the others; anything but ``auto`` is part of what names the run.
        progress: Show progress bars where the output is a terminal.
        checkpoint_minutes: Time after which the training of a stored level leaves a checkpoint, from which a killed run
            goes on.

    Raises:
        Refused: An unknown name, data that cannot be loaded, a factory whose weights do not depend on the seed, levels
            that counting shows to be too many, a model that does not fit the task.
    """

    def __init__(
        self,
        config: ImpConfig,
        *,
        model: Factory | None = None,
        task: Task | None = None,
        device: torch.device | str | None = None,
        start: State | None = None,
        criteria: OwnCriteria | None = None,
        treatments: OwnTreatments | None = None,
        execution: Execution = "auto",
        progress: bool = True,
        checkpoint_minutes: float = 10.0,
    ) -> None:
        for what, given, kind, remedy in (
            ("config", config, ImpConfig, "Pass tl.ImpConfig(...)."),
            (
                "task",
                task,
                Task,
                "A named one belongs into ImpConfig(task=...); your own comes from Task.from_tensors.",
            ),
            ("start", start, State, "Pass tl.state(model)."),
            ("criteria", criteria, Mapping, 'Pass {"my_name": my_function}.'),
            ("treatments", treatments, Mapping, 'Pass {"my_name": my_function}.'),
        ):
            if given is not None or what == "config":
                check_type(what, given, kind, remedy)
        self.own: dict[str, dict[str, Any]] = {"criteria": dict(criteria or {}), "treatments": dict(treatments or {})}
        name = _file_name(getattr(model, "__name__", type(model).__name__)) if model else config.model
        every = tuple(dict.fromkeys((*config.treatments, *self.own["treatments"])))
        self.criterion = _criterion(config.criterion, self.own["criteria"])
        self.treatments = _treatments(every, self.own["treatments"])
        self.task = _task(config, task, device)
        # The task's own name: that of text says which text it is. A function to import is found by its name again.
        task_name = config.task if task is None and is_own(config.task) else self.task.name
        self.config = replace(config, model=name, task=task_name, treatments=every)
        shape, n_classes = self.task.input_shape, self.task.n_classes
        self.factory: Factory = model or (lambda: models.build(config.model, shape, n_classes))
        self.given, self.execution, self.progress = start, execution, progress
        self.seconds = 60 * checkpoint_minutes
        self.dense: Level | None = None
        self.model = self.initialised(config.init_seeds[0])
        self.names = mask_ops.prunable(self.model, config.prunable or None)
        self._check()

    def __repr__(self) -> str:
        config, n = self.config, len(self.config.init_seeds)
        return (
            f"Study of {config.model} on {config.task}: {config.levels} levels, {n} init seeds, "
            f"{len(self.treatments)} treatments ({', '.join(self.treatments)})"
        )

    def _repr_html_(self) -> str:
        return shown.table(repr(self), in_words(self.config))

    @property
    def order_seeds(self) -> tuple[int, ...]:
        """One batch order per init seed."""
        return self.config.order_seeds or self.config.init_seeds

    @property
    def environment(self) -> dict[str, str]:
        """Versions, device, threads and the execution asked for, as ``config.json`` and manifests keep them."""
        return {**runs.environment(self.task.device), "execution": self.execution}

    @cached_property
    def rates(self) -> float | dict[str, float]:
        """Prune fractions: one, or each layer's; the output layer is found from the graph."""
        config = self.config
        if config.scope == "global":
            return config.prune_fraction
        last = graph.output_layers(self.model, self.task.train.x)
        return mask_ops.fractions_by_layer(
            self.model,
            config.prune_fraction,
            conv=config.conv_fraction,
            output=config.output_fraction,
            output_layers=last,
            names=self.names,
        )

    @cached_property
    def uses(self) -> dict[str, float]:
        """How often one example uses each prunable weight."""
        return cost.positions(self.model, self.task.train.x, self.names)

    @cached_property
    def description(self) -> dict[str, Any]:
        """What decides every stored bit; not ``levels``, so that a run can be extended.

        What the network does is part of it, as far as a few examples show, and what is a user's own: told of the
        network of seed 0, so that blocks of seeds of one study can be known by it.
        """
        dtype, first = getattr(torch, self.config.dtype), self.initialised(0)
        fingerprint = {"task": self.task.fingerprint(), "model": runs.identity(behaviour(first, self.task, dtype))}
        effects: dict[str, Callable[[str, Any], dict[str, Any]]] = {
            "criteria": lambda _, f: criterion_effect(f, first, self.task, self.ones),
            "treatments": lambda name, f: treatment_effect(name, f, self.factory, first, self.ones),
        }
        own = {
            kind: {name: runs.identity(effects[kind](name, f)) for name, f in chosen.items()}
            for kind, chosen in self.own.items()
            if chosen
        }
        recipe = self.config.recipe
        if callable(recipe.optimizer):
            effect = optimizer_effect(recipe.optimizer, first)
            own["optimizer"] = {own_name(recipe.optimizer): runs.identity(effect)}
        if callable(recipe.schedule):
            own["schedule"] = {own_name(recipe.schedule): runs.identity(schedule_effect(recipe))}
        path: dict[str, Any] = {"execution": self.execution} if self.execution != "auto" else {}
        path |= {"start": True} if self.given is not None else {}
        path |= {"ranks": ranks.size()} if ranks.size() > 1 else {}
        return runs.plain(
            {"config": described(self.config), "fingerprint": fingerprint} | ({"own": own} if own else {}) | path
        )

    @cached_property
    def identity(self) -> str:
        """Hash of all that would change a bit of the study; the end of its folder's name."""
        return runs.identity(self.description)

    def rewound(self, step: int, dense: Level) -> Study:
        """The same study with another rewind step k, its dense networks those of this one: a grid over k trains them
        once.

        Args:
            step: k.
            dense: Level 0 of this study, its networks kept at k (``snapshot_steps``).

        Raises:
            Refused: A step that was not kept.
        """
        if step not in dense.snapshots:
            raise Refused(f"the rewind step must be one that level 0 kept: got {step} of {sorted(dense.snapshots)}.")
        other = copy.copy(self)
        for name in ("description", "identity"):
            other.__dict__.pop(name, None)
        other.config = replace(self.config, rewind_step=step)
        other.dense = replace(dense, start=dense.snapshots[step].clone())
        return other

    def folder(self, store: str | Path = "runs") -> Path:
        """Where a store keeps the levels."""
        task, model = _file_name(self.config.task), _file_name(self.config.model)
        return Path(store).expanduser() / f"{task}-{model}-{self.identity}"

    def levels(self, store: str | Path | None = "runs") -> Iterator[Level]:
        """Level 0 (dense), 1, ... ``config.levels``, each stored before it is yielded; what is stored comes first.

        Raises:
            Refused: At once: a directory of another study, a damaged one, a place that cannot be written. While
                training: a level that cuts the network in two, scores that are all zero; what is stored stays.
        """
        folder = None if store is None else self.folder(store)
        if folder is not None and runs.is_run(folder):
            self._compare(runs.read_config(folder), folder)
        return levels(self, folder)

    def estimate(self) -> Estimate:
        """What the study costs, from a few steps of one stack on this device."""
        config, recipe, n = self.config, self.config.recipe, len(self.config.init_seeds)
        trainings = n * (1 + config.levels * len(self.treatments))
        rest = recipe.steps - config.rewind_step
        steps = n * (recipe.steps + config.levels * len(self.treatments) * rest)
        wide = n * (len(self.treatments) if config.levels else 1)
        starts = [Start(state(self.model), self.ones, seed) for seed in range(wide)]
        short, long = (
            train(self.model, starts, self.task, replace(recipe, steps=k, eval_every=k, **_UNSCHEDULED), progress=False)
            for k in (2, 12)
        )
        step = max(0.0, long.wall_seconds - short.wall_seconds) / 10 / wide
        looks = steps / recipe.eval_every + 2 * trainings
        seconds = step * steps + (short.wall_seconds / wide) * looks * len(self.task.validation) / self._evaluated
        sizes = [t.numel() * t.element_size() for part in state(self.model) for t in part.values()]
        kept = sum(mask.numel() for mask in self.ones.values())
        held = (1 if recipe.optimizer == "sgd" else 2) + 4  # weights, gradients, the best, the last
        dataset = sum(bytes_of(t) for split in self.task.splits() for t in (split.x, split.y))
        states = 2 * trainings + n * len({0, config.rewind_step, *config.snapshot_steps})
        disk = states * sum(sizes) + trainings * kept
        return Estimate(trainings, steps, seconds / 3600, wide * sum(sizes) * held + dataset, disk)

    @property
    def ones(self) -> dict[str, Tensor]:
        """The mask of the dense network."""
        ones = mask_ops.ones(self.model, self.config.prunable or None)
        return {name: mask.to(self.task.device) for name, mask in ones.items()}

    def initialised(self, seed: int) -> nn.Module:
        """The network of an init seed, on the task's device and in the config's dtype."""
        net = initialise(self.factory, seed)
        own: dict[str, Tensor] = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        for tensor in own.values():
            tensor.data = moved(tensor.data, self.task.device, getattr(torch, self.config.dtype))
        if self.given is not None:
            given = {**self.given.params, **self.given.buffers}
            wrong = [n for n in {**own, **given} if n not in own or n not in given or own[n].shape != given[n].shape]
            if wrong:
                raise Refused(f"start must be one network's state, of the model: {wrong[:5]} are not. Take tl.state.")
            with torch.no_grad():
                for name, tensor in own.items():
                    tensor.copy_(given[name])
        return net

    # What is refused before hours are spent.

    def _check(self) -> None:
        config = self.config
        if config.recipe.batch_size > len(self.task.train):
            n = len(self.task.train)
            raise Refused(f"batch_size must be at most {n}, the training set: got {config.recipe.batch_size}.")
        weights = dict(self.model.named_parameters())
        if config.conv_fraction is not None and all(weights[name].ndim < 3 for name in self.names):
            raise Refused("conv_fraction needs a convolution that is pruned: the model has none. Leave it out.")
        sparse = [n for part in state(self.model) for n, t in part.items() if t.layout != torch.strided]
        if sparse:
            raise Refused(f"what a run stores must be dense: {sparse} are sparse. Register them as tensor.to_dense().")
        self._check_seeds()
        with torch.no_grad(), kept_generators(), lent(self.model, None, None):
            x, y = self.task.train.x[:2], self.task.train.y[:2]
            trained = self.task.objective.smoothed(config.recipe.label_smoothing)
            trained.check(y, len(x), attempt(self.model, x).shape[1:])
        self._check_state()
        self._check_levels()
        if any(self.own.values()):
            self.description  # noqa: B018 - runs what is a user's own, and refuses what it must not do
        refuse_too_large(self.criterion, self.model, self.names)

    def _check_seeds(self) -> None:
        """One seed twice must give one network, two seeds two."""
        if self.given is not None and not any(t.redraws for t in self.treatments.values()):
            return
        first, again = (state(initialise(self.factory, self.config.init_seeds[0])) for _ in range(2))
        if not _equal(first, again):
            raise Refused(
                "the model must be a function of the seed: two calls with one seed gave different weights. Draw them "
                "from the global generator of torch, NumPy or random, which are seeded for it, not from your own."
            )
        redrawn = [name for name, treatment in self.treatments.items() if treatment.redraws and self.config.levels]
        if (len(self.config.init_seeds) < 2 or self.given is not None) and not redrawn:
            return
        others = (*self.config.init_seeds[1:], derived_seed("another network", self.config.init_seeds[0]))
        if _equal(first, state(initialise(self.factory, others[0]))):
            raise Refused(
                "two seeds must give two networks: the factory gave equal weights for different seeds, so that "
                f"replicas would be one network, and {redrawn or 'reinit'} the ticket itself. Build the module anew in "
                "the factory, without a seed or a state of its own; pass pretrained weights as start=tl.state(net), "
                "beside a factory that draws."
            )

    def _check_state(self) -> None:
        """A network must be its parameters and buffers: another one that holds the same must give the same."""
        held, x, outputs = state(self.model), self.task.train.x[:2], []
        another = self.initialised(derived_seed("another network", self.config.init_seeds[0]))
        if _shapes(state(another)) != _shapes(held):
            raise Refused("the factory must build one architecture: for two seeds shapes differ. Draw weights alone.")
        for net in (self.model, self.model, another):
            with torch.no_grad(), kept_generators(x.device), lent(net, *held.clone()):
                seed_generators(0, x.device)
                outputs.append(attempt(net, x))
        first, again, other = outputs
        near = 1e-3 * first.abs().max()
        if (first - again).abs().max() <= near < (first - other).abs().max():  # others refuse what is random
            raise Refused(
                f"{type(another).__name__} must hold all of its weights: two with equal parameters and buffers gave "
                "different outputs. Put layers into an nn.ModuleList, not a list; weights into nn.Parameter or "
                "register_buffer; and draw nothing else in the factory."
            )

    def _check_levels(self) -> None:
        """Refuse levels that counting alone shows to be too many."""
        masks, rates = {n: m for n, m in self.ones.items()}, self.rates
        alive = {names: mask_ops.n_alive(masks, names) for names in mask_ops.counts_after(masks, rates)}
        for level in range(1, self.config.levels + 1):
            where = (
                f"at level {level} of {self.config.levels}. Use at most {level - 1} levels, or another prune_fraction."
            )
            before = alive
            alive = {
                names: n - mask_ops.n_removed(n, rates[names[0]] if isinstance(rates, dict) else rates)
                for names, n in alive.items()
            }
            if alive == before:
                raise Refused(f"every level must prune a weight: none of {sum(alive.values())} would go {where}")
            if not all(alive.values()):
                raise Refused(
                    f"a live weight must be left: {[list(n) for n, k in alive.items() if not k]} lose all {where}"
                )
        if "random_erk" in self.treatments and self.config.levels:  # sparsest at the last level
            spread_over({name: mask.shape for name, mask in masks.items()}, sum(alive.values()))

    @property
    def _evaluated(self) -> int:
        return len(self.task.train) + 3 * len(self.task.validation) + 2 * len(self.task.test)

    def _compare(self, stored: Mapping[str, Any], folder: Path) -> None:
        parts = ("config", "fingerprint", "own", "execution", "start", "ranks")
        if {k: v for k, v in stored.items() if k in parts} != self.description:
            flat = [_flat({k: v for k, v in d.items() if k in parts}) for d in (stored, self.description)]
            changed = [k for k in {**flat[0], **flat[1]} if flat[0].get(k) != flat[1].get(k)]
            told = "; ".join(f"{k} {flat[0].get(k)!r} instead of {flat[1].get(k)!r}" for k in changed)
            raise Refused(
                f"{folder} must be a run of this study, but its {runs.CONFIG} is of another: {told or 'other fields'}. "
                "Move it away, or use another store."
            )


def imp(
    config: ImpConfig,
    *,
    model: Factory | None = None,
    task: Task | None = None,
    store: str | Path | None = "runs",
    device: torch.device | str | None = None,
    start: State | None = None,
    criteria: OwnCriteria | None = None,
    treatments: OwnTreatments | None = None,
    execution: Execution = "auto",
    progress: bool = True,
    checkpoint_minutes: float = 10.0,
) -> Iterator[Level]:
    """Find lottery tickets: yield level 0 (dense), 1, ... ``config.levels``, each stored before it is yielded.

    Level 0 trains the dense networks and keeps their weights at the rewind step k. Every further level prunes
    the tickets of the level before, rewinds them to k, and trains them and the other treatments to step T
    (Frankle & Carbin 2019; late rewinding: Frankle et al. 2020). Weights and masks are a function of the config
    and the machine's arithmetic alone: a killed run goes on to the same bits. Arguments as of `Study`.

    Args:
        config: The study.
        store: Folder of run directories; None keeps nothing.

    Raises:
        Refused: As `Study` and ``Study.levels``.
    """
    study = Study(
        config,
        model=model,
        task=task,
        device=device,
        start=start,
        criteria=criteria,
        treatments=treatments,
        execution=execution,
        progress=progress,
        checkpoint_minutes=checkpoint_minutes,
    )
    return study.levels(store)


def run_folder(
    config: ImpConfig,
    store: str | Path = "runs",
    *,
    model: Factory | None = None,
    task: Task | None = None,
    execution: Execution = "auto",
) -> Path:
    """Where ``imp(config, store=store, model=..., task=..., execution=...)`` keeps its levels."""
    return Study(config, model=model, task=task, device="cpu", execution=execution).folder(store)


def model_and_task(config: ImpConfig, *, device: torch.device | str | None = None) -> tuple[nn.Module, Task]:
    """The network, initialised with the first init seed, and the data that a config names.

    Args:
        config: Of a study with a named model and task.
        device: Where both lie; a CUDA device if there is one, otherwise the CPU, when None.

    Raises:
        Refused: An unknown name, or data that cannot be loaded.
    """
    study = study_of(config, device=device)
    return study.model, study.task


def study_of(
    config: ImpConfig,
    *,
    model: Factory | None = None,
    task: Task | None = None,
    device: torch.device | str | None = None,
) -> Study:
    """The study but for its criterion and treatments, which may be a user's own: for its network and its data."""
    return Study(replace(config, criterion="magnitude", treatments=("ticket",)), model=model, task=task, device=device)


_UNSCHEDULED: dict[str, Any] = {"schedule": "constant", "milestones": (), "decay": 0.1, "warmup_steps": 0}


def _task(config: ImpConfig, own: Task | None, device: torch.device | str | None) -> Task:
    place, dtype = runs.place(device), getattr(torch, config.dtype)
    if own is not None:
        if config.validation_size is not None or config.split_seed:
            raise Refused(
                "validation_size and split_seed split the named data sets: a task of your own is split already. Leave "
                "them out, or give them to Task.from_tensors."
            )
        return own.to(place, dtype)
    size, seed = config.validation_size, config.split_seed
    return data.load(config.task, validation_size=size, split_seed=seed, dtype=dtype, device=place)


def _criterion(name: str, own: Mapping[str, Any]) -> Criterion:
    if own and name not in own:
        raise Refused(f"criteria of your own must be named by config.criterion: got {list(own)} and {name!r}.")
    known = {**CRITERIA, **own}
    if name not in known:
        raise Refused(nearest("criterion", name, tuple(known)))
    return as_criterion(known[name])


def _treatments(names: tuple[str, ...], own: Mapping[str, Any]) -> dict[str, Treatment]:
    taken = sorted(set(own) & set(TREATMENTS))
    if taken:
        raise Refused(f"treatments of your own need names of their own: {taken} are taken.")
    known = {**TREATMENTS, **{n: t if isinstance(t, Treatment) else Treatment(t) for n, t in own.items()}}
    for name in names:
        if name not in known:
            raise Refused(nearest("treatment", name, tuple(known)))
    return {name: known[name] for name in names}


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """What parts of it hold, in one."""
    parts = [part if isinstance(part, Mapping) else {name: part} for name, part in description.items()]
    return {name: value for part in parts for name, value in part.items()}


def _shapes(held: State) -> dict[str, torch.Size]:
    return {name: tensor.shape for part in held for name, tensor in part.items()}


def _equal(a: State, b: State) -> bool:
    return all(torch.equal(t, other[n]) for part, other in zip(a, b, strict=True) for n, t in part.items())


def _file_name(name: str) -> str:
    """A model's name as part of a folder's: every lambda is called <lambda>."""
    return re.sub(r"[^\w.+-]+", "", name.replace(":", ".")) or "custom"
