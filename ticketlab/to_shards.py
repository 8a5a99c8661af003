"""Write a data set as shards from the command line: images in folders, or any ``torch.utils.data.Dataset``.

::

    python -m ticketlab.to_shards shards/imagenet --images /data/imagenet --size 224
    python -m ticketlab.to_shards shards/mine --dataset package.module:function

Of ImageNet, ``/data/imagenet`` holds ``train/<wnid>/*.JPEG`` and ``val/<wnid>/*.JPEG``; classes are the folders in
alphabetical order, as usual, and the 50,000 images of ``val`` are the test set. At 224 pixels it takes 200 GB.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ticketlab.commands import guarded, parsed
from ticketlab.datasets import Augmentation
from ticketlab.errors import Refused
from ticketlab.image_folder import ImageFolder
from ticketlab.imports import imported
from ticketlab.shard_writer import write_shards
from ticketlab.shards import load_shards


@dataclass(frozen=True)
class Config:
    """Write a data set as shards, for `ticketlab.load_shards`."""

    folder: tyro.conf.Positional[Path]
    """New folder of the shards."""
    images: Path | None = None
    """Folder with train/CLASS/*.JPEG, and val/CLASS/*.JPEG or test/CLASS/*.JPEG to test on."""
    size: int = 224
    """Height and width of the images in pixels."""
    dataset: str | None = None
    """In place of images: PACKAGE.MODULE:FUNCTION, which returns a data set, or one to train and one to test on."""
    name: str | None = None
    """Name of the task; None: that of the folder."""
    augmentation: Augmentation = "none"
    """How training batches are augmented."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: as `guarded`."""
    return guarded(lambda: _written(parsed(Config, argv, prog="python -m ticketlab.to_shards")))


def _written(config: Config) -> int:
    train, test = _asked_for(config)
    name = config.name or config.folder.resolve().name
    n_classes = len(train.classes) if isinstance(train, ImageFolder) else None
    write_shards(config.folder, train, test, name=name, n_classes=n_classes, augmentation=config.augmentation)
    print(load_shards(config.folder))
    return 0


def _asked_for(config: Config) -> tuple[Any, Any]:
    if (config.images is None) == (config.dataset is None):
        raise Refused("one of --images and --dataset must be given: got both or neither.")
    if config.images is not None:
        held_out = next((config.images / part for part in ("val", "test") if (config.images / part).is_dir()), None)
        train = ImageFolder(config.images / "train", config.size)
        test = None if held_out is None else ImageFolder(held_out, config.size)
        if test is not None and test.classes != train.classes:
            raise Refused(f"{held_out} must have the classes of train: they differ.")
        return train, test
    found = imported(str(config.dataset), "a data set")()
    return found if isinstance(found, tuple) and len(found) == 2 else (found, None)


if __name__ == "__main__":
    sys.exit(main())
