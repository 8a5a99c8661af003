"""Which examples a step sees, their augmentation, and the network's noise: functions of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from ticketlab.errors import Refused
from ticketlab.seeds import derived_seed, stream


def epoch_order(n: int, order_seed: int, epoch: int) -> Int64[Tensor, " n"]:
    """The order in which an epoch visits n examples: a permutation of 0..n - 1, on the CPU."""
    return torch.randperm(n, generator=stream("order", order_seed, epoch))


_NUMBERS = 2500 * 3072  # of inputs in one forward pass: 2,500 small colour images, or 51 of ImageNet's size
_PER_TOKEN = 256  # numbers of an embedding, or of outputs, that a token stands for


def portion(x: Tensor, y: Tensor, size: int) -> int:
    """How many examples go through a network at once: ``size``, or fewer where they are large.

    What a forward pass holds grows with its inputs, and with its outputs where each token has a label.

    Args:
        x: Examples [n, ...].
        y: Their targets; the largest label of tokens [n, t] tells how many outputs there are.
        size: The most.
    """
    each = x[:1].numel()
    if not x.is_floating_point():
        of_token = not y.is_floating_point() and y.ndim > 1
        each *= max(_PER_TOKEN, int(y.max()) + 1 if of_token else 0)
    return max(1, min(size, _NUMBERS // max(1, each)))


# One entry a replica and epoch, so that many replicas can step in turn: 60 MB on MNIST, when full.
_recent_order: Callable[[int, int, int], Tensor] = lru_cache(maxsize=128)(epoch_order)


def batch_indices(n: int, batch_size: int, order_seed: int, step: int) -> Int64[Tensor, " batch"]:
    """Which of n training examples a step sees, as a function of the step alone: a resumed run needs no state.

    Epochs have n // batch_size steps; the incomplete batch at the end of an epoch is dropped.

    Args:
        n: Number of training examples.
        batch_size: In 1..n.
        order_seed: Of the replica.
        step: From 0.

    Returns:
        Indices on the CPU, all different.

    Raises:
        Refused: A batch size out of range or a negative step.
    """
    if not 1 <= batch_size <= n:
        raise Refused(f"batch_size must be in 1..{n}, the number of examples: got {batch_size}. Lower it.")
    if step < 0:
        raise Refused(f"step must not be negative: got {step}. Count steps from 0.")
    return batch_orders(n, batch_size, order_seed, range(step, step + 1))[0]


def batch_orders(n: int, batch_size: int, order_seed: int, steps: range) -> Int64[Tensor, "step batch"]:
    """`batch_indices` of successive steps, whole stretches of an epoch at a time."""
    each, parts, step = n // batch_size, [], steps.start
    while step < steps.stop:
        epoch, batch = divmod(step, each)
        stop = min(batch + steps.stop - step, each)
        order = _recent_order(n, order_seed, epoch)
        parts.append(order[batch * batch_size : stop * batch_size].view(-1, batch_size))
        step += stop - batch
    return torch.cat(parts)  # a copy: the cached one must stay as it is


def noise_seed(order_seed: int, step: int) -> int:
    """What the global generators are seeded with before a training step of a network that draws from them.

    Dropout, stochastic depth and other noise are then a function of (order seed, step): two siblings differ in their
    noise as in their batches, the treatments of one order seed in neither.
    """
    return derived_seed("noise", order_seed, step)


def crop_flip(
    x: Float[Tensor, "batch c h w"], order_seed: int, step: int, padding: int = 4
) -> Float[Tensor, "batch c h w"]:
    """Each image shifted by up to `padding` pixels and mirrored with probability 1/2, as is usual on CIFAR.

    The border is filled with 0 *after* normalisation, which is the mean colour, not black. Draws are made on
    the CPU, so that CPU and GPU agree, and are a function of the seed and the step alone.

    Args:
        x: A training batch.
        order_seed: Of the replica.
        step: From 0.
        padding: Largest shift, at least 0.

    Raises:
        Refused: An x that is not four-dimensional, or a negative padding.
    """
    if x.ndim != 4 or padding < 0:
        raise Refused(
            f"x must be [batch, c, h, w] and padding >= 0: got shape {tuple(x.shape)} and {padding}. Reshape x."
        )
    return crop_flipped(x, crop_flip_draws(len(x), order_seed, step, padding).to(x.device), padding)


def crop_flip_draws(n: int, order_seed: int, step: int, padding: int = 4) -> Int64[Tensor, "3 n 1"]:
    """The top and left edges of n crops, in 0..2 padding, and whether each is mirrored; on the CPU."""
    generator = stream("augment", order_seed, step)
    shifts = torch.randint(0, 2 * padding + 1, (2, n, 1), generator=generator)
    return torch.cat([shifts, torch.randint(0, 2, (1, n, 1), generator=generator)])


def crop_flipped(
    x: Float[Tensor, "batch c h w"], draws: Int64[Tensor, "3 batch 1"], padding: int = 4
) -> Float[Tensor, "batch c h w"]:
    """The images cropped and mirrored as drawn; everything on the device of ``x``."""
    n, c, h, w = x.shape
    top, left, flip = draws  # [n, 1] each
    rows = top + torch.arange(h, device=x.device)  # [n, h]
    column = torch.arange(w, device=x.device)
    columns = left + torch.where(flip.bool(), w - 1 - column, column)  # [n, w]
    source = rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]  # [n, h, w], into the padded image
    padded = F.pad(x, (padding,) * 4).flatten(2)
    return padded.gather(2, source.reshape(n, 1, h * w).expand(n, c, h * w)).reshape(x.shape)
