"""Charts as PNG files: NELBO split into its terms, training curves, mixing coefficients, ablation scatter plots."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsgm.evaluation.canvas import BLUE, COLOURS, LARGEST, SKY, VERMILLION, canvas, drawable


@dataclass(frozen=True)
class Bar:
    """One row of the NELBO figure, all in nats/image."""

    label: str
    reconstruction: float
    kl: float
    nelbo: float
    stderr: float  # NaN if there is only one image

    @property
    def spread(self) -> float:
        """Half the length of the error bar."""
        return self.stderr if 0 <= self.stderr < LARGEST else 0.0


def save_nelbo_bars(groups: Mapping[str, Sequence[Bar]], path: str | Path) -> None:
    """Plot the NELBO of each model (key) under each prior (bar), split into reconstruction and KL, as a PNG."""
    height = 1.25 + sum(0.55 + 0.5 * len(bars) for bars in groups.values())
    with canvas(path, (9, height), layout="constrained") as figure:
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
            if abs(middle) <= 100 * max(1, abs(bar.nelbo)):  # matplotlib cannot draw text far outside the figure
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
    """Plot the NELBO of the training batches through both stages, one after the other, as a PNG.

    ``vae`` and ``lsgm`` are histories with the columns ``step`` (counted within the stage) and ``nelbo`` (nats/image).
    The optional column ``test_nelbo``, measured on a few test images, is drawn as dots.
    """
    change = float(vae["step"].iloc[-1])
    with canvas(path, (9, 4.2), layout="constrained") as figure:
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
            tops.append(smooth.iloc[len(y) // 8 :].max())  # the steep drop at the start would flatten the rest
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
    """Plot the mixing coefficients as a PNG: their mean during training, and each of them at the end.

    ``history`` has the column ``epoch`` and, if the coefficients are trained, ``alpha_mean``.
    ``coefficients`` are in [0, 1].
    """
    with canvas(path, (9, 3.8), layout="constrained") as figure:
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
    """One scatter plot. Three attributes of a point select its color, its marker and its fill style."""

    x: list[float]
    y: list[float]
    color: list[str]
    marker: list[str]  # "" for every point: one marker for all
    filling: list[str]  # "" for every point: one fill style for all
    text: list[str]  # labels, drawn if there are few points
    titles: tuple[str, ...]  # legend titles of the colors, markers and fill styles
    x_title: str
    y_title: str
    log: bool = False  # logarithmic x axis
    line: bool = False  # connect the points of each color


def save_points(panels: Sequence[Points], path: str | Path, few: int = 12) -> None:
    """Draw scatter plots of the same series side by side as a PNG; points that cannot be drawn are left out."""
    from matplotlib.lines import Line2D

    series = panels[0]
    colors = dict(zip(dict.fromkeys(series.color), itertools.cycle(COLOURS), strict=False))
    markers = dict(zip(dict.fromkeys(series.marker), itertools.cycle("osD^vPX"), strict=False))
    fillings = dict(zip(dict.fromkeys(series.filling), itertools.cycle(("full", "none", "left", "top")), strict=False))
    with canvas(path, (6.5 * len(panels) + 1.5, 4.8), layout="constrained") as figure:
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
