"""What all figures share: style, colors, and a canvas that is written as a PNG, the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lsgm.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 1e9  # number in a figure
# Okabe and Ito's palette: told apart by color-blind readers too.
BLUE, VERMILLION, SKY = "#0072B2", "#D55E00", "#9AD0F2"
COLOURS = (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it along: the same letters on every machine
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
    """Whether a number, or each of an array, is finite and on the scale of a figure: matplotlib fails far from it."""
    return np.abs(value) < LARGEST


@contextmanager
def canvas(path: str | Path, inches: tuple[float, float], dpi: int | None = None, **kwargs: Any) -> Iterator[Figure]:
    """A figure that is written to ``path`` at the end of the block."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=inches, **kwargs)  # without pyplot: no display, no global state
        yield figure
        with atomic(path) as part:
            # No metadata: it would hold matplotlib's version.
            figure.savefig(part, format="png", dpi=dpi or STYLE["savefig.dpi"], metadata={"Software": None})
