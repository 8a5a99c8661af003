"""Fixed features of digit images: what the certified networks see. Nothing here is learned.

Textbook preprocessing of handwriting: an image is set upright and to size by its own moments; then where its strokes
run (gradients in eight directions) and where its paper is enclosed (concavities and holes) is pooled on a coarse grid.
All of it is integer arithmetic on one image at a time, so that the features are the same bytes on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Integers = NDArray[np.int64]

SIZE = 28  # side of the normalised image
GRID = 7  # side of the pooled maps
SPAN = (9, 2)  # the normalised image is 9/2 standard deviations of the ink wide and high
INK = 96  # of 255: what counts as ink where the paper is looked at
ONE = 1024  # fixed point: units a pixel
KINDS = (8, 12)
"""Maps of gradients and of concavities; every map has GRID * GRID cells."""
N_FEATURES = sum(KINDS) * GRID**2
SIDES = (15, 14, 13, 11, 7, 3, 12, 5, 6, 9, 10)
"""Of the concavities after holes: where ink is met, 1 for left, 2 for right, 4 for the top, 8 for the bottom."""


def features(images: NDArray[np.uint8], chunk: int = 1000) -> NDArray[np.uint8]:
    """Every image by itself as unsigned bytes: gradients, then concavities, each [direction, row, column].

    Args:
        images: [n, height, width], 0 = paper, 255 = ink.
        chunk: Images at a time; changes nothing but memory.

    Returns:
        [n, N_FEATURES].
    """
    parts = []
    for start in range(0, len(images), chunk):
        upright = normalised(images[start : start + chunk])
        maps = [pooled(gradients(upright)), pooled(concavities(upright) * 256)]
        parts.append(np.concatenate([np.minimum(isqrt(m) // 16, 255) for m in maps], axis=1).astype(np.uint8))
    return np.concatenate(parts)


def isqrt(values: Integers) -> Integers:
    """Integer square roots; exact below 2^52, for IEEE 754 rounds square roots correctly."""
    return np.floor(np.sqrt(values.astype(np.float64))).astype(np.int64)


def normalised(images: NDArray[np.uint8]) -> Integers:
    """Upright, centred and to size by the moments of each image.

    The slant is removed by the shear that makes the covariance of the ink zero. Then the longer extent is scaled to
    the frame and the shorter to the geometric mean of the two, so that a 1 stays narrow (aspect-adaptive moment
    normalisation: Liu et al., Pattern Recognition 37, 2004).

    Args:
        images: [n, height, width].

    Returns:
        [n, SIZE, SIZE] in 0..255, bilinear samples rounded down.
    """
    ink = images.astype(np.int64)
    height, width = ink.shape[1:]
    rows, columns = np.arange(height), np.arange(width)
    by_row, by_column = ink.sum(2), ink.sum(1)
    mass = np.maximum(by_row.sum(1), 1)
    sum_y, sum_x = by_row @ rows, by_column @ columns
    # covariances, times mass^2
    var_x = mass * (by_column @ columns**2) - sum_x**2
    var_y = np.maximum(mass * (by_row @ rows**2) - sum_y**2, 1)
    cov = mass * ((ink @ columns) * rows).sum(1) - sum_x * sum_y
    shear = np.clip(cov * ONE // var_y, -2 * ONE, 2 * ONE)
    upright_x = np.maximum(var_x - cov * shear // ONE, 0)  # the shear is rounded
    extent_x, extent_y = (isqrt(v * ONE // mass * ONE // mass) for v in (upright_x, var_y))
    mean = isqrt(extent_x * extent_y)
    step_x, step_y = (np.maximum(np.maximum(e, mean) * SPAN[0] // (SPAN[1] * SIZE), 64) for e in (extent_x, extent_y))

    half = 2 * np.arange(SIZE) - (SIZE - 1)  # positions about the centre, in half pixels
    dy = step_y[:, None] * half // 2  # [n, SIZE]
    y = (sum_y * ONE // mass)[:, None] + dy
    x = ((sum_x * ONE // mass)[:, None] + shear[:, None] * dy // ONE)[:, :, None] + (step_x[:, None] * half // 2)[
        :, None
    ]
    return _bilinear(ink, np.broadcast_to(y[:, :, None], x.shape), x)


def _bilinear(ink: Integers, y: Integers, x: Integers) -> Integers:
    """The images at fixed-point places; paper outside."""
    n, height, width = ink.shape
    framed = np.zeros((n, height + 3, width + 3), dtype=np.int64)
    framed[:, 1:-2, 1:-2] = ink
    y, x = (np.clip(p + ONE, 0, (side + 1) * ONE) for p, side in ((y, height), (x, width)))
    corner = (y // ONE) * (width + 3) + x // ONE
    flat, corner = framed.reshape(n, -1), corner.reshape(n, -1)
    fy, fx = y % ONE, x % ONE
    at = [np.take_along_axis(flat, corner + step, 1).reshape(x.shape) for step in (0, 1, width + 3, width + 4)]
    above, below = at[0] * (ONE - fx) + at[1] * fx, at[2] * (ONE - fx) + at[3] * fx
    return ((above * (ONE - fy) + below * fy) // ONE**2).astype(np.int64)


def gradients(images: Integers) -> Integers:
    """Sobel gradients, each split between the two nearest of eight directions.

    [n, SIZE, SIZE] -> [n, 8, SIZE, SIZE].
    """
    p = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    down, right = p[:, 2:] - p[:, :-2], p[:, :, 2:] - p[:, :, :-2]
    gy = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    gx = right[:, :-2] + 2 * right[:, 1:-1] + right[:, 2:]
    straight = np.abs(np.abs(gx) - np.abs(gy))
    oblique = np.minimum(np.abs(gx), np.abs(gy)) * 1448 // 1024  # times sqrt(2)
    level = np.abs(gx) > np.abs(gy)
    out = np.zeros((len(images), 8, *images.shape[1:]), dtype=np.int64)
    for direction, where in enumerate((level & (gx > 0), ~level & (gy > 0), level & (gx < 0), ~level & (gy < 0))):
        out[:, 2 * direction] = straight * where
    for direction, (sx, sy) in enumerate(((1, 1), (-1, 1), (-1, -1), (1, -1))):
        out[:, 2 * direction + 1] = oblique * ((gx * sx > 0) & (gy * sy > 0))
    return out


def concavities(images: Integers) -> Integers:
    """Kinds of paper, 0 or 1: holes; then by the sides (left, right, top, bottom) on which ink is met.

    Bays met on all four sides, on three (open to left, right, top, bottom), and on two: left and right, top and
    bottom, left-top, right-top, left-bottom, right-bottom. [n, SIZE, SIZE] -> [n, 12, SIZE, SIZE].
    """
    ink = images >= INK
    seen = np.logical_or.accumulate
    met = seen(ink, 2) + 2 * seen(ink[:, :, ::-1], 2)[:, :, ::-1].astype(np.int64)
    met = met + 4 * seen(ink, 1) + 8 * seen(ink[:, ::-1], 1)[:, ::-1]
    paper = np.pad(~ink, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    plus = ndimage.generate_binary_structure(2, 1)[None] & (np.arange(3) == 1)[:, None, None]  # within an image alone
    region, _ = ndimage.label(paper, plus)
    hole = ~ink & (region != region[:, :1, :1])[:, 1:-1, 1:-1]
    rest = ~ink & ~hole
    return np.stack([hole, *(rest & (met == side) for side in SIDES)], 1).astype(int)


def pooled(maps: Integers) -> Integers:
    """Weighted sums about the cells of a grid. [n, kind, SIZE, SIZE] -> [n, kind * GRID * GRID].

    The weights fall linearly from 64 at the centre of a cell to 0 at those of its neighbours.
    """
    centres, places = (2 * np.arange(GRID) + 1) * SIZE, (2 * np.arange(SIZE) + 1) * GRID
    weights = 64 * np.maximum(2 * SIZE - np.abs(centres[:, None] - places), 0) // (2 * SIZE)
    # float64 holds these integers exactly, and its matrix products are fast
    w = weights.astype(np.float64)
    return (w @ maps.astype(np.float64) @ w.T).astype(np.int64).reshape(len(maps), -1)
