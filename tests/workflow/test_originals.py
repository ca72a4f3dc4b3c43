"""A user's own images in the workflow: what counts as a change of them, and that nothing is lost where they are away.

The model is evaluated without an extractor, so this is also the project in which no model has one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import yaml
from PIL import Image

if TYPE_CHECKING:
    from ..conftest import Project

MODEL = "checkpoints/vae/tiny/config.json"


@pytest.fixture(scope="module")
def mine(fresh: Project) -> Project:
    """The small project with a folder of images, in `images {a}` beside it, after a `dvc repro`."""
    project = type(fresh)(fresh.path.parent / "mine", fresh.environment)
    shutil.copytree(fresh.path, project.path, symlinks=True)
    draw = np.random.default_rng(0)
    for number in range(40):
        file = originals(project) / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (20, 20, 3), np.uint8)).save(file)
    params = yaml.safe_load((project.path / "params.yaml").read_text())
    params["datasets"]["mine"] = {"path": str(originals(project)), "images": {"size": 16}}
    model = params["models"]["tiny"]
    model |= {"dataset": "mine", "vae": {**model["vae"], "likelihood": "dl"}}
    for stage in ("pretrain", "train"):
        model[stage] |= {"epochs": 1, "batch": 8}
    model["sample"] |= {"count": 8, "batch": 8}
    model["evaluate"] |= {"images": 4, "batch": 4, "extractor": None}
    params["models"] = {"tiny": model}
    (project.path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    project.log = project.run("dvc", "repro")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "run")
    return project


def originals(project: Project) -> Path:
    return project.path.parent / "images {a}"


def store(project: Project) -> dict[str, str]:
    files = sorted((project.path / "data/mine").iterdir())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_what_is_no_data_is_no_change(mine: Project) -> None:
    """A file manager's, a notebook's: the folder's own time changes."""
    hidden = originals(mine) / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(originals(mine) / "a/0.png", hidden / "0-checkpoint.png")
    (originals(mine) / "a/.DS_Store").write_bytes(b"x")
    assert mine.dry_run() == {}
    shutil.rmtree(hidden)
    (originals(mine) / "a/.DS_Store").unlink()


@pytest.mark.parametrize("change", ["an image more", "an image less", "another image", "another name"])
def test_a_change_in_a_subfolder_is_noticed(mine: Project, change: str) -> None:
    folder = originals(mine) / "a"
    kept = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}
    one, two = sorted(kept)[:2]
    if change == "an image more":
        shutil.copy(one, folder / "new.png")
    elif change == "an image less":
        one.unlink()
    elif change == "another image":
        shutil.copy(two, one)
    else:
        one.rename(folder / "new.png")
    plan = mine.dry_run(MODEL)
    assert (plan["prepare"], plan["pretrain_vae"]) == (1, 1)
    (folder / "new.png").unlink(missing_ok=True)
    for file, (content, time) in kept.items():
        file.write_bytes(content)
        os.utime(file, ns=(time, time))
    assert mine.dry_run(MODEL) == {}


@pytest.mark.parametrize("how", ["gone", "not mounted"])
def test_a_store_stays_while_its_originals_are_away(mine: Project, how: str) -> None:
    before, away = store(mine), originals(mine).with_name("away")
    originals(mine).rename(away)
    if how == "not mounted":
        originals(mine).mkdir()
    assert "Nothing to be done" in mine.run("snakemake", MODEL)
    assert "didn't change, skipping" in mine.run("dvc", "repro", "data")
    if how == "not mounted":
        originals(mine).rmdir()
    away.rename(originals(mine))
    assert store(mine) == before


def test_a_store_stays_where_the_new_one_fails(mine: Project) -> None:
    before, bad = store(mine), originals(mine) / "a/bad.png"
    bad.write_bytes(b"no image")
    for _ in range(2):
        assert "bad.png" in mine.run("snakemake", MODEL, fails=True)
        assert store(mine) == before
    bad.unlink()
    said = mine.run("snakemake", MODEL)
    assert "checkpoint prepare:" in said
    assert "rule pretrain_vae:" not in said
    assert store(mine) == before
    assert mine.dry_run() == {}


def test_equal_content_makes_nothing_again(mine: Project) -> None:
    """A copy without the times: the originals are read once, and known from then on."""
    for file in originals(mine).rglob("*.png"):
        os.utime(file)
    assert mine.dry_run() == {}
    assert "hashing 40 original files" in mine.said
    assert mine.dry_run() == {}
    assert "original files" not in mine.said


def test_a_store_with_the_same_content_makes_nothing_again(mine: Project) -> None:
    """Made by other code, say."""
    before = store(mine)
    mine.run("snakemake", "--forcerun", "prepare", "--", "data/mine/manifest.json")
    after = store(mine)
    before.pop("source.json"), after.pop("source.json")  # it has the times of the originals
    assert after == before
    assert mine.dry_run() == {}


def test_dvc_sees_changed_originals_as_snakemake_does(mine: Project) -> None:
    new = originals(mine) / "b/new.png"
    shutil.copy(originals(mine) / "b/1.png", new)
    said = mine.run("dvc", "repro", "data")
    assert "checkpoint prepare:" in said
    new.unlink()
    said = mine.run("dvc", "repro", "data")
    assert "checkpoint prepare:" in said
    assert mine.dry_run() == {}


def test_a_clone_without_originals_and_extractors_has_nothing_to_do(mine: Project, tmp_path: Path) -> None:
    mine.run("dvc", "repro")
    mine.run("dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    mine.run("git", "add", "--all")
    mine.run("git", "commit", "--quiet", "--message", "remote")
    mine.run("dvc", "push", "--quiet")
    mine.run("git", "clone", "--quiet", str(mine.path), str(tmp_path / "clone"))
    clone, away = type(mine)(tmp_path / "clone", mine.environment), originals(mine).with_name("away")
    originals(mine).rename(away)
    clone.run("dvc", "pull", "--quiet")
    assert clone.run("dvc", "repro").count("didn't change, skipping") == 4
    assert clone.dry_run() == {}
    away.rename(originals(mine))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "datasets.mine.path",
            "/nowhere/images",
            "datasets.mine.path = /nowhere/images: does not exist, or holds no file",
        ),
        ("datasets.mine.path", "$HOME", "variables such as $HOME are not"),
        ("models.tiny.evaluate.images", 1000, "models.tiny.evaluate.images: mine has 4 test images, not 1000"),
        ("models.tiny.train.batch", 64, "models.tiny.train.batch: mine has 36 training images, not 64"),
    ],
)
def test_what_the_data_tell_is_said_before_the_first_job(mine: Project, key: str, value: object, message: str) -> None:
    with mine.parameter(key, value):
        said = mine.run("snakemake", "--dry-run", fails=True)
    assert f"params.yaml: {message}" in said or message in said
    assert "Traceback" not in said
    assert mine.dry_run() == {}


@pytest.mark.parametrize("name", ["2024-17", "all", "gpu", "0x10", "None"])
def test_names_of_accounts_and_partitions_reach_slurm_as_they_are(mine: Project, name: str) -> None:
    names = {"SBATCH_ACCOUNT": name, "SBATCH_PARTITION": name}
    said = type(mine)(mine.path, mine.environment | names).run(
        "snakemake", "--profile", "slurm", "--dry-run", "--forceall", MODEL
    )
    assert f"slurm_account={name}, slurm_partition={name}" in said
