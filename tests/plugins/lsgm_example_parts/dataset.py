"""Datasets in an .npz file with the arrays train_images and test_images, bytes [N, C, H, W]."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from lsgm.config import DatasetFormatConfig, ImageConfig
from lsgm.config.bounds import Pixels
from lsgm.data.formats import Contents
from lsgm.errors import LSGMError


class NPZConfig(DatasetFormatConfig):
    """Its keys under a dataset."""

    implementation = "lsgm_example_parts.dataset:NPZ"

    format: Literal["npz"]  # type: ignore[assignment]
    size: Pixels
    binary: bool = False

    def image(self) -> ImageConfig:
        padded = -(-self.size // 8) * 8
        return ImageConfig(channels=1 if self.binary else 3, size=self.size, padded_size=padded, binary=self.binary)


class NPZ:
    """The reader of such a file."""

    def __init__(self, *, size: int, binary: bool) -> None:
        self.size = size

    def open(self, path: Path, stack: ExitStack) -> Contents:
        names = ("train_images", "test_images")
        try:
            with np.load(path, allow_pickle=False) as file:
                return Contents({name: file[name] for name in names})
        except (OSError, KeyError, ValueError) as error:
            raise LSGMError(f"{path}: expected an .npz file with {' and '.join(names)} ({error})") from None
