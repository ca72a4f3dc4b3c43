"""The small project after a run, and a clone of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..conftest import Project


@pytest.fixture(scope="session")
def finished(fresh: Project) -> Project:
    """The small project after a `dvc repro`, committed, its files pushed to a DVC remote."""
    fresh.log = fresh.run("dvc", "repro")
    fresh.run("git", "add", "--all")
    fresh.run("git", "commit", "--quiet", "--message", "run")
    fresh.run("dvc", "remote", "add", "--default", "storage", str(fresh.path.parent / "storage"))
    fresh.run("git", "commit", "--quiet", "--all", "--message", "remote")
    fresh.run("dvc", "push", "--quiet")
    return fresh


@pytest.fixture
def clone(finished: Project, tmp_path: Path) -> Project:
    """A fresh clone of the finished project after `dvc pull`."""
    finished.run("git", "clone", "--quiet", str(finished.path), str(tmp_path / "clone"))
    project = type(finished)(tmp_path / "clone", finished.environment)
    project.run("dvc", "pull", "--quiet")
    return project
