"""Networks of small integers on fixed features, and the prefix-free code whose lengths are the prior.

    scores = V relu(W x + 256 b) + 512 c

with x in 0..255, the features. The prior is this code: 16 bits for the design, 6 for the number of hidden units, then
W, b, V, c. Each array is coded as flags, for all its entries in turn: is it zero, is it negative, is its size above 1,
above 2 and so on up to 7, every kind of flag by the adaptive code of Krichevsky and Trofimov. Whether a weight of W is
zero is coded in three lots: gradients inside, gradients along the border of the grid, concavities.

Which weights live, their values and the width are paid for in the message, and with them the seed, the settings and
the end of the search, for a bound speaks of the network itself, whatever way led to it. The features, this form and
these lots are taken for given, but for 16 bits. They were settled after trying others on the training images:
gradients or pixels, upright or not, grids, with and without concavities, hidden layers, convolutions, other lots; some
thousand combinations at most. So the bound holds on the condition that this design, number 0, would have been one of
65,536 that were written down before the images were seen, which nobody did. complete.py pays for the design as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.certificate.features import GRID, KINDS, N_FEATURES, Integers
from ticketlab.bounds import Decoder, Encoder
from ticketlab.errors import Refused

CLASSES = 10
DESIGNS = 1 << 16
MOST_HIDDEN = 64
LARGEST = 7
HIDDEN_BIAS, OUTPUT_BIAS = 256, 512
KT = 2  # what a frequency grows by at each use, having started at 1

_border = np.pad(np.zeros((GRID - 2, GRID - 2), dtype=bool), 1, constant_values=True).ravel()
_inner = np.concatenate([np.tile(~_border, KINDS[0]), np.zeros(KINDS[1] * GRID**2, dtype=bool)])
_edge = np.concatenate([np.tile(_border, KINDS[0]), np.zeros(KINDS[1] * GRID**2, dtype=bool)])
LOTS = (_inner, _edge, ~(_inner | _edge))
"""Features [N_FEATURES] whose weights are coded together: gradients inside, gradients at the border, concavities."""


@dataclass(frozen=True)
class Network:
    """Integer weights in -7..7."""

    weights: Integers
    """W: [hidden, N_FEATURES]."""
    hidden_bias: Integers
    """b: [hidden]."""
    output: Integers
    """V: [CLASSES, hidden]."""
    output_bias: Integers
    """c: [CLASSES]."""

    @property
    def arrays(self) -> tuple[Integers, ...]:
        """In the order of the code."""
        return self.weights, self.hidden_bias, self.output, self.output_bias


def shapes(hidden: int) -> list[tuple[int, ...]]:
    """Of the arrays of a network, in the order of the code."""
    return [(hidden, N_FEATURES), (hidden,), (CLASSES, hidden), (CLASSES,)]


def lots(array: Any) -> list[Any]:
    """An array or tensor cut into what is coded together."""
    return [array[:, lot] for lot in LOTS] if array.ndim == 2 and array.shape[1] == N_FEATURES else [array]


def without_idle_units(network: Network) -> Network:
    """The same function less the hidden units that are always 0, and those that nothing comes out of."""
    used = (network.weights.any(1) | (network.hidden_bias > 0)) & network.output.any(0)
    used[0] |= not used.any()
    return Network(network.weights[used], network.hidden_bias[used], network.output[:, used], network.output_bias)


def scores(network: Network, x: NDArray[np.uint8]) -> NDArray[np.float64]:
    """[n, CLASSES], exact: float64 holds every sum, all integers below 2^53, whatever their order."""
    w = network.weights.T.astype(np.float64)
    hidden = np.maximum(x.astype(np.float64) @ w + HIDDEN_BIAS * network.hidden_bias, 0)
    return hidden @ network.output.T.astype(np.float64) + OUTPUT_BIAS * network.output_bias


def count_errors(network: Network, x: NDArray[np.uint8], y: NDArray[np.uint8], chunk: int = 5000) -> int:
    """Examples whose own class does not have the one largest score: a tie is an error."""
    errors = 0
    for start in range(0, len(y), chunk):
        found = scores(network, x[start : start + chunk])
        rows, labels = np.arange(len(found)), y[start : start + chunk]
        own = found[rows, labels]
        found[rows, labels] = -np.inf
        errors += int((own <= found.max(1)).sum())
    return errors


def encode(network: Network) -> bytes:
    """The message from which `decode` rebuilds the network; 8 times its bytes is the description length in bits."""
    encoder = Encoder()
    encoder.uniform(0, DESIGNS)
    encoder.uniform(len(network.hidden_bias) - 1, MOST_HIDDEN)
    for array in network.arrays:
        for lot in lots(array != 0):
            encoder.symbols(lot, (1, 1), KT)
        live = array[array != 0]
        encoder.symbols(live < 0, (1, 1), KT)
        sizes = np.abs(live)
        if sizes.max(initial=0) > LARGEST:
            raise Refused(f"weights must be in -{LARGEST}..{LARGEST}: got {sizes.max()}. Clip them.")
        for size in range(1, LARGEST):
            encoder.symbols(sizes[sizes >= size] > size, (1, 1), KT)
    return encoder.finish()


def decode(message: bytes) -> Network:
    """The network that `encode` wrote.

    Raises:
        ValueError: Bytes that are not one whole message in its shortest form.
    """
    decoder = Decoder(message)
    if design := decoder.uniform(DESIGNS):
        raise Refused(f"the message must be of design 0, the one that is known here: got {design}.")
    hidden = decoder.uniform(MOST_HIDDEN) + 1
    arrays = [np.zeros(shape, dtype=np.int64) for shape in shapes(hidden)]
    for array in arrays:
        alive = np.zeros(array.shape, dtype=bool)
        for indices in lots(np.arange(array.size).reshape(array.shape)):
            alive.ravel()[indices.ravel()] = decoder.symbols(indices.size, (1, 1), KT)
        n_live = int(alive.sum())
        signs = 1 - 2 * decoder.symbols(n_live, (1, 1), KT)
        sizes = np.ones(n_live, dtype=np.int64)
        for size in range(1, LARGEST):
            sizes[sizes >= size] += decoder.symbols(int((sizes >= size).sum()), (1, 1), KT)
        array[alive] = signs * sizes
    decoder.finish()
    network = Network(*arrays)
    if encode(network) != message:
        raise Refused("the message must be in its shortest form: this one is not. Use encode's bytes.")
    return network
