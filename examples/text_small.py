"""Both text tasks small enough for a laptop. Runs of them are in ``docs/studies.md``.

>>> # python -m analyses.transformer_tickets --task examples.text_small:topics \
>>> #     --pretrain-task examples.text_small:next_bytes
"""

from __future__ import annotations

import ticketlab as tl


def topics() -> tl.Task:
    """Passages of 128 bytes and the package that each is from: 4,000 for training, 800 for validation, 1,600 tests."""
    return tl.load_task("stdlib_topics").limit(train=4000)


def next_bytes() -> tl.Task:
    """Next bytes of passages of 128: 10,000 for training, 200 for validation, 400 tests."""
    return tl.load_task("stdlib_lm").limit(train=10000, validation=200, test=400)
