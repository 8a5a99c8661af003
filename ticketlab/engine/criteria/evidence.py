"""What a criterion may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ticketlab import masks as mask_ops
from ticketlab.data import Task
from ticketlab.errors import Refused
from ticketlab.functional import evaluating, fitted, masked
from ticketlab.seeds import stream
from ticketlab.state import Masks, Params, State

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """One network: the weights that are alive, where training began and where it stands, and examples.

    Scores are taken at m * theta of ``end``, with the network in evaluation mode and derivatives with respect to
    prunable weights. At initialisation, pass the same state twice.

    Raises:
        Refused: Masks or states that do not fit the model, a stack of networks (score one at a time), or labels
            that are not int64.
    """

    model: nn.Module
    """Lends its forward pass; not changed."""
    masks: Masks
    """True = alive."""
    start: State
    """Where training began, w_i."""
    end: State
    """Where it stands, w_f: initialisation, an early step, or trained."""
    x: Float[Tensor, "n *input"] | None = None
    """Training examples, for criteria that look at data; SynFlow takes their shape alone."""
    y: Int64[Tensor, " n"] | None = None
    """Their labels."""
    seed: int = 0
    """Of criteria that draw."""
    scope: mask_ops.Scope = "global"
    """Where weights compete: in the whole network or in each layer. Criteria that rank need to know."""

    def __post_init__(self) -> None:
        mask_ops.validate(self.model, self.masks)
        for when in (self.start, self.end):
            replicas, _ = fitted(self.model, when.params, self.masks, when.buffers)
            if replicas is not None:
                raise Refused(f"a criterion scores one network: got {replicas}. Take them with State.select(index).")
        lengths = {len(part) for part in (self.x, self.y) if part is not None}
        if len(lengths) > 1 or 0 in lengths:
            raise Refused(f"x and y must be as many, at least one: got {sorted(lengths)}.")
        if self.y is not None and (self.y.ndim != 1 or self.y.dtype != torch.int64):
            raise Refused(
                f"y must be one int64 label for each example: got {self.y.dtype} of shape {tuple(self.y.shape)}. "
                "Convert it with y.flatten().long()."
            )

    @property
    def initial(self) -> Params:
        """m * w_i, prunable weights alone."""
        return _prunable(self.start, self.masks)

    @property
    def final(self) -> Params:
        """m * w_f, prunable weights alone."""
        return _prunable(self.end, self.masks)

    def inputs(self, criterion: str) -> Tensor:
        """``x``, or a refusal that names the criterion."""
        if self.x is None:
            raise Refused(f"criterion {criterion!r} needs inputs: got none. Pass x, such as task.train.x[:1000].")
        refuse_batch_statistics(criterion, self.model)
        return self.x

    def examples(self, criterion: str) -> tuple[Tensor, Tensor]:
        """``x`` and ``y``, or a refusal that names the criterion."""
        x = self.inputs(criterion)
        if self.y is None:
            raise Refused(f"criterion {criterion!r} needs labels: got none. Pass y, such as task.train.y[:1000].")
        n_classes = self.one_output(self.final, x).shape[-1]
        low, high = int(self.y.min()), int(self.y.max())
        if low < 0 or high >= n_classes:
            raise Refused(f"labels must lie in 0..{n_classes - 1}, an output each: got {low} to {high}.")
        return x, self.y

    def one_output(self, weights: Mapping[str, Tensor], x: Tensor, at: State | None = None) -> Tensor:
        """The logits of the first example, or a refusal of inputs that do not fit the model."""
        try:
            with torch.no_grad():
                return self.logits(weights, x[:1], at)[0]
        except (RuntimeError, IndexError) as error:
            raise Refused(
                f"x must be what the model takes: it fails on one example of shape {tuple(x.shape[1:])} and "
                f"{x.dtype}: {error}"
            ) from error

    def logits(self, weights: Mapping[str, Tensor], x: Tensor, at: State | None = None) -> Tensor:
        """f(x) with these prunable weights; all else as in ``end``, or in another state."""
        params, buffers = at or self.end
        with evaluating(self.model):
            return functional_call(self.model, {**params, **buffers, **weights}, (x,))


def refuse_batch_statistics(criterion: str, model: nn.Module) -> None:
    """Raise where an output depends on the other examples of a batch even in evaluation mode."""
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is None]
    if norms:
        raise Refused(
            f"criterion {criterion!r} needs running statistics: batch norms {norms} have none, so that a score would "
            "depend on how examples are batched. Build them with track_running_stats=True."
        )


def draw_examples(task: Task, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` training examples at random with their labels; all, where there are fewer."""
    some = torch.randperm(len(task.train), generator=stream("score examples", seed))[:n].to(task.device)
    return task.train.x[some], task.train.y[some]


Criterion = Callable[[Evidence], Scores]


def _prunable(when: State, masks: Masks) -> Params:
    return masked({name: when.params[name] for name in masks}, masks)
