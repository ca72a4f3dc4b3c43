"""Two real processes (torchrun, gloo) against one: the same training."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

import lsgm
from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, TrainStage
from lsgm.data import prepare, registry
from lsgm.training import distributed
from lsgm.training.flat import flatten

BLOCKS = {"blocks": 2, "cells": 1}
VAE = {
    "arch": "res_mbconv", "channels": 4, "channel_mult": [1, 2, 2], "groups_per_scale": 2, "latents_per_group": 2,
    "cells_per_cond": 1, "preprocess": BLOCKS, "postprocess": BLOCKS, "likelihood": "dml",
}  # fmt: skip
# An adam_eps far above the gradients makes updates proportional to them. Adam's usual ones are the gradient's sign
# where that is near 0, which a last bit turns.
SHORT = {"epochs": 2, "batch": 8, "warmup_epochs": 0, "lr_schedule": "iteration"}
PRIOR = {"channels": 8, "scales": 1, "cells_per_scale": 1, "dropout": 0, "embedding_dim": 16, "mixing_logit_init": -1}
PRETRAIN = {**SHORT, "kl_anneal_portion": 1, "kl_max_coeff": 0.7, "spectral_reg": 0.01, "lr": 1, "adam_eps": 1e4}
TRAIN = {
    **SHORT, "p_weighting": "un", "algorithm": 3, "time_samples": 2, "spectral_reg_prior": 1e-3,
    "lr_vae": 1, "lr_prior": 1, "adam_eps_vae": 1e4, "adam_eps_prior": 1e4,
}  # fmt: skip
STAGES = {
    "pretrain": (PretrainStage, {"vae": VAE, "pretrain": PRETRAIN}),
    "train": (TrainStage, {"prior": PRIOR, "sde": {}, "train": TRAIN}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        np.save(root / f"{split}_images.npy", rng.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8))
    prepare.build(registry.CIFAR10, root / "store", root)
    return root / "store"


def command(stage, data, folder, *arguments, **settings):
    """The arguments of `lsgm` that train ``stage``."""
    kind, sections = STAGES[stage]
    sections = {**sections, stage: {**sections[stage], **settings}}
    folder.mkdir(exist_ok=True)
    config = parse(kind, {"model": "m", "dataset": "cifar10", **sections}, "test")
    (folder / f"{stage}.json").write_text(config.model_dump_json())
    given = [stage, "--config", folder / f"{stage}.json", "--data", data, "--out", folder / stage, *arguments]
    return list(map(str, given))


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def run(lsgm_command):
    """Run `lsgm`, or a script, in several processes that find each other as those of torchrun do; what they said."""

    def run(processes, arguments, script="lsgm"):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with tempfile.TemporaryFile("w+") as said:
            started = [
                lsgm_command.start(
                    script, *arguments, stdout=said.fileno(), stderr=said.fileno(),
                    env=ENVIRONMENT | ({**several, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}),
                )
                for rank in map(str, range(processes))
            ]  # fmt: skip
            codes = [process.wait() for process in started]
            said.seek(0)
            text = said.read()
        assert not any(codes), text
        return text

    return run


def test_two_processes_train_what_one_trains(data, run, tmp_path):
    """Half of each batch each, batch norm and losses over the whole: the same weights and losses to float tolerance."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        for stage, more in (("pretrain", ()), ("train", ("--vae", tmp_path / "1" / "pretrain"))):
            run(processes, command(stage, data, folder, *more))
        found[processes] = folder
    for stage in ("pretrain", "train"):
        one, two = (lsgm.load(found[n] / stage).state_dict() for n in (1, 2))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        rows = [(found[n] / stage / "history.csv").read_text().splitlines() for n in (1, 2)]
        for a, b in zip(*(r[1:] for r in rows), strict=True):
            np.testing.assert_allclose(*([float(v) for v in line.split(",")] for line in (a, b)), rtol=1e-3, atol=1e-4)
    summary = json.loads((found[2] / "train" / "config.json").read_text())["training"]
    assert summary["processes"] == 2 and summary["steps"] == 6


def test_a_process_that_dies_takes_the_job_down_with_its_message(data, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, sys\n"
        "from lsgm import cli\n"
        "from lsgm.training.step import TrainingStep\n"
        "call = TrainingStep.__call__\n"
        "def dying(self, step, *given):\n"
        "    if step == 2 and self.ranks.rank == 1:\n"
        "        raise RuntimeError('this process dies')\n"
        "    return call(self, step, *given)\n"
        "TrainingStep.__call__ = dying\n"
        "sys.exit(cli.main())\n"
    )
    kind, sections = STAGES["pretrain"]
    config = parse(kind, {"model": "m", "dataset": "cifar10", **sections}, "test")
    (tmp_path / "c.json").write_text(config.model_dump_json())
    given = [*TORCHRUN, script, "pretrain", "--config", tmp_path / "c.json", "--data", data, "--out", tmp_path / "out"]
    start = time.monotonic()
    done = subprocess.run([*map(str, given)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode != 0 and "this process dies" in done.stderr
    assert time.monotonic() - start < 60
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_one_process_ends_badly_all_do_again(data, run, tmp_path):
    """Statistics of one process that are not finite after the last step: both go back, and end well together."""
    script = tmp_path / "spoils.py"
    script.write_text(
        "import math, sys\n"
        "from lsgm import cli\n"
        "from lsgm.training.step import TrainingStep\n"
        "call = TrainingStep.__call__\n"
        "def spoiling(self, step, guard, *given):\n"
        "    found = call(self, step, guard, *given)\n"
        "    if step == self.schedule.steps - 1 and self.ranks.rank == 1 and guard.restarts == 0:\n"
        "        self.buffers[0].fill_(math.inf)\n"
        "    return found\n"
        "TrainingStep.__call__ = spoiling\n"
        "sys.exit(cli.main())\n"
    )
    run(2, command("pretrain", data, tmp_path), script)
    training = json.loads((tmp_path / "pretrain" / "config.json").read_text())["training"]
    assert (training["steps"], training["restarts"], training["processes"]) == (6, 1, 2)


def test_told_to_stop_all_processes_save_and_go_on(data, run, tmp_path):
    """SIGTERM to torchrun: one state, from which two processes end in the bits of two that were not stopped."""
    settings = {"epochs": 8, "checkpoint_minutes": 10}
    run(2, command("pretrain", data, tmp_path / "whole", **settings))
    out = tmp_path / "stopped" / "pretrain"
    more = ("--log", tmp_path / "log", "--resume", out / "resume")
    given = command("pretrain", data, tmp_path / "stopped", *more, **settings)
    launched = [*TORCHRUN, "--no-python", "--", sys.executable, "-m", "lsgm.cli", *given]
    job = subprocess.Popen(launched, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not (out / "resume" / "step-000000000.sha256").exists():
        assert job.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=60)[1]
    assert job.returncode != 0 and said.count("told to stop after step") == 1
    assert not (out / "config.json").exists()
    assert "resuming after step" in run(2, given)
    for name in ("model.safetensors", "history.csv"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / "pretrain" / name).read_bytes()
    log = (tmp_path / "log").read_text()  # of both
    assert log.index("told to stop after step") < log.index("resuming after step")


def test_nan_and_infinity_anywhere_are_infinity_everywhere():
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        facts = torch.tensor([torch.inf, torch.nan, 1.0])
        distributed.all_reduce_max(facts)
        assert facts.tolist() == [torch.inf, torch.inf, 1.0]
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_are_reduced_in_buckets_as_they_come(monkeypatch):
    """Each element once, the last layer's first, and those that the backward pass does not reach at the end."""
    started = []
    monkeypatch.setattr(distributed, "BUCKET", 40)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda bucket, async_op: started.append(bucket))
    network = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(4)))
    vector = flatten(network)
    reducer = distributed.GradientReducer([network], [vector])
    network[:3](torch.ones(1, 6)).sum().backward()  # an earlier part of the step
    assert not started
    reducer.armed = True
    network[:3](torch.ones(1, 6)).sum().backward()
    during = len(started)
    expected = vector.grad / 2
    reducer.finish()
    starts = [bucket.storage_offset() for bucket in started]
    assert during == 3 and starts[0] == max(starts[:3])
    assert starts[3:] == sorted(starts)[-2:]  # the last layer, which had no part in it
    ends = {bucket.storage_offset() + len(bucket) for bucket in started}
    assert {0, *ends} == {*starts, len(vector)} and sum(map(len, started)) == len(vector)
    torch.testing.assert_close(vector.grad, expected)
    assert not reducer.armed
