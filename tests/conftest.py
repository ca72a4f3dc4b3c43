"""What all tests share: real data, and a small project to run the workflow in."""

from __future__ import annotations

import copy
import fcntl
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from lsgm.config import DatasetConfig
from lsgm.config.stages import PrepareStage
from lsgm.data.prepare import prepare
from lsgm.data.store import ImageStore

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """A command that runs in this process sends the log to handlers of its own."""
    yield
    logger = logging.getLogger("lsgm")
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
    for handler in [*logger.handlers]:
        logger.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def mnist_store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """The real MNIST: from LSGM_TEST_DATA (made there if it is empty), else data/mnist, else a temporary folder."""
    chosen = os.environ.get("LSGM_TEST_DATA")
    path = Path(chosen) if chosen else REPOSITORY / "data" / "mnist"
    if not chosen and not (path / "manifest.json").exists():
        common = tmp_path_factory.getbasetemp()
        path = (common.parent if "PYTEST_XDIST_WORKER" in os.environ else common) / "data" / "mnist"
    if not (path / "manifest.json").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / ".lock", "w") as lock:  # one of the processes that run tests makes it, the others wait
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (path / "manifest.json").exists():
                prepare(PrepareStage(dataset="mnist", source=DatasetConfig(path=None)), path)
    return ImageStore(path)


class Project:
    """A folder in which Snakemake, DVC and git can be run."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self.path = path
        self.environment = environment
        self.log = ""  # what the first run said
        self.said = ""  # what the last dry run said

    def run(self, *command: str, fails: bool = False) -> str:
        """Run a command; returns what it wrote to both streams."""
        done = subprocess.run(
            command, cwd=self.path, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert (done.returncode != 0) == fails, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def dry_run(self, *targets: str) -> dict[str, int]:
        """How often each rule would run; empty if there is nothing to do."""
        output = self.said = self.run("snakemake", "--dry-run", *targets)
        if "Nothing to be done" in output:
            return {}
        table = output.partition("Job stats:")[2].partition("\n\n")[0]
        counts = {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", table, flags=re.M)}
        assert counts, output
        return {name: count for name, count in counts.items() if name not in ("total", "all", *targets)}

    @contextmanager
    def edited(self, path: str, old: str, new: str) -> Iterator[None]:
        """Replace ``old`` by ``new`` in a file, and put the file back afterwards."""
        file = self.path / path
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))
        try:
            yield
        finally:
            file.write_text(text)

    @contextmanager
    def parameter(self, key: str, value: Any) -> Iterator[None]:
        """Set one parameter (`a.b.c`) in params.yaml, and put the file back afterwards."""
        file = self.path / "params.yaml"
        text = file.read_text()
        params = yaml.safe_load(text)
        *path, last = key.split(".")
        section = params
        for name in path:
            section = section[name]
        section[last] = value
        file.write_text(yaml.safe_dump(params, sort_keys=False))  # the first of those alike owns what they share
        try:
            yield
        finally:
            file.write_text(text)


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of the commands: this Python's tools first, no setting of the user's, no GPU."""
    home = tmp_path_factory.mktemp("home")
    # One thread for a job: two for so small a model are many times slower where another program uses the cores too.
    profile = {
        "cores": 2,
        "set-threads": dict.fromkeys(
            ("statistics", "pretrain_vae", "train_lsgm", "sample", "nelbo", "evaluate_model"), 1
        ),
    }
    (home / "config.yaml").write_text(yaml.safe_dump(profile))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SNAKEMAKE_", "DVC_", "GIT_"))}
    identity = {
        f"GIT_{who}_{what}": "tester@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return {
        **kept,
        **identity,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "DVC_SITE_CACHE_DIR": str(home / "dvc"),
        "SNAKEMAKE_PROFILE": str(home),
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], mnist_store: ImageStore) -> Project:
    """The small project as committed: nothing has run yet."""
    root = tmp_path_factory.mktemp("workflow")
    original = root / "original"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = REPOSITORY / name, original / name
        if name.startswith(("results/", "tests/", "dvc.lock")) or not os.path.lexists(source):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    params = yaml.safe_load((REPOSITORY / "tests/workflow/tiny.yaml").read_text())
    params["models"]["unused"] = copy.deepcopy(params["models"]["tiny"])
    params["models"]["unused"]["pretrain"]["seed"] = 2  # or it would share what the other one has
    params["datasets"]["mnist"]["path"] = str(write_idx(mnist_store, root / "idx"))
    (original / "params.yaml").write_text(yaml.safe_dump(params))
    project = Project(original, environment)
    project.run("git", "init", "--quiet")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "start")
    return project


def write_idx(store: ImageStore, folder: Path) -> Path:
    """Write the four original files of MNIST, as which the store was read."""
    folder.mkdir(parents=True)
    for split, name in (("train", "train"), ("test", "t10k")):
        for content, suffix in ((store.images(split)[:, 0], "images-idx3"), (store.labels(split), "labels-idx1")):
            header = struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape)
            (folder / f"{name}-{suffix}-ubyte").write_bytes(header + content.tobytes())
    return folder
