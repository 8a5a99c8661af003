"""Linear connectivity: loss and error along the segment between two networks, and its barriers.

Leans on ``functional.evaluate``. Takes any ``nn.Module``, single or stacked parameters, and changes neither.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ticketlab.data import Task
from ticketlab.errors import Refused
from ticketlab.functional import Execution, evaluate, fitted, masked, resolve
from ticketlab.state import Buffers, Params, State, select, stack_states

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

    @property
    def table(self) -> pd.DataFrame:
        """Tidy: one row a replica, split and alpha, with ``loss_nats`` and ``error``."""
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
        Height in the metric's own unit, one a replica: at least 0 for ``linear`` and ``max``, and for ``mean``
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
    params_a: Params,
    params_b: Params,
    task: Task,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Buffers | None = None,
    n_alphas: int = 31,
    batchnorm: Literal["recalibrate", "keep"] = "recalibrate",
    splits: Sequence[SplitName] = ("train", "test"),
    execution: Execution = "auto",
) -> Path:
    r"""Loss and error at :math:`(1-\alpha)\theta_a + \alpha\theta_b`, both ends included.

    Args:
        model: Any module in float weights; not changed.
        params_a: Parameters at alpha = 0, or a stack of R.
        params_b: Parameters at alpha = 1, of the same shapes.
        task: Data on the device of the parameters; cut it with ``task.limit`` where the whole is too much.
        masks: True = kept; applied to every point.
        buffers: The model's own when None; stacked with stacked parameters.
        n_alphas: Evenly spaced points, at least 3.
        batchnorm: ``recalibrate`` estimates running statistics anew at every alpha from the training split,
            the ends included, as Frankle et al. (2020) do; ``keep`` uses ``buffers`` throughout, which makes
            barriers of its own. Without batch norm the two agree.
        splits: Which data to evaluate.
        execution: How networks are stacked.

    Raises:
        Refused: Fewer than 3 alphas, an unknown split or option, or parameters of other shapes.
    """
    replicas, a = fitted(model, params_a, masks, buffers)
    if fitted(model, params_b, masks, buffers)[0] != replicas:
        raise Refused("params_a and params_b must both be single or stacks of one length: one of them is not.")
    if n_alphas < 3:
        raise Refused(f"a path needs at least 3 alphas, both ends included: got {n_alphas}.")
    if batchnorm not in ("recalibrate", "keep"):
        raise Refused(f"batchnorm must be 'recalibrate' or 'keep': got {batchnorm!r}.")
    splits = tuple(dict.fromkeys(splits))
    if not splits or not set(splits) <= {"train", "validation", "test"}:
        raise Refused(f"splits must be some of train, validation, test: got {list(splits)}.")
    b = State(masked(params_b, masks), a.buffers)
    if replicas is None:
        a, b = stack_states([a]), stack_states([b])
    alphas = np.linspace(0, 1, n_alphas)
    curves: dict[tuple[SplitName, Metric], list[np.ndarray]] = {(s, m): [] for s in splits for m in _METRICS}
    for block in np.array_split(alphas, -(-n_alphas // max(1, _STACK // (replicas or 1)))):
        params = _interpolate(a.params, b.params, block)
        state = {n: b.repeat(len(block), *[1] * (b.ndim - 1)) for n, b in a.buffers.items()}
        if batchnorm == "recalibrate":
            state = recalibrate(model, params, state, task.train.x, execution=execution)
        for split in splits:
            data = getattr(task, split)
            found = evaluate(model, params, data.x, data.y, buffers=state, execution=execution)
            for metric, values in zip(_METRICS, found, strict=True):
                curves[split, metric].append(values.view(len(block), -1).cpu().numpy())
    whole = {key: np.concatenate(blocks) for key, blocks in curves.items()}  # [alpha, replica]
    return Path(alphas, {key: curve[:, 0] if replicas is None else curve for key, curve in whole.items()})


def _interpolate(a: Params, b: Params, alphas: np.ndarray) -> Params:
    """Stacked networks at each alpha: [alpha * replica, ...]; ``lerp`` is exact at both ends."""
    return {name: torch.cat([torch.lerp(a[name], b[name], float(alpha)) for alpha in alphas]) for name in a}


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    params: Params,
    buffers: Buffers,
    x: Tensor,
    *,
    batch_size: int = 500,
    execution: Execution = "auto",
) -> Buffers:
    """Running statistics of every batch norm estimated anew for a stack of networks.

    The average over equal batches of their means and of their unbiased variances, as batch norm itself
    accumulates them with ``momentum=None``; what was there is forgotten. Only batch norms run in training
    mode; buffers of other modules are returned as they came. Without batch norm this costs nothing.

    Args:
        model: Not changed.
        params: Stacked parameters.
        buffers: Stacked buffers; not changed.
        x: Inputs [n, ...] of the training split.
        batch_size: Examples a batch; what is left over at the end is not used.
        execution: How networks are stacked.
    """
    net = copy.deepcopy(model).eval()
    norms = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    }
    if not norms:
        return buffers
    calls: dict[nn.Module, int] = dict.fromkeys(norms.values(), 0)

    def average(module: Any, inputs: object) -> None:
        calls[module] += 1
        module.momentum = 1 / calls[module]  # the mean over the calls so far

    for module in norms.values():
        module.train()
        module.register_forward_pre_hook(average)
    fresh = {n: torch.zeros_like(b) if n.rpartition(".")[0] in norms else b for n, b in buffers.items()}
    tensors = {**params, **fresh}
    whole = len(x) // batch_size * batch_size or len(x)
    batches = x[:whole].split(batch_size)
    if resolve(execution, model, x.device) == "vmap":
        for batch in batches:
            vmap(lambda one, xs: functional_call(net, one, (xs,)), in_dims=(0, None))(tensors, batch)
        return fresh
    for r in range(len(next(iter(params.values())))):
        calls.update(dict.fromkeys(calls, 0))
        for batch in batches:
            functional_call(net, select(tensors, r), (batch,))
    return fresh
