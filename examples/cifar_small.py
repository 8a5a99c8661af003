"""CIFAR-10 small enough for a laptop: 16 x 16 pixels, 10,000 training images. Runs of it are in ``docs/studies.md``.

>>> # python -m analyses.instability --task examples.cifar_small:task --model resnet_14_w8
"""

from __future__ import annotations

import ticketlab as tl


def task() -> tl.Task:
    """Images of three channels, ten classes: 10,000 for training, 1,000 for validation, 5,000 for tests."""
    return tl.load_task("cifar10").limit(train=10000, validation=1000, test=5000).resize(16, 16)
