"""Faults of files and of the machine: damaged files of every kind, full disks, signals.

What is damaged gives the same result, or a refusal in one line.
Bytes are flipped, cut, swapped, repeated and blanked, and values of JSON and YAML files replaced, in everything that a
command reads. What a person writes (params.yaml) may turn into another valid file; what a command wrote may not.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lsgm.cli import main
from lsgm.model import LSGM
from lsgm.params import load_params
from lsgm.training.state import States

if TYPE_CHECKING:
    from .conftest import Fork, Warm

CASES = 25  # of each file
TRAINING = {"epochs": 4, "batch": 8, "warmup_epochs": 0, "lr_schedule": "iteration"}
MODEL = {
    "dataset": "drawn",
    "vae": {
        **{"arch": "res_bnswish", "channels": 4, "channel_mult": [1, 1, 1], "groups_per_scale": 1},
        **{"latents_per_group": 2, "cells_per_cond": 1, "use_se": False, "likelihood": "dl"},
        **{"preprocess": {"blocks": 2, "cells": 1}, "postprocess": {"blocks": 2, "cells": 1}},
    },
    "pretrain": {**TRAINING, "kl_anneal_portion": 0.5, "kl_max_coeff": 0.7, "spectral_reg": 0.01},
    "prior": {"channels": 8, "scales": 1, "cells_per_scale": 1, "embedding_dim": 16, "mixing_logit_init": -1},
    "sde": {},
    "train": {**TRAINING, "ema": 0.9},
    "sample": {"count": 6, "solver": "euler", "steps": 2, "batch": 6},
    "evaluate": {"images": 4, "estimator": "discretized", "steps": 2, "batch": 2, "extractor": None},
}
STRANGE: list[Any] = [
    None, True, -1, 0, 2**63, 10**30, 0.5, -0.0, math.nan, math.inf, 1e308, "", "x", "../x", "\0", "1:30", [], [None],
    [[1]], {}, {"": 1}, {"x": {"y": 1}},
]  # fmt: skip


def run(*arguments: object) -> tuple[int, str]:
    """Run a command in this process: its exit status, and what it said. A traceback has the status -1."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        try:
            status = main([str(argument) for argument in arguments])
        except Exception:
            traceback.print_exc(file=said)
            status = -1
    return status, said.getvalue()


class Made:
    """What the pipeline makes of a handful of drawn images, with the configuration of each command."""

    def __init__(self, root: Path) -> None:
        self.root = root
        draw = np.random.default_rng(0)
        (root / "originals").mkdir()
        for number in range(20):
            pixels = draw.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"originals/{number}.png")
        images = {"size": 16, "split": 0.25}
        params = {
            "run": ["tiny"],
            "datasets": {"drawn": {"path": str(root / "originals"), "images": images}},
            "models": {"tiny": MODEL},
        }
        (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        loaded = load_params(root / "params.yaml")
        for stage in ("prepare", "pretrain", "train", "sample", "nelbo", "evaluate"):
            name = {"prepare": "drawn", "sample": "lsgm.tiny"}.get(stage, "tiny")
            (root / f"{stage}.json").write_text(loaded.freeze(stage, name).model_dump_json())  # type: ignore[arg-type]
        states = States.clear
        States.clear = lambda self: None  # type: ignore[method-assign]  # those of a training that was not interrupted
        try:
            for command in (
                self.command("prepare", root / "data"),
                self.command("pretrain", root / "vae"),
                self.command("train", root / "lsgm"),
                self.command("sample", root / "vae_samples", model="vae"),
                self.command("sample", root / "samples"),
                self.command("nelbo", root / "nelbo.jsonl"),
                self.command("evaluate", root / "results"),
                ["export-published", "--model", root / "vae", "--out", root / "published.pt", "--dataset", "lsun_16"],
            ):
                status, said = run(*command)
                assert status == 0, said
        finally:
            States.clear = states  # type: ignore[method-assign]

    def command(self, stage: str, out: Path, model: str = "lsgm") -> list[object]:
        """The command of a stage that writes to ``out``."""
        root = self.root
        models: list[object] = ["--model", root / "lsgm", "--vae", root / "vae"]
        inputs: dict[str, list[object]] = {
            "prepare": [],
            "pretrain": ["--data", root / "data"],
            "train": ["--data", root / "data", "--vae", root / "vae"],
            "sample": ["--model", root / model],
            "nelbo": ["--data", root / "data", *models],
            "evaluate": [
                *("--data", root / "data", *models, "--nelbo", root / "nelbo.jsonl"),
                *("--samples", root / "samples", "--vae-samples", root / "vae_samples"),
            ],
        }
        return [stage, "--config", root / f"{stage}.json", *inputs[stage], "--out", out, "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def damaged(content: bytes, draw: random.Random) -> bytes:
    """``content`` with one kind of damage: of its bytes or, in JSON and YAML, of its values."""
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if isinstance(tree, dict) and draw.random() < 0.5:
        _replace_a_value(tree, draw)
        return (json.dumps(tree) if content.startswith(b"{") else yaml.safe_dump(tree, sort_keys=False)).encode()
    bad = bytearray(content)
    a, b = sorted(draw.randrange(len(bad)) for _ in range(2))
    kind = draw.choice(["flip", "flip", "cut", "swap", "repeat", "blank", "drop"])
    if kind == "flip":
        bad[a] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del bad[a:]
    elif kind == "swap":
        bad[a], bad[b] = bad[b], bad[a]
    elif kind == "repeat":
        bad[a:a] = bad[a : a + 8]
    elif kind == "blank":
        bad[a : a + 8] = bytes(len(bad[a : a + 8]))
    else:
        del bad[a : a + 8]
    return bytes(bad)


def _replace_a_value(tree: dict[str, Any], draw: random.Random) -> None:
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                collect(node[key])

    collect(tree)
    node, key = draw.choice(places)
    if isinstance(node, dict) and draw.random() < 0.2:
        del node[key]
    else:
        node[key] = draw.choice(STRANGE)


def each_damage(file: Path, cases: int = CASES) -> Iterator[str]:
    """Damage ``file`` so many times, each time anew, and put it back in the end."""
    content = file.read_bytes()
    try:
        for case in range(cases):
            draw = random.Random(f"{file.name} {case}")
            bad = damaged(content, draw)
            if bad != content:
                file.write_bytes(bad)
                yield f"{file.name}, case {case}"
    finally:
        file.write_bytes(content)


def check(case: str, status: int, said: str, same: Callable[[], bool], lines: int = 1) -> None:
    """The same result, or a refusal in one line (of a configuration a line for each mistake, up to twenty)."""
    assert "Traceback" not in said, f"{case}: {said}"
    if status == 0:
        assert same(), f"{case}: another result, in silence\n{said}"
    else:
        assert status == 1, f"{case}: {status} {said}"
        _, _, message = said.partition("error: ")
        assert 1 <= len(message.strip().splitlines()) <= lines, f"{case}: {said}"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def numbers(path: Path) -> str:
    """What a JSON file says, but for the times that something took and the day."""
    return re.sub(r'"(\w*seconds\w*|date|images_per_second|device)": [^,}\]]*', "", path.read_text())


def test_params(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.root)
    for case in each_damage(made.root / "params.yaml", 4 * CASES):
        check(case, *run("describe", "tiny"), lambda: True, lines=21)


def test_configurations_of_jobs(made: Made, tmp_path: Path) -> None:
    for case in each_damage(made.root / "sample.json"):
        check(case, *run(*made.command("sample", tmp_path / "out")), lambda: True, lines=21)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_checkpoints(made: Made, tmp_path: Path, name: str) -> None:
    for case in each_damage(made.root / "lsgm" / name):
        status, said = run(*made.command("sample", tmp_path))
        check(case, status, said, lambda: sha(tmp_path / "samples.npy") == sha(made.root / "samples/samples.npy"))
        assert run("verify", made.root / "lsgm")[0] == status, case


@pytest.mark.parametrize("name", ["manifest.json", "test_images.npy"])
def test_stores(made: Made, tmp_path: Path, name: str) -> None:
    for case in each_damage(made.root / "data" / name):
        status, said = run(*made.command("nelbo", tmp_path / "nelbo.jsonl"))
        check(case, status, said, lambda: nelbos(tmp_path / "nelbo.jsonl") == nelbos(made.root / "nelbo.jsonl"))


def nelbos(path: Path) -> list[Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [[line.get(key) for key in ("chunk", "prior", "nelbo", "reconstruction", "kl")] for line in lines]


@pytest.mark.parametrize(
    "name",
    [
        "nelbo.jsonl",
        "samples/samples.npy",
        "samples/sampling.json",
        "lsgm/config.json",
        "data/test_images.npy",
        "vae/history.csv",
    ],
)
def test_what_an_evaluation_reads(made: Made, tmp_path: Path, name: str) -> None:
    for case in each_damage(made.root / name):
        status, said = run(*made.command("evaluate", tmp_path))
        check(
            case,
            status,
            said,
            lambda: numbers(tmp_path / "metrics.json") == numbers(made.root / "results/metrics.json"),
        )


@pytest.mark.parametrize(
    "name", ["lsgm/config.json", "lsgm/model.safetensors", "lsgm/history.csv", "data/manifest.json"]
)
def test_what_is_incomplete_is_not_verified(made: Made, tmp_path: Path, name: str) -> None:
    for folder in ("lsgm", "vae", "data"):
        shutil.copytree(made.root / folder, tmp_path / folder)
    assert run("verify", tmp_path)[0] == 0
    (tmp_path / name).unlink()
    status, said = run("verify", tmp_path)
    check(name, status, said, lambda: False)
    assert str(tmp_path / name) in said


def test_memory_that_is_not_there(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(LSGM, "sample_batches", fails)
    status, said = run(*made.command("sample", tmp_path))
    check("memory", status, said, lambda: False)
    assert "reduce the batch" in said


def test_metrics(made: Made, tmp_path: Path) -> None:
    """Read for tables; nothing is written but below the folder that is asked for."""
    for case in each_damage(made.root / "results/metrics.json", 2 * CASES):
        status, said = run("tabulate", "--results", made.root / "results", "--out", tmp_path / "out")
        check(case, status, said, lambda: True, lines=21)
        assert [path.name for path in tmp_path.iterdir()] in ([], ["out"]), case


@pytest.mark.parametrize("number", [0, 1])
def test_states(made: Made, tmp_path: Path, number: int) -> None:
    """The older of two states, and the newer: a training goes on from one that is whole, to the same weights."""
    kept = sorted((made.root / "vae/resume").glob("step-*"))
    assert kept, "the training left no states"
    for case in each_damage(kept[number], 10):
        shutil.copytree(made.root / "vae/resume", tmp_path / "out/resume", dirs_exist_ok=True)
        status, said = run(*made.command("pretrain", tmp_path / "out"))
        check(
            case,
            status,
            said,
            lambda: sha(tmp_path / "out/model.safetensors") == sha(made.root / "vae/model.safetensors"),
        )
        shutil.rmtree(tmp_path / "out")


def test_parts_that_go_on(made: Made, tmp_path: Path) -> None:
    """A NELBO that was interrupted after some of its lines."""
    state, lines = tmp_path / "state.jsonl", (made.root / "nelbo.jsonl").read_bytes().splitlines(keepends=True)
    state.write_bytes(b"".join(lines[:-3]))
    for case in each_damage(state):
        status, said = run(*made.command("nelbo", tmp_path / "out.jsonl"), "--resume", state)
        check(case, status, said, lambda: nelbos(tmp_path / "out.jsonl") == nelbos(made.root / "nelbo.jsonl"))


def test_published_files(made: Made, tmp_path: Path) -> None:
    run("import-published", made.root / "published.pt", "--out", tmp_path / "right")
    for case in each_damage(made.root / "published.pt", 2 * CASES):
        status, said = run("import-published", made.root / "published.pt", "--out", tmp_path / "out")
        check(
            case,
            status,
            said,
            lambda: sha(tmp_path / "out/model.safetensors") == sha(tmp_path / "right/model.safetensors"),
        )


@pytest.fixture
def start(lsgm_command: Warm) -> Callable[..., tuple[Fork, TextIO]]:
    """Start a command as a process of its own: it, and what it says; ``limit``: bytes of a full disk."""

    def start(*arguments: object, limit: int | None = None) -> tuple[Fork, TextIO]:
        said, end = os.pipe()
        process = lsgm_command.start("lsgm", *arguments, stdout=end, stderr=end, limit=limit)
        os.close(end)
        return process, open(said)

    return start


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("prepare", "journal.jsonl"),
        ("pretrain", "step-000000000.pt"),
        ("train", "step-000000000.pt"),
        ("sample", "chunk-000000.safetensors"),
        ("nelbo", "out.resume"),
        ("evaluate", "samples.png"),
    ],
)
def test_a_full_disk_names_the_file(
    made: Made, start: Callable[..., tuple[Fork, TextIO]], tmp_path: Path, stage: str, file: str
) -> None:
    process, output = start(*made.command(stage, tmp_path / "out"), limit=200)
    with output:
        said = output.read()
    assert process.wait() == 1, said
    message = said.partition("error: ")[2].strip()
    assert file in message.splitlines()[0], said
    assert os.strerror(errno.EFBIG) in message
    assert len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*.part") if path.is_file()] == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_part_files_of_ended_processes_go(
    made: Made, start: Callable[..., tuple[Fork, TextIO]], tmp_path: Path, number: signal.Signals
) -> None:
    """The next process that writes there removes them; it leaves those of a living one."""
    config = json.loads((made.root / "sample.json").read_text())
    config["sample"] |= {"count": 10**5}
    (tmp_path / "long.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    process, output = start("sample", "--config", tmp_path / "long.json", "--model", made.root / "lsgm", "--out", out)
    while not (parts := list(out.glob("resume/*/chunk-*"))):
        assert process.poll() is None, output.read()
        time.sleep(0.05)
    assert run(*made.command("sample", out))[0] == 0
    assert all(path.exists() for path in parts)  # their process lives
    process.send_signal(number)
    with output:
        said = output.read()
    process.wait()
    if number == signal.SIGTERM:
        assert process.returncode == 128 + signal.SIGTERM
        assert "lsgm sample: terminated" in said
    assert all(path.exists() for path in parts)
    assert run(*made.command("sample", out))[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "samples.npy", "sampling.json"]
