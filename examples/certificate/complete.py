"""Certificates that pay for the program which sees and scores, and not for the weights alone.

The certificates of network.py take their features and the form of their code for given, at the price of 16 bits. Here
the features and the network are the text of a program, and that text is paid for: a word is the program as raw deflate,
which says by itself where it ends, and the message that the program decodes, a word of an arithmetic code; words are
prefix-free, so that 2^-bits is a prior. Whatever was tried on the training images before the program was written, its
own length pays for.

Free remain Python, the names of numpy and scipy.ndimage, and the `Decoder` of ticketlab.bounds. `with_decoder` pays for
the last two as well: their text (records/mnist-decoder.txt) stands before the program's and is deflated with it. Then
nothing is given but Python with those two libraries installed, inflate, and a loop that hands over images and bytes.
A message is as long as it takes to fix the weights whatever bytes follow, so these words are prefix-free as well.

The program (records/mnist-program.txt) is features.py and network.py in short: it finds the same maps of an upright
image, with real numbers in place of integers and one square root in place of bytes, and has no biases. It is run on
images I [n, 28, 28], one by one, with D the decoder of its message, and puts scores [10] an image into R; preceded by
its decoder's text it finds the bytes of the message in M instead. Only the program whose SHA-256 stands here is ever
run, for a file that is to be verified is not to be trusted.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.certificate.features import GRID, KINDS, SIDES
from examples.certificate.network import Network
from ticketlab.bounds import Decoder, Encoder
from ticketlab.errors import Refused

RECORDS = Path(__file__).parent / "records"
PROGRAM = RECORDS / "mnist-program.txt"
DECODER = RECORDS / "mnist-decoder.txt"
"""Imports and decoder as the program needs them, short for the sake of its bits."""
PROGRAM_SHA256 = "d0e2976d051fa2b3bceca3da0c6c094b1a4b3c1c9a37a8aae56a6ff87559db48"
LONGEST = 1000
"""Bytes that are inflated at most: the program has 695."""
INTERPRETER = "from scipy.ndimage import *\nfrom numpy import *"
LARGEST = 5
"""Of the program's weights."""


def encode(program: str, network: Network) -> bytes:
    """The word of a program and of a network without its biases, its maps in the program's order.

    Raises:
        Refused: Another program, or weights above 5.
    """
    _check(program.encode())
    cells, hidden = GRID**2, len(network.weights)
    mine = network.weights.reshape(hidden, sum(KINDS), cells)
    maps = np.zeros((hidden, KINDS[0] + 1 + 13, cells), dtype=np.int64)  # gradients, holes, and sides 3 to 15
    maps[:, : KINDS[0] + 1] = mine[:, : KINDS[0] + 1]
    maps[:, [KINDS[0] - 2 + side for side in SIDES]] = mine[:, KINDS[0] + 1 :]
    if (largest := max(np.abs(array).max() for array in (maps, network.output))) > LARGEST:
        raise Refused(f"weights must be in -{LARGEST}..{LARGEST}: got {largest}.")
    return _deflated(program) + _message(maps, network.output)


def taken_apart(word: bytes) -> tuple[str, bytes, list[NDArray[np.int64]]]:
    """The program and the message of a word, and the weights in it; nothing beyond the longest program is inflated.

    Raises:
        Refused: Bytes that are not one whole word of the one program that is known here.
    """
    inflate = zlib.decompressobj(-15)
    try:
        program = inflate.decompress(word, LONGEST)
    except zlib.error as error:
        raise Refused(f"the word must begin with a program as raw deflate: {error}.") from error
    if not inflate.eof:
        raise Refused(f"the word must begin with a program below {LONGEST} bytes: it is longer, or has no end.")
    _check(program)
    message = inflate.unused_data
    decoder = Decoder(message)
    weights = _run(program, {**_free_names(), "D": decoder})[0]
    decoder.finish()
    if _message(*weights) != message:
        raise Refused("the message must be in its shortest form: this one is not.")
    return program.decode(), message, weights


def scores(word: bytes, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Scores that the word's program gives images [n, 28, 28]: [n, 10]. Raises as `taken_apart`."""
    program, message, _ = taken_apart(word)
    return np.array(_run(program, {**_free_names(), "D": Decoder(message)}, images)[1])


def with_decoder(word: bytes) -> bytes:
    """The word of the same scores that brings its imports and its decoder along.

    The same program has the same scores if its decoder's text gives it the same weights: that is checked here.

    Raises:
        Refused: As `taken_apart`, or a message that the two decoders do not read alike.
    """
    program, message, free = taken_apart(word)
    text = DECODER.read_text() + program
    if not all(map(np.array_equal, free, _run(text, {"M": message})[0])):
        raise Refused("the message must decode alike with and without ticketlab.bounds: this one does not.")
    return _deflated(text) + message


def count_errors(word: bytes, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> int:
    """Images whose own class does not have the one largest score: ties and scores that are no numbers are errors."""
    found, rows = scores(word, images), np.arange(len(labels))
    own = found[rows, labels]
    found[rows, labels] = -np.inf
    return int((~(own > found.max(1))).sum())


def _run(
    source: str | bytes, names: dict[str, Any], images: NDArray[np.uint8] | tuple[()] = ()
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.float64]]]:
    """The weights that a known program decodes and its scores of images; `names` are those that it finds."""
    names |= {"I": np.asarray(images, dtype=np.float64), "R": []}
    with np.errstate(all="ignore"):
        exec(source, names)
    return [names["W"], names["V"]], names["R"]


def _free_names() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(INTERPRETER, names)
    return names


def _deflated(text: str) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return deflate.compress(text.encode()) + deflate.flush()


def _message(*weights: NDArray[np.int64]) -> bytes:
    encoder = Encoder()
    for array in weights:
        encoder.symbols(array.ravel() + LARGEST, (1,) * (2 * LARGEST + 1), 2)
    return encoder.finish()


def _check(program: bytes) -> None:
    if (given := hashlib.sha256(program).hexdigest()) != PROGRAM_SHA256:
        raise Refused(f"the program must be records/mnist-program.txt: got one of SHA-256 {given}.")
