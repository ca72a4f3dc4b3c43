"""The small project after a run, and a clone of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..conftest import Project


@pytest.fixture(scope="session")
def finished(fresh: Project) -> Project:
    """The small project after a `dvc repro`, committed, its files pushed to a DVC remote."""
    project = type(fresh)(fresh.path.parent / "finished", fresh.environment)
    shutil.copytree(fresh.path, project.path, symlinks=True)
    project.log = project.run("dvc", "repro")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "run")
    project.run("dvc", "remote", "add", "--default", "storage", str(fresh.path.parent / "storage"))
    project.run("git", "commit", "--quiet", "--all", "--message", "remote")
    project.run("dvc", "push", "--quiet")
    return project


@pytest.fixture
def clone(finished: Project, tmp_path: Path) -> Project:
    """A fresh clone of the finished project after `dvc pull`."""
    finished.run("git", "clone", "--quiet", str(finished.path), str(tmp_path / "clone"))
    project = type(finished)(tmp_path / "clone", finished.environment)
    project.run("dvc", "pull", "--quiet")
    return project
