"""A zoo of tickets, every criterion and every start, trained in one stack against one network after the other.

Both train the same networks for the same steps in the same process: the engine's ``train`` called once with all of
them, and called once for each. What the stack gains is what small networks leave idle: on a CPU the overhead of
Python, shared by ``vmap``, and cores, of which each works on a network of its own where weights are many.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch

import ticketlab as tl
from benchmarks.timing import alternate, command, hardware, median_ratio, report
from ticketlab.engine.criteria import CRITERIA, Evidence, draw_examples, find
from ticketlab.engine.start import Start
from ticketlab.engine.treatments import TREATMENTS, Origin
from ticketlab.network import resolve
from ticketlab.state import Masks, State


@dataclass(frozen=True)
class Config:
    """Time the zoo of one init seed on random inputs in the shapes of the digits and of MNIST."""

    rounds: int = 5
    """Alternations; medians are over these."""
    steps: dict[str, int] = field(default_factory=lambda: {"mlp_100_50": 200, "lenet_300_100": 100})
    """Architectures and the steps that each is trained in a timing."""
    density: float = 0.2
    """Of every mask."""
    batch_size: int = 60
    """Examples a step."""
    device: str = "cpu"
    """Where."""
    out: Path | None = None
    """Write the table to this CSV file too."""


SHAPES = {"mlp_100_50": (1, 8, 8), "lenet_300_100": (1, 28, 28)}


def zoo(model_name: str, task: tl.Task, density: float) -> list[Start]:
    """One network for every criterion, and for every start under the magnitude mask."""

    def factory() -> torch.nn.Module:
        return tl.models.build(model_name, task.input_shape, task.n_classes)

    def network(seed: int) -> State:
        return tl.state(tl.initialise(factory, seed)).to(task.device, task.dtype)

    model, start, end = tl.initialise(factory, 0).to(task.device), network(0), network(1)
    everything: Masks = {n: m.to(task.device) for n, m in tl.masks.ones(model).items()}
    evidence = Evidence(model, everything, start, end, *draw_examples(task, 100, 0))
    layers = dict.fromkeys(everything, density)  # whatever the criterion, no layer is emptied
    masks = {name: find(name, evidence, layers, rounds=1) for name in CRITERIA if name != "obd_exact"}
    origin = Origin(factory, start, masks["magnitude"], 0, 0, 1, trained=end, dense=end, last_learning_rate=1e-3)
    starts = [treatment.start(origin) for treatment in TREATMENTS.values()]
    # A network with a learning rate of its own cannot be trained under vmap.
    return [Start(start, mask, 0) for mask in masks.values()] + [s for s in starts if s.learning_rate is None]


def contestants(model_name: str, task: tl.Task, config: Config) -> tuple[int, str, dict[str, Callable[[], None]]]:
    """How many networks, how their stack is computed, and the two ways to train them."""
    networks = zoo(model_name, task, config.density)
    steps = config.steps[model_name]
    recipe = tl.Recipe(steps=steps, batch_size=config.batch_size, eval_every=steps)
    model = tl.initialise(lambda: tl.models.build(model_name, task.input_shape, task.n_classes), 0)

    def trained(some: list[Start]) -> None:
        tl.train(model, some, task, recipe, progress=False)

    def one_by_one() -> None:
        for network in networks:
            trained([network])

    how = resolve("auto", model, task.device, len(networks))
    return len(networks), how, {"one stack": lambda: trained(networks), "one after the other": one_by_one}


def run(config: Config) -> pd.DataFrame:
    """One row an architecture and way of training, medians over rounds."""
    rows = []
    for model_name, steps in config.steps.items():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4000, *SHAPES[model_name], generator=generator)
        y = torch.randint(0, 10, (4000,), generator=generator)
        task = tl.Task.from_tensors(x, y, n_classes=10).to(config.device)
        networks, how, calls = contestants(model_name, task, config)
        seconds = alternate(calls, config.rounds)
        for name, times in seconds.items():
            rows.append(
                {
                    "model": model_name,
                    "contestant": name,
                    "networks": networks,
                    "computed_by": how if name == "one stack" else "loop",
                    "steps": steps,
                    "seconds": statistics.median(times),
                    "ms_per_network_step": 1e3 * statistics.median(times) / networks / steps,
                    "times_faster": median_ratio(seconds["one after the other"], times),
                    "n_rounds": config.rounds,
                    "hardware": hardware(),
                }
            )
    return pd.DataFrame(rows)


def main(config: Config) -> int:
    return report(run(config), "training, with one evaluation at the end", config.out)


if __name__ == "__main__":
    sys.exit(command("zoo", Config, main))
