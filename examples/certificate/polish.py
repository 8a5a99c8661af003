"""Descent on the bound itself: one weight or two at a time, errors counted on the training examples, bits as coded.

Near a network with p = errors / n and bound B, an error more leaves the bound where it is if it saves
log2(B (1 - p) / (p (1 - B))) bits, by the slopes of kl(p || B). So what falls is bits + that price * errors. Where p or
B is 0 or 1 the price is that of the nearest p or B at which it is finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.certificate.features import GRID, N_FEATURES, Integers
from examples.certificate.network import (
    CLASSES,
    DESIGNS,
    HIDDEN_BIAS,
    LARGEST,
    MOST_HIDDEN,
    OUTPUT_BIAS,
    Network,
    count_errors,
    lots,
    scores,
    without_idle_units,
)
from ticketlab import bounds
from ticketlab.losses import mean_cross_entropy
from ticketlab.seeds import stream

WEIGHTS, BIAS, OUTPUT, _ = range(4)  # places in Network.arrays

Move = tuple[int, tuple[int, ...], tuple[int, ...]]
"""An array, flat indices into it (two only within one row of W), and their new values."""


def kt_bits(zeros: int, ones: int) -> float:
    """Of the adaptive code of Krichevsky and Trofimov for that many flags."""
    nats = math.lgamma(zeros + ones + 1) - math.lgamma(zeros + 0.5) - math.lgamma(ones + 0.5) + math.log(math.pi)
    return nats / math.log(2)


def array_bits(array: Integers) -> float:
    """What `network.encode` spends on an array, but for rounding."""
    live = array[array != 0]
    above = [int((np.abs(live) > size).sum()) for size in range(LARGEST)]
    bits = kt_bits(int((live > 0).sum()), int((live < 0).sum()))
    bits += sum(kt_bits(lot.size - (ones := int(np.count_nonzero(lot))), ones) for lot in lots(array))
    return bits + sum(kt_bits(above[size - 1] - above[size], above[size]) for size in range(1, LARGEST))


def certified(network: Network, x: NDArray[np.uint8], y: NDArray[np.uint8], delta: float) -> tuple[float, int]:
    """The bound in its kl form, which is quick, and the training errors."""
    errors, bits = count_errors(network, x, y), math.log2(DESIGNS * MOST_HIDDEN) + sum(map(array_bits, network.arrays))
    return float(bounds.occam_kl(errors / len(y), bits * math.log(2), len(y), delta)), errors


def polish(
    network: Network,
    x: NDArray[np.uint8],
    y: NDArray[np.uint8],
    *,
    sweeps: int,
    delta: float,
    seed: int = 0,
    additions: int = 300,
    share: float = 0.25,
) -> Network:
    """The network after so many sweeps of small changes; stops early where a sweep gains nothing.

    Args:
        network: The start.
        x: Features [n, d].
        y: Labels [n].
        sweeps: At most; each takes seconds.
        delta: Of the bound.
        seed: Of the order of the changes.
        additions: Dead weights tried in a sweep, those with the largest gradients.
        share: Of the examples, the hardest, on which errors are counted during a sweep. Afterwards on all.
    """
    best = without_idle_units(network)
    bound, errors = certified(best, x, y, delta)
    for sweep in range(sweeps):
        price = price_of_an_error(errors, len(y), bound)
        state = State.of(best, *hardest(best, x, y, share))
        descend(state, moves(best, state.x, state.y, additions, seed + sweep), price)
        network = without_idle_units(Network(*state.arrays))
        least, (bound, errors) = bound, certified(network, x, y, delta)
        if bound >= least:
            break
        best = network
    return best


def price_of_an_error(errors: int, n: int, bound: float) -> float:
    """In bits; of at least one error and one right answer, and of a bound below 1."""
    p, bound = min(max(errors, 1), n - 1) / n, min(bound, math.nextafter(1.0, 0.0))
    return math.log2(bound * (1 - p) / (p * (1 - bound)))


def hardest(network: Network, x: NDArray[np.uint8], y: NDArray[np.uint8], share: float) -> tuple[Tensor, Tensor]:
    """The examples that are wrong or nearly: x [d, n] and y [n]."""
    margins = []
    for part, labels in zip(np.array_split(x, len(x) // 5000 + 1), np.array_split(y, len(x) // 5000 + 1), strict=True):
        found, rows = scores(network, part), np.arange(len(part))
        own = found[rows, labels]
        found[rows, labels] = -np.inf
        margins.append(own - found.max(1))
    chosen = np.argsort(np.concatenate(margins), kind="stable")[: math.ceil(share * len(y))]
    return torch.from_numpy(x[chosen].T.astype(np.float32)).contiguous(), torch.from_numpy(y[chosen].astype(np.int64))


@dataclass
class State:
    """A network and what it computes on some examples, kept up to date change by change."""

    arrays: list[Integers]
    x: Tensor  # [d, n] float32; all integers here are below 2^24, so exact
    y: Tensor  # [n]
    before: Tensor  # W x + 256 b [h, n]
    lead: Tensor  # the score of each class less that of the right one [10, n]; -inf for the right one itself

    @classmethod
    def of(cls, network: Network, x: Tensor, y: Tensor) -> State:
        weights, bias, output, output_bias = (torch.from_numpy(a).float() for a in network.arrays)
        before = weights @ x + HIDDEN_BIAS * bias[:, None]
        found = output @ before.relu() + OUTPUT_BIAS * output_bias[:, None]
        lead = found - found.gather(0, y[None])
        lead.scatter_(0, y[None], -math.inf)
        return cls([a.copy() for a in network.arrays], x, y, before, lead)

    def after(self, move: Move) -> tuple[Tensor | None, Tensor]:
        """The row of `before` that a move makes, None if it changes none, and `lead`."""
        which, indices, values = move
        steps = [value - int(self.arrays[which].flat[index]) for index, value in zip(indices, values, strict=True)]
        if which in (WEIGHTS, BIAS):
            unit = self.unit(move)
            inputs = [self.x[i % N_FEATURES] if which == WEIGHTS else HIDDEN_BIAS for i in indices]
            row = self.before[unit] + sum(step * value for step, value in zip(steps, inputs, strict=True))
            weights = torch.from_numpy(self.arrays[OUTPUT][:, unit]).float()
            return row, self._shifted(weights, row.relu() - self.before[unit].relu())
        weights, (index,), (step,) = torch.zeros(CLASSES), indices, steps
        if which == OUTPUT:
            weights[index // len(self.before)] = step
            return None, self._shifted(weights, self.before[index % len(self.before)].relu())
        weights[index] = step * OUTPUT_BIAS
        return None, self._shifted(weights, torch.ones(len(self.y)))

    def _shifted(self, weights: Tensor, amount: Tensor) -> Tensor:
        """`lead` once the scores have grown by weights [10] times amount [n]."""
        return self.lead + (weights[:, None] - weights[self.y]) * amount

    def unit(self, move: Move) -> int:
        return move[1][0] // (N_FEATURES if move[0] == WEIGHTS else 1)


def descend(state: State, tried: Iterable[Move], price: float) -> None:
    """Each move in turn, made where it lowers bits + price * errors."""
    errors, bits = _wrong(state.lead), [array_bits(array) for array in state.arrays]
    for move in tried:
        which, indices, values = move
        flat = state.arrays[which].ravel()
        was = flat[list(indices)].copy()
        if len(indices) == 2 and (was[0] == 0 or was[1] != 0):
            continue  # an earlier move has been here
        row, lead = state.after(move)
        flat[list(indices)] = values
        new_errors, new_bits = _wrong(lead), array_bits(state.arrays[which])
        if new_bits - bits[which] + price * (new_errors - errors) < -1e-9:
            state.lead, errors, bits[which] = lead, new_errors, new_bits
            if row is not None:
                state.before[state.unit(move)] = row
        else:
            flat[list(indices)] = was


def _wrong(lead: Tensor) -> int:
    return int((lead.amax(0) >= 0).sum())


def moves(network: Network, x: Tensor, y: Tensor, additions: int, seed: int) -> list[Move]:
    """What is tried: each weight that lives in W, and every other entry, made zero, smaller or larger; weights of W
    moved to a neighbouring feature; the dead ones that the gradient asks for most brought to life, with and without
    the death of another in the same unit. In random order."""
    found: list[Move] = []
    for which, array in enumerate(network.arrays):
        flat = array.ravel()
        for index in (np.flatnonzero(flat) if which == WEIGHTS else np.arange(flat.size)).tolist():
            value = int(flat[index])
            found += [(which, (index,), (v,)) for v in {0, value - 1, value + 1} - {value} if abs(v) <= LARGEST]
            if which == WEIGHTS:
                others = [index - index % N_FEATURES + feature for feature in neighbours(index % N_FEATURES)]
                found += [(which, (index, other), (0, value)) for other in others if not flat[other]]
    gradient = loss_gradient(network, x, y) * (network.weights == 0)
    most = np.argsort(-np.abs(gradient).ravel(), kind="stable")[:additions].tolist()
    found += [(WEIGHTS, (index,), (-int(np.sign(gradient.flat[index])),)) for index in most]
    by_unit = np.argsort(-np.abs(gradient), axis=1, kind="stable")[:, : additions // 50]
    for index in np.flatnonzero(network.weights).tolist():
        unit, row = index // N_FEATURES, index - index % N_FEATURES
        found += [(WEIGHTS, (index, row + f), (0, -int(np.sign(gradient[unit, f])))) for f in by_unit[unit].tolist()]
    return [found[i] for i in torch.randperm(len(found), generator=stream("polish", seed)).tolist()]


def neighbours(feature: int) -> list[int]:
    """One step away in the grid, and the same cell of the maps before and after its own."""
    kind, row, column = feature // GRID**2, feature // GRID % GRID, feature % GRID
    near = [(kind, row + r, column + c) for r, c in ((0, 1), (0, -1), (1, 0), (-1, 0))]
    near += [(kind - 1, row, column), (kind + 1, row, column)]
    sides = (N_FEATURES // GRID**2, GRID, GRID)
    inside = [at for at in near if all(0 <= place < side for place, side in zip(at, sides, strict=True))]
    return [(k * GRID + r) * GRID + c for k, r, c in inside]


def loss_gradient(network: Network, x: Tensor, y: Tensor) -> NDArray[np.float32]:
    """Of the cross-entropy, at a temperature that suits the scores, in W: [h, d]."""
    weights, bias, output, output_bias = (torch.from_numpy(a).float() for a in network.arrays)
    weights.requires_grad_()
    hidden = (weights @ x + HIDDEN_BIAS * bias[:, None]).relu()
    logits = output @ hidden + OUTPUT_BIAS * output_bias[:, None]
    loss = mean_cross_entropy((4 * logits / logits.detach().std().clamp(min=1)).T, y)
    return torch.autograd.grad(loss, weights)[0].numpy()
