"""An installed package that adds a part of each kind: its model goes through the whole workflow, as ours do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml

from lsgm.data.store import ImageStore

if TYPE_CHECKING:
    from ..conftest import Project

PACKAGE = Path(__file__).parent
PARTS = {"backbone", "score_network", "sde", "solver", "likelihood", "dataset", "extractor"}
SHORT = {"epochs": 0.05, "batch": 32, "warmup_epochs": 0}
MODEL = {
    "dataset": "digits",
    "vae": {"backbone": "linear", "latents": 4, "likelihood": "noisy_bernoulli"},
    "pretrain": {**SHORT, "kl_anneal_portion": 0.5, "kl_max_coeff": 0.7, "spectral_reg": 0, "eval_every_epochs": 1},
    "prior": {"network": "mlp", "hidden": 16, "mixing_logit_init": -1},
    "sde": {"name": "constant", "rate": 6.0},
    "train": {**SHORT, "ema": 0.9, "spectral_reg_vae": 0, "p_weighting": "un", "algorithm": 3},
    "sample": {"count": 20, "solver": "midpoint", "midpoints": 3, "time_eps": 0.01, "batch": 20},
    "evaluate": {"images": 10, "steps": 8, "check_images": 4, "batch": 10, "extractor": "pooled_pixels",
                 "extra_estimators": ["bound"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def project(fresh: Project, mnist_store: ImageStore, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small project with the package installed beside it, and a model made of its parts, after a run."""
    root = tmp_path_factory.mktemp("plugins")
    shutil.copytree(PACKAGE, root / "source", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(root / "installed"), str(root / "source")], check=True)
    path = os.pathsep.join(filter(None, [str(root / "installed"), fresh.environment.get("PYTHONPATH")]))
    project = type(fresh)(root / "project", {**fresh.environment, "PYTHONPATH": path})
    shutil.copytree(fresh.path, project.path, symlinks=True)
    np.savez(
        root / "digits.npz",
        train_images=mnist_store.images("train")[:2000],
        test_images=mnist_store.images("test")[:50],
    )
    params = yaml.safe_load((fresh.path / "params.yaml").read_text())
    params["datasets"]["digits"] = {"format": "npz", "path": str(root / "digits.npz"), "size": 28, "binary": True}
    params["models"] = {"added": MODEL, "tiny": params["models"]["tiny"]}
    params["run"] = ["added", "tiny"]
    (project.path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    project.log = project.run("snakemake")
    return project


def test_none_is_long() -> None:
    files = {path.stem: path for path in (PACKAGE / "lsgm_example_parts").glob("*.py")}
    assert files.keys() == PARTS | {"__init__"}
    assert {name for name, path in files.items() if len(path.read_text().splitlines()) > 60} == set()


def test_the_whole_workflow_runs_with_one_of_each_kind(project: Project) -> None:
    assert "| added" in (project.path / "results/tables/comparison.md").read_text()
    metrics = yaml.safe_load((project.path / "results/models/added/metrics.json").read_text())
    assert metrics["nelbo"]["lsgm"]["nelbo"] > 0 and metrics["nelbo"]["lsgm_bound"]["nfe"] == 32
    assert metrics["sampling"]["lsgm"]["nfe"] == 6
    assert metrics["fidelity"]["lsgm"]["frechet_pooled_pixels"] > 0
    assert project.dry_run() == {}


FROM_DATA = {"prepare": 1}
FROM_SAMPLES = {"evaluate_model": 1, "tabulate": 1}
FROM_TRAINING = {"train_lsgm": 1, "nelbo": 1, "illustrate": 1, **FROM_SAMPLES}


@pytest.mark.parametrize(
    ("part", "jobs"),
    [
        ("dataset", FROM_DATA),  # what follows is looked at again when the manifest is there
        ("backbone", {"pretrain_vae": 1, "sample": 2, **FROM_TRAINING}),
        ("likelihood", {"pretrain_vae": 1, "sample": 2, **FROM_TRAINING}),
        ("score_network", {"sample": 1, **FROM_TRAINING}),
        ("sde", {"sample": 1, **FROM_TRAINING}),
        ("solver", {"sample": 1, **FROM_SAMPLES}),
        ("extractor", {"statistics": 1, **FROM_SAMPLES}),
    ],
)
def test_a_change_reruns_exactly_what_uses_it(project: Project, part: str, jobs: dict[str, int]) -> None:
    file = project.path.parent / "installed" / "lsgm_example_parts" / f"{part}.py"
    text = file.read_text()
    try:
        file.write_text(f"{text}\nCHANGED = 1\n")
        found = project.dry_run()
        assert found.pop("freeze") > 0
        if part == "dataset":
            found = {name: count for name, count in found.items() if name == "prepare"}
        assert found == jobs
        if part == "solver":
            file.write_text(f"{text}\n# A comment changes nothing.\n")
            assert project.dry_run() == {}
    finally:
        file.write_text(text)


WRONG = [
    ("vae.latent", 3, "models.added.vae.latent: unknown key .its value is 3.; did you mean 'latents'?"),
    ("vae.backbone", "linaer", "models.added.vae.backbone: expected .*, found 'linaer'; did you mean 'linear'?"),
    ("vae.likelihood", "noisy", "models.added.vae.likelihood: expected bernoulli or .* or noisy_bernoulli, found"),
    ("prior.hidden", 0, "models.added.prior.hidden: expected greater than or equal to 1, found 0"),
    ("sde.rate", -1, "models.added.sde.rate: expected greater than 0, found -1"),
    ("sample.midpoint", 2, "models.added.sample.midpoint: unknown key .*; did you mean 'midpoints'?"),
    ("evaluate.extractor", "pooled", "evaluate.extractor: expected .*, found 'pooled'; did you mean 'pooled_pixels'"),
]
CHECK = """
import json, sys, yaml
from lsgm.config.mistakes import parse
from lsgm.errors import LSGMError
from lsgm.params import Params
for key, value in json.load(sys.stdin):
    raw = yaml.safe_load(open("params.yaml"))
    section, last = key.split(".")
    raw["models"]["added"][section][last] = value
    try:
        parse(Params, raw, "params.yaml")
    except LSGMError as error:
        print(error)
"""


def test_wrong_keys_are_explained(project: Project) -> None:
    given = json.dumps([(key, value) for key, value, _ in WRONG])
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(
        command, input=given, cwd=project.path, env=project.environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRONG), done.stdout
    for line, (_, _, message) in zip(lines, WRONG, strict=True):
        assert re.match(rf"params\.yaml: .*{message}", line), line
    with project.parameter("models.added.vae.latent", 3):
        said = project.run("snakemake", "--dry-run", fails=True)
    assert "did you mean 'latents'?" in said and "Traceback" not in said


def test_it_is_described_like_any_other(project: Project) -> None:
    said = project.run("lsgm", "describe", "added")
    assert "vae.encoder" in said and "prior.network.layers" in said
    assert "midpoints: 3" in project.run("lsgm", "describe", "--config", "added")
    schema = yaml.safe_load(project.run(sys.executable, "-m", "lsgm.params"))
    assert {"LinearVAEConfig", "MLPConfig", "ConstantConfig", "MidpointConfig", "NPZConfig"} <= schema["$defs"].keys()
