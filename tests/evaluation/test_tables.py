"""Tables from made-up metrics: the numbers, the bold, the messages, the same bytes twice."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lsgm.errors import LSGMError
from lsgm.evaluation.image_grids import save_panels
from lsgm.evaluation.tables import PRIORS, tabulate

METRICS: dict[str, Any] = {
    "model": "mnist_demo",
    "dataset": "mnist",
    "device": "cpu",
    "date": "2026-11-22",
    "nelbo": {
        "unit": "nats/image",
        "images": 500,
        "lsgm": {
            "nelbo": 95.123456,
            "stderr": 1.25,
            "reconstruction": 70.0,
            "kl": 25.123456,
            "nfe": 80.5,
            "seconds": 30.0,
        },
        "vae": {"nelbo": 99.5, "stderr": 1.5, "reconstruction": 72.5, "kl": 27.0, "nfe": 0, "seconds": 1.0},
        "lsgm_with_normal_prior": {
            "nelbo": 103.0,
            "stderr": 1.75,
            "reconstruction": 70.0,
            "kl": 33.0,
            "nfe": 0,
            "seconds": 1.0,
        },
        "gain": {"nelbo": 4.376544, "stderr": 0.25},
    },
    "fidelity": {
        "extractor": "mnist_classifier",
        "images": 2000,
        "kept_images": 2000,
        "lsgm": {"frechet_mnist_classifier": 2.5, "kid_mnist_classifier": 0.125, "recall_mnist_classifier": 0.75},
        "vae": {"frechet_mnist_classifier": 7.25, "kid_mnist_classifier": 0.5, "recall_mnist_classifier": 0.25},
        "real_vs_real_images": 2000,
        "real_vs_real": {"frechet_mnist_classifier": 0.25},
    },
    "sampling": {
        "lsgm": {"images": 2000, "solver": "rk45", "tol": 1e-4, "nfe": 40.0, "seconds": 20.0},
        "vae": {"images": 2000, "solver": None, "tol": None, "nfe": 0, "seconds": 1.0},
    },
    "training": {"vae": {"seconds": 100.0, "steps": 20}, "lsgm": {"seconds": 150.5, "steps": 20}},
    "code": {"pretrain": "ab12", "evaluate": None},
}


def folder(path: Path, change: Callable[[dict[str, Any]], Any] = lambda metrics: None) -> Path:
    """A folder as `lsgm evaluate` writes it, its metrics changed by ``change``."""
    path.mkdir(parents=True)
    metrics = copy.deepcopy(METRICS)
    metrics["model"] = path.name
    change(metrics)
    (path / "metrics.json").write_text(json.dumps(metrics))
    save_panels({"real": np.zeros((4, 1, 28, 28), np.uint8)}, path / "samples.png")
    for stage, extra in (("vae", "spectral"), ("lsgm", "alpha_mean")):
        frame = pd.DataFrame({"step": [10, 20], "epoch": [0.5, 1.0], "loss": [120.0, 110.0], "nelbo": [121.0, 111.0]})
        frame.assign(**{extra: 0.5}).to_csv(path / f"history_{stage}.csv", index=False)
    return path


def test_csv_holds_the_numbers(tmp_path: Path) -> None:
    tabulate([folder(tmp_path / "models" / "mnist_demo")], tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "comparison.csv").set_index("prior")
    assert list(table.index) == list(PRIORS.values())
    vae, normal, lsgm = (table.loc[prior] for prior in PRIORS.values())
    assert lsgm["nelbo"] == 95.1235
    assert vae["nelbo_stderr"] == 1.5
    assert [row["reconstruction"] + row["kl"] for row in (vae, normal)] == [99.5, 103.0]
    assert [row["frechet_mnist_classifier"] for row in (vae, lsgm)] == [7.25, 2.5]
    assert [row["kid_mnist_classifier"] for row in (vae, lsgm)] == [0.5, 0.125]
    assert lsgm["nfe"] == 40
    assert lsgm["sampling_s_per_1000"] == 10.0
    assert [row["training_s"] for row in (vae, normal, lsgm)] == [100.0, 250.5, 250.5]
    assert np.isnan([normal["frechet_mnist_classifier"], normal["nfe"]]).all()
    assert not [name for name in table if name.endswith("_paper")]


def test_a_model_without_frechet_distance(tmp_path: Path) -> None:
    """Beside one that has it its cells are empty; alone there is no column."""

    def without(metrics: dict[str, Any]) -> None:
        metrics["fidelity"] = None

    one = folder(tmp_path / "models" / "mnist_demo")
    two = folder(tmp_path / "models" / "other", without)
    tabulate([one, two], tmp_path / "both")
    table = pd.read_csv(tmp_path / "both" / "tables" / "comparison.csv")
    column = table["frechet_mnist_classifier"]
    assert column.notna().tolist() == [True, False, True, False, False, False]
    text = (tmp_path / "both" / "tables" / "comparison.md").read_text()
    assert text.count("between two disjoint sets") == 1 and "N = 2000) ↓" in text
    tabulate([two], tmp_path / "alone")
    assert "frechet" not in (tmp_path / "alone" / "tables" / "comparison.csv").read_text()
    assert "frechet" not in (tmp_path / "alone" / "metrics/lsgm/other.json").read_text()


def test_markdown_shows_the_best_in_bold_and_what_the_numbers_rest_on(tmp_path: Path) -> None:
    tabulate([folder(tmp_path / "models" / "mnist_demo")], tmp_path)
    text = (tmp_path / "tables" / "comparison.md").read_text()
    header, rule, *rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "Fréchet distance (mnist_classifier, N = 2000)" in header
    assert {line.count("|") for line in (header, rule, *rows)} == {10}
    assert rows == [
        "| mnist_demo | VAE, N(0, I) prior | 99.50 ± 1.50 | 72.50 | 27.00 | 7.25 | 0 | 0.50 | 100 |",
        "| mnist_demo | LSGM's VAE, N(0, I) prior | 103.00 ± 1.75 | 70.00 | 33.00 |  |  |  | 250 |",
        "| mnist_demo | LSGM | **95.12 ± 1.25** | 70.00 | 25.12 | **2.50** | 40 | 10.00 | 250 |",
    ]
    for fact in (
        "500 test images",
        "N = 2000) of samples",
        "sets of 2000",
        "is 0.25",
        "4.38 ± 0.25",
        "cpu, 2026-11-22",
    ):
        assert fact in text


def test_importance_weighted_bounds_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    def several(metrics: dict[str, Any]) -> None:
        for i, key in enumerate(PRIORS):
            metrics["nelbo"][key] |= {"iw_samples": 16, "iw_bound": 94.0 - i, "iw_stderr": 0.5}

    tabulate([folder(tmp_path / "models" / "mnist_demo", several)], tmp_path)
    text = (tmp_path / "tables" / "comparison.md").read_text()
    assert "importance-weighted bound (K = 16)" in text and "**92.00 ± 0.50**" in text and "94.00 ± 0.50" in text
    table = pd.read_csv(tmp_path / "tables" / "comparison.csv")
    assert table["iw_bound"].tolist() == [94.0, 93.0, 92.0] and table["iw_stderr"].eq(0.5).all()
    assert json.loads((tmp_path / "metrics/lsgm/mnist_demo.json").read_text())["iw_bound_16"] == 92.0


def test_how_exact_the_likelihood_is(tmp_path: Path) -> None:
    def checked(metrics: dict[str, Any]) -> None:
        check = {"check_images": 16, "solver_error": 0.031, "solver_rms": 0.104, "estimate_std": 2.04}
        metrics["nelbo"]["lsgm"] |= check | {"iw_samples": 8, "iw_bound": 93.5, "iw_stderr": 1.0}

    tabulate([folder(tmp_path / "models" / "mnist_demo", checked)], tmp_path)
    text = (tmp_path / "tables" / "comparison.md").read_text()
    assert "Its estimate of log p(z0) varies by 2.04 nats over its random draws, which can make the" in text
    assert "the solver's error is +0.03 nats (rms 0.10), on 16 of the images." in text
    summary = json.loads((tmp_path / "metrics/lsgm/mnist_demo.json").read_text())
    assert summary["solver_error"] == 0.031 and summary["estimate_std"] == 2.04


def test_two_models_share_the_bold_and_the_history(tmp_path: Path) -> None:
    def better(metrics: dict[str, Any]) -> None:
        metrics["nelbo"]["lsgm"]["nelbo"] = 80.0

    tabulate([folder(tmp_path / "in" / "small"), folder(tmp_path / "in" / "big", better)], tmp_path)
    text = (tmp_path / "tables" / "comparison.md").read_text()
    assert "**80.00 ± 1.25**" in text
    assert "**95.12" not in text
    history = pd.read_csv(tmp_path / "tables" / "history.csv")
    assert list(history.columns[:3]) == ["model", "stage", "step"]
    assert history.groupby(["model", "stage"]).size().to_dict() == {
        (model, stage): 2 for model in ("big", "small") for stage in ("lsgm", "vae")
    }
    assert history.query("stage == 'vae'")["spectral"].eq(0.5).all()
    assert history.query("stage == 'vae'")["alpha_mean"].isna().all()


def test_summary_is_narrow(tmp_path: Path) -> None:
    care = {"skipped": 30, "restarts": 2}
    rescued = folder(tmp_path / "in" / "mnist_demo", lambda metrics: metrics["training"]["lsgm"].update(care))
    tabulate([rescued], tmp_path)
    found = {prior: json.loads((tmp_path / "metrics" / prior / "mnist_demo.json").read_text()) for prior in PRIORS}
    assert found["lsgm"] == {
        "nelbo": 95.12,
        "stderr": 1.25,
        "reconstruction": 70.0,
        "kl": 25.12,
        "frechet_mnist_classifier": 2.5,
        "kid_mnist_classifier": 0.125,
        "recall_mnist_classifier": 0.75,
        "nfe": 40.0,
        "skipped_steps": 30,
        "restarts": 2,
        "gain": 4.377,
        "gain_stderr": 0.25,
    }
    assert found["vae"]["skipped_steps"] == 0
    assert found["lsgm_with_normal_prior"].keys() == {"nelbo", "stderr", "reconstruction", "kl"}
    tabulate([folder(tmp_path / "in" / "other")], tmp_path)  # the first one is no longer run
    assert sorted(path.name for path in (tmp_path / "metrics").rglob("*.json")) == ["other.json"] * 3


def test_each_extractor_has_its_own_column(tmp_path: Path) -> None:
    def inception(metrics: dict[str, Any]) -> None:
        found = {"fid": 2.5, "clean_fid": 2.625, "inception_score": 9.0}
        metrics["fidelity"].update(extractor="inception", lsgm=found, vae=found, real_vs_real={"fid": 0.25})

    other = folder(tmp_path / "in" / "other", inception)
    tabulate([folder(tmp_path / "in" / "mnist_demo"), other], tmp_path)
    table = pd.read_csv(tmp_path / "tables" / "comparison.csv").query("prior == 'LSGM'").set_index("model")
    assert table.loc["mnist_demo", "frechet_mnist_classifier"] == 2.5
    assert table.loc["other", ["fid", "clean_fid", "inception_score"]].tolist() == [2.5, 2.625, 9.0]
    assert table[["frechet_mnist_classifier", "fid"]].isna().sum().sum() == 2
    header = (tmp_path / "tables" / "comparison.md").read_text().splitlines()[0]
    for title in ("| FID (N = 2000) ↓ |", "| FID by clean-fid (N = 2000) ↓ |", "Fréchet distance (mnist_classifier, N"):
        assert title in header


def test_a_further_estimator_has_a_row_of_its_own(tmp_path: Path) -> None:
    def discretized(metrics: dict[str, Any]) -> None:
        metrics["nelbo"]["lsgm_discretized"] = metrics["nelbo"]["lsgm"] | {"nelbo": 96.5}
        metrics["nelbo"]["settings"] = {"estimator": "ode", "extra_estimators": ["discretized"]}

    tabulate([folder(tmp_path / "in" / "mnist_demo", discretized)], tmp_path)
    assert "| LSGM (discretized bound) | 96.50 ± 1.25 |" in (tmp_path / "tables" / "comparison.md").read_text()
    found = json.loads((tmp_path / "metrics" / "lsgm_discretized" / "mnist_demo.json").read_text())
    assert found == {"nelbo": 96.5, "stderr": 1.25, "reconstruction": 70.0, "kl": 25.12}


def test_paper_columns_where_the_paper_has_a_figure(tmp_path: Path) -> None:
    """By the model: the paper has three of CIFAR-10."""

    def color(metrics: dict[str, Any]) -> None:
        for key in PRIORS:
            metrics["nelbo"][key]["bpd"] = 3.25
        for key in ("lsgm", "vae"):
            metrics["fidelity"][key] = {"fid": 5.0}

    folders = [folder(tmp_path / "models" / "omniglot"), folder(tmp_path / "models" / "cifar10_best_nll", color)]
    tabulate(folders, tmp_path)
    header, _, *rows = (tmp_path / "tables" / "comparison.md").read_text().splitlines()
    shown = [dict(zip(*(line.split(" | ") for line in (header, row)), strict=True)) for row in (rows[2], rows[5])]
    paper = ("NELBO in the paper", "bits/dim in the paper", "FID in the paper")
    assert [[row[name] for name in paper] for row in shown] == [["≤ 87.79", "", ""], ["", "≤ 2.87", "6.89"]]
    assert shown[1]["bits/dim ↓"] == "**3.250**"
    table = pd.read_csv(tmp_path / "tables" / "comparison.csv")
    assert table["nelbo_paper"].dropna().tolist() == [87.79] and table["fid_paper"].dropna().tolist() == [6.89]
    assert "<b>95.12 ± 1.25</b>" in (tmp_path / "tables" / "comparison.html").read_text()


def test_nan_is_shown_as_such(tmp_path: Path) -> None:
    def diverged(metrics: dict[str, Any]) -> None:
        metrics["nelbo"]["lsgm"] |= {"nelbo": float("nan"), "stderr": float("nan"), "kl": float("nan")}
        metrics["nelbo"]["gain"] = {"nelbo": float("nan"), "stderr": float("nan")}

    tabulate([folder(tmp_path / "in" / "mnist_demo", diverged)], tmp_path)
    text = (tmp_path / "tables" / "comparison.md").read_text()
    assert "| LSGM | nan | 70.00 | nan |" in text
    assert "**99.50 ± 1.50**" in text
    assert "mnist,LSGM,nan,nan,70.0,nan," in (tmp_path / "tables" / "comparison.csv").read_text()
    assert json.loads((tmp_path / "metrics/lsgm/mnist_demo.json").read_text())["nelbo"] == "nan"


def test_null_is_nan(tmp_path: Path) -> None:
    """What strict JSON has for it gives the tables of the NaN that older files have."""

    def diverged(value: float | None) -> Callable[[dict[str, Any]], None]:
        def change(metrics: dict[str, Any]) -> None:
            metrics["model"] = "mnist_demo"
            metrics["nelbo"]["lsgm"] |= {"nelbo": value, "stderr": value, "kl": value, "bpd": value, "iw_bound": value}
            metrics["nelbo"]["lsgm"] |= {"iw_stderr": value}
            metrics["nelbo"]["vae"] |= {"stderr": value}
            metrics["nelbo"]["gain"] = {"nelbo": value, "stderr": value}
            metrics["fidelity"]["lsgm"] |= {"kid_mnist_classifier": value}
            metrics["fidelity"]["floor"] = {"frechet_mnist_classifier": value}
            metrics["sampling"]["lsgm"]["nfe"] = value

        return change

    found = []
    for name, value in (("null", None), ("nan", float("nan"))):
        out = tmp_path / name / "out"
        tabulate([folder(tmp_path / name / "in", diverged(value))], out)
        found.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert found[0] == found[1] and len(found[0]) == 10


def test_text_does_not_break_a_table(tmp_path: Path) -> None:
    def odd(metrics: dict[str, Any]) -> None:
        metrics["nelbo"]["unit"] = "nats | bits\n<b>"

    tabulate([folder(tmp_path / "in" / "mnist_demo", odd)], tmp_path)
    header, rule, *_ = (tmp_path / "tables" / "comparison.md").read_text().splitlines()
    assert "NELBO (nats \\| bits &lt;b>) ↓" in header and header.replace("\\|", "").count("|") == rule.count("|")


def test_same_bytes_every_time(tmp_path: Path) -> None:
    given = [folder(tmp_path / "in" / "small"), folder(tmp_path / "in" / "big")]
    found = []
    for name in ("one", "two"):
        tabulate(given, tmp_path / name)
        tabulate(given, tmp_path / name)  # over what is there
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert found[0] == found[1]
    assert sorted(found[0]) == [
        "figures/big_samples.png",
        "figures/big_training.png",
        "figures/nelbo.png",
        "figures/small_samples.png",
        "figures/small_training.png",
        *(f"metrics/{prior}/{model}.json" for prior in sorted(PRIORS) for model in ("big", "small")),
        "tables/comparison.csv",
        "tables/comparison.html",
        "tables/comparison.md",
        "tables/history.csv",
    ]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / "metrics.json").unlink(), r"metrics\.json: cannot be read .*lsgm evaluate"),
        (lambda path: (path / "metrics.json").write_text('{"model": '), r"metrics\.json: is not valid JSON"),
        (lambda path: (path / "metrics.json").write_bytes(b"\x89PNG\xff"), r"metrics\.json: is not a UTF-8 text file"),
        (lambda path: (path / "metrics.json").write_text("[1]"), r"metrics\.json: the whole file: expected"),
        (lambda path: (path / "history_vae.csv").unlink(), r"history_vae\.csv: cannot be read"),
        (lambda path: (path / "history_lsgm.csv").write_text(""), r"history_lsgm\.csv: cannot be read"),
        (lambda path: (path / "history_lsgm.csv").write_text("step,epoch\n1,2\n"), r"lsgm\.csv: has no column nelbo"),
        (lambda path: (path / "history_lsgm.csv").write_text("step,epoch,nelbo\n"), r"lsgm\.csv: has no rows"),
        (lambda path: (path / "samples.png").unlink(), r"samples\.png: is missing"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, spoil: Callable[[Path], Any], says: str) -> None:
    path = folder(tmp_path / "in" / "mnist_demo")
    spoil(path)
    with pytest.raises(LSGMError, match=says):
        tabulate([path], tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["nelbo"]["lsgm"].pop("kl"), r"nelbo\.lsgm\.kl: missing"),
        (lambda m: m.pop("fidelity"), r"metrics\.json: fidelity: missing"),
        (lambda m: m["fidelity"]["lsgm"].update(fid="low"), r"fidelity\.lsgm\.fid: expected a valid number.*'low'"),
        (lambda m: m.update(model="../outside"), r"metrics\.json: model: expected .*'\.\./outside'"),
        (lambda m: m.update(model="/tmp/outside"), r"metrics\.json: model: expected .*'/tmp/outside'"),
        (lambda m: m.update(dataset="mnist | <b>"), r"metrics\.json: dataset: expected"),
        (
            lambda m: m["nelbo"].update({"lsgm_../x": m["nelbo"]["lsgm"]}),
            r"metrics\.json: nelbo\.lsgm_\.\./x: expected",
        ),
        (lambda m: m["fidelity"]["lsgm"].update({"fid|x": 1.0}), r"metrics\.json: fidelity\.lsgm\.fid\|x: expected"),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    with pytest.raises(LSGMError, match=says):
        tabulate([folder(tmp_path / "in" / "mnist_demo", change)], tmp_path)


def test_one_model_in_two_folders_is_refused(tmp_path: Path) -> None:
    twice = [folder(tmp_path / name, lambda metrics: metrics.update(model="same")) for name in ("a", "b")]
    with pytest.raises(LSGMError, match="both hold results of the model same"):
        tabulate(twice, tmp_path)
