"""A certificate in which everything is paid for: the program that sees and scores, and the weights it reads.

The certificates of network.py take their features and the form of their code for given, at the price of 16 bits. Here
nothing but the interpreter is: Python with the names of numpy and scipy.ndimage, and the `Decoder` of ticketlab.bounds.
A word is a program as raw deflate, which says by itself where it ends, and the message that the program decodes, a
word of an arithmetic code; words are prefix-free, so that 2^-bits is a prior. Whatever was tried on the training
images before the program was written, its own length pays for.

The program (certificates/mnist-program.txt) is features.py and network.py in short: it finds the same maps of an
upright image, with real numbers in place of integers and one square root in place of bytes, and has no biases. It is
run on images I [n, 28, 28], one by one, with D the decoder of its message, and puts scores [10] an image into R.
Only the program whose SHA-256 stands here is ever run, for a file that is to be verified is not to be trusted.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyses.certificate.features import GRID, KINDS, SIDES
from analyses.certificate.network import Network
from ticketlab.bounds import Decoder, Encoder
from ticketlab.errors import Refused

PROGRAM_SHA256 = "d0e2976d051fa2b3bceca3da0c6c094b1a4b3c1c9a37a8aae56a6ff87559db48"
INTERPRETER = "from scipy.ndimage import *\nfrom numpy import *"
LARGEST = 5
"""Of the program's weights."""


def encode(program: str, network: Network) -> bytes:
    """The word of a program and of a network without its biases, its maps in the program's order.

    Raises:
        ValueError: Another program, or weights above 5.
    """
    _check(program.encode())
    cells, hidden = GRID**2, len(network.weights)
    mine = network.weights.reshape(hidden, sum(KINDS), cells)
    maps = np.zeros((hidden, KINDS[0] + 1 + 13, cells), dtype=np.int64)  # gradients, holes, and sides 3 to 15
    maps[:, : KINDS[0] + 1] = mine[:, : KINDS[0] + 1]
    maps[:, [KINDS[0] - 2 + side for side in SIDES]] = mine[:, KINDS[0] + 1 :]
    if (largest := max(np.abs(array).max() for array in (maps, network.output))) > LARGEST:
        raise Refused(f"weights must be in -{LARGEST}..{LARGEST}: got {largest}.")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return deflate.compress(program.encode()) + deflate.flush() + _message(maps, network.output)


def _message(*weights: NDArray[np.int64]) -> bytes:
    encoder = Encoder()
    for array in weights:
        encoder.symbols(array.ravel() + LARGEST, (1,) * (2 * LARGEST + 1), 2)
    return encoder.finish()


def scores(word: bytes, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What the word's program gives for images [n, 28, 28]: [n, 10].

    Raises:
        ValueError: Bytes that are not one whole word of the one program that is known here.
    """
    inflate = zlib.decompressobj(-15)
    try:
        program = inflate.decompress(word)
    except zlib.error as error:
        raise Refused(f"the word must begin with a program as raw deflate: {error}.") from error
    _check(program)
    decoder = Decoder(inflate.unused_data)
    names: dict[str, Any] = {}
    exec(INTERPRETER, names)
    found: list[NDArray[np.float64]] = []
    names |= {"I": images.astype(np.float64), "D": decoder, "R": found}
    with np.errstate(all="ignore"):
        exec(program.decode(), names)
    decoder.finish()
    if _message(names["W"], names["V"]) != inflate.unused_data:  # the arrays that it decoded
        raise Refused("the message must be in its shortest form: this one is not.")
    return np.array(found)


def count_errors(word: bytes, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> int:
    """Images whose own class does not have the one largest score: ties and scores that are no numbers are errors."""
    found, rows = scores(word, images), np.arange(len(labels))
    own = found[rows, labels]
    found[rows, labels] = -np.inf
    return int((~(own > found.max(1))).sum())


def _check(program: bytes) -> None:
    if (given := hashlib.sha256(program).hexdigest()) != PROGRAM_SHA256:
        raise Refused(f"the program must be certificates/mnist-program.txt: got one of SHA-256 {given}.")
