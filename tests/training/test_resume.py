"""A training that is killed, at any moment, ends in the weights and the history of one that was not: bit by bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, TrainStage
from lsgm.data import prepare, registry

BLOCKS = {"blocks": 1, "cells": 1}
VAE = {
    "arch": "res_mbconv", "channels": 4, "channel_mult": [1, 2], "groups_per_scale": 2, "latents_per_group": 2,
    "cells_per_cond": 1, "preprocess": BLOCKS, "postprocess": BLOCKS, "likelihood": "dml",
}  # fmt: skip
LENGTH = {"epochs": 12, "batch": 8, "warmup_epochs": 1, "lr_schedule": "iteration", "checkpoint_minutes": 1e-9}
STAGES = {
    "pretrain": (
        PretrainStage,
        {"vae": VAE, "pretrain": {**LENGTH, "kl_anneal_portion": 1, "kl_max_coeff": 0.7, "spectral_reg": 0.01}},
    ),
    "train": (
        TrainStage,
        {
            "prior": {"channels": 8, "scales": 1, "cells_per_scale": 1, "embedding_dim": 16, "mixing_logit_init": -1},
            "sde": {},
            "train": {**LENGTH, "p_weighting": "un", "algorithm": 3, "spectral_reg_prior": 1e-3, "ema_vae": 0.9},
        },
    ),
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def arguments(root: Path, stage: str, out: Path) -> list[str]:
    """Of the command that trains ``stage``."""
    given = [stage, "--config", root / f"{stage}.json", "--data", root / "store", "--out", out]
    return list(map(str, given + (["--vae", root / "pretrain"] if stage == "train" else [])))


@pytest.fixture(scope="module")
def lsgm(lsgm_command):
    """Run `lsgm`, or a script; what it said."""

    def run(*given: str, script: str | Path = "lsgm", status: int = 0) -> str:
        done = lsgm_command.run(script, *given, env=ENVIRONMENT)
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def root(lsgm, tmp_path_factory):
    """A small store, the stages' configurations, and both stages trained without a disturbance."""
    root = tmp_path_factory.mktemp("resume")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(root / f"{split}_images.npy", rng.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8))
    prepare.build(registry.CIFAR10, root / "store", root)
    for stage, (kind, sections) in STAGES.items():
        config = parse(kind, {"model": "m", "dataset": "cifar10", **sections}, "test")
        (root / f"{stage}.json").write_text(config.model_dump_json())
        lsgm(*arguments(root, stage, root / stage))
    return root


def same(one: Path, two: Path) -> bool:
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in ("model.safetensors", "history.csv"))


@pytest.mark.parametrize(("stage", "options"), [("train", ()), ("pretrain", ("--saving",))])
def test_ten_kills_change_nothing(root, lsgm, tmp_path, stage, options):
    said = lsgm("3", "10", *options, *arguments(root, stage, tmp_path), script=Path(__file__).with_name("killed.py"))
    assert "10 kills" in said and "resuming after step" in said
    assert same(root / stage, tmp_path)
    assert not (tmp_path / "resume").exists()


def test_told_to_stop_it_says_so_with_its_exit_code_and_goes_on(root, lsgm, tmp_path):
    """SIGTERM: the state is saved at once (here states are ten minutes apart), exit code 75."""
    shutil.copytree(root, tmp_path / "root")
    config = json.loads((root / "train.json").read_text())
    config["train"]["checkpoint_minutes"] = 10
    (tmp_path / "root" / "train.json").write_text(json.dumps(config, separators=(",", ":")))
    given = arguments(tmp_path / "root", "train", tmp_path / "out")
    job = subprocess.Popen(
        [sys.executable, "-m", "lsgm.cli", *given], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    while not (tmp_path / "out" / "resume" / "step-000000000.sha256").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 75 and "told to stop after step" in said and "the same command resumes" in said
    assert not (tmp_path / "out" / "config.json").exists()
    # Another training finds this state: other settings, data, a VAE of another weight (whose config.json does not say
    # that it was altered). Nothing is lost.
    config = tmp_path / "root" / "pretrain" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sha256": None}))
    for key, path, old, new in (
        ("train.lr_vae", tmp_path / "root" / "train.json", b'"lr_vae":0.0001', b'"lr_vae":0.0002'),
        ("data", tmp_path / "root" / "store" / "manifest.json", b"\n", b" \n"),
        ("vae", tmp_path / "root" / "pretrain" / "model.safetensors", b"\0\0", b"\1\0"),
    ):
        content = path.read_bytes()
        at = content.rindex(old)
        path.write_bytes(content[:at] + new + content[at + len(old) :])
        assert path.read_bytes() != content
        assert f"other settings ({key}); put them back to resume" in lsgm(*given, status=1)
        path.write_bytes(content)
    assert "resuming after step" in lsgm(*given)
    assert same(root / "train", tmp_path / "out")
