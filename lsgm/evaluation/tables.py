"""Builds the tables, figures and summary of all evaluated models from their metrics.json files.

The same inputs produce the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from lsgm.errors import LSGMError
from lsgm.evaluation.charts import Bar, save_curves, save_nelbo_bars
from lsgm.evaluation.history import read_history
from lsgm.evaluation.metrics import NELBO, Metrics, Training, read_metrics
from lsgm.evaluation.samples import Sampling
from lsgm.files import atomic, copy, write_json

# Results that the paper (Vahdat et al., arXiv 2106.05931) reports for its LSGMs: NELBO in nats/image or bits/dim, FID.
# Models without an entry have no counterpart in the paper.
PAPER = {
    "cifar10_best_fid": {"fid": 2.10},
    "cifar10_balanced": {"fid": 2.17},
    "cifar10_best_nll": {"bpd": 2.87, "fid": 6.89},
    "celebahq256_quantitative": {"bpd": 0.70, "fid": 7.22},
    "omniglot": {"nelbo": 87.79},
}

PRIORS = {
    "vae": "VAE, N(0, I) prior",
    "lsgm_with_normal_prior": "LSGM's VAE, N(0, I) prior",
    "lsgm": "LSGM",
}
SAMPLED = ("vae", "lsgm")  # the LSGM's VAE was not trained for the prior N(0, I)
HEAD = (
    '<meta charset="utf-8">\n'
    "<style>body {font: 14px sans-serif} td, th {padding: 4px 10px; text-align: right} "
    "td {white-space: nowrap}</style>\n"
)
DISTANCES = {"fid": "FID (", "clean_fid": "FID by clean-fid ("}


def tabulate(results: Sequence[Path], out: Path) -> None:
    """Write tables/, figures/ and metrics/ to ``out`` from the folders ``results`` that `lsgm evaluate` wrote.

    Raises:
        LSGMError: a file is missing or damaged, or two folders hold results of the same model.
    """
    folders: dict[str, Path] = {}
    models: list[Metrics] = []
    for folder in map(Path, results):
        metrics = read_metrics(folder / "metrics.json")
        if metrics.model in folders:
            raise LSGMError(f"{folders[metrics.model]} and {folder} both hold results of the model {metrics.model}")
        folders[metrics.model] = folder
        models.append(metrics)
    histories = {
        (model, stage): read_history(folder / f"history_{stage}.csv", "write it again with `lsgm evaluate`")
        for model, folder in folders.items()
        for stage in ("vae", "lsgm")
    }

    for model, folder in folders.items():
        _copy(folder / "samples.png", out / "figures" / f"{model}_samples.png")
    table = comparison(models)
    write_text(out / "tables" / "comparison.csv", csv(table))
    shown, lines = readable(table, models), notes(models)
    write_text(out / "tables" / "comparison.md", "\n\n".join([markdown(shown, labels=2), *map(one_line, lines)]) + "\n")
    write_text(out / "tables" / "comparison.html", page("Models and priors", shown, lines))
    long = pd.concat(
        [frame.assign(model=model, stage=stage) for (model, stage), frame in histories.items()], ignore_index=True
    )
    first = ["model", "stage", "step"]
    long = long[[*first, *(name for name in long.columns if name not in first)]]
    write_text(out / "tables" / "history.csv", long.to_csv(index=False, lineterminator="\n"))
    for stale in (out / "metrics").glob("*/*.json"):  # left over from models that are no longer run
        stale.unlink()
    for metrics in models:
        for prior, found in summary(metrics).items():
            write_json(out / "metrics" / prior / f"{metrics.model}.json", found)

    save_nelbo_bars({metrics.model: _bars(metrics) for metrics in models}, out / "figures" / "nelbo.png")
    for model in folders:
        save_curves(histories[model, "vae"], histories[model, "lsgm"], out / "figures" / f"{model}_training.png")


def comparison(models: Sequence[Metrics]) -> pd.DataFrame:
    """One row of plain numbers per model and prior; NaN marks what was not measured.

    ``training_s`` is the time of training from scratch: the LSGM's includes the training of the VAE it starts from.
    """
    rows: list[dict[str, Any]] = []
    for metrics in models:
        for key, prior in _priors(metrics).items():
            nelbo: NELBO = getattr(metrics.nelbo, key)
            paper = PAPER.get(metrics.model, {}) if key == "lsgm" else {}
            row = {
                "model": metrics.model,
                "dataset": metrics.dataset,
                "prior": prior,
                "nelbo": nelbo.nelbo,
                "nelbo_stderr": nelbo.stderr,
                "nelbo_paper": paper.get("nelbo"),
                "bpd": nelbo.bpd,
                "bpd_paper": paper.get("bpd"),
                "reconstruction": nelbo.reconstruction,
                "kl": nelbo.kl,
                "iw_bound": nelbo.iw_bound,
                "iw_stderr": nelbo.iw_stderr,
            }
            if key in SAMPLED:
                sampling: Sampling = getattr(metrics.sampling, key)
                row |= _fidelity(metrics, key) | {
                    "fid_paper": paper.get("fid"),
                    "nfe": sampling.nfe,
                    "sampling_s_per_1000": sampling.seconds_per_1000,
                }
            training = metrics.training.vae.seconds if key == "vae" else metrics.training.total
            rows.append(row | {"training_s": training})
    fidelity = list(dict.fromkeys(name for metrics in models for key in SAMPLED for name in _fidelity(metrics, key)))
    measured = ["nelbo", "nelbo_stderr", "nelbo_paper", "bpd", "bpd_paper", "reconstruction", "kl"]
    measured += ["iw_bound", "iw_stderr", *fidelity, "fid_paper", "nfe", "sampling_s_per_1000", "training_s"]
    frame = pd.DataFrame(rows, columns=["model", "dataset", "prior", *measured])
    frame[measured] = frame[measured].astype(float)
    optional = [*(name for name in measured if name.endswith("_paper")), "bpd", "iw_bound", "iw_stderr"]
    return frame.drop(columns=[name for name in optional if frame[name].isna().all()]).round(4)


def csv(table: pd.DataFrame) -> str:
    """Format :func:`comparison` as CSV. An empty field was not measured; `nan` was measured and came out as NaN."""
    measured = ["nelbo", "nelbo_stderr", "reconstruction", "kl"]
    table = table.assign(**{name: table[name].astype(object).fillna("nan") for name in measured})
    return table.to_csv(index=False, lineterminator="\n")


def readable(table: pd.DataFrame, models: Sequence[Metrics]) -> pd.DataFrame:
    """Format :func:`comparison` for readers: the best of each dataset in bold, the paper's results beside ours."""
    unit = " / ".join(dict.fromkeys(metrics.nelbo.unit for metrics in models))
    counts = " / ".join(dict.fromkeys(str(metrics.fidelity.images) for metrics in models if metrics.fidelity))
    samples = " / ".join(dict.fromkeys(str(metrics.nelbo.lsgm.iw_samples) for metrics in models))
    text = table[["model", "prior"]].copy()
    text[f"NELBO ({unit}) ↓"] = _bold(_with_error(table, "nelbo", "nelbo_stderr"), table, "nelbo")
    if "nelbo_paper" in table:
        text["NELBO in the paper"] = [bound and f"≤ {bound}" for bound in map(number(2), table["nelbo_paper"])]
    if "bpd" in table:
        text["bits/dim ↓"] = _bold([number(3)(value) for value in table["bpd"]], table, "bpd")
    if "bpd_paper" in table:
        text["bits/dim in the paper"] = [bound and f"≤ {bound}" for bound in map(number(2), table["bpd_paper"])]
    if "iw_bound" in table:
        header = f"importance-weighted bound (K = {samples}) ↓"
        text[header] = _bold(_with_error(table, "iw_bound", "iw_stderr"), table, "iw_bound")
    for name, header in (("reconstruction", "reconstruction"), ("kl", "KL")):
        text[header] = [number(2)(value) or "nan" for value in table[name]]  # measured, but NaN
    for name in table.columns:
        if name in DISTANCES or name.startswith("frechet_"):
            cells = [number(2)(value) for value in table[name]]
            text[f"{distance_title(name)}N = {counts}) ↓"] = _bold(cells, table, name)
    if "fid_paper" in table:
        text["FID in the paper"] = [number(2)(value) for value in table["fid_paper"]]
    text["NFE"] = [number(0)(value) for value in table["nfe"]]
    text["sampling (s / 1000 images)"] = [number(2)(value) for value in table["sampling_s_per_1000"]]
    text["training (s)"] = [number(0)(value) for value in table["training_s"]]
    return text


def notes(models: Sequence[Metrics]) -> list[str]:
    """The notes below the table: how its numbers were measured."""
    return [
        *map(_caption, models),
        "± is one standard error over the test images. Bold: the best of each dataset. Training counts from nothing: "
        "the LSGM's includes that of the VAE it starts from. The LSGM's own VAE under N(0, I) is not sampled: its "
        "latents are not trained for that prior.",
    ]


def markdown(shown: pd.DataFrame, labels: int) -> str:
    """Format a table of strings as Markdown: the first ``labels`` columns hold words, the others numbers."""
    cells = ([plain(cell).replace("|", "\\|") for cell in row] for row in (shown.columns, *shown.to_numpy()))
    header, *rows = ("| " + " | ".join(row) + " |" for row in cells)
    rule = "|" + "---|" * labels + "---:|" * (len(shown.columns) - labels)
    return "\n".join([header, rule, *rows])


def one_line(text: str) -> str:
    """Remove line breaks, which would end a row or a paragraph in Markdown."""
    return " ".join(text.splitlines())


def plain(text: str) -> str:
    """Put ``text`` on one line and escape HTML, for use in Markdown."""
    return one_line(text).replace("<", "&lt;")


def page(title: str, shown: pd.DataFrame, lines: Sequence[str]) -> str:
    """Render title, table and notes as an HTML page for the workflow's report; ``**`` marks bold text."""

    def bold(text: str) -> str:
        return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))

    body = shown.map(bold).rename(columns=escape).to_html(index=False, border=0, escape=False)
    below = "\n".join(f"<p>{bold(line)}</p>" for line in lines)
    return f"{HEAD}<h3>{escape(title)}</h3>\n{body}\n{below}\n"


def summary(metrics: Metrics) -> dict[str, Any]:
    """The metrics that `dvc metrics show` prints for a model: prior -> content of its file. Each file becomes a row."""

    def of(key: str) -> dict[str, Any]:
        nelbo: NELBO = getattr(metrics.nelbo, key)
        found: dict[str, float] = {"nelbo": nelbo.nelbo, "stderr": nelbo.stderr}
        found |= {} if math.isnan(nelbo.bpd) else {"bpd": nelbo.bpd}
        found |= {"reconstruction": nelbo.reconstruction, "kl": nelbo.kl}
        if nelbo.iw_bound is not None and nelbo.iw_stderr is not None:
            found |= {f"iw_bound_{nelbo.iw_samples}": nelbo.iw_bound, "iw_stderr": nelbo.iw_stderr}
        checks = {name: getattr(nelbo, name) for name in ("solver_error", "solver_rms", "estimate_std")}
        found |= {name: value for name, value in checks.items() if value is not None}
        if key in SAMPLED:
            found |= _fidelity(metrics, key)
            training: Training = getattr(metrics.training, key)
            found |= {"nfe": getattr(metrics.sampling, key).nfe}
            found |= {"skipped_steps": training.skipped, "restarts": training.restarts}
            if training.diverged_at is not None:
                found["diverged_at"] = training.diverged_at
        if key == "lsgm":
            found |= {"gain": metrics.nelbo.gain.nelbo, "gain_stderr": metrics.nelbo.gain.stderr}
        return {name: _rounded(value) for name, value in found.items()}

    return {key: of(key) for key in _priors(metrics)}


def _caption(metrics: Metrics) -> str:
    fidelity, gain = metrics.fidelity, metrics.nelbo.gain
    text = (
        f"**{metrics.model}** ({metrics.dataset}): NELBO of {metrics.nelbo.images} test images; the LSGM's gain over "
        f"the VAE is {gain.nelbo:.2f} ± {gain.stderr:.2f} {metrics.nelbo.unit} (paired). "
    )
    text += _exactness(metrics.nelbo.lsgm)
    if fidelity is not None:
        name, real = next(iter(fidelity.real_vs_real.items()))
        text += (
            f"{distance_title(name)}N = {fidelity.images}) of samples to the training images; between two disjoint "
            f"sets of {fidelity.real_vs_real_images} real images it is {real:.2f}"
            f"{'' if fidelity.real_vs_real_images == fidelity.images else ' (it falls with their number)'}. "
        )
    for what, training in (("VAE", metrics.training.vae), ("LSGM", metrics.training.lsgm)):
        if training.diverged_at is not None:
            text += f"The training of the {what} diverged at step {training.diverged_at}: this is its last good state. "
    return f"{text}Measured on {metrics.device}, {metrics.date}."


def _exactness(nelbo: NELBO) -> str:
    """How exact the estimate of log p(z0) is, where that was checked."""
    if nelbo.estimate_std is None or not math.isfinite(nelbo.estimate_std):
        return ""
    found = f"Its estimate of log p(z0) varies by {nelbo.estimate_std:.2f} nats over its random draws"
    if nelbo.iw_bound is not None:
        found += ", which can make the importance-weighted bound too low by up to half the square of that"
    if nelbo.solver_error is not None and nelbo.solver_rms is not None:
        found += f"; the solver's error is {nelbo.solver_error:+.2f} nats (rms {nelbo.solver_rms:.2f})"
    return f"{found}, on {nelbo.check_images} of the images. "


def _bars(metrics: Metrics) -> list[Bar]:
    parts: dict[str, NELBO] = {label: getattr(metrics.nelbo, key) for key, label in PRIORS.items()}
    return [Bar(label, part.reconstruction, part.kl, part.nelbo, part.stderr) for label, part in parts.items()]


def _priors(metrics: Metrics) -> dict[str, str]:
    """The priors of a model: key in metrics.json -> label in the tables."""
    further = {key: f"LSGM ({key.removeprefix('lsgm_')} bound)" for key in metrics.nelbo.__pydantic_extra__}
    return PRIORS | further


def _fidelity(metrics: Metrics, key: str) -> dict[str, float]:
    """FID and related metrics by column name; empty if they were not measured."""
    return dict(getattr(metrics.fidelity, key)) if metrics.fidelity is not None else {}


def distance_title(name: str) -> str:
    """The start of the heading of a Fréchet distance; the caller completes it with the number of samples."""
    return DISTANCES.get(name, f"Fréchet distance ({name.removeprefix('frechet_')}, ")


def number(digits: int) -> Callable[[float], str]:
    return lambda value: "" if math.isnan(value) else f"{value:.{digits}f}"


def _bold(cells: Sequence[str], table: pd.DataFrame, name: str) -> list[str]:
    """Make those ``cells`` bold whose number in the column ``name`` is the lowest of its dataset."""
    best = table[name] == table.groupby("dataset")[name].transform("min")
    return [f"**{cell}**" if chosen else cell for cell, chosen in zip(cells, best, strict=True)]


def _with_error(table: pd.DataFrame, name: str, stderr: str) -> list[str]:
    """Format the column ``name`` with its standard errors; values that are not finite get none."""
    return [
        f"{value:.2f} ± {error:.2f}" if math.isfinite(value) else f"{value:.2f}"
        for value, error in zip(table[name], table[stderr], strict=True)
    ]


def _rounded(value: float) -> float | str:
    """Round floats to four significant digits and keep ints. JSON has no NaN or infinity, so they become strings."""
    if isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)


def write_text(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def _copy(source: Path, path: Path) -> None:
    try:
        copy(source, path)
    except FileNotFoundError:
        raise LSGMError(f"{source}: is missing; run `lsgm evaluate` again to write it") from None
