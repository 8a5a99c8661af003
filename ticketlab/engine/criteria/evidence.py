"""What a criterion may look at, and the record of what is known of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab import masks as mask_ops
from ticketlab.data import Task
from ticketlab.errors import Refused
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.network import Network, network, output_shape
from ticketlab.seeds import stream
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, Params, State

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """One network: the weights that are alive, where training began and where it stands, and examples.

    Scores are taken at m * theta of ``end``, in evaluation mode, and derivatives are those of masked weights: what
    ``masks`` names is what may be pruned.

    Raises:
        Refused: Masks or states that do not fit the model, a stack of networks, or other numbers of x than of y.
    """

    model: nn.Module = field(repr=False)
    """Module that lends its forward pass; not changed."""
    masks: Masks = field(repr=False)
    """True = alive."""
    start: State = field(repr=False)
    """Where training began, w_i."""
    end: State = field(repr=False)
    """Where it stands, w_f: initialisation, an early step, or trained."""
    x: Float[Tensor, "n *input"] | None = field(default=None, repr=False)
    """Training examples, for criteria that look at data; SynFlow takes their shape alone."""
    y: Tensor | None = field(default=None, repr=False)
    """Their targets."""
    seed: int = 0
    """Seed of criteria that draw."""
    scope: mask_ops.Scope = "global"
    """Where weights compete: in the whole network or in each layer. Criteria that rank need to know."""
    loss: Loss = CROSS_ENTROPY
    """Loss of the task."""

    __repr__, _repr_html_ = as_line, as_table

    def __post_init__(self) -> None:
        for when in (self.start, self.end):
            replicas = network(self.model, when, masks=self.masks, finite=False).replicas
            if replicas is not None:
                raise Refused(f"a criterion scores one network: got {replicas}. Take them with State.select(index).")
        lengths = {len(part) for part in (self.x, self.y) if part is not None}
        if len(lengths) > 1 or 0 in lengths:
            raise Refused(f"x and y must be as many, at least one: got {sorted(lengths)}.")

    def copied(self) -> Evidence:
        """With tensors of its own: a criterion of a user's may write into what it is given."""
        x, y = (None if part is None else part.clone() for part in (self.x, self.y))
        masks = {n: m.clone() for n, m in self.masks.items()}
        return replace(self, masks=masks, start=self.start.clone(), end=self.end.clone(), x=x, y=y)

    @cached_property
    def network(self) -> Network:
        """m * w_f, held to all that ``network`` checks; on the examples where there are any."""
        net = network(self.model, self.end, self.x, masks=self.masks)
        untrained = sorted(set(self.masks) - set(net.trainable))
        if untrained:
            raise Refused(f"masks must name trained parameters: {untrained} require no gradient. Leave them out.")
        return net

    @property
    def initial(self) -> Params:
        """m * w_i, masked weights alone."""
        return _masked(self.start, self.masks)

    @property
    def final(self) -> Params:
        """m * w_f, masked weights alone."""
        return _masked(self.end, self.masks)

    @property
    def inputs(self) -> Tensor:
        """``x``, or a refusal where there is none."""
        if self.x is None:
            raise Refused("it needs inputs: got none. Pass x, such as task.train.x[:1000].")
        return self.x

    @property
    def examples(self) -> tuple[Tensor, Tensor]:
        """``x`` and ``y``, which fit the network and the loss, or a refusal."""
        if self.y is None and self.x is not None:
            raise Refused("it needs labels: got none. Pass y, such as task.train.y[:1000].")
        x, y = self.inputs, self.y
        self.loss.check(y, len(x), output_shape(self.network, x))  # type: ignore[arg-type]
        return x, y  # type: ignore[return-value]


def _masked(when: State, masks: Masks) -> Params:
    return mask_ops.masked({name: when.params[name] for name in masks}, masks)


def draw_examples(task: Task, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` training examples at random with their targets; all, where there are fewer. One that is not finite tells a
    criterion nothing, and is left out."""
    some = torch.randperm(len(task.train), generator=stream("score examples", seed))[:n].to(task.device)
    finite = task.train.x[some].flatten(1).isfinite().all(1)
    return task.train.x[some[finite]], task.train.y[some[finite]]


def _nothing(n_examples: int, n_outputs: int, n_weights: int) -> float:
    return 0


@dataclass(frozen=True)
class Criterion:
    """A pruning criterion and what is known of it.

    >>> early = Criterion(lambda evidence: {n: w.abs() for n, w in evidence.final.items()}, stage="init")
    """

    score: Callable[[Evidence], Scores]
    """A score for every masked weight, in the shapes of the masks; higher = keep."""
    needs: Literal["weights", "inputs", "labels"] = "weights"
    """What it looks at, beside the weights."""
    stage: Literal["init", "trained"] = "trained"
    """Where its authors take it: at initialisation, or after training."""
    passes: Callable[[int, int, int], float] = _nothing
    """(examples, outputs, live weights) -> cost of a round in forward passes of one example; a backward pass is two."""
    rounds: int = 1
    """Rounds that it is defined with."""
    limit: int | None = None
    """Largest number of live weights that it scores; None: any."""

    def forward_passes(self, n_examples: int, n_outputs: int, n_weights: int, rounds: int | None = None) -> float:
        """What scoring costs in all its rounds, in forward passes of one example."""
        return self.passes(n_examples, n_outputs, n_weights) * (self.rounds if rounds is None else rounds)
