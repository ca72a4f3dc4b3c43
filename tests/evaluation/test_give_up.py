"""A model whose ODE cannot be solved: an error, or numbers that say so where that is asked for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lsgm import checkpoint
from lsgm.cli import main
from lsgm.config import EvaluateConfig, NELBOConfig, SampleConfig
from lsgm.config.stages import EvaluateStage, IllustrateStage, NELBOStage, SampleStage, StatisticsStage
from lsgm.data.store import ImageStore
from lsgm.errors import SolverError
from lsgm.evaluation.evaluate import Inputs, compare, evaluate
from lsgm.evaluation.nelbo import make_part
from lsgm.evaluation.statistics import make_reference, read_reference

from .test_illustrate import tiny

CPU = torch.device("cpu")
SHORT = {"solver": "rk45", "tol": 1e-2, "time_eps": 0.01, "batch": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A VAE, and an LSGM whose score network says nothing finite."""
    root = tmp_path_factory.mktemp("models")
    broken = tiny()
    assert broken.prior is not None
    for parameter in broken.prior.network.parameters():
        torch.nn.init.constant_(parameter, math.inf)
    checkpoint.save(broken, root / "lsgm", [], {"seconds": 1.0})
    checkpoint.save(tiny(prior=False), root / "vae", [], {"seconds": 1.0})
    return root / "lsgm", root / "vae"


def sample(model: Path, out: Path, on_failure: str) -> int:
    stage = SampleStage(model="tiny", sample=SampleConfig(count=6, on_failure=on_failure, **SHORT))  # type: ignore[arg-type]
    out.mkdir(exist_ok=True)
    (out / "c.json").write_text(stage.model_dump_json())
    return main(["sample", "--config", str(out / "c.json"), "--model", str(model), "--out", str(out)])


def test_it_is_an_error(
    folders: tuple[Path, Path], mnist_store: ImageStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(folders[0], tmp_path, "error") == 1
    assert "the ODE solver failed at t = 1" in capsys.readouterr().err
    assert not (tmp_path / "samples.npy").exists()
    stage = NELBOStage(model="tiny", dataset="mnist", nelbo=NELBOConfig(images=6, **SHORT))  # type: ignore[arg-type]
    with pytest.raises(SolverError, match="the ODE solver failed"):
        make_part(stage, mnist_store.path, *folders, tmp_path / "part", CPU)


def test_it_is_recorded(folders: tuple[Path, Path], mnist_store: ImageStore, tmp_path: Path) -> None:
    """The VAE's numbers, and those of the LSGM under N(0, I), are there all the same."""
    for model in folders:
        assert sample(model, tmp_path / model.name, "record") == 0
    facts = json.loads((tmp_path / "lsgm" / "sampling.json").read_text())
    assert "the ODE solver failed at t = 1" in facts["failed"] and facts["nfe"] is None
    assert not np.load(tmp_path / "lsgm" / "samples.npy").any()
    assert "failed" not in json.loads((tmp_path / "vae" / "sampling.json").read_text())

    nelbo = NELBOConfig(images=6, on_failure="record", **SHORT)  # type: ignore[arg-type]
    make_part(
        NELBOStage(model="tiny", dataset="mnist", nelbo=nelbo), mnist_store.path, *folders, tmp_path / "part", CPU
    )
    config = EvaluateConfig(**nelbo.model_dump(), extractor=None)
    metrics = evaluate(
        EvaluateStage(model="tiny", dataset="mnist", evaluate=config),
        Inputs(mnist_store.path, folders[0], tmp_path / "lsgm", folders[1], tmp_path / "vae", [tmp_path / "part"], []),
        CPU,
    ).written()
    assert math.isnan(metrics["nelbo"]["lsgm"]["nelbo"]) and math.isnan(metrics["nelbo"]["gain"]["nelbo"])
    assert math.isfinite(metrics["nelbo"]["vae"]["nelbo"] + metrics["nelbo"]["lsgm_with_normal_prior"]["nelbo"])
    assert metrics["sampling"]["lsgm"]["failed"] == facts["failed"]


def test_what_was_not_drawn_is_not_compared(small_store: ImageStore, tmp_path: Path) -> None:
    stage = StatisticsStage(dataset=small_store.name, extractor="mnist_classifier")
    make_reference(stage, small_store.path, tmp_path / "reference", CPU)
    images = np.array(small_store.images("train")[:8])
    references = [read_reference(tmp_path / "reference", small_store)]
    found = compare({"lsgm": 0 * images, "vae": images}, references, CPU, 0, failed={"lsgm"})
    assert found.lsgm == {} and found.vae["frechet_mnist_classifier"] >= 0


def test_a_figure_says_so(folders: tuple[Path, Path], mnist_store: ImageStore, tmp_path: Path) -> None:
    pd.DataFrame({"epoch": [0.5, 1.0], "alpha_mean": [0.4, 0.5]}).to_csv(folders[0] / "history.csv", index=False)
    for on_failure, code in (("error", 1), ("record", 0)):
        config = SampleConfig(count=8, on_failure=on_failure, **SHORT)  # type: ignore[arg-type]
        stage = IllustrateStage(model="tiny", dataset="mnist", sample=config)
        (tmp_path / "c.json").write_text(stage.model_dump_json())
        options = ["--config", str(tmp_path / "c.json"), "--data", str(mnist_store.path), "--model", str(folders[0])]
        assert main(["illustrate", *options, "--out", str(tmp_path / on_failure)]) == code
    assert len(list((tmp_path / "record").glob("tiny_*.png"))) == 4
