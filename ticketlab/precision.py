"""What float32 means where a device has faster and coarser arithmetic for it: nothing is left to global switches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import backends


@contextmanager
def float32_arithmetic(device: torch.device, tf32: bool = False) -> Iterator[None]:
    """Matrix products, convolutions and recurrent layers of float32 as float32 until the block ends, or with TF32.

    PyTorch leaves TF32 (10 bits of mantissa in place of 23) on for convolutions of CUDA devices and off for matrix
    products, and lets global switches change both: what they say is put aside, and back afterwards. On a CPU the
    switch is ``torch.set_float32_matmul_precision``. Other dtypes are not touched.

    Args:
        device: Where is computed.
        tf32: Allow TF32, which CUDA devices of compute capability 8.0 and later have.
    """
    mkldnn: Any = backends.mkldnn
    cudnn: Any = backends.cudnn
    of_cpu, of_cuda = (mkldnn.matmul, mkldnn.conv, mkldnn.rnn), (backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    operations = of_cuda if device.type == "cuda" else of_cpu
    if all(one.fp32_precision == "tf32" if tf32 else one.fp32_precision in ("ieee", "none") for one in operations):
        yield
        return
    before = [(one, one.fp32_precision) for one in of_cpu + of_cuda]
    older = _older_switches()
    try:
        if older is not None:  # which must not contradict the newer ones
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            cudnn.allow_tf32 = tf32
        for operation in operations:
            operation.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for operation, precision in before:
            if operation.fp32_precision != precision:
                operation.fp32_precision = precision


def _older_switches() -> tuple[str, bool] | None:
    """None: the newer switches have been used, and say something else."""
    try:
        return torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:
        return None
