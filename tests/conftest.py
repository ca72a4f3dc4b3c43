"""What all tests share: real data, and a small project to run the workflow in."""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from lsgm.config import DatasetConfig
from lsgm.config.stages import PrepareStage
from lsgm.data.prepare import prepare
from lsgm.data.store import ImageStore

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


# The files that take longest, first the one that mostly waits: begun first, they keep no worker busy at the end.
LONGEST = (
    *("slurm/test_slurm.py", "workflow/test_pipeline.py", "workflow/test_originals.py", "plugins/test_plugins.py"),
    *("training/test_distributed.py", "training/test_resume.py", "test_published_vectors.py", "test_recipes.py"),
    *("test_cli.py", "test_examples.py", "workflow/test_remotes.py", "test_faults.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; the others stay in their order."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


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


PATIENCE = 600  # seconds that a command may take


class Fork:
    """A command that runs in a fork of a process that has imported what it needs."""

    def __init__(self, answers: socket.socket) -> None:
        self.answers = answers
        self.answers.settimeout(PATIENCE)
        self.returncode: int | None = None
        self.pid = 0
        self.pid = self._answer()

    def _answer(self) -> int:
        try:
            found = self.answers.recv(4)
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"a command ran for more than {PATIENCE} s") from None
        assert found, "the process whose forks run commands has ended"
        return array("i", found)[0]

    def wait(self) -> int:
        """Its exit code, when it has ended; that of a killed one is negative."""
        if self.returncode is None:
            self.returncode = self._answer()
            self.answers.close()
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None:
            self.answers.setblocking(False)
            try:
                self.wait()
            except BlockingIOError:
                self.answers.settimeout(PATIENCE)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Warm:
    """A Python that has imported ``modules`` and runs commands in forks of itself (warm.py)."""

    def __init__(self, main: str, *modules: str, environment: Mapping[str, str] = os.environ) -> None:
        self.main = main  # "module:function"
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, str(Path(__file__).with_name("warm.py")), str(number), *modules]
            self.process = subprocess.Popen(command, pass_fds=[number], env=environment)

    def close(self) -> None:
        self.requests.close()
        self.process.wait()

    def start(
        self,
        *command: object,
        stdout: int,
        stderr: int,
        cwd: Path | None = None,
        env: Mapping[str, str] = os.environ,
        limit: int | None = None,
    ) -> Fork:
        """Start a command. ``stdout``, ``stderr``: open files; ``limit``: bytes that it can write to a file."""
        ours, theirs = socket.socketpair()
        with theirs:
            request = {"main": self.main, "command": [*map(str, command)], "folder": str(cwd or Path.cwd())}
            text = json.dumps({**request, "environment": dict(env), "limit": limit}).encode()
            socket.send_fds(self.requests, [text], [theirs.fileno(), stdout, stderr])
        return Fork(ours)

    def run(
        self,
        *command: object,
        cwd: Path | None = None,
        env: Mapping[str, str] = os.environ,
        stderr: int = subprocess.PIPE,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; ``stderr`` as in `subprocess.run`."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            files = [file.fileno() for file in (out, out if stderr == subprocess.STDOUT else err)]
            code = self.start(*command, stdout=files[0], stderr=files[1], cwd=cwd, env=env).wait()
            said = []
            for file in (out, err):
                file.seek(0)
                said.append(file.read())
        return subprocess.CompletedProcess([*map(str, command)], code, *said)


@pytest.fixture(scope="session")
def lsgm_command() -> Iterator[Warm]:
    """The command `lsgm`, in forks of a process that has imported what its stages need."""
    # torch imports _dynamo when the first optimizer is made.
    stages = ("training.pretrain", "training.train", "evaluation.generate", "evaluation.nelbo")
    warm = Warm("lsgm.cli:main", "lsgm.cli", "torch", "torch._dynamo", *(f"lsgm.{stage}" for stage in stages))
    yield warm
    warm.close()


class Project:
    """A folder in which Snakemake, DVC and git can be run."""

    warm: ClassVar[dict[str, Warm]] = {}  # commands that run in forks

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self.path = path
        self.environment = environment
        self.log = ""  # what the first run said
        self.said = ""  # what the last dry run said

    def run(self, *command: str, fails: bool = False) -> str:
        """Run a command; returns what it wrote to both streams."""
        where: dict[str, Any] = {"cwd": self.path, "env": self.environment, "stderr": subprocess.STDOUT}
        if warm := self.warm.get(command[0]):
            done = warm.run(*command, **where)
        else:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, **where)
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
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
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
    found = {
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
    # Nothing of the library: that of the project's own folder is to be imported.
    imported = ("numpy", "pandas", "pydantic", "smart_open", "yaml")
    Project.warm["snakemake"] = Warm("snakemake.cli:main", "snakemake.cli", *imported, environment=found)
    Project.warm["dvc"] = Warm("dvc.cli:main", "dvc.cli.parser", "dvc.ignore", "dvc.repo", "dvc.scm", environment=found)
    yield found
    while Project.warm:
        Project.warm.popitem()[1].close()


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
