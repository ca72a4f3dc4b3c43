"""Pictures: grids and panels of images, the split of the NELBO, training curves. All PNG, the same bytes every time.

matplotlib and Pillow are imported by the functions that draw with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from lsgm.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Images = Tensor | NDArray[np.uint8]  # uint8 [N, C, H, W], C = 1 or 3, in 0..255

SEPARATOR = 56  # a gray that parts black images without drawing the eye
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


def grid(images: Images, columns: int) -> NDArray[np.uint8]:
    """``images`` in rows of ``columns``, one pixel of gray between them: uint8 [H, W], or [H, W, 3] for color.

    The cells that an incomplete last row leaves over are black.
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
    """Write :func:`grid` as a PNG, every pixel ``scale`` x ``scale``."""
    from PIL import Image

    picture = _enlarged(grid(images, columns), scale)
    with atomic(path) as part:
        Image.fromarray(picture).save(part, format="PNG", optimize=True)


def save_panels(panels: Mapping[str, Images], path: str | Path, columns: int | None = None, scale: int = 2) -> None:
    """Write grids of images (square ones, if ``columns`` is not given) side by side as a PNG.

    The keys are the titles; a title may have several lines.
    """
    columns = columns or math.ceil(math.sqrt(max(len(images) for images in panels.values())))
    pictures = {title: _enlarged(grid(images, columns), scale) for title, images in panels.items()}
    margin, gap, line = 16, 28, 36  # pixels
    head = line * max(title.count("\n") + 1 for title in panels) + 12
    width = sum(p.shape[1] for p in pictures.values()) + gap * (len(pictures) - 1) + 2 * margin
    height = max(p.shape[0] for p in pictures.values()) + head + 2 * margin
    dpi = 100
    with _figure(path, (width / dpi, height / dpi), dpi=dpi) as figure:
        left = margin
        for title, picture in pictures.items():
            h, w = picture.shape[:2]
            # Axes of the picture's own size, so that no pixel is resampled.
            axes = figure.add_axes(
                (left / width, 1 - (margin + head + h) / height, w / width, h / height), frameon=False
            )
            color = picture if picture.ndim == 3 else np.stack([picture] * 3, axis=-1)  # a color map would round
            axes.imshow(color, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            x, y = (left + w / 2) / width, 1 - (margin + head - 20) / height
            figure.text(x, y, title, ha="center", va="baseline", fontsize=20, linespacing=1.25)
            left += w + gap


def drawable(value: Any) -> Any:
    """Whether a number, or each of an array, is finite and on the scale of a figure: matplotlib fails far from it."""
    return np.abs(value) < LARGEST


@dataclass(frozen=True)
class Bar:
    """One row of the NELBO figure, all in nats/image."""

    label: str
    reconstruction: float
    kl: float
    nelbo: float
    stderr: float  # NaN: of a single image

    @property
    def spread(self) -> float:
        """Half the length of the error bar."""
        return self.stderr if 0 <= self.stderr < LARGEST else 0.0


def save_nelbo_bars(groups: Mapping[str, Sequence[Bar]], path: str | Path) -> None:
    """Write the NELBO of each model (the key) and prior (its bars), split into reconstruction and KL, as a PNG."""
    height = 1.25 + sum(0.55 + 0.5 * len(bars) for bars in groups.values())
    with _figure(path, (9, height), layout="constrained") as figure:
        plots = figure.subplots(
            len(groups), squeeze=False, sharex=True, height_ratios=[0.55 + 0.5 * len(bars) for bars in groups.values()]
        )[:, 0]
        for axes, (model, bars) in zip(plots, groups.items(), strict=True):
            _draw_bars(axes, bars)
            axes.set_title(model)
        ends = [bar.nelbo + bar.spread for bars in groups.values() for bar in bars]
        plots[0].set_xlim(0, 1.19 * max([end for end in ends if drawable(end)], default=1))
        plots[-1].set_xlabel("NELBO on test images (nats/image, lower is better; error bar: one standard error)")
        handles, labels = plots[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2)


def _draw_bars(axes: Any, bars: Sequence[Bar]) -> None:
    rows = np.arange(len(bars))
    parts = np.array([[bar.reconstruction, bar.kl] for bar in bars], dtype=float)
    known = drawable(parts).all(1) & np.array([drawable(bar.nelbo) and not bar.stderr >= LARGEST for bar in bars])
    drawn = np.where(known[:, None], parts, 0)
    axes.barh(rows, drawn[:, 0], color=BLUE, height=0.66, label="reconstruction")
    axes.barh(rows, drawn[:, 1], left=drawn[:, 0], color=SKY, height=0.66, label="KL to the prior")
    for row, bar in enumerate(bars):
        if not known[row]:
            axes.text(0, row, "  not finite, or too large to draw", va="center", color="#333333")
            continue
        axes.errorbar(bar.nelbo, row, xerr=bar.spread, color="black", capsize=3, linewidth=1.2)
        for middle, value, color in (
            (bar.reconstruction / 2, bar.reconstruction, "white"),
            (bar.reconstruction + bar.kl / 2, bar.kl, "black"),
        ):
            if abs(middle) <= 100 * max(1, abs(bar.nelbo)):  # far outside of the figure text cannot be drawn
                axes.text(middle, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=10)
        axes.annotate(
            f"{bar.nelbo:.1f} ± {bar.stderr:.1f}",
            (bar.nelbo + bar.spread, row),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            weight="bold",
        )
    axes.set_yticks(rows, [bar.label for bar in bars])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def save_curves(vae: pd.DataFrame, lsgm: pd.DataFrame, path: str | Path) -> None:
    """Write the NELBO of the training batches over both stages, one after the other, as a PNG.

    ``vae`` and ``lsgm`` are histories with the columns ``step`` (the stage's own count) and ``nelbo`` (nats/image);
    that of a few test images, ``test_nelbo``, is drawn where it was measured.
    """
    change = float(vae["step"].iloc[-1])
    with _figure(path, (9, 4.2), layout="constrained") as figure:
        axes = figure.subplots()
        tops, bottoms = [], []
        for frame, start, color, label in (
            (vae, 0.0, BLUE, "first stage: VAE, N(0, I) prior"),
            (lsgm, change, VERMILLION, "second stage: LSGM"),
        ):
            x, y = start + frame["step"], frame["nelbo"].where(drawable(frame["nelbo"]))
            smooth = y.rolling(max(1, len(y) // 12), center=True, min_periods=1).mean()
            axes.plot(x, y, color=color, alpha=0.3, linewidth=1)
            axes.plot(x, smooth, color=color, linewidth=2.2, label=label)
            if "test_nelbo" in frame:
                test = frame["test_nelbo"].where(drawable(frame["test_nelbo"]))
                axes.plot(x, test, "o", color=color, markersize=5, label="the same, test images")
            tops.append(smooth.iloc[len(y) // 8 :].max())  # the first steps' plunge would flatten all that follows
            bottoms.append(y.min())
        top, bottom = pd.Series(tops).max(), pd.Series(bottoms).min()
        if np.isfinite(top) and np.isfinite(bottom) and top > bottom:
            axes.set_ylim(bottom - 0.08 * (top - bottom), top + 0.15 * (top - bottom))
        axes.axvline(change, color="#888888", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 1.01 * (change + float(lsgm["step"].iloc[-1])))
        axes.set_xlabel("training step")
        axes.set_ylabel("NELBO of training batches\n(nats/image)")
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        axes.legend(loc="upper right")


def save_mixing(history: pd.DataFrame, coefficients: Sequence[float], path: str | Path) -> None:
    """Write the mixing coefficients as a PNG: their mean in the course of the training, and each at its end.

    ``history`` has the columns ``epoch`` and, where they are trained, ``alpha_mean``; ``coefficients`` are in [0, 1].
    """
    with _figure(path, (9, 3.8), layout="constrained") as figure:
        course, end = figure.subplots(1, 2)
        if "alpha_mean" in history:
            mean = history["alpha_mean"].where(drawable(history["alpha_mean"]))
            course.plot(history["epoch"], mean, color=VERMILLION, linewidth=2.2)
        else:
            course.text(0.5, 0.5, "no mixed score: 1 throughout", ha="center", transform=course.transAxes)
        course.set_xlabel("epochs of the second stage")
        course.set_ylabel("mixing coefficient, mean")
        end.bar(range(1, len(coefficients) + 1), sorted(coefficients, reverse=True), color=BLUE, width=0.8)
        end.set_xlabel("latent channels, sorted")
        end.set_ylabel("mixing coefficient at the end")
        for axes in (course, end):
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
            axes.set_axisbelow(True)


@dataclass(frozen=True)
class Points:
    """One panel of points, each of a series with its color, one with its marker and one with its filling."""

    x: list[float]
    y: list[float]
    color: list[str]
    marker: list[str]  # "": all alike
    filling: list[str]  # the same
    text: list[str]  # beside the points, where they are few
    titles: tuple[str, ...]  # of the legends of colors, markers and fillings
    x_title: str
    y_title: str
    log: bool = False  # the x axis
    line: bool = False  # through the points of a color


def save_points(panels: Sequence[Points], path: str | Path, few: int = 12) -> None:
    """Write panels of points, of the same series, side by side as a PNG; points off the scale are left out."""
    from matplotlib.lines import Line2D

    series = panels[0]
    colors = dict(zip(dict.fromkeys(series.color), itertools.cycle(COLOURS), strict=False))
    markers = dict(zip(dict.fromkeys(series.marker), itertools.cycle("osD^vPX"), strict=False))
    fillings = dict(zip(dict.fromkeys(series.filling), itertools.cycle(("full", "none", "left", "top")), strict=False))
    with _figure(path, (6.5 * len(panels) + 1.5, 4.8), layout="constrained") as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_points(axes, panel, colors, markers, fillings, few)
        handles = []
        legends = zip(series.titles, (colors, markers, fillings), ("color", "marker", "fillstyle"), strict=True)
        for title, looks, of in legends:
            if len(looks) > 1 and (of != "color" or set(series.text) != set(looks)):
                handles.append(Line2D([], [], linestyle="", label=f"{title}:"))
                handles += [
                    Line2D([], [], linestyle="", label=name, **({"marker": "o", "color": "#555555"} | {of: look}))  # type: ignore[arg-type]
                    for name, look in looks.items()
                ]
        if handles:
            figure.legend(handles=handles, loc="outside right upper")


def _draw_points(
    axes: Any, panel: Points, colors: dict[str, str], markers: dict[str, str], fillings: dict[str, str], few: int
) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    points = list(zip(panel.x, panel.y, panel.color, panel.marker, panel.filling, panel.text, strict=True))
    points = [point for point in points if drawable(point[0]) and drawable(point[1])]
    for x, y, color, marker, filling, text in points:
        look = {"color": colors[color], "fillstyle": fillings[filling]}
        axes.plot(x, y, markers[marker], markersize=7, alpha=0.85, **look)
        if len(points) <= few and text:
            axes.annotate(text, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=9, color="#333333")
    for name, color in colors.items() if panel.line else ():
        own = sorted((x, y) for x, y, series, *_ in points if series == name)
        axes.plot([x for x, _ in own], [y for _, y in own], color=color, linewidth=1.2, alpha=0.6)
    if panel.log and any(x > 0 for x, *_ in points):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.15 if any(panel.text) and len(points) <= few else 0.08)
    axes.set_xlabel(panel.x_title)
    axes.set_ylabel(panel.y_title)
    axes.grid(color="#DDDDDD", linewidth=0.8)


@contextmanager
def _figure(path: str | Path, inches: tuple[float, float], dpi: int | None = None, **kwargs: Any) -> Iterator[Figure]:
    """A figure that is written to ``path`` at the end of the block."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=inches, **kwargs)  # without pyplot: no display, no global state
        yield figure
        with atomic(path) as part:
            # No metadata: it would hold matplotlib's version.
            figure.savefig(part, format="png", dpi=dpi or STYLE["savefig.dpi"], metadata={"Software": None})


def _enlarged(picture: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)
