"""Studies in independent blocks of seeds, each a run of its own, here or on the workers of a Dask cluster.

Replicas do not know of one another, so a study is the sum of its blocks: `tl.load_run` reads them as one. A block goes
on from its stored levels wherever it is taken up, so a worker that dies costs a level at most, and the bytes are those
of one machine. Every block computes on one thread, replica by replica: with more, products would be summed in another
order, and with ``vmap`` those of a seed would depend on the seeds beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import uuid4

import torch
from tqdm import tqdm

from ticketlab.data import Task
from ticketlab.engine.apart import apart
from ticketlab.engine.config import ImpConfig
from ticketlab.engine.store import place
from ticketlab.engine.study import Study
from ticketlab.errors import Refused
from ticketlab.network import Execution
from ticketlab.seeds import Factory

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
R = TypeVar("R")
Report = Callable[[], object]
RETRIES = 20


def blocks(config: ImpConfig, seeds: int = 1) -> list[ImpConfig]:
    """The same study in blocks of so many init seeds; the last may have fewer.

    Raises:
        Refused: Less than one seed per block.
    """
    if seeds < 1:
        raise Refused(f"a block must have at least 1 init seed: got {seeds}.")
    orders = config.order_seeds or config.init_seeds
    cuts = [slice(i, i + seeds) for i in range(0, len(config.init_seeds), seeds)]
    own = config.order_seeds is not None
    return [
        replace(config, init_seeds=config.init_seeds[cut], order_seeds=orders[cut] if own else None) for cut in cuts
    ]


def sweep(
    studies: Sequence[ImpConfig],
    store: str | Path = "runs",
    *,
    client: Client | None = None,
    seeds: int = 1,
    model: Factory | None = None,
    task: Task | None = None,
    device: str | None = None,
    execution: Execution | None = None,
    resources: Mapping[str, float] | None = None,
    retries: int = RETRIES,
    progress: bool = True,
) -> list[list[Path]]:
    """Run every block of every study, whatever of it is stored already, and say where: ``tl.load_run`` takes a list.

    Args:
        studies: Their seeds are cut into blocks.
        store: Folder of run directories, under the same name on every worker.
        client: Of a Dask cluster; None: one block after another in this process.
        seeds: Init seeds per block, which share a stack.
        model: Makes a network of your own, as of `Study`.
        task: Data of your own, which travels to every worker.
        device: Where a block trains; a CUDA device if the worker has one, otherwise the CPU, when None.
        execution: As of `Study`; ``loop`` on a CPU and ``auto`` on a GPU when None.
        resources: What a block takes of its worker, such as {"GPU": 1}: as many blocks at once as workers have.
        retries: How often a block is tried again whose worker died, or that failed.
        progress: Show levels done and the time left where the output is a terminal.

    Returns:
        Run directories, one list per study.

    Raises:
        Refused: Two studies with one block between them; what a block refuses, once the others are done.
    """
    parts = [block for study in studies for block in blocks(study, seeds)]
    if len(set(parts)) < len(parts):
        raise Refused("studies of a sweep must not share a block: two have the same seeds and flags. Leave one out.")
    work = partial(_train, str(store), model, task, device, execution)
    total = sum(block.levels + 1 for block in parts)
    with tqdm(total=total, desc="sweep", unit="level", disable=None if progress else True) as bar:
        found = iter(spread(work, parts, client, report=bar.update, resources=resources, retries=retries))
    return [[next(found) for _ in blocks(study, seeds)] for study in studies]


def _train(
    store: str,
    model: Factory | None,
    task: Task | None,
    device: str | None,
    execution: Execution | None,
    config: ImpConfig,
    report: Report,
) -> Path:
    how = execution or ("loop" if place(device).type == "cpu" else "auto")
    with one_thread():
        study = Study(config, model=model, task=task, device=device, execution=how, progress=False)
        for _ in study.levels(store):
            report()
        return study.folder(store)


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Work on a cluster.


def spread(
    work: Callable[[T, Report], R],
    items: Sequence[T],
    client: Client | None = None,
    *,
    report: Callable[[], object] | None = None,
    resources: Mapping[str, float] | None = None,
    retries: int = RETRIES,
) -> list[R]:
    """``work(item, report)`` of every item, in order: here, or on the workers of a Dask cluster.

    An item whose worker dies, or that fails, is tried again while others go on. Whoever wants a second try to be short
    stores what the first has done, as runs do.

    Args:
        work: Calls ``report()`` whenever a part is done.
        items: What is pickled and sent.
        client: None: one item after another in this process.
        report: Called here whenever an item reports.
        resources: What an item takes of its worker.
        retries: Of one item.

    Raises:
        Exception: The first item's that failed more often, once every other is done.
    """
    if client is None:
        return [work(item, report or (lambda: None)) for item in items]
    from distributed import as_completed  # noqa: PLC0415  (ticketlab[cluster])

    name, found, failed = f"ticketlab-{uuid4().hex[:8]}", dict[int, R](), dict[int, BaseException]()

    def submit(i: int, attempt: int) -> Any:
        on = dict(resources) if resources else None
        return client.submit(_reported, work, items[i], name, key=f"{name}-{i}-{attempt}", resources=on, pure=False)

    if report is not None:
        client.subscribe_topic(name, lambda event: report())
    waiting = {submit(i, 0): (i, 0) for i in range(len(items))}
    queue = as_completed(list(waiting))
    for future in queue:
        i, attempt = waiting.pop(future)
        error = future.exception()
        if error is None:
            found[i] = future.result()
        elif attempt < retries and not _hopeless(error):
            again = submit(i, attempt + 1)
            waiting[again] = (i, attempt + 1)
            queue.add(again)
        else:
            failed[i] = error
    if report is not None:
        client.unsubscribe_topic(name)
    if failed:
        raise failed[min(failed)]
    return [found[i] for i in range(len(items))]


def _reported(work: Callable[[T, Report], R], item: T, topic: str) -> R:
    from distributed import get_worker  # noqa: PLC0415

    worker = get_worker()
    return cast(R, apart(partial(work, item), lambda: worker.log_event(topic, {})))


def _hopeless(error: BaseException) -> bool:
    """Whether another try ends alike: what is refused stays refused, unless another process held the run."""
    return isinstance(error, Refused) and "one writer" not in str(error)
