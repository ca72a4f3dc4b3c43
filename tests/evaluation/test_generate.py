"""Sampling in parts: the same bytes for any number of jobs, after a kill, and where a file is damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsgm import checkpoint
from lsgm.config import ConvVAEConfig, ImageConfig, NCSNppConfig, SampleConfig, SDEConfig
from lsgm.config.stages import SampleStage
from lsgm.errors import LSGMError
from lsgm.evaluation.generate import draw_part, generate
from lsgm.files import sha256
from lsgm.model import LSGM

CPU = torch.device("cpu")
STAGE = SampleStage(model="tiny", sample=SampleConfig(count=22, batch=4, steps=3, seed=5), code="c0de")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    lsgm = LSGM(
        ImageConfig(channels=1, size=28, padded_size=32, binary=True),
        ConvVAEConfig(backbone="conv", channels=4, channel_mult=[1, 2, 2, 2], latents=4),
        NCSNppConfig(channels=8, scales=1, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=0),
        SDEConfig(),
    )
    return checkpoint_in(tmp_path_factory.mktemp("model"), lsgm)


def checkpoint_in(folder: Path, lsgm: LSGM) -> Path:
    checkpoint.save(lsgm, folder, [], {})
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    generate(STAGE, model, out, CPU)
    return out


def same(out: Path, other: Path) -> bool:
    return all(sha256(out / name) == sha256(other / name) for name in ("samples.npy", "grid.png"))


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_any_number_of_jobs_draws_the_same_images(model: Path, alone: Path, tmp_path: Path, parts: int) -> None:
    """More jobs than batches too, in which case some have nothing to do."""
    for part in reversed(range(parts)):
        draw_part(STAGE, model, tmp_path / "resume", CPU, part, parts)
    found = generate(STAGE, model, tmp_path / "out", CPU, tmp_path / "resume")
    assert same(tmp_path / "out", alone) and found.images == 22 and found.nfe == 3
    assert not (tmp_path / "resume").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["grid.png", "samples.npy", "sampling.json"]


def test_they_are_those_of_the_library(model: Path, alone: Path) -> None:
    x = checkpoint.load(model).sample(22, batch=4, steps=3, seed=5)
    assert np.array_equal(np.load(alone / "samples.npy"), x.mul(255).round().byte().numpy())


def test_killed_in_the_middle_it_resumes(model: Path, alone: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(STAGE.model_dump_json())
    command = ["sample", "--config", str(tmp_path / "c.json"), "--model", str(model), "--device", "cpu"]
    command += ["--out", str(tmp_path / "out"), "--resume", str(tmp_path / "resume")]
    slow = "import time; from lsgm.evaluation.sample_chunks import Chunks as c; w = c.write\n"
    slow += "def write(*a): w(*a); time.sleep(0.5)\n"
    slow += f"c.write = write\nfrom lsgm.cli import main; main({command})"
    with subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.DEVNULL) as process:
        while len(list(tmp_path.glob("resume/*/chunk-*"))) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "out" / "samples.npy").exists()
    done = subprocess.run([sys.executable, "-m", "lsgm.cli", *command], capture_output=True, text=True, check=True)
    assert "of 6 batches are there already" in done.stderr
    assert same(tmp_path / "out", alone) and not (tmp_path / "resume").exists()


@pytest.mark.parametrize("damage", ["bytes", "truncated", "empty", "another"])
def test_a_damaged_batch_is_drawn_again(
    model: Path, alone: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = draw_part(STAGE, model, tmp_path / "resume", CPU)
    path = chunks.folder / "chunk-000001.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "bytes":
        content[-5] ^= 1
    elif damage == "another":  # of the last batch, which is smaller
        content = bytearray((chunks.folder / "chunk-000005.safetensors").read_bytes())
    path.write_bytes(content[: {"truncated": len(content) // 2, "empty": 0}.get(damage, len(content))])
    with caplog.at_level("INFO", logger="lsgm"):
        generate(STAGE, model, tmp_path / "out", CPU, tmp_path / "resume")
    assert caplog.text.count("chunk-000001.safetensors: damaged; its images are drawn again") == 1
    assert same(tmp_path / "out", alone)


def test_a_file_system_without_locks(model: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    generate(STAGE, model, tmp_path / "out", CPU, tmp_path / "resume")
    assert same(tmp_path / "out", alone) and not (tmp_path / "resume").exists()


def test_batches_of_other_settings_or_weights_are_not_mixed_in(model: Path, alone: Path, tmp_path: Path) -> None:
    other_seed = STAGE.model_copy(update={"sample": STAGE.sample.model_copy(update={"seed": 6})})
    draw_part(other_seed, model, tmp_path / "resume", CPU)
    lsgm = checkpoint.load(model)
    with torch.no_grad():
        for parameter in lsgm.parameters():
            parameter.mul_(1.1)
    draw_part(STAGE, checkpoint_in(tmp_path / "other", lsgm), tmp_path / "resume", CPU)
    (tmp_path / "resume" / "mine.txt").write_text("stays")
    generate(STAGE, model, tmp_path / "out", CPU, tmp_path / "resume")
    assert same(tmp_path / "out", alone)
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["mine.txt"]


def test_a_part_that_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `record` all images are black, whichever part failed; with `error` what was drawn stays."""
    lsgm = checkpoint.load(model)
    with torch.no_grad():
        for parameter in lsgm.prior.network.parameters():
            parameter.fill_(float("inf"))
    broken = checkpoint_in(tmp_path / "broken", lsgm)

    def stage(on_failure: Any) -> SampleStage:
        return STAGE.model_copy(update={"sample": STAGE.sample.model_copy(update={"on_failure": on_failure})})

    for part in (1, 0):
        draw_part(stage("record"), broken, tmp_path / "resume", CPU, part, 2)
    found = generate(stage("record"), broken, tmp_path / "out", CPU, tmp_path / "resume")
    assert found.failed is not None and "not finite" in found.failed
    assert not np.load(tmp_path / "out" / "samples.npy").any()
    assert json.loads((tmp_path / "out" / "sampling.json").read_text())["nfe"] is None
    with pytest.raises(LSGMError, match="not finite"):
        draw_part(stage("error"), broken, tmp_path / "resume", CPU)


def test_parts_that_do_not_exist(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LSGMError, match="--part: expected 0 to 1, found 2"):
        draw_part(STAGE, model, tmp_path, CPU, 2, 2)
    with pytest.raises(LSGMError, match="--parts: expected at least 1, found 0"):
        draw_part(STAGE, model, tmp_path, CPU, 0, 0)
