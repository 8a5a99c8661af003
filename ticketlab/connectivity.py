"""Linear connectivity: loss and error along the segment between two networks, and its barriers.

Leans on `Network`. Takes any ``nn.Module``, single or stacked networks, and changes neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ticketlab import shown
from ticketlab.data import Task
from ticketlab.errors import Refused, check_count
from ticketlab.losses import LOSSES
from ticketlab.network import Execution, Network, network, output_shape, reads
from ticketlab.probing import close
from ticketlab.state import Buffers, State, stack

Baseline = Literal["mean", "linear", "max"]
Metric = Literal["loss_nats", "error"]
SplitName = Literal["train", "validation", "test"]

_METRICS: tuple[Metric, ...] = ("loss_nats", "error")
_STACK = 8  # networks in one batched forward pass: enough to share launches, little enough for memory


@dataclass(frozen=True)
class Path:
    """Metrics along a segment from a (alpha = 0) to b (alpha = 1)."""

    alphas: Float[np.ndarray, " alpha"]
    curves: dict[tuple[SplitName, Metric], Float[np.ndarray, "alpha *replica"]]
    """Keyed by (split, metric): loss in nats, error in [0, 1]."""

    def __repr__(self) -> str:
        heights = ", ".join(f"{name} {height}" for name, height in self._heights().items())
        return f"Path: {len(self.alphas)} alphas; {heights}"

    def _repr_html_(self) -> str:
        return shown.table(f"Path: {len(self.alphas)} alphas", self._heights())

    def _heights(self) -> dict[str, str]:
        keys = [(split, metric) for metric in _METRICS for split in dict.fromkeys(split for split, _ in self.curves)]
        return {f"{split} {metric} barrier": shown.text(self.barrier(metric, split)) for split, metric in keys}

    @property
    def table(self) -> pd.DataFrame:
        """Tidy: one row per replica, split and alpha, with ``loss_nats`` and ``error``."""
        rows = []
        for split in dict.fromkeys(split for split, _ in self.curves):
            loss, error = (self.curves[split, m].reshape(len(self.alphas), -1) for m in _METRICS)
            for r in range(loss.shape[1]):
                columns = {"alpha": self.alphas, "loss_nats": loss[:, r], "error": error[:, r]}
                rows.append(pd.DataFrame({"replica": r, "split": split, **columns}))
        return pd.concat(rows, ignore_index=True)

    def barrier(
        self, metric: Metric = "error", split: SplitName = "test", baseline: Baseline = "mean"
    ) -> Float[np.ndarray, "*replica"]:
        """Height of a metric above its endpoints, see ``barrier``."""
        return barrier(self._curve(metric, split), baseline)

    def rise(self, metric: Metric = "loss_nats", split: SplitName = "train") -> Float[np.ndarray, "*replica"]:
        """Largest climb of a metric on the way from a to b, see ``rise``."""
        return rise(self._curve(metric, split))

    def _curve(self, metric: Metric, split: SplitName) -> np.ndarray:
        if (split, metric) not in self.curves:
            raise Refused(f"split and metric must be one of {sorted(self.curves)}: got {(split, metric)}.")
        return self.curves[split, metric]


def barrier(curve: Float[np.ndarray, "alpha *replica"], baseline: Baseline = "mean") -> Float[np.ndarray, "*replica"]:
    r"""Height of a metric along a segment above its endpoints.

    .. math:: \max_\alpha M(\theta_\alpha) - b(\alpha)

    With ``mean``, b is the mean of the two ends (Frankle et al. 2020, section 2): right between siblings. Where
    the ends differ by design (theta_k and theta_T), ``linear`` measures against the chord between them and
    ``max`` against the worse of them. A maximum over a grid is a lower estimate of the true one.

    Args:
        curve: Metric at evenly spaced alphas, both ends included; at least 3.
        baseline: ``mean``, ``linear`` or ``max`` of the endpoints.

    Returns:
        Height in the metric's own unit, one per replica: at least 0 for ``linear`` and ``max``, and for ``mean``
        at least half the difference of the ends.

    Raises:
        Refused: Fewer than 3 alphas, or an unknown baseline.
    """
    curve = np.asarray(curve, dtype=np.float64)
    if len(curve) < 3:
        raise Refused(f"a barrier needs at least 3 alphas, both ends included: got {len(curve)}.")
    alphas = np.linspace(0, 1, len(curve)).reshape(-1, *[1] * (curve.ndim - 1))
    baselines = {
        "mean": (curve[0] + curve[-1]) / 2,
        "linear": curve[0] + alphas * (curve[-1] - curve[0]),
        "max": np.maximum(curve[0], curve[-1]),
    }
    if baseline not in baselines:
        raise Refused(f"baseline must be one of {list(baselines)}: got {baseline!r}.")
    height = curve - baselines[baseline]
    if baseline == "linear":
        height[[0, -1]] = 0.0  # the ends lie on their chord, without the rounding
    return height.max(axis=0)


def rise(curve: Float[np.ndarray, "alpha *replica"]) -> Float[np.ndarray, "*replica"]:
    r"""Largest climb of a metric on the way from a to b: 0 where it never rises.

    .. math:: \max_{\alpha' \ge \alpha} M(\theta_{\alpha'}) - M(\theta_\alpha)

    A monotone loss from initialisation to the trained network is what Goodfellow et al. (2015) report.
    """
    curve = np.asarray(curve, dtype=np.float64)
    return (curve - np.minimum.accumulate(curve, axis=0)).max(axis=0)


def linear_path(
    model: nn.Module,
    state_a: State | Mapping[str, Tensor],
    state_b: State | Mapping[str, Tensor],
    task: Task,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    n_alphas: int = 31,
    batchnorm: Literal["recalibrate", "keep"] = "recalibrate",
    splits: Sequence[SplitName] = ("train", "test"),
    execution: Execution = "auto",
) -> Path:
    r"""Loss and error at :math:`(1-\alpha)\theta_a + \alpha\theta_b`, both ends included and exact.

    Floating buffers lie on the segment too, between those of the two ends; other buffers, which nothing lies between,
    must agree as far as outputs depend on them.

    Args:
        model: Any module in float weights; not changed.
        state_a: The network at alpha = 0, or a stack of R. Parameters alone will do where the forward pass reads no
            buffers but statistics of batch norm that are estimated anew.
        state_b: That at alpha = 1, of the same shapes.
        task: Data on the device and in the dtype of the parameters; cut it with ``task.limit`` where it is too much.
        masks: True = kept; applied to every point.
        buffers: For both ends, in place of their own; as for parameters alone, they must not matter.
        n_alphas: Evenly spaced points, at least 3.
        batchnorm: ``recalibrate`` estimates running statistics of batch norm anew at every alpha from the training
            split, the ends included, as Frankle et al. (2020) do; ``keep`` takes them as other floating buffers, which
            makes barriers of its own. Without batch norm the two agree.
        splits: Which data to evaluate.
        execution: How networks are stacked.

    Raises:
        Refused: Ends or a task that do not fit the model or each other, buffers that are not known or differ where
            nothing lies between them, fewer than 3 alphas, an unknown split or option.
    """
    check_count("n_alphas, both ends included,", n_alphas, 3, 10**6)
    if batchnorm not in ("recalibrate", "keep"):
        raise Refused(f"batchnorm must be 'recalibrate' or 'keep': got {batchnorm!r}.")
    splits = tuple(dict.fromkeys(splits))
    if not splits or not set(splits) <= {"train", "validation", "test"}:
        raise Refused(f"splits must be some of train, validation, test: got {list(splits)}.")
    norms = _norms(model) if batchnorm == "recalibrate" else {}
    a, b = _ends(model, (state_a, state_b), task.train.x, masks, buffers, _statistics(norms))
    loss = LOSSES[task.loss]
    for split in splits:
        data = getattr(task, split)
        loss.check(data.y, len(data), output_shape(a, data.x))
    alphas = np.linspace(0, 1, n_alphas)
    curves: dict[tuple[SplitName, Metric], list[np.ndarray]] = {(s, m): [] for s in splits for m in _METRICS}
    for block in np.array_split(alphas, -(-n_alphas // max(1, _STACK // (a.replicas or 1)))):
        net = _between(a, b, block)
        if norms:
            net = replace(net, buffers=recalibrate(model, State(net.params, net.buffers), task.train.x))
        for split in splits:
            data = getattr(task, split)
            found = net.evaluate(data.x, data.y, loss, execution=execution)
            for metric, values in zip(_METRICS, found, strict=True):
                curves[split, metric].append(values.view(len(block), -1).cpu().numpy())
    whole = {key: np.concatenate(blocks) for key, blocks in curves.items()}  # [alpha, replica]
    return Path(alphas, {key: curve[:, 0] if a.replicas is None else curve for key, curve in whole.items()})


def _ends(
    model: nn.Module,
    states: tuple[State | Mapping[str, Tensor], State | Mapping[str, Tensor]],
    x: Tensor,
    masks: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
    replaced: set[str],
) -> tuple[Network, Network]:
    """Both ends at m * theta, diverged ones too; refused where what lies between them is not known."""
    a, b = (network(model, s, x, masks=masks, buffers=buffers, finite=False, replaced=replaced) for s in states)
    if a.replicas != b.replicas:
        raise Refused("state_a and state_b must both be single or stacks of one length: one of them is not.")
    known = {n for n, held in a.buffers.items() if held.is_floating_point()} - replaced
    if buffers is not None and known and reads(a, x, known):
        raise Refused(
            "the model's forward pass reads buffers that are not estimated anew, and each end has its own: pass "
            "States, such as level.start and level.end, in place of parameters and buffers=..."
        )
    other = {n: b.buffers[n] for n, held in a.buffers.items() if not held.is_floating_point()}
    differ = [n for n, held in other.items() if not torch.equal(held, a.buffers[n])]
    if differ and not close(replace(a, buffers=a.buffers | other)(x[:2]), a(x[:2])):
        raise Refused(
            f"buffers that are no floating numbers must agree where outputs depend on them, for nothing lies between: "
            f"{differ} differ. Give both ends the same."
        )
    return a, b


def _between(a: Network, b: Network, alphas: np.ndarray) -> Network:
    """Stacked networks at each alpha, [alpha * replica, ...]; a and b themselves at the ends."""

    def at(first: Tensor, second: Tensor, alpha: float) -> Tensor:
        if alpha in (0, 1) or not first.is_floating_point():
            return second if alpha == 1 else first
        # Where both are equal, so is what lies between: infinite entries of attention masks, for one.
        return torch.where(first == second, first, torch.lerp(first, second, alpha))

    def stacked(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        join = torch.stack if a.replicas is None else torch.cat
        return {name: join([at(first[name], second[name], float(alpha)) for alpha in alphas]) for name in first}

    replicas = len(alphas) * (a.replicas or 1)
    parts = stacked(a.params, b.params), stacked(a.buffers, b.buffers)
    return replace(
        a,
        params=parts[0],
        buffers=parts[1],
        masks=None,
        replicas=replicas,
        writes_input=a.writes_input or b.writes_input,
        writes_params=a.writes_params or b.writes_params,
    )


def _norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Batch norms that keep running statistics, by name."""
    norms = ((name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm))
    return {name: m for name, m in norms if m.track_running_stats and m.running_mean is not None}


def _statistics(norms: Mapping[str, _BatchNorm]) -> set[str]:
    return {f"{name}.{own}".lstrip(".") for name, norm in norms.items() for own, _ in norm.named_buffers()}


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    batch_size: int = 500,
) -> Buffers:
    """Buffers with the running statistics of every batch norm estimated anew.

    The average over equal batches of their means and of their unbiased variances, as batch norm itself
    accumulates them with ``momentum=None``; what was there is forgotten. Only batch norms run in training
    mode; buffers of other modules are returned as they came. Without batch norm this costs nothing.

    Args:
        model: Not changed.
        state: One network or a stack; of parameters alone, other buffers are the model's own.
        x: Inputs [n, ...] of the training split.
        masks: True = kept; stacked or not.
        batch_size: Examples in a batch; what is left over at the end is not used.
    """
    names = _statistics(_norms(model))
    net = network(model, state, x, masks=masks, finite=False, replaced=names)
    if not names:
        return net.buffers
    whole = len(x) // batch_size * batch_size or len(x)
    forgotten = {n: torch.zeros_like(b) if n in names else b for n, b in net.buffers.items()}
    found = []
    for one in replace(net, buffers=forgotten).each():
        with one.lent():
            _count_calls(model)
            for begin in range(0, whole, batch_size):
                one.forward(x[begin : begin + batch_size])
            anew = {n: b.clone() for n, b in model.named_buffers() if n in names}
        found.append(one.buffers | anew)
    return found[0] if net.replicas is None else stack(found)


def _count_calls(model: nn.Module) -> None:
    """Batch norms of a lent module in training mode, each taking the mean over its calls so far."""
    calls: dict[nn.Module, int] = {}

    def average(module: Any, _inputs: object) -> None:
        calls[module] = calls.get(module, 0) + 1
        module.momentum = 1 / calls[module]

    for norm in _norms(model).values():
        norm.training = True
        norm.register_forward_pre_hook(average)  # taken off with all else that the block leaves on the module
