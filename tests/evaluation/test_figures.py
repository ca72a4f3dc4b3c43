"""Pictures: where each pixel lands, what can be read back, the same bytes twice."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from lsgm.evaluation.charts import Bar, save_curves, save_nelbo_bars
from lsgm.evaluation.image_grids import SEPARATOR, grid, save_grid, save_panels

RNG = np.random.default_rng(0)


def images(n: int, channels: int = 1) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, (n, channels, 6, 5), dtype=np.uint8)


def test_grid_puts_each_image_in_its_cell() -> None:
    given = images(7)
    found = grid(given, columns=3)
    assert found.shape == (3 * 7 - 1, 3 * 6 - 1)
    for index, image in enumerate(given):
        row, column = divmod(index, 3)
        np.testing.assert_array_equal(found[7 * row : 7 * row + 6, 6 * column : 6 * column + 5], image[0])
    assert (found[6] == SEPARATOR).all()
    assert (found[:, 5] == SEPARATOR).all()
    assert not found[14:, 6:11].any(), "a cell without an image is black"


def test_grid_of_color_images_and_tensors() -> None:
    given = images(2, channels=3)
    found = grid(torch.from_numpy(given), columns=2)
    assert found.shape == (6, 11, 3)
    np.testing.assert_array_equal(found[:, 6:], given[1].transpose(1, 2, 0))


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 1, 6, 5)), images(2)[:, 0], images(2)[:0], np.zeros((2, 2, 6, 5), np.uint8)]
)
def test_grid_wants_bytes_of_images(wrong: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        grid(wrong, columns=2)


def test_saved_grid_is_the_grid_enlarged(tmp_path: Path) -> None:
    given = images(5)
    save_grid(given, tmp_path / "new" / "grid.png", columns=4, scale=3)
    found = np.round(matplotlib.image.imread(tmp_path / "new" / "grid.png") * 255).astype(np.uint8)
    np.testing.assert_array_equal(found[1::3, 1::3], grid(given, 4))
    np.testing.assert_array_equal(found[::3, ::3], found[2::3, 2::3])


def test_panels_hold_the_pictures_unsampled(tmp_path: Path) -> None:
    given = {"real": images(9), "VAE": images(9), "LSGM\nsamples": images(4)}
    save_panels(given, tmp_path / "panels.png", scale=8)
    found = np.round(matplotlib.image.imread(tmp_path / "panels.png") * 255).astype(np.uint8)
    assert (found[..., 3] == 255).all()
    left = 16
    for panel in given.values():
        picture = grid(panel, 3).repeat(8, 0).repeat(8, 1)
        top = 16 + 84
        np.testing.assert_array_equal(
            found[top : top + picture.shape[0], left : left + picture.shape[1], 0], picture, strict=True
        )
        left += picture.shape[1] + 28
    assert found.shape[1] == left - 28 + 16
    assert found[:100].min() < 100, "titles"


def curves() -> tuple[pd.DataFrame, pd.DataFrame]:
    step = np.arange(1, 41)
    return (
        pd.DataFrame({"step": step, "nelbo": 100 + 400 * np.exp(-step / 4)}),
        pd.DataFrame({"step": step, "nelbo": 95 + 5 * np.exp(-step / 20)}),
    )


BARS = {
    "one": [Bar("VAE", 70.0, 30.0, 100.0, 1.0), Bar("LSGM", 70.0, 25.0, 95.0, 0.9)],
    "two": [Bar("VAE", float("nan"), 30.0, float("nan"), float("nan")), Bar("LSGM", 70.0, 25.0, 95.0, float("nan"))],
}


def draw(folder: Path) -> list[bytes]:
    save_grid(np.zeros((4, 1, 6, 5), np.uint8), folder / "grid.png")
    save_panels({"zeros": np.zeros((4, 1, 6, 5), np.uint8)}, folder / "panels.png")
    save_nelbo_bars(BARS, folder / "bars.png")
    save_curves(*curves(), folder / "curves.png")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def test_same_bytes_every_time_and_nothing_left_behind(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert first == second
    assert len(first) == 4
    assert all(content.startswith(b"\x89PNG") for content in first)
    assert not any(b"atplotlib" in content for content in first)


def test_numbers_that_are_none_and_short_histories_are_drawn(tmp_path: Path) -> None:
    nan = float("nan")
    save_nelbo_bars({"all lost": [Bar("VAE", nan, nan, nan, nan)]}, tmp_path / "bars.png")
    row = pd.DataFrame({"step": [5], "nelbo": [nan]})
    save_curves(row, row, tmp_path / "curves.png")
    assert len(list(tmp_path.iterdir())) == 2
