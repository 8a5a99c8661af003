"""One training on several processes, as ``torchrun`` starts them: each takes its share of every batch.

Gradients are summed over the processes, so that a step is that of the whole batch but for the order of sums. Weights,
masks and optimizers are the same everywhere; the first process alone writes. A batch norm takes the statistics of its
process's share, and keeps the mean of the running ones: it is local, unless the network has
``torch.nn.SyncBatchNorm``, which PyTorch has for GPUs. Without a process group there is one process, and nothing of
this does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ticketlab.errors import Refused
from ticketlab.seeds import derived_seed

T = TypeVar("T")


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has; on GPUs each takes the one of its local rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def share(n: int) -> slice:
    """This process's part of a batch of n examples.

    Raises:
        Refused: Fewer examples than processes.
    """
    if n < size():
        raise Refused(f"a batch must have an example for each of {size()} processes: got {n}. Start fewer processes.")
    return slice(n * rank() // size(), n * (rank() + 1) // size())


def own_seed(seed: int) -> int:
    """Of draws that differ from process to process, such as dropout's."""
    return derived_seed("rank", seed, rank()) if size() > 1 else seed


def weight(n: int) -> float:
    """What this process's mean counts for in that of a batch of n examples."""
    part = share(n)
    return (part.stop - part.start) / n


@torch.no_grad()
def add_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Each gradient summed over the processes; None where no process used the parameter."""
    if size() == 1:
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for dtype in dict.fromkeys(p.dtype for p in params):
        same = [p for p in params if p.dtype == dtype]
        used = same[0].new_tensor([p.grad is not None for p in same])
        flat = torch.cat([used, *((torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in same)])
        dist.all_reduce(flat)
        used, *parts = flat.split([len(same), *(p.numel() for p in same)])
        for p, of_any, part in zip(same, used.tolist(), parts, strict=True):
            p.grad = part.view_as(p) if of_any else None


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Each floating tensor the mean over the processes; one that is the same everywhere stays to the bit."""
    for tensor in (t for t in tensors if t.is_floating_point()) if size() > 1 else ():
        first = tensor.clone()
        take_first([first])
        apart = torch.where(tensor == first, 0, tensor - first)
        dist.all_reduce(apart)
        tensor.copy_(first + apart / size())


@torch.no_grad()
def take_first(tensors: Iterable[Tensor]) -> None:
    """Each tensor that of the first process: scores of a GPU may differ in their last bits, and masks with them."""
    for tensor in tensors if size() > 1 else ():
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


def agreed(value: T) -> T:
    """What the first process says."""
    if size() == 1:
        return value
    said = [value]
    dist.broadcast_object_list(said, 0)
    return said[0]
