"""Shared by all figures: style, colors, and a canvas that is saved as a reproducible PNG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsgm.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 1e9  # numbers from this size on are not drawn
# Okabe and Ito's palette, which color-blind readers can tell apart.
BLUE, VERMILLION, SKY = "#0072B2", "#D55E00", "#9AD0F2"
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so it looks the same on every machine
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def drawable(value: Any) -> Any:
    """Whether a number, or each number of an array, is finite and small enough for matplotlib to draw."""
    return np.abs(value) < LARGEST


@contextmanager
def canvas(path: str | Path, inches: tuple[float, float], dpi: int | None = None, **kwargs: Any) -> Iterator[Figure]:
    """Create a figure and save it to ``path`` when the block ends."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # ignores the user's matplotlibrc
        figure = Figure(figsize=inches, **kwargs)  # without pyplot: no display, no global state
        yield figure
        with atomic(path) as part:
            # No metadata, because it contains matplotlib's version.
            figure.savefig(part, format="png", dpi=dpi or STYLE["savefig.dpi"], metadata={"Software": None})
