"""The command line as a user sees it: real processes, real MNIST, a tiny model."""

import csv
import fcntl
import json
import os
import pty
import re
import shutil
import struct
import termios
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lsgm.config.mistakes import parse
from lsgm.params import Params

TINY = """
run: [tiny]
datasets: {mnist: {path: null}}
models:
  tiny:
    dataset: mnist
    vae: {arch: res_bnswish, channels: 4, channel_mult: [1, 2, 2, 2], groups_per_scale: 2, latents_per_group: 2,
          cells_per_cond: 1, preprocess: {blocks: 3, cells: 1}, postprocess: {blocks: 3, cells: 1}}
    pretrain: {epochs: 0.01, batch: 32, warmup_epochs: 0, kl_anneal_portion: 1, kl_max_coeff: 0.7, spectral_reg: 0.01}
    prior: {channels: 8, scales: 1, cells_per_scale: 1, dropout: 0, embedding_dim: 16, mixing_logit_init: -3}
    sde: {time_eps: 0.01}
    train: {epochs: 0.01, batch: 32, warmup_epochs: 0, ema: 0.9, spectral_reg_prior: 0.001, eval_every_epochs: 0.006,
            eval_images: 4}
    sample: {count: 64, steps: 5, batch: 32}
    evaluate: {images: 16, steps: 8, check_images: 4, batch: 16, extractor: mnist_classifier}
"""


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # what is fastest for networks this small


@pytest.fixture(scope="module")
def run(lsgm_command):
    """Run `lsgm ARGUMENTS`."""
    return lambda *arguments, **where: lsgm_command.run("lsgm", *arguments, env=ONE_THREAD, **where)


CONV = {"backbone": "conv", "channels": 4, "channel_mult": [1, 2, 2, 2], "latents": 4}


@pytest.fixture(scope="module", params=["nvae", "conv"])
def made(request, run, tmp_path_factory, mnist_store):
    """Every stage run once, with each backbone; what each said on stderr."""
    folder = tmp_path_factory.mktemp("cli")
    raw = yaml.safe_load(TINY)
    if request.param == "conv":
        raw["models"]["tiny"]["vae"] = CONV
    params = parse(Params, raw, "tiny")
    said = {}
    for stage in ("statistics", "pretrain", "train", "sample", "nelbo", "evaluate"):
        name = {"statistics": "mnist.mnist_classifier", "sample": "lsgm.tiny"}.get(stage, "tiny")
        (folder / f"{stage}.json").write_text(params.freeze(stage, name, code="c0de").model_dump_json())

    def stage(name, *arguments, config=None):
        result = run(config or name, "--config", folder / f"{config or name}.json", *arguments)
        assert result.returncode == 0, result.stderr
        said[name] = result.stderr

    data = ("--data", mnist_store.path)
    log = ("--log", folder / "logs" / "pretrain.log")
    stage("pretrain", *data, "--out", folder / "vae", "--tensorboard", folder / "events", *log)
    stage("train", *data, "--vae", folder / "vae", "--out", folder / "lsgm", "--tensorboard", folder / "events_lsgm")
    for kind in ("vae", "lsgm"):
        stage(f"sample {kind}", "--model", folder / kind, "--out", folder / f"samples_{kind}", config="sample")
    stage("statistics", *data, "--out", folder / "real")
    models = ("--model", folder / "lsgm", "--vae", folder / "vae")
    stage("nelbo", *data, *models, "--out", folder / "nelbo")
    stage(
        "evaluate", *data, *models, "--samples", folder / "samples_lsgm", "--vae-samples",
        folder / "samples_vae", "--nelbo", folder / "nelbo", "--statistics", folder / "real", "--out",
        folder / "results",
    )  # fmt: skip
    result = run("tabulate", "--results", folder / "results", "--out", folder / "tables")
    assert result.returncode == 0, result.stderr
    return folder, said


def test_training_speaks_in_plain_lines_without_a_terminal(made):
    folder, said = made
    assert "\r" not in said["pretrain"] and "VAE: 19/19" in said["pretrain"] and "img/s" in said["pretrain"]
    assert "left, NELBO" in said["train"]
    assert (folder / "logs" / "pretrain.log").read_text() == said["pretrain"]
    last = said["train"].splitlines()[-1]
    assert re.search(r"lsgm train: done in 0:\d\d on cpu, 1 threads; peak memory \d\.\d GB; 19 steps, \d+ img/s$", last)
    assert re.search(r"lsgm sample: done in .*; \d+ images, NFE \d+, \d+ img/s$", said["sample lsgm"].splitlines()[-1])


def test_tensorboard_has_curves_and_samples(made):
    folder, _ = made
    assert list((folder / "events").glob("events.*"))
    events = EventAccumulator(str(folder / "events_lsgm"))
    events.Reload()
    assert {"nelbo", "kl_group_0", "active_latents", "alpha_mean", "lr_prior", "gradient_norm", "sampling_nfe"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Images("samples")] == [12, 19]


def test_training_writes_model_and_history(made):
    folder, _ = made
    for kind, columns in [
        ("vae", {"kl_coeff", "spectral", "lr_vae", "kl", "skipped"}),
        ("lsgm", {"cross_entropy", "alpha_mean", "lr_prior", "test_nelbo", "sampling_nfe"}),
    ]:
        assert {p.name for p in (folder / kind).iterdir()} == {"model.safetensors", "config.json", "history.csv"}
        rows = list(csv.DictReader((folder / kind / "history.csv").read_text().splitlines()))
        assert len(rows) == 19 and columns <= rows[0].keys()
        assert {"step", "loss", "nelbo", "gradient_norm", "kl_group_0", "active_latents"} <= rows[0].keys()
    looks = [row["step"] for row in rows if row["test_nelbo"]]  # every 11.25 steps, and at the end
    assert looks == ["12", "19"]
    config = json.loads((folder / "lsgm" / "config.json").read_text())
    assert [stage["code"] for stage in config["stages"]] == ["c0de", "c0de"]


def test_samples_and_grid(made):
    folder, _ = made
    samples = np.load(folder / "samples_lsgm" / "samples.npy")
    assert samples.shape == (64, 1, 28, 28) and samples.dtype == np.uint8 and samples.std() > 0
    facts = json.loads((folder / "samples_lsgm" / "sampling.json").read_text())
    assert facts["nfe"] == 5 and facts["seconds"] > 0 and facts["images"] == 64
    assert json.loads((folder / "samples_vae" / "sampling.json").read_text())["nfe"] == 0
    assert (folder / "samples_lsgm" / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_hold_together(made):
    folder, _ = made
    metrics = json.loads((folder / "results" / "metrics.json").read_text())
    nelbo = metrics["nelbo"]
    for row in ("lsgm", "vae", "lsgm_with_normal_prior"):
        assert nelbo[row]["nelbo"] == pytest.approx(nelbo[row]["reconstruction"] + nelbo[row]["kl"], rel=1e-6)
    assert nelbo["gain"]["nelbo"] == pytest.approx(nelbo["vae"]["nelbo"] - nelbo["lsgm"]["nelbo"], rel=1e-6)
    # the same encoder, decoder and draws: only the prior differs
    assert nelbo["lsgm"]["reconstruction"] == pytest.approx(nelbo["lsgm_with_normal_prior"]["reconstruction"], rel=1e-6)
    assert (
        metrics["fidelity"]["extractor"] == "mnist_classifier"
        and metrics["fidelity"]["lsgm"]["frechet_mnist_classifier"]
        > metrics["fidelity"]["real_vs_real"]["frechet_mnist_classifier"]
    )
    assert 0 <= metrics["fidelity"]["lsgm"]["precision_mnist_classifier"] <= 1
    assert metrics["code"]["nelbo"] == metrics["code"]["evaluate"] == "c0de"
    assert not (folder / "nelbo.resume").exists()
    assert metrics["training"]["lsgm"]["seconds"] > 0 and metrics["code"]["train"] == "c0de"
    assert (folder / "tables" / "tables" / "comparison.md").exists()


def test_an_altered_checkpoint_is_noticed(made, run, tmp_path):
    folder, _ = made
    assert "2 models unchanged since they were saved" in run("verify", folder).stderr
    shutil.copytree(folder / "vae", tmp_path / "models/vae")
    weights = tmp_path / "models/vae/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for command in (
        ["verify", tmp_path / "models"],
        ["sample", "--config", folder / "sample.json", "--model", tmp_path / "models/vae", "--out", tmp_path / "o"],
    ):
        result = run(*command)
        assert result.returncode == 1
        assert f"{weights}: altered or damaged" in result.stderr
    config = json.loads((tmp_path / "models/vae/config.json").read_text())
    del config["sha256"]
    (tmp_path / "models/vae/config.json").write_text(json.dumps(config))
    assert "models/vae/model.safetensors: cannot be checked" in run("verify", tmp_path / "models").stderr
    assert "holds no model and no dataset" in run("verify", folder / "results").stderr


def test_training_is_reproducible(made, run, mnist_store, tmp_path):
    folder, _ = made
    result = run(
        "pretrain", "--config", folder / "pretrain.json", "--data", mnist_store.path, "--out", tmp_path / "vae"
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "vae/model.safetensors").read_bytes() == (folder / "vae/model.safetensors").read_bytes()


def test_a_bar_with_rate_and_time_left_on_a_terminal(made, lsgm_command, mnist_store, tmp_path):
    folder, _ = made
    arguments = ["--config", folder / "pretrain.json", "--data", mnist_store.path, "--out", tmp_path / "vae"]
    command = ["lsgm", "pretrain", *arguments, "--log", tmp_path / "log"]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # a new one has no columns
    process = lsgm_command.start(*command, stdout=end, stderr=end, env=ONE_THREAD)
    os.close(end)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other end of a pseudo-terminal is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    assert b"img/s" in shown and b"\r" in shown and b"VAE:" in shown
    assert "VAE: 19/19" in (tmp_path / "log").read_text() and "\r" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config", "none.json", "--data", "d", "--vae", "v", "--out", "o"], "none.json: cannot be read"),
        (["sample", "--config", "{sample}", "--model", "none", "--out", "o"], "none/config.json: not found"),
        (["pretrain", "--config", "{train}", "--data", "d", "--out", "o"], "stage: expected 'pretrain', found 'train'"),
        (["pretrain", "--config", "{pretrain}", "--data", "none", "--out", "o"], "none"),
        (["tabulate", "--results", "none", "--out", "o"], "none"),
    ],
)
def test_errors_are_one_message_without_traceback(made, run, tmp_path, arguments, message):
    folder, _ = made
    paths = {stage: str(folder / f"{stage}.json") for stage in ("pretrain", "train", "sample")}
    result = run(*(argument.format(**paths) for argument in arguments), cwd=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr and "error" in result.stderr and "Traceback" not in result.stderr
    assert not (Path(tmp_path) / "o").exists()
