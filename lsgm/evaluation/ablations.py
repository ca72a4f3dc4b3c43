"""Builds the table and the figure of an ablation from the metrics.json of its cells.

The CSV has a row for each cell and seed, including invalid and diverged ones. The readable table has means over the
seeds, and follows the paper's layout where the grid says which axes become columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lsgm.config.stages import TabulateStage
from lsgm.errors import LSGMError
from lsgm.evaluation.charts import Points, save_points
from lsgm.evaluation.metrics import Metrics, read_metrics
from lsgm.evaluation.tables import distance_title, markdown, number, one_line, page, plain, write_text

# Column of the CSV -> its heading in the readable table, decimal places.
COST = {
    "nfe": ("NFE", 0),
    "sampling_s_per_1000": ("sampling (s / 1000 images)", 2),
    "training_s": ("training (s)", 0),
}
AGAINST = {
    "nelbo": ("nelbo", "NELBO (nats/image)"),
    "nfe": ("nfe", "NFE of a sample"),
    "seconds": ("sampling_s_per_1000", "seconds for 1000 images"),
}


def tabulate(stage: TabulateStage, results: Sequence[Path], out: Path) -> None:
    """Write tables/ablations/NAME.csv, .md and .html and figures/ablations/NAME.png to ``out``.

    Args:
        results: the folders that `lsgm evaluate` wrote, one for each valid cell.

    Raises:
        LSGMError: a file is missing or damaged, or a cell has no results.
    """
    _check_cells(stage)
    found: dict[str, Metrics] = {}
    for folder in map(Path, results):
        metrics = read_metrics(folder / "metrics.json")
        if metrics.model in found:
            raise LSGMError(
                f"{folder}: holds results of {metrics.model}, and so does another folder; give each model once"
            )
        found[metrics.model] = metrics
    if missing := [name for name in stage.models if name not in found]:
        raise LSGMError(f"--results: no folder holds the results of {', '.join(missing)}; {stage.name} needs them")
    frame = measured(stage, found)
    shown, lines = table(stage, frame), notes(stage, frame, [found[name] for name in stage.models])
    folder = out / "tables" / "ablations"
    write_text(folder / f"{stage.name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    labels = sum(axis not in stage.columns for axis in stage.axes)
    title = plain(stage.title)
    figure = f"![{title}](../../figures/ablations/{stage.name}.png)"
    text = [f"# {title}", markdown(shown, labels), *map(one_line, lines), figure]
    write_text(folder / f"{stage.name}.md", "\n\n".join(text) + "\n")
    write_text(folder / f"{stage.name}.html", page(stage.title, shown, lines))
    save_points(points(stage, frame), out / "figures" / "ablations" / f"{stage.name}.png")


def _check_cells(stage: TabulateStage) -> None:
    """Raise :class:`LSGMError` unless each combination of the axes has a cell, and each valid cell a model."""
    taken = {"seed", "model", "state", "device", *COST, "nelbo", "nelbo_stderr", "nelbo_vae"} & {*stage.axes}
    if taken or not stage.axes:
        raise LSGMError(f"{stage.name}: axes: expected names that the table does not use for its own columns, found "
                        f"{', '.join(sorted(taken)) or 'none'}")  # fmt: skip
    if unknown := {*stage.columns} - {*stage.axes}:
        raise LSGMError(f"{stage.name}: columns: {', '.join(sorted(unknown))}: expected some of the axes")
    wanted = set(itertools.product(*stage.axes.values()))
    found = {tuple(cell.labels.get(axis, "") for axis in stage.axes) for cell in stage.cells}
    valid = {cell.name for cell in stage.cells if cell.invalid is None}
    if found != wanted or valid != {*stage.models}:
        raise LSGMError(
            f"{stage.name}: cells: expected one for each combination of the axes, and a model for each valid cell"
        )


def measured(stage: TabulateStage, found: dict[str, Metrics]) -> pd.DataFrame:
    """One row per cell and seed; ``state`` says why a row has no numbers. NELBOs are in nats per image."""
    distance = _distance(list(found.values()))
    rows: list[dict[str, Any]] = []
    for cell in stage.cells:
        row: dict[str, Any] = {**cell.labels, "seed": cell.seed, "model": cell.name, "state": ""}
        rows.append(row)
        if cell.invalid is not None:
            row["state"] = f"invalid: {cell.invalid}"
            continue
        metrics = found[cell.name]
        devices = (metrics.training.lsgm.device or metrics.device, metrics.sampling.lsgm.device or metrics.device)
        row["device"] = devices[0] if devices[0] == devices[1] else f"{devices[0]}, sampled on {devices[1]}"
        row["state"] = _failure(metrics)
        if not row["state"]:
            row |= {"nelbo": metrics.nelbo.lsgm.nelbo, "nelbo_stderr": metrics.nelbo.lsgm.stderr}
            row |= {"nelbo_vae": metrics.nelbo.vae.nelbo}
            if metrics.fidelity is not None and distance:
                row[distance] = metrics.fidelity.lsgm.get(distance)
                row[f"{distance}_vae"] = metrics.fidelity.vae.get(distance)
            sampling = metrics.sampling.lsgm
            row |= {"nfe": sampling.nfe, "sampling_s_per_1000": sampling.seconds_per_1000}
        row["training_s"] = metrics.training.total
    first = [*stage.axes, "seed", "model", "state"]
    distances = [distance, f"{distance}_vae"] if distance else []
    numbers = ["nelbo", "nelbo_stderr", "nelbo_vae", *distances, *COST]
    frame = pd.DataFrame(rows, columns=[*first, *numbers, "device"])
    frame[numbers] = frame[numbers].astype(float).round(4)
    return frame


def _failure(metrics: Metrics) -> str:
    """Why a cell has no numbers; "" if it has them."""
    for what, training in (("VAE ", metrics.training.vae), ("", metrics.training.lsgm)):
        if training.diverged_at is not None:
            return f"{what}diverged at step {training.diverged_at}"
    if metrics.sampling.lsgm.failed is not None:
        return "no samples: the ODE could not be solved"
    return "" if math.isfinite(metrics.nelbo.lsgm.nelbo) else "no NELBO: the ODE could not be solved"


def table(stage: TabulateStage, frame: pd.DataFrame) -> pd.DataFrame:
    """The readable table, as text: means over the seeds ± their standard deviation.

    The best value of each measure is bold; where the VAE is shown too, it competes with the LSGM. Cells with a failed
    seed do not compete.
    """
    reasons = _reasons(frame)
    distance = _distance_column(frame)
    pair = [name for name in ("nelbo", distance) if name]
    groups: dict[Any, pd.DataFrame] = dict(iter(frame.groupby(list(stage.axes), sort=False)))
    whole = [group for group in groups.values() if (group["state"] == "").all()]
    best = {}
    for measure in pair:
        shown = (measure,) if stage.columns else (measure, f"{measure}_vae")
        best[measure] = min((_mean(group[name]) for group in whole for name in shown), default=math.inf)

    def text(group: pd.DataFrame, name: str, measure: str, digits: int = 2) -> str:
        good = group.loc[group["state"] == "", name]
        spread = not name.endswith("_vae")  # all seeds share one VAE
        value = _with_spread(good, digits) if spread else number(digits)(float(good.mean()))
        competes = value and len(good) == len(group)
        return f"**{value}**" if competes and _mean(good) == best.get(measure) else value

    def state(group: pd.DataFrame) -> str:
        states = [s for s in group["state"] if s]
        if not states:
            return ""
        said = ", ".join(dict.fromkeys(f"invalid [{reasons[s]}]" if s in reasons else s for s in states))
        return said if len(states) == len(group) else f"{len(states)} of {len(group)} seeds: {said}"

    if stage.columns:
        across = [stage.axes[axis] for axis in stage.columns]
        rows = []
        for down in itertools.product(*(labels for axis, labels in stage.axes.items() if axis not in stage.columns)):
            row = dict(zip((axis for axis in stage.axes if axis not in stage.columns), down, strict=True))
            for columns in itertools.product(*across):
                labels = row | dict(zip(stage.columns, columns, strict=True))
                group = groups[tuple(labels[axis] for axis in stage.axes)]
                values = " / ".join(text(group, name, name) for name in pair) if (group["state"] == "").any() else ""
                row = row | {", ".join(columns): "; ".join(part for part in (values, state(group)) if part)}
            rows.append(row)
        return pd.DataFrame(rows)
    rows = []
    headings = [*stage.axes]
    for name in pair:
        headings += [f"{_title(frame, name)}, VAE", _title(frame, name)]
    headings += [title for title, _ in COST.values()] + [""]
    for key, group in groups.items():
        row = dict(zip(stage.axes, key, strict=True))
        if not (group["state"] == "").any():
            rows.append({**row, _title(frame, "nelbo"): state(group)})
            continue
        for name in pair:
            row |= {
                f"{_title(frame, name)}, VAE": text(group, f"{name}_vae", name),
                _title(frame, name): text(group, name, name),
            }
        row |= {title: text(group, name, name, digits) for name, (title, digits) in COST.items()}
        rows.append({**row, "": state(group)})
    found = pd.DataFrame(rows, columns=headings, dtype=object).fillna("")
    return found if found[""].any() else found.drop(columns="")


def notes(stage: TabulateStage, frame: pd.DataFrame, models: Sequence[Metrics]) -> list[str]:
    """The notes below the table: how its numbers were measured."""
    lines = [f"[{i}] {reason.removeprefix('invalid: ')}" for reason, i in _reasons(frame).items()]
    distance = _distance_column(frame)
    if stage.columns:
        what = " / ".join(_title(frame, name) for name in ("nelbo", distance) if name)
        lines.append(f"Columns: {', '.join(stage.columns)}. Cells: {what}.")
    about = f"NELBO of {_each(str(m.nelbo.images) for m in models)} test images, nats/image; lower is better."
    fidelities = [metrics.fidelity for metrics in models if metrics.fidelity is not None]
    if distance and fidelities:
        real = _each(
            f"{f.real_vs_real[distance]:.2f} (of {f.real_vs_real_images})"
            for f in fidelities
            if distance in f.real_vs_real
        )
        about += (
            f" {distance_title(distance)}N = {_each(str(f.images) for f in fidelities)}) of samples to the training "
            f"images; two disjoint sets of real ones are {real} apart."
        )
    if frame["nelbo_stderr"].notna().any():
        about += (
            f" The standard error of a NELBO is {_range(frame['nelbo_stderr'], 2)}; that of a difference is smaller: "
            "all cells see the same images and draws."
        )
    seeds = sorted({cell.seed for cell in stage.cells})
    spread = (
        f"Means ± standard deviations over the seeds {', '.join(map(str, seeds))} of all but the VAE's first training."
        if len(seeds) > 1
        else "One seed."
    )
    lines.append(f"{about} {spread} Bold: the best.")
    time = (f"{title} {_range(frame[name], digits)}" for name, (title, digits) in COST.items() if frame[name].count())
    devices = _each(str(device) for device in frame["device"].dropna())
    lines.append(
        f"From cell to cell: {', '.join(time)}. Training includes that of the VAE; what cells share counts for each of "
        f"them. Trained on {devices}, {_each(metrics.date for metrics in models)}."
    )
    return [*lines, *([stage.note] if stage.note else [])]


def points(stage: TabulateStage, frame: pd.DataFrame) -> list[Points]:
    """The panels of the figure, with one point per cell: the mean over its seeds."""
    distance = _distance_column(frame)
    good = frame[frame["state"] == ""]
    panels = []
    first, *others = stage.axes
    for name in stage.against:
        column, title = AGAINST[name]
        y = distance or "nelbo"
        means = good.groupby(list(stage.axes), sort=False)[list(dict.fromkeys([column, y]))].mean().reset_index()
        alike = pd.Series([""] * len(means))
        color, marker, filling = [*(means[axis] for axis in stage.axes), alike, alike][:3]
        text = means[others[2:]].agg(", ".join, axis=1) if others else alike
        if not others:  # "rk45, tol 1e-1" belongs to the series "rk45"
            parts = means[first].str.partition(", ")
            color, text = parts[0], parts[2].where(parts[2] != "", parts[0])
        panels.append(
            Points(
                x=means[column].tolist(),
                y=means[y].tolist(),
                color=color.tolist(),
                marker=marker.tolist(),
                filling=filling.tolist(),
                text=text.tolist() if len(means) else [],
                titles=(first, *[*others, "", ""][:2]),
                x_title=title,
                y_title=_title(frame, y),
                log=name != "nelbo",
                line=not others and bool((parts[1] != "").any()),
            )
        )
    return panels


def _distance(models: Sequence[Metrics]) -> str | None:
    """The name of the Fréchet distance that was measured; None: no cell has one."""
    return next((next(iter(m.fidelity.real_vs_real)) for m in models if m.fidelity is not None), None)


def _distance_column(frame: pd.DataFrame) -> str | None:
    return next((name for name in frame.columns if name == "fid" or name.startswith("frechet_")), None)


def _title(frame: pd.DataFrame, name: str) -> str:
    if name == "nelbo":
        return "NELBO"
    title = distance_title(name)
    return f"{title[:-2]})" if title.endswith(", ") else title.removesuffix(" (")


def _reasons(frame: pd.DataFrame) -> dict[str, int]:
    """Number the reasons why cells are invalid, starting at 1."""
    return {s: i for i, s in enumerate(dict.fromkeys(s for s in frame["state"] if s.startswith("invalid: ")), 1)}


def _mean(values: pd.Series[float]) -> float:
    """The mean; inf, which never wins, if a value is missing."""
    mean = float(values.mean(skipna=False))
    return mean if math.isfinite(mean) else math.inf


def _with_spread(values: pd.Series[float], digits: int) -> str:
    if len(values) < 2 or values.isna().any():
        return number(digits)(float(values.mean(skipna=False))) if len(values) else ""
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def _range(values: pd.Series[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _each(texts: Iterator[str] | Sequence[str]) -> str:
    return " / ".join(dict.fromkeys(texts))
