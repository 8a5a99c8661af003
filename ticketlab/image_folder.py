"""Images in a folder per class, ImageNet's layout, as a map-style data set. Needs Pillow, which matplotlib brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ticketlab.errors import Refused

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class ImageFolder:
    """Images in a folder per class, as bytes [3, size, size]: a map-style data set.

    The shorter side is scaled to 8/7 of the size (256 of 224, as usual in evaluation) with antialiasing, and the middle
    is cut out; grey images get three channels. Classes are the folders in alphabetical order.

    Attributes:
        root: Folder with a folder of images per class, such as ``train/<wnid>/*.JPEG``.
        size: Height and width in pixels.

    Raises:
        Refused: No such folders or images, no Pillow, an image that cannot be read.
    """

    root: Path
    size: int
    classes: tuple[str, ...] = field(init=False, repr=False)
    files: tuple[tuple[Path, int], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        root = Path(self.root)
        classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        files = [(path, label) for label, name in enumerate(classes) for path in _images_in(root / name)]
        empty = sorted(set(classes) - {path.relative_to(root).parts[0] for path, _ in files})
        if len(classes) < 2 or empty or self.size < 1:
            raise Refused(
                f"{root} must hold two folders of images at least, one per class, and size be at least 1: got "
                f"{len(classes)} folders, {len(empty)} of them without images {empty[:3]}, and size {self.size}."
            )
        object.__setattr__(self, "classes", tuple(classes))
        object.__setattr__(self, "files", tuple(files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path, label = self.files[index]
        return _image(path, self.size), label


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGES and path.is_file())


def _image(path: Path, size: int) -> np.ndarray:
    try:
        from PIL import Image  # noqa: PLC0415  (matplotlib brings it; only images need it)
    except ImportError as error:
        raise Refused("images need Pillow, which is not installed: pip install pillow.") from error
    try:
        with Image.open(path) as opened_image:
            image = opened_image.convert("RGB")
    except (OSError, SyntaxError) as error:  # what Pillow raises at files that are damaged
        raise Refused(f"{path} must be an image: {error}. Download it anew, or leave it out.") from error
    shorter = round(size * 8 / 7)
    scale = shorter / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)
