"""The noun of a study: one level of it, R networks with what was measured of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ticketlab import shown
from ticketlab.errors import Refused
from ticketlab.seeds import Factory, initialise
from ticketlab.state import Masks, Params, State, select

_SEVERAL = (list, tuple, set, range, np.ndarray, pd.Series)


@dataclass(frozen=True, repr=False)
class Level:
    """One level of a study: R networks, on the replica axis in the order of the rows of ``metrics``."""

    level: int
    """0 is the dense network."""
    density: float
    """Density of the ticket, kept / prunable."""
    masks: Masks
    """[replica, ...] bool, True = kept."""
    start: State
    """What was trained, such as m * theta_k of a rewound ticket; pruned weights are zero unless they were frozen."""
    end: State
    """The networks after T steps."""
    metrics: pd.DataFrame
    """One row per replica."""
    curves: pd.DataFrame
    """One row per replica and evaluation: validation loss and error."""
    snapshots: dict[int, State] = field(default_factory=dict)
    """Level 0 alone: the networks after so many steps."""
    wall_seconds: float = float("nan")
    """Training and evaluation of the whole level."""
    execution: str = ""
    """The way that the stack was trained: loop, vmap, recorded loop or recorded stack; empty where it is not known."""
    factory: Factory | None = field(default=None, compare=False)
    """Builds the architecture, where it is known."""
    stacked: bool = True
    """Whether the tensors have the replica axis."""

    def __repr__(self) -> str:
        n, treatments = len(self.metrics), ", ".join(dict.fromkeys(self.metrics.get("treatment", [])))
        error = self.metrics["test_error"].mean() if "test_error" in self.metrics else float("nan")
        networks = f"{n} network{'s' * (n != 1)} ({treatments})"
        return f"Level {self.level}: density {self.density:.4g}, {networks}, mean test error {error:.4f}"

    def _repr_html_(self) -> str:
        """The line, and the networks of each treatment: how many, their density and test error."""
        if not {"treatment", "density", "test_error"} <= set(self.metrics):
            return shown.table(repr(self), {})
        groups = self.metrics.groupby("treatment", sort=False)
        rows = groups.agg(networks=("density", "size"), density=("density", "mean"), test_error=("test_error", "mean"))
        return f"<div><b>{escape(repr(self))}</b>{rows.to_html(float_format='{:.4g}'.format)}</div>"

    @property
    def theta_start(self) -> Params:
        """Parameters of ``start``."""
        return self.start.params

    @property
    def theta_end(self) -> Params:
        """Parameters of ``end``."""
        return self.end.params

    def subset(self, **conditions: Any) -> Level:
        """The replicas whose row of ``metrics`` has these values: always a stack, its rows numbered anew from 0.

        Several values of one column are a list; NaN is found as NaN.

        Raises:
            Refused: A column that metrics lacks, values that no replica has, a level cut down to one network.
        """
        return self._take(self._found(conditions), keep_axis=True)

    def select(self, **conditions: Any) -> Level:
        """The same, but a single network loses the replica axis. Selections may follow one another.

        >>> level.select(treatment="ticket", init_seed=0).theta_start  # doctest: +SKIP
        """
        found = self._found(conditions)
        return self if not self.stacked else self._take(found, keep_axis=len(found) > 1)

    def module(
        self, replica: int = 0, *, at: Literal["start", "end"] = "end", model: Factory | None = None
    ) -> nn.Module:
        """A plain ``nn.Module`` with the network in it, in evaluation mode; pruned weights are zero unless frozen.

        Args:
            replica: Row of ``metrics``.
            at: The network before or after training.
            model: Builds the architecture; the study's own when None.

        Raises:
            Refused: A row that is not there, or an architecture that is not known.
        """
        factory = model or self.factory
        if factory is None or at not in ("start", "end"):
            raise Refused(f"module needs the architecture and at='start' or 'end': got {at!r}. Pass model=my_factory.")
        if not 0 <= replica < len(self.metrics):
            raise Refused(f"replica must lie in 0..{len(self.metrics) - 1}: got {replica}.")
        one = self._take([replica], keep_axis=False) if self.stacked else self
        state = one.start if at == "start" else one.end
        net = initialise(factory, 0).eval()
        own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        for name, tensor in {**state.params, **state.buffers}.items():
            if name not in own or own[name].shape != tensor.shape:
                raise Refused(
                    f"model must build the study's architecture: it has no {name!r} of {tuple(tensor.shape)}."
                )
            own[name].data = tensor.detach().clone()
        return net

    def _found(self, conditions: dict[str, Any]) -> list[int]:
        rows = pd.Series(True, index=self.metrics.index)
        for column, value in conditions.items():
            if column not in self.metrics:
                raise Refused(f"select needs columns of metrics: got {column!r}, not in {list(self.metrics)}.")
            values = list(value) if isinstance(value, _SEVERAL) else [value]
            rows &= self.metrics[column].isin(values) | (self.metrics[column].isna() & pd.isna(values).any())
        found = rows.to_numpy().nonzero()[0].tolist()
        if not found:
            given = ", ".join(f"{k}={v!r}" for k, v in conditions.items())
            has = {c: list(self.metrics[c].unique()) for c in conditions}
            raise Refused(f"no replica of level {self.level} has {given}: it has {has}.")
        return found

    def _take(self, rows: Sequence[int], keep_axis: bool) -> Level:
        """These rows, in their order."""
        if not self.stacked:
            raise Refused("this level is one network without a replica axis: take a subset before you select.")
        metrics = self.metrics.iloc[list(rows)].reset_index(drop=True)
        numbers = dict(zip(metrics["replica"], range(len(rows)), strict=True))
        curves = self.curves[self.curves["replica"].isin(list(numbers))]
        index = list(rows) if keep_axis else rows[0]
        return replace(
            self,
            masks=select(self.masks, index),
            start=self.start.select(index),
            end=self.end.select(index),
            snapshots={step: s.select(index) for step, s in self.snapshots.items()},
            metrics=metrics.assign(replica=range(len(rows))),
            curves=curves.assign(replica=curves["replica"].map(numbers)).reset_index(drop=True),
            stacked=keep_axis,
        )


def joined(levels: Sequence[Level]) -> Level:
    """One level of several with equal names and densities: their replicas one behind another, numbered anew."""
    offsets = np.cumsum([0, *(len(level.metrics) for level in levels)])[:-1]
    metrics, curves = (
        pd.concat([t.assign(replica=t["replica"] + o) for t, o in zip(tables, offsets, strict=True)], ignore_index=True)
        for tables in ([level.metrics for level in levels], [level.curves for level in levels])
    )
    steps = set.intersection(*(set(level.snapshots) for level in levels))
    return replace(
        levels[0],
        masks=_behind([level.masks for level in levels]),
        start=_states([level.start for level in levels]),
        end=_states([level.end for level in levels]),
        snapshots={step: _states([level.snapshots[step] for level in levels]) for step in sorted(steps)},
        metrics=metrics,
        curves=curves,
        wall_seconds=sum(level.wall_seconds for level in levels),
    )


def _behind(stacks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([stack[name] for stack in stacks]) for name in stacks[0]}


def _states(states: Sequence[State]) -> State:
    return State(_behind([state.params for state in states]), _behind([state.buffers for state in states]))
