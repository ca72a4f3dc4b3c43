"""One step of either training stage, everything in it: forward, backward, spectral regularization, optimizers, averaged
weights, history.

    python benchmarks/training.py [--models demo small medium] [--steps 30] [--options precision=bf16] [--profile]
    python benchmarks/training.py --against REVISION [--models small medium]

`demo` is mnist_demo of params.yaml; `small` and `medium` are two sizes for batches of 32 binary 32x32 images. "of
conv." is the work per second in units of the machine's own 3x3 convolution, measured between the steps: it says how
much is left, not how two machines compare. FLOPs are three times those of convolutions and matrix products in the
forward pass. "MFU" is their rate over the GPU's peak at the training's precision (on other devices over the rate of a
float32 matrix product). Run it where nothing else runs. The images are the store in --data, that `lsgm prepare` wrote.

`--against` compares with another revision of this project: its worktree and this one each have a process, and the two
take their steps in turns, so that a machine whose speed drifts is fair to both. OpenMP's threads wait as `lsgm` sets
them in both. A model of params.yaml has each revision's own settings.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import convolution_rate, machine, peak_rate, table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lsgm import checkpoint
from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, TrainStage
from lsgm.params import load_params
from lsgm.runtime import device, keep_freed_memory, limit_spinning
from lsgm.training import pretrain, train
from lsgm.training.batch_noise import BatchNoise
from lsgm.training.distributed import Ranks
from lsgm.training.engine import Engine

SINGLE = Ranks()
BLOCKS = {"blocks": 2, "cells": 2}
VAE = {"arch": "res_mbconv", "channel_mult": [1, 2, 2], "groups_per_scale": 2, "cells_per_cond": 1,
       "preprocess": BLOCKS, "postprocess": BLOCKS, "likelihood": "bernoulli"}  # fmt: skip
PRIOR = {"scales": 2, "dropout": 0, "mixing_logit_init": -6}
COMMON = {"epochs": 10, "batch": 32, "warmup_epochs": 0}
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "vae": {**VAE, "channels": 16, "latents_per_group": 4},
        "prior": {**PRIOR, "channels": 32, "cells_per_scale": 1},
    },
    "medium": {
        "vae": {**VAE, "channels": 32, "latents_per_group": 20},
        "prior": {**PRIOR, "channels": 64, "cells_per_scale": 2},
    },
}
STAGES: dict[str, dict[str, Any] | None] = {
    "pretraining": None,
    "end to end, ll": {"p_weighting": "ll", "algorithm": 1},
    "end to end, un": {"p_weighting": "un", "algorithm": 3},
}


def configs(name: str, what: str, options: dict[str, Any]) -> tuple[PretrainStage, TrainStage | None]:
    """What `lsgm pretrain` and `lsgm train` would read."""
    if name in SIZES:
        parts: dict[str, Any] = {"dataset": "mnist", "sde": {}, **SIZES[name]}
        parts["pretrain"] = {**COMMON, "spectral_reg": 1e-2, "kl_anneal_portion": 1, "kl_max_coeff": 1}
        parts["train"] = {**COMMON, "spectral_reg_prior": 1e-2, "spectral_reg_vae": 1e-2}
    else:
        name = "mnist_demo" if name == "demo" else name
        parts = load_params("params.yaml").models[name].model_dump()
        parts["prior"]["drop_inactive"] = None  # a thousand batches before the first step
    head = {"model": name, "dataset": parts["dataset"]}
    first = {**head, "vae": parts["vae"], "pretrain": {**parts["pretrain"], **options}}
    settings = STAGES[what]
    second = {**head, "prior": parts["prior"], "sde": parts["sde"], "train": {**parts["train"], **options}}
    if settings is not None:
        second["train"] |= settings
    return parse(PretrainStage, first, "pretrain"), settings and parse(TrainStage, second, "train")


def build(
    first: PretrainStage, second: TrainStage | None, data: Path, where: torch.device, ranks: Ranks = SINGLE
) -> Engine:
    """The engine of the second stage (from a VAE that was never trained), or of the first where there is none."""
    engine, model = pretrain.build(first, data, where, ranks)
    if second is None:
        return engine
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, folder, stages=[first], summary={})
        return train.build(second, data, Path(folder), where, ranks)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo", *SIZES], help="also any name in params.yaml")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="of `pretrain` and `train`")
    parser.add_argument("--profile", action="store_true", help="which operations take the time")
    parser.add_argument("--data", type=Path, default=Path("data/mnist"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--against", metavar="REVISION", help="compare with this revision, steps in turns")
    args = parser.parse_args()
    where = device(args.device)
    keep_freed_memory()
    print(machine(where), flush=True)
    options = dict(option.split("=", 1) for option in args.options)
    if args.against:
        compare(args)
        return
    rows = []
    for name in args.models:
        for what in args.stages:
            rows.append(measure(name, what, options, args.data, where, args.steps, args.profile))
            print(" | ".join(rows[-1]), flush=True)
    header = ["step", "batch", "ms", "images/s", "GFLOP", "GFLOP/s", "of conv.", "MFU"]
    print(table(header, rows))


def measure(
    name: str, what: str, options: dict[str, Any], data: Path, where: torch.device, steps: int, profiled: bool
) -> list[str]:
    """A row of the table."""
    engine = build(*configs(name, what, options), data, where)
    for _ in range(3):
        engine.one_step()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        share = engine.take_step.share
        whole = BatchNoise(0, share, share, where)
        engine.task.objective(engine.batches.batch_at(0, 0)[:share], 0, 10, whole)
    seconds, rates = [], []
    for i in range(steps + 2):
        start = time.perf_counter()
        engine.one_step()  # ends with a transfer to the host: nothing is left to wait for
        if i >= 2:
            seconds.append(time.perf_counter() - start)
            rates.append(convolution_rate(where, runs=1))
    if profiled:
        gpu = where.type == "cuda"
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as recorded:
            for _ in range(5):
                engine.one_step()
        key = "self_cuda_time_total" if gpu else "self_cpu_time_total"
        print(recorded.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=45))
    median, (low, _, high) = statistics.median(seconds), statistics.quantiles(seconds, n=4)
    batch = engine.batches.batch
    flops = 3 * counter.get_total_flops() / 1e9 * batch / share
    of_convolution = flops / median / statistics.median(rates)
    row = [f"{name}, {what}", str(batch), f"{1e3 * median:.0f} ± {5e2 * (high - low):.0f}", f"{batch / median:.0f}"]
    mfu = flops / median / peak_rate(where, engine.config.precision)
    return [*row, f"{flops:.1f}", f"{flops / median:.0f}", f"{of_convolution:.0%}", f"{mfu:.1%}"]


# Runs in the environment of one revision: builds its engine, then takes a step for every line that it is sent.
STEPPER = """
import sys, time
from pathlib import Path
import lsgm.runtime as runtime
getattr(runtime, "limit_spinning", lambda: None)()  # before PyTorch is imported
import training
from lsgm.training import distributed
name, what, data, device = sys.argv[1:]
runtime.keep_freed_memory()
ranks, device = distributed.start(runtime.device(device))
engine = training.build(*training.configs(name, what, {}), Path(data), device, *([ranks] if ranks.world > 1 else []))
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        engine.one_step()
    print(time.perf_counter() - start, flush=True)
"""


class Stepper:
    """A process that takes training steps with the code in a folder, in an environment with these variables."""

    def __init__(self, folder: Path, *arguments: str, code: str = STEPPER, **variables: str) -> None:
        path = os.pathsep.join([str(folder), str(folder / "benchmarks")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=folder, env={**os.environ, **variables, "PYTHONPATH": path},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def steps(self, count: int) -> float:
        """Take ``count`` steps; returns seconds per step."""
        self.begin(count)
        return self.finish() / count

    def begin(self, count: int) -> None:
        """Start to take ``count`` steps."""
        assert self.process.stdin is not None
        print(count, file=self.process.stdin, flush=True)

    def finish(self) -> float:
        """Wait for the steps; returns seconds."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            try:
                return float(line)
            except ValueError:  # a log line
                continue
        raise SystemExit("a process ended early; its message is above")

    def close(self) -> None:
        self.process.communicate()


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary worktree of ``revision``."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, revision], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], check=True)


def compare(args: argparse.Namespace) -> None:
    """The table of `--against`: three steps of one revision, three of the other, and so on."""
    here, rows = Path(__file__).resolve().parents[1], []
    limit_spinning()  # of both: what it costs and brings is for contention.py
    with worktree(args.against) as there:
        for name in args.models:
            for what in args.stages:
                arguments = (name, what, str(args.data.resolve()), args.device)
                steppers = [Stepper(there, *arguments), Stepper(here, *arguments)]
                for stepper in steppers:
                    stepper.steps(3)
                turns = [[stepper.steps(3) for stepper in steppers] for _ in range(-(-args.steps // 3))]
                for stepper in steppers:
                    stepper.close()
                before, after = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
                low, middle, high = statistics.quantiles([old / new for old, new in turns], n=4)
                row = [f"{name}, {what}", f"{1e3 * before:.0f}", f"{1e3 * after:.0f}"]
                rows.append([*row, f"{middle:.2f} ± {(high - low) / 2:.2f}"])
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["step", f"{args.against}, ms", "this revision, ms", "times faster"], rows))


if __name__ == "__main__":
    main()
