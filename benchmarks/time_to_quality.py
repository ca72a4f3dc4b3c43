"""How long the demo trains until it is as good as it was: wall time and images until a test NELBO is reached.

    python benchmarks/time_to_quality.py [--against e349bbb] [--target 100.6] [--seeds 3]

The demo of another revision (its settings, its code) and that of this one are trained in turns, each in a process of
its own, with OpenMP's threads as `lsgm` sets them in both. Ten times in the second stage the model is saved, and this
revision measures its NELBO, always by the same estimator on the same 500 test images. The training ends once the target
is reached; one that never gets there counts in full, and is marked. Counted are the steps of both stages. Run it where
nothing else runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import machine, table
from torch import Tensor
from training import Stepper, worktree

import lsgm
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.runtime import keep_freed_memory, limit_spinning

IMAGES, BATCH, SEED = 500, 250, 1

# Runs in the environment of one revision. Prints seconds and images so far after each save; goes on when sent a line.
TRAINER = """
import sys, time
from pathlib import Path
import lsgm.runtime as runtime
getattr(runtime, "limit_spinning", lambda: None)()  # before PyTorch is imported
import torch
import training
from lsgm import checkpoint
from lsgm.training import pretrain, train
data, out, seed, saves = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
runtime.keep_freed_memory()
first, second = training.configs("demo", "end to end, ll", {"seed": seed})
where, seconds, images = torch.device("cpu"), 0.0, 0

def take(engine, steps):
    global seconds, images
    start = time.perf_counter()
    for _ in range(steps):
        engine.one_step()
    seconds += time.perf_counter() - start
    images += steps * engine.batches.batch

engine, model = pretrain.build(first, data, where)
take(engine, round(first.pretrain.epochs * len(engine.batches)))
checkpoint.save(model, out / "vae", stages=[first], summary={})
engine, model, averages = train.build(second, data, out / "vae", where)
steps = round(second.train.epochs * len(engine.batches))
points = [round(steps * (i + 1) / saves) for i in range(saves)]
for before, point in zip([0, *points], points):
    take(engine, point - before)
    raw = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages.copy_to_module()
    checkpoint.save(model, out / "lsgm", stages=[first, second], summary={})
    model.load_state_dict(raw)
    print("saved", seconds, images, flush=True)
    sys.stdin.readline()
"""


@dataclass
class Found:
    """Where a training was when it reached the target, or ended without."""

    seconds: float
    images: int
    nelbo: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REVISION", default="e349bbb")
    parser.add_argument("--target", type=float, default=100.6, help="nats")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--saves", type=int, default=10, help="points of the second stage at which it may stop")
    parser.add_argument("--data", type=Path, default=Path("data/mnist"))
    args = parser.parse_args()
    limit_spinning()
    keep_freed_memory()
    print(machine(torch.device("cpu")), flush=True)
    here, rows, shares = Path(__file__).resolve().parents[1], [], []
    with worktree(args.against) as there:
        for seed in range(1, args.seeds + 1):
            order = [(args.against, there), ("this revision", here)]
            found = {name: train(folder, args, seed) for name, folder in (order if seed % 2 == 0 else order[::-1])}
            for name, _ in order:
                end = found[name]
                reached = "" if end.nelbo <= args.target else " (not reached)"
                rows.append(
                    [f"{name}, seed {seed}", f"{end.seconds:.0f}", f"{end.images:,}", f"{end.nelbo:.2f}{reached}"]
                )
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            shares.append(found["this revision"].seconds / found[args.against].seconds)
    print(table(["training", "seconds", "images", "NELBO, nats"], rows))
    print(
        f"\nShare of the time: {', '.join(f'{share:.0%}' for share in shares)}; median {statistics.median(shares):.0%}"
    )


def train(folder: Path, args: argparse.Namespace, seed: int) -> Found:
    """Train with the code in ``folder`` until the target is reached."""
    x, end = test_images(args.data), None
    with tempfile.TemporaryDirectory() as out:
        trainer = Stepper(folder, str(args.data.resolve()), out, str(seed), str(args.saves), code=TRAINER)
        assert trainer.process.stdin is not None and trainer.process.stdout is not None
        while line := trainer.process.stdout.readline():
            if not line.startswith("saved "):
                continue
            seconds, images = line.split()[1:]
            end = Found(float(seconds), int(images), nelbo(Path(out) / "lsgm", x))
            print(f"{folder.name}, seed {seed}: {end}", file=sys.stderr, flush=True)
            if end.nelbo <= args.target:
                break
            print(file=trainer.process.stdin, flush=True)
        trainer.process.kill()
        trainer.process.wait()
    if end is None:
        raise SystemExit("a training ended early; its message is above")
    return end


def test_images(data: Path) -> Tensor:
    """Binary test images [500, 1, 32, 32]: the random subset of the demo's evaluation."""
    test = ImageStore(data).images("test")
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(test))[:IMAGES])
    return preprocess(torch.from_numpy(np.array(test[chosen])), torch.Generator().manual_seed(SEED), 32)


def nelbo(folder: Path, x: Tensor) -> float:
    """Mean NELBO in nats of the images under the saved model."""
    model = lsgm.load(folder)
    return torch.cat([model.nelbo(part, seed=i) for i, part in enumerate(x.split(BATCH))]).mean().item()


if __name__ == "__main__":
    main()
