"""The restricted NTK: every method, and the explicit Jacobians that one writes first, in the same rounds.

(a) tutorial: the empirical NTK of the torch.func tutorial, ``vmap(jacrev)`` over each parameter and an einsum; with
a mask the same with respect to the scattered live vector, one product at the end. (b) each method of
``tl.ntk.kernel``. Times are medians over alternating rounds; peak memory is that of a process of its own, above what
it held before the call; error is the largest difference from the float64 oracle, relative to its largest entry.

A contestant that would need more multiply-adds or bytes than the limits allow is left out of the table.
(c) with ``--peer-python``, each implementation of neural-tangents in the environment of ``make bench-peers``, on
LeNet-300-100; with a mask, of the scattered live vector. Its times are its own clock's, its memory is not measured.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import ticketlab as tl
from benchmarks.timing import alternate, command, hardware, median_ratio, report
from ticketlab import ntk
from ticketlab.ntk.layers import find_layers
from ticketlab.ntk.plan import allowed, multiply_adds
from ticketlab.ntk.problem import problems
from ticketlab.seeds import initialise
from ticketlab.state import Masks, Params, state

METHODS = ("structured", "rows", "gather", "auto")


@dataclass(frozen=True)
class Config:
    """Time the full kernel of LeNet-300-100 and Conv-2 on MNIST inputs (random ones without TICKETLAB_DATA)."""

    models: tuple[str, ...] = ("lenet_300_100", "conv_2")
    """Names of ticketlab.models."""
    examples: tuple[int, ...] = (100, 300)
    """N."""
    densities: tuple[float, ...] = (1.0, 0.2, 0.036, 0.01)
    """Of random masks; 1 = no mask."""
    outputs: Literal["full", "trace"] = "full"
    """Every pair of outputs, or their trace: then ours alone."""
    rounds: int = 5
    """Alternations; medians are over these."""
    multiply_adds: float = 3e11
    """Leave out what would need more."""
    gigabytes: float = 6.0
    """Leave out explicit Jacobians that would need more."""
    memory: bool = True
    """Measure peak memory too, each in a new process; Linux with glibc only."""
    peer_python: Path | None = None
    """Python of `make bench-peers`, to run neural-tangents in the same rounds; None: leave it out."""
    out: Path | None = None
    """Write the table to this CSV file too."""


@dataclass(frozen=True)
class Case:
    """One network, one mask, one set of inputs: small enough to be sent to another process by name."""

    model: str
    density: float
    n: int
    outputs: Literal["full", "trace"] = "full"

    def build(self) -> tuple[nn.Module, Params, Masks | None, Tensor]:
        model = initialise(lambda: tl.models.build(self.model, (1, 28, 28), 10), 0).eval()
        generator = torch.Generator().manual_seed(1)
        masks = {n: torch.rand(m.shape, generator=generator) < self.density for n, m in tl.masks.ones(model).items()}
        return model, state(model).params, None if self.density == 1 else masks, inputs(self.n)


def inputs(n: int) -> Tensor:
    """The first n training examples of MNIST where it is at hand, else normal noise."""
    if os.environ.get("TICKETLAB_DATA"):
        return tl.load_task("mnist").train.x[:n]
    return torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def tutorial(model: nn.Module, params: Params, masks: Masks | None, x: Tensor) -> Tensor:
    """The explicit per-example Jacobian and its contraction: [n, out, n, out]."""
    if masks is not None:
        return live_vector(model, params, masks, x)

    def single(weights: Params, example: Tensor) -> Tensor:
        return functional_call(model, weights, (example[None],))[0]

    jacobians = vmap(jacrev(single), (None, 0))(params, x).values()
    return torch.stack([torch.einsum("nof,mpf->nomp", j.flatten(2), j.flatten(2)) for j in jacobians]).sum(0)


def live_vector(model: nn.Module, params: Params, masks: Masks, x: Tensor) -> Tensor:
    """The same with respect to the live entries alone."""
    point = {n: p * masks[n] if n in masks else p for n, p in params.items()}
    where = {n: masks.get(n, torch.ones_like(p, dtype=torch.bool)).flatten().nonzero()[:, 0] for n, p in point.items()}
    vector = torch.cat([point[n].flatten()[index] for n, index in where.items()])

    def single(live: Tensor, example: Tensor) -> Tensor:
        parts = live.split([len(index) for index in where.values()])
        weights = {
            n: torch.zeros_like(point[n]).flatten().index_copy(0, index, part).view_as(point[n])
            for (n, index), part in zip(where.items(), parts, strict=True)
        }
        return functional_call(model, weights, (example[None],))[0]

    rows = vmap(jacrev(single), (None, 0))(vector, x)
    return torch.einsum("nof,mpf->nomp", rows, rows)


def contestants(case: Case, config: Config) -> dict[str, Callable[[], Tensor]]:
    """What can run this case within the limits, by name; the tutorial first."""
    model, params, masks, x = case.build()
    found: dict[str, Callable[[], Tensor]] = {}
    (problem,), _ = problems(model, params, x, masks=masks)
    with problem.net.lent():
        layers, n_outputs = find_layers(problem, x)
    k, total = sum(int(live.sum()) for live in problem.live.values()), sum(p.numel() for p in params.values())
    rows = case.n * n_outputs
    full = case.outputs == "full"
    if (
        full and rows**2 * k <= config.multiply_adds and 8e-9 * rows * total <= config.gigabytes
    ):  # J, and gradients before it
        found["tutorial"] = lambda: tutorial(model, params, masks, x)
    for method in METHODS:
        size = {"trace": not full, "symmetric": True}
        if method != "auto" and not all(method in allowed(layer) for layer in layers):
            continue
        cost = sum(
            min(multiply_adds(layer, way, n_outputs, case.n, case.n, **size) for way in allowed(layer))
            if method == "auto"
            else multiply_adds(layer, method, n_outputs, case.n, case.n, **size)
            for layer in layers
        )
        if cost <= config.multiply_adds:
            found[method] = partial(ntk.kernel, model, params, x, masks=masks, outputs=case.outputs, method=method)
    return found


@dataclass(frozen=True)
class Peer:
    """neural-tangents in its own process, spoken to as peer_neural_tangents.py says."""

    process: subprocess.Popen[str]
    folder: Path
    methods: tuple[str, ...]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def ask(self, line: str) -> str:
        print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"neural-tangents stopped with {self.process.wait()}; its message is above.")
        return line.strip()

    def time(self, method: str) -> None:
        self.seconds.setdefault(method, []).append(float(self.ask(method)))

    def kernel(self, method: str) -> Tensor:
        return torch.from_numpy(np.load(self.ask(f"save {method} {self.folder / 'kernel.npy'}")))


@contextmanager
def peer(case: Case, config: Config) -> Iterator[Peer | None]:
    """neural-tangents, compiled and warm, where it is asked for and something of it fits the limits."""
    methods = peer_methods(case, config)
    if config.peer_python is None or not methods:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        problem, script = Path(folder, "problem.npz"), Path(__file__).with_name("peer_neural_tangents.py")
        np.savez(problem, **peer_arrays(case))
        # -P: this folder's signal.py must not come before the standard library's.
        command = [str(config.peer_python), "-P", str(script), str(problem), *methods]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                found = Peer(process, Path(folder), methods)
                found.answer()  # ready
                yield found
            finally:
                process.kill()


def peer_methods(case: Case, config: Config) -> tuple[str, ...]:
    """The implementations within the limits; structured derivatives have no rule for the scatter of a live vector."""
    if case.model != "lenet_300_100" or case.outputs != "full":
        return ()
    model, params, masks, x = case.build()
    total = sum(p.numel() for p in params.values())
    k = total - sum(int((~m).sum()) for m in (masks or {}).values())
    rows = case.n * model(x[:1]).shape[1]
    costs = {"jacobian-contraction": rows**2 * k, "ntk-vector-products": rows * case.n * total}
    explicit = [name for name, cost in costs.items() if cost <= config.multiply_adds]
    explicit = explicit if 8e-9 * rows * total <= config.gigabytes else []
    return tuple(explicit) if masks is not None else (*explicit, "structured-derivatives")


def peer_arrays(case: Case) -> dict[str, np.ndarray]:
    """The case as peer_neural_tangents.py reads it."""
    _, params, masks, x = case.build()
    arrays = {"x": x.flatten(1).numpy()}
    for index, weight in enumerate((n for n in params if n.endswith(".weight")), start=1):
        bias = params[weight.replace(".weight", ".bias")]
        arrays |= {f"w{index}": params[weight].numpy(), f"b{index}": bias.numpy()}
        if masks is not None:
            arrays[f"m{index}"] = masks[weight].numpy()
    return arrays


def error(case: Case, kernel: Tensor) -> float:
    """Against ``auto`` in float64, which the tests hold to the oracle at 1e-10."""
    model, params, masks, x = case.build()
    params = {n: p.double() for n, p in params.items()}
    exact = ntk.kernel(model, params, x.double(), masks=masks, outputs=case.outputs)
    return float((kernel - exact).abs().max() / exact.abs().max())


def peak_mib(case: Case, config: Config, name: str) -> float:
    """Peak resident memory of one call above what the process held before it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (case, config, name))


def _peak_here(case: Case, config: Config, name: str) -> float:
    call = contestants(case, config)[name]
    # What the allocator keeps of freed memory would hide the call's own; ru_maxrss starts from the parent's.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    call()
    return (_kib("VmHWM") - before) / 1024


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def run(config: Config) -> pd.DataFrame:
    """One row a case and contestant."""
    tables = []
    for case in (
        Case(m, d, n, config.outputs) for m in config.models for n in config.examples for d in config.densities
    ):
        with peer(case, config) as other:
            calls = contestants(case, config)
            timed, kernels = {name: _quiet(call) for name, call in calls.items()}, dict(calls)
            for method in other.methods if other else ():
                timed[f"neural-tangents {method}"] = lambda method=method, other=other: other.time(method)
                kernels[f"neural-tangents {method}"] = lambda method=method, other=other: other.kernel(method)
            if not timed:
                continue
            seconds = alternate(timed, config.rounds)
            if other is not None:  # its own clock's, without the pipe and the warm-up
                seconds |= {f"neural-tangents {m}": s[-config.rounds :] for m, s in other.seconds.items()}
            tables += _rows(case, config, seconds, kernels)
    return pd.DataFrame(tables)


def _rows(
    case: Case, config: Config, seconds: dict[str, list[float]], kernels: dict[str, Callable[[], Tensor]]
) -> list[dict[str, object]]:
    ours = [name for name in seconds if name in METHODS]
    best = min((statistics.median(seconds[name]) for name in ours if name != "auto"), default=float("nan"))
    nan = [float("nan")] * config.rounds
    return [
        {
            "model": case.model,
            "outputs": case.outputs,
            "n": case.n,
            "density": case.density,
            "contestant": name,
            "ms": 1e3 * statistics.median(times),
            "times_faster_than_tutorial": median_ratio(seconds.get("tutorial", nan), times),
            "times_the_best_method": statistics.median(times) / best,
            "peak_mib": peak_mib(case, config, name)
            if config.memory and (name in ours or name == "tutorial")
            else nan[0],
            "relative_error": error(case, kernels[name]()),
            "n_rounds": config.rounds,
            "hardware": hardware(),
        }
        for name, times in seconds.items()
    ]


def _quiet(call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        call()

    return run


def main(config: Config) -> int:
    print("inputs:", "MNIST" if os.environ.get("TICKETLAB_DATA") else "normal noise (set TICKETLAB_DATA for MNIST)")
    return report(run(config), "milliseconds a kernel", config.out)


if __name__ == "__main__":
    sys.exit(command("ntk", Config, main))
