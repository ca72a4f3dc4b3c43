"""An evaluation of damaged inputs is refused; one of a single image ends in tables, its NaN null in the JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lsgm import checkpoint
from lsgm.cli import main
from lsgm.config import EvaluateConfig, NELBOConfig, SampleConfig
from lsgm.config.stages import EvaluateStage, IllustrateStage, NELBOStage, SampleStage, StatisticsStage
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation.evaluate import Inputs, evaluate
from lsgm.evaluation.illustrate import illustrate
from lsgm.evaluation.metrics import Metrics
from lsgm.evaluation.nelbo import make_part
from lsgm.evaluation.statistics import make_reference
from lsgm.files import sha256

from .test_illustrate import tiny

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"tol": 1e-1, "time_eps": 0.01, "batch": 4}
NELBO = NELBOConfig(images=1, **SHORT)
STAGE = EvaluateStage(model="tiny", dataset="mnist", evaluate=EvaluateConfig(**NELBO.model_dump(), extractor=None))


@pytest.fixture(scope="module")
def made(small_store: ImageStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that an evaluation reads."""
    root = tmp_path_factory.mktemp("evaluate")
    shutil.copytree(small_store.path, root / "data")
    for name in ("lsgm", "vae"):
        checkpoint.save(tiny(prior=name == "lsgm"), root / name, [], {"seconds": 1.0})
        history = {"step": [1, 2], "epoch": [0.5, 1.0], "nelbo": [9.0, 8.0]}
        pd.DataFrame(history).to_csv(root / name / "history.csv", index=False)
        out = root / f"{name}_samples"
        out.mkdir()
        stage = SampleStage(model="tiny", sample=SampleConfig(count=6, **SHORT))
        (root / "sample.json").write_text(stage.model_dump_json())
        command = ["sample", "--config", root / "sample.json", "--model", root / name, "--out", out]
        assert main(list(map(str, command))) == 0
    stage = NELBOStage(model="tiny", dataset="mnist", nelbo=NELBO)
    make_part(stage, root / "data", root / "lsgm", root / "vae", root / "part", CPU)
    (root / "evaluate.json").write_text(STAGE.model_dump_json())
    return root


@pytest.fixture
def inputs(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "inputs"))


def run(root: Path) -> Metrics:
    given = [root / name for name in ("data", "lsgm", "lsgm_samples", "vae", "vae_samples")]
    return evaluate(STAGE, Inputs(*given, [root / "part"], []), CPU)


def test_one_image_has_no_standard_error_and_makes_tables(inputs: Path, tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    options = {name: inputs / name for name in ("data", "vae")}
    options |= {"config": inputs / "evaluate.json", "model": inputs / "lsgm", "samples": inputs / "lsgm_samples"}
    options |= {"vae-samples": inputs / "vae_samples", "nelbo": inputs / "part", "out": tmp_path / "results"}
    assert main(["evaluate", *(str(word) for key, value in options.items() for word in (f"--{key}", value))]) == 0
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text(), parse_constant=refuse)
    assert metrics["nelbo"]["lsgm"]["stderr"] is None and metrics["nelbo"]["gain"]["stderr"] is None
    assert metrics["nelbo"]["lsgm"]["nelbo"] > 0
    assert main(["tabulate", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "tables" / "comparison.csv")
    assert table["nelbo"].gt(0).all() and table["nelbo_stderr"].isna().all()
    assert "± nan" in (tmp_path / "out" / "tables" / "comparison.md").read_text()
    for path in (tmp_path / "out" / "metrics").rglob("*.json"):
        assert json.loads(path.read_text(), parse_constant=refuse)["stderr"] == "nan"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def sampling(**changes: Any) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        path = root / "lsgm_samples" / "sampling.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def samples(array: Any) -> Callable[[Path], object]:
    return lambda root: np.save(root / "lsgm_samples" / "samples.npy", array)


def altered_samples(root: Path) -> None:
    path = root / "lsgm_samples" / "samples.npy"
    sampling(samples_sha256=sha256(path))(root)
    run(root)
    flip(path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: flip(root / "data" / "test_images.npy"), r"test_images\.npy: has changed"),
        (altered_samples, r"samples\.npy: has changed: its sha256 does not match sampling\.json"),
        (
            samples(np.zeros((6, 1, 28, 28), np.float32)),
            r"samples\.npy: expected images, uint8 .*, found float32 \[6, 1",
        ),
        (samples(np.zeros((6, 28, 28), np.uint8)), r"samples\.npy: expected images, .* found uint8 \[6, 28, 28\]"),
        (samples(np.zeros((6, 1, 32, 32), np.uint8)), r"samples\.npy: expected \[6, 1, 28, 28\] from the model"),
        (samples(np.zeros((5, 1, 28, 28), np.uint8)), r"samples\.npy: expected \[6, 1, 28, 28\] .* found \[5, 1"),
        (samples(np.array([{}, 1], dtype=object)), r"samples\.npy: is not an array of samples"),
        (
            lambda root: (root / "lsgm_samples/samples.npy").write_bytes(b""),
            r"samples\.npy: is not an array of samples",
        ),
        (lambda root: (root / "lsgm_samples/samples.npy").unlink(), r"samples\.npy: cannot be read"),
        (sampling(images="six"), r"sampling\.json: images: expected .*'six'"),
        (sampling(seconds=[]), r"sampling\.json: seconds: expected"),
        (sampling(model=3), r"sampling\.json: model: expected"),
        (
            lambda root: (root / "lsgm_samples/sampling.json").write_bytes(b"\xff"),
            r"sampling\.json: is not a UTF-8 text file",
        ),
        (lambda root: (root / "lsgm_samples/sampling.json").write_text("[]"), r"sampling\.json: the whole file: exp"),
    ],
)
def test_damaged_inputs_are_named(inputs: Path, spoil: Callable[[Path], object], says: str) -> None:
    run(inputs)
    spoil(inputs)
    with pytest.raises(LSGMError, match=says) as caught:
        run(inputs)
    assert "\n" not in str(caught.value)


def test_no_job_computes_with_damaged_images(inputs: Path, tmp_path: Path) -> None:
    data, lsgm = inputs / "data", inputs / "lsgm"
    for split in ("train", "test"):
        flip(data / f"{split}_images.npy")
    statistics = StatisticsStage(dataset="mnist", extractor="mnist_classifier")
    nelbo = NELBOStage(model="tiny", dataset="mnist", nelbo=NELBO)
    figures = IllustrateStage(model="tiny", dataset="mnist", sample=SampleConfig(count=6, **SHORT))
    jobs: dict[str, Callable[[], object]] = {
        "train": lambda: make_reference(statistics, data, tmp_path / "statistics", CPU),
        "test": lambda: make_part(nelbo, data, lsgm, inputs / "vae", tmp_path / "part", CPU),
        "tes.": lambda: illustrate(figures, data, lsgm, tmp_path / "figures", CPU),
    }
    for split, job in jobs.items():
        with pytest.raises(LSGMError, match=rf"{split}_images\.npy: has changed: sha256"):
            job()
    assert not list(tmp_path.glob("[spf]*"))
