"""A dataset of your own in a format of your own: here an .npz file of drawn disks and squares.

    python examples/my_dataset.py --data data/shapes --out my_dataset

In params.yaml it is `datasets: {shapes: {format: npz, path: shapes.npz, size: 28}}`, once its package is installed
(`pip install --no-deps ./examples`). Images in a folder, zip, tar, LMDB or TFRecord need no format of their own: give
the dataset `images: {size: 64}` instead.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import minimal_lsgm
import numpy as np

from lsgm.config import DatasetFormatConfig, ImageConfig
from lsgm.config.bounds import Pixels
from lsgm.data.formats import Contents
from lsgm.data.prepare import build
from lsgm.data.registry import dataset
from lsgm.errors import LSGMError


class NPZ:
    """Reads an .npz file with the arrays train_images and test_images, bytes [N, 1, size, size]."""

    def __init__(self, *, size: int) -> None:
        self.size = size

    def open(self, path: Path, stack: ExitStack) -> Contents:
        names = ("train_images", "test_images")
        try:
            with np.load(path, allow_pickle=False) as file:
                return Contents({name: file[name] for name in names})
        except (OSError, KeyError, ValueError) as error:
            raise LSGMError(f"{path}: expected an .npz file with {' and '.join(names)} ({error})") from None


class NPZConfig(DatasetFormatConfig):
    """Its keys in params.yaml: a path, and the size of the images."""

    implementation = "my_dataset:NPZ"

    format: Literal["npz"] = "npz"
    size: Pixels

    def image(self) -> ImageConfig:
        """Binary images, with a border so that they can be halved three times."""
        return ImageConfig(channels=1, size=self.size, padded_size=-(-self.size // 8) * 8, binary=True)


def shapes(count: int, size: int, seed: int) -> np.ndarray:
    """Disks and squares at random places, bytes [count, 1, size, size]."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size]
    center, radius = rng.uniform(8, size - 8, (count, 2, 1, 1)), rng.uniform(4, 8, (count, 1, 1))
    away = np.abs(row - center[:, 0]), np.abs(column - center[:, 1])
    disk, square = np.hypot(*away) < radius, np.maximum(*away) < radius
    return np.where(rng.random((count, 1, 1)) < 0.5, disk, square)[:, None].astype(np.uint8) * 255


if __name__ == "__main__":
    store = Path(sys.argv[sys.argv.index("--data") + 1])
    originals = store.with_suffix(".npz")
    store.parent.mkdir(parents=True, exist_ok=True)
    np.savez(originals, train_images=shapes(5000, 28, seed=1), test_images=shapes(500, 28, seed=2))
    build(dataset("shapes", NPZConfig(path=str(originals), size=28)), store, originals)
    minimal_lsgm.main()
