"""Every example runs as its first lines say, at a tiny size, and leaves a model that can be loaded and a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lsgm
from lsgm.data.store import ImageStore

if TYPE_CHECKING:
    from .conftest import Warm

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_the_minimal_one_is_short() -> None:
    assert len((EXAMPLES / "minimal_lsgm.py").read_text().splitlines()) < 200


@pytest.mark.parametrize("file", FILES)
def test_an_example_runs(
    file: str, lsgm_command: Warm, mnist_store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "store" if file == "my_dataset.py" else mnist_store.path
    command = [EXAMPLES / file, "--data", data, "--out", tmp_path / "out"]
    command += ["--steps", "4", "--batch", "8", "--samples", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = lsgm_command.run(*command, env=environment)
    assert done.returncode == 0, done.stderr
    assert "LSGM: step 4 of 4" in done.stdout and "test NELBO of 32 images" in done.stdout
    assert (tmp_path / "out" / "samples.png").read_bytes().startswith(b"\x89PNG")
    if file in ("minimal_lsgm.py", "my_dataset.py"):  # the others need their packages installed
        monkeypatch.chdir(tmp_path)
        assert lsgm.load("out").sample(2, tol=0.1, time_eps=0.1).shape == (2, 1, 28, 28)
