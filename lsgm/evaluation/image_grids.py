"""Grids and panels of images, saved as reproducible PNG files.

matplotlib and Pillow are imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lsgm.evaluation.canvas import canvas
from lsgm.files import atomic

Images = Tensor | NDArray[np.uint8]  # uint8 [N, C, H, W], C = 1 or 3, in 0..255

SEPARATOR = 56  # a dark gray that separates black images without standing out


def grid(images: Images, columns: int) -> NDArray[np.uint8]:
    """Arrange ``images`` in rows of ``columns``, one gray pixel apart: uint8 [H, W], or [H, W, 3] for color.

    Unused cells of the last row are black.
    """
    array = np.asarray(images.cpu() if isinstance(images, Tensor) else images)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or array.dtype != np.uint8 or not len(array):
        raise ValueError(f"expected uint8 [N, 1 or 3, H, W] with N > 0, found {array.dtype} {list(array.shape)}")
    n, channels, height, width = array.shape
    rows = math.ceil(n / columns)
    cells = np.full((rows * columns, channels, height + 1, width + 1), SEPARATOR, np.uint8)
    cells[:, :, :-1, :-1] = 0
    cells[:n, :, :-1, :-1] = array
    cells = cells.reshape(rows, columns, channels, height + 1, width + 1).transpose(0, 3, 1, 4, 2)
    picture = cells.reshape(rows * (height + 1), columns * (width + 1), channels)[:-1, :-1]
    return picture[..., 0] if channels == 1 else picture


def save_grid(images: Images, path: str | Path, columns: int = 16, scale: int = 2) -> None:
    """Save :func:`grid` as a PNG, enlarging every pixel to ``scale`` x ``scale``."""
    from PIL import Image

    picture = _enlarged(grid(images, columns), scale)
    with atomic(path) as part:
        Image.fromarray(picture).save(part, format="PNG", optimize=True)


def save_panels(panels: Mapping[str, Images], path: str | Path, columns: int | None = None, scale: int = 2) -> None:
    """Save grids of images side by side as a PNG; without ``columns`` the grids are square.

    The keys are the titles, which may have several lines.
    """
    columns = columns or math.ceil(math.sqrt(max(len(images) for images in panels.values())))
    pictures = {title: _enlarged(grid(images, columns), scale) for title, images in panels.items()}
    margin, gap, line = 16, 28, 36  # pixels
    head = line * max(title.count("\n") + 1 for title in panels) + 12
    width = sum(p.shape[1] for p in pictures.values()) + gap * (len(pictures) - 1) + 2 * margin
    height = max(p.shape[0] for p in pictures.values()) + head + 2 * margin
    dpi = 100
    with canvas(path, (width / dpi, height / dpi), dpi=dpi) as figure:
        left = margin
        for title, picture in pictures.items():
            h, w = picture.shape[:2]
            # The axes have exactly the picture's size, so no pixel is resampled.
            axes = figure.add_axes(
                (left / width, 1 - (margin + head + h) / height, w / width, h / height), frameon=False
            )
            color = (
                picture if picture.ndim == 3 else np.stack([picture] * 3, axis=-1)
            )  # gray as RGB: a colormap would round the values
            axes.imshow(color, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            x, y = (left + w / 2) / width, 1 - (margin + head - 20) / height
            figure.text(x, y, title, ha="center", va="baseline", fontsize=20, linespacing=1.25)
            left += w + gap


def _enlarged(picture: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)
