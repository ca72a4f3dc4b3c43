"""Tables of ablations from made-up metrics: layout, bold, means, what has no numbers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lsgm.config.stages import TabulateStage
from lsgm.errors import LSGMError
from lsgm.evaluation.ablations import tabulate

from .test_tables import METRICS

AXES = {"diffusion": ["VPSDE", "geometric"], "q": ["shared", "own"]}
WHY = "train: algorithm must be <own>"


def stage(seeds: tuple[int, ...] = (1,), **changes: Any) -> TabulateStage:
    cells = [
        {"name": f"g_{d}_{q}_{seed}", "labels": {"diffusion": d, "q": q}, "seed": seed,
         "invalid": WHY if (d, q) == ("geometric", "shared") else None}
        for d in AXES["diffusion"] for q in AXES["q"] for seed in seeds
    ]  # fmt: skip
    models = [cell["name"] for cell in cells if cell["invalid"] is None]
    given = {"name": "g", "title": "Grid", "models": models, "axes": AXES, "against": ["nelbo"], "cells": cells}
    return TabulateStage.model_validate(given | changes)


def results(path: Path, grid: TabulateStage, **numbers: Any) -> list[Path]:
    """Folders of all cells; ``numbers``: (NELBO, Fréchet distance) or a step where it diverged."""
    folders = []
    for name in grid.models:
        metrics = copy.deepcopy(METRICS)
        found = numbers.get(name, (95.0, 2.5))
        metrics["model"] = name
        metrics["training"]["lsgm"]["device"] = "cpu, 2 threads"
        if isinstance(found, int):
            metrics["training"]["lsgm"]["diverged_at"] = found
        else:
            metrics["nelbo"]["lsgm"]["nelbo"], metrics["fidelity"]["lsgm"]["frechet_mnist_classifier"] = found
        (path / name).mkdir(parents=True)
        (path / name / "metrics.json").write_text(json.dumps(metrics))
        folders.append(path / name)
    return folders


def rows(path: Path) -> list[str]:
    return [line for line in (path / "tables/ablations/g.md").read_text().splitlines() if line.startswith("|")]


def test_axes_in_the_columns_as_in_the_paper(tmp_path: Path) -> None:
    grid = stage(columns=["q"])
    tabulate(grid, results(tmp_path / "in", grid, g_VPSDE_own_1=(90.0, 3.0), g_geometric_own_1=77), tmp_path)
    assert rows(tmp_path) == [
        "| diffusion | shared | own |",
        "|---|---:|---:|",
        "| VPSDE | 95.00 / **2.50** | **90.00** / 3.00 |",
        "| geometric | invalid [1] | diverged at step 77 |",
    ]
    text = (tmp_path / "tables/ablations/g.md").read_text()
    for fact in (
        f"[1] {WHY}",
        "Columns: q.",
        "500 test images",
        "N = 2000",
        "cpu, 2 threads",
        "training (s) 250",
        "One seed",
    ):
        assert fact in text
    page = (tmp_path / "tables/ablations/g.html").read_text()
    assert "<b>90.00</b> / 3.00" in page and "&lt;own&gt;" in page and "<own>" not in page
    assert (tmp_path / "figures/ablations/g.png").stat().st_size > 0


def test_measures_in_the_columns_with_means_over_seeds(tmp_path: Path) -> None:
    grid = stage((1, 2), note="A note.", against=["nfe", "seconds"])
    numbers = {"g_VPSDE_shared_1": (92.0, 2.0), "g_VPSDE_shared_2": (94.0, 2.2), "g_geometric_own_2": 8}
    tabulate(grid, results(tmp_path / "in", grid, **numbers), tmp_path)
    header, _, *found = rows(tmp_path)
    assert header.startswith("| diffusion | q | NELBO, VAE | NELBO | Fréchet distance (mnist_classifier), VAE |")
    first, second, third, last = ([cell.strip() for cell in row.split("|")[1:-1]] for row in found)
    assert first[2:6] == ["99.50", "**93.00 ± 1.41**", "7.25", "**2.10 ± 0.14**"]  # one VAE, whatever the seed
    assert second[3] == "95.00 ± 0.00" and second[6:9] == ["40 ± 0", "10.00 ± 0.00", "250 ± 0"]
    assert third[3] == "invalid [1]"
    assert last[3] == "95.00" and last[-1] == "1 of 2 seeds: diverged at step 8"
    text = (tmp_path / "tables/ablations/g.md").read_text()
    assert "over the seeds 1, 2" in text and "A note." in text


def test_a_cell_of_which_a_seed_failed_is_not_the_best(tmp_path: Path) -> None:
    """Neither where the seed diverged nor where its NELBO could not be computed."""
    grid = stage((1, 2))
    numbers: dict[str, Any] = {"g_VPSDE_shared_1": (90.0, 1.0), "g_VPSDE_shared_2": 8}
    numbers |= {"g_VPSDE_own_1": (91.0, 1.5), "g_VPSDE_own_2": (math.nan, 1.0), "g_geometric_own_1": (94.0, 2.0)}
    tabulate(grid, results(tmp_path / "in", grid, **numbers), tmp_path)
    shared, own, _, geometric = ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows(tmp_path)[2:])
    assert (shared[3], shared[-1]) == ("90.00", "1 of 2 seeds: diverged at step 8")
    assert (own[3], own[-1]) == ("91.00", "1 of 2 seeds: no NELBO: the ODE could not be solved")
    assert geometric[3] == "**94.50 ± 0.71**"


def test_samples_that_could_not_be_drawn_are_said(tmp_path: Path) -> None:
    grid = stage()
    folders = results(tmp_path / "in", grid)
    path = folders[0] / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["sampling"]["lsgm"] |= {"failed": "the ODE solver failed at t = 0.5", "nfe": math.nan}
    metrics["fidelity"]["lsgm"] = {}
    path.write_text(json.dumps(metrics))
    tabulate(grid, folders, tmp_path)
    assert "no samples: the ODE could not be solved" in rows(tmp_path)[2]
    assert "NFE 40." in (tmp_path / "tables/ablations/g.md").read_text().replace("NFE 40,", "NFE 40.")


def test_the_csv_has_every_cell_and_seed(tmp_path: Path) -> None:
    grid = stage((1, 2))
    given = results(tmp_path / "in", grid, g_VPSDE_own_1=5)
    tabulate(grid, given, tmp_path)
    frame = pd.read_csv(tmp_path / "tables/ablations/g.csv")
    assert len(frame) == 8 and list(frame.columns[:5]) == ["diffusion", "q", "seed", "model", "state"]
    diverged = frame.set_index("model").loc["g_VPSDE_own_1"]
    assert diverged["state"] == "diverged at step 5" and pd.isna(diverged["nelbo"]) and diverged["training_s"] == 250.5
    assert frame["state"].eq(f"invalid: {WHY}").sum() == 2
    one = (tmp_path / "figures/ablations/g.png").read_bytes()
    tabulate(grid, given, tmp_path)
    assert one == (tmp_path / "figures/ablations/g.png").read_bytes()


def test_cells_that_all_diverged_make_a_table(tmp_path: Path) -> None:
    for name, columns in (("a", []), ("b", ["q"])):
        grid = stage(columns=columns)
        tabulate(grid, results(tmp_path / f"in_{name}", grid, **dict.fromkeys(grid.models, 3)), tmp_path / name)
        assert "\n".join(rows(tmp_path / name)).count("diverged at step 3") == 3


def test_missing_results_are_named(tmp_path: Path) -> None:
    grid = stage()
    with pytest.raises(LSGMError, match="no folder holds the results of g_VPSDE_shared_1; g needs them"):
        tabulate(grid, results(tmp_path / "in", grid)[1:], tmp_path)


def test_results_of_one_cell_in_two_folders_are_refused(tmp_path: Path) -> None:
    grid = stage()
    given = results(tmp_path / "in", grid)
    with pytest.raises(LSGMError, match="holds results of g_VPSDE_shared_1, and so does another folder"):
        tabulate(grid, [*given, given[0]], tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cells": []}, "g: cells: expected one for each combination of the axes"),
        (
            {"models": ["g_VPSDE_shared_1"]},
            "g: cells: expected one for each combination .* a model for each valid cell",
        ),
        ({"axes": AXES | {"size": ["small"]}}, "g: cells: expected one for each combination"),
        ({"axes": {}}, "g: axes: expected names that the table does not use .* found none"),
        ({"axes": {"seed": ["1"]}}, "g: axes: expected names that the table does not use .* found seed"),
        ({"columns": ["p"]}, "g: columns: p: expected some of the axes"),
    ],
)
def test_cells_that_are_no_grid_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    grid = stage()
    with pytest.raises(LSGMError, match=says):
        tabulate(stage(**changes), results(tmp_path / "in", grid), tmp_path)


def test_labels_do_not_break_a_table(tmp_path: Path) -> None:
    axes = {"a|b": ["x|y", "<i>"]}
    cells = [{"name": f"g_{i}", "labels": {"a|b": label}, "seed": 1} for i, label in enumerate(axes["a|b"])]
    grid = stage(axes=axes, cells=cells, models=["g_0", "g_1"], title="One\n# Two <script>")
    tabulate(grid, results(tmp_path / "in", grid), tmp_path)
    header, rule, *found = rows(tmp_path)
    assert {row.replace("\\|", "").count("|") for row in (header, *found)} == {rule.count("|")}
    assert header.startswith("| a\\|b |") and [row.split()[1] for row in found] == ["x\\|y", "&lt;i>"]
    assert (tmp_path / "tables/ablations/g.md").read_text().startswith("# One # Two &lt;script>\n")
    assert pd.read_csv(tmp_path / "tables/ablations/g.csv")["a|b"].tolist() == axes["a|b"]
