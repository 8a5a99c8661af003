"""What each process of tests/test_ranks.py does: ``torchrun ranks_worker.py FOLDER [study]``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from cases import blobs, build, half_masks, images, small_conv_bn, small_mlp
from torch import nn

import ticketlab as tl
from ticketlab.engine import ranks
from ticketlab.engine.dynamic import DropGrow
from ticketlab.engine.start import Start
from ticketlab.engine.training import train

SGD = tl.Recipe(
    steps=9, batch_size=16, optimizer="sgd", learning_rate=0.05, momentum=0.9, weight_decay=1e-3, eval_every=4
)  # fmt: skip
ADAM = tl.Recipe(steps=9, batch_size=15, optimizer="adam", learning_rate=1e-2, eval_every=4, clip_norm=0.5)
STUDY = tl.ImpConfig(
    levels=2, prune_fraction=0.5, init_seeds=(0, 1), dtype="float64",
    recipe=tl.Recipe(steps=60, eval_every=20, batch_size=16, learning_rate=0.05),
)  # fmt: skip


class Unused(nn.Module):
    """A layer that the forward pass does not use, and one that only positive examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rest, self.some = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        positive = x[:, 0] > 3
        y = self.fc(x)
        return y.index_add(0, positive.nonzero()[:, 0], self.some(x[positive])) if bool(positive.any()) else y


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tl.Task], tl.Recipe]] = {
    "momentum": (small_mlp, blobs, SGD),
    "adam, an odd batch, clipped": (small_mlp, blobs, ADAM),
    "batch norm": (small_conv_bn, images, SGD),
    "dropout": (dropped, blobs, SGD),
    "not used": (Unused, blobs, SGD),
    "masks that move": (small_mlp, blobs, SGD),
    "cropped and flipped": (small_conv_bn, images, SGD),
}


def problem(name: str) -> tuple[nn.Module, list[Start], tl.Task, tl.Recipe]:
    factory, make_task, recipe = CASES[name]
    task = make_task()
    if name == "cropped and flipped":
        task = tl.Task(**{**vars(task), "augmentation": "crop_flip"})
    models = [build(factory, seed) for seed in (0, 1)]
    rigl = DropGrow(every=3) if name == "masks that move" else None
    starts = [Start(tl.state(m), half_masks(m, seed), seed, dynamics=rigl) for seed, m in enumerate(models)]
    return models[0], starts, task, recipe


def main(folder: Path, what: str = "train") -> None:
    with ranks.joined():
        if what == "study":
            levels = tl.imp(STUDY, model=small_mlp, task=blobs(), store=folder, progress=False, checkpoint_minutes=1e-9)
            list(levels)
            return
        for name in CASES:
            model, starts, task, recipe = problem(name)
            outcome = train(model, starts, task, recipe, progress=False)
            kept = (outcome.end, outcome.masks, outcome.metrics.to_dict())
            torch.save(kept, folder / f"{name}-{ranks.rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
