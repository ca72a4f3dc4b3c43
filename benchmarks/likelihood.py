"""log p(z0) in few evaluations: solvers and bounds against the exact ODE with the same probes, and seconds.

    python benchmarks/likelihood.py [--model checkpoints/lsgm/mnist_demo] [--images 500] [--batch 250] [--out DIR]

The differences are those of the NELBO of the same test images, binarized once, with the same encoder samples, to rk45
with tolerance 1e-5 and the same Rademacher probe: mean with its standard error, and root mean square, in nats. Those
of the bounds and of other probes show their own noise, and how loose the bound is. Seconds are of a pass over all
images: medians of --runs passes, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine, table
from torch import Tensor

import lsgm
from lsgm.config import EstimatorConfig
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.evaluation.canvas import canvas
from lsgm.model import LSGM
from lsgm.progress import set_up_logging

SEED = 1
EXACT: dict[str, Any] = {"solver": "rk45", "tol": 1e-5}
ESTIMATES: dict[str, list[dict[str, Any]]] = {
    "rk45, tol 1e-4": [{"solver": "rk45", "tol": 1e-4}],
    "rk45, tol 1e-3": [{"solver": "rk45", "tol": 1e-3}],
    "RK4 in phi": [{"solver": "rk4", "steps": n} for n in (8, 12, 16, 24, 32)],
    "Heun in phi": [{"solver": "heun", "steps": n} for n in (8, 12, 16, 24, 32)],
    "AB2 in phi": [{"solver": "ab", "steps": n} for n in (8, 12, 16, 24, 32)],
    "RK4 in phi, 4 probes": [{"solver": "rk4", "steps": 12, "probes": 4}],
    "continuous bound": [{"estimator": "bound", "steps": n} for n in (16, 32, 64)],
    "discretized bound": [{"estimator": "discretized", "steps": n} for n in (100, 1000)],
}


def nelbo(model: LSGM, batches: list[Tensor], settings: dict[str, Any]) -> tuple[Tensor, float, float]:
    """NELBOs [N], mean NFE and seconds."""
    config, found, nfe, first = EstimatorConfig(**settings), [], 0, 0
    start = time.perf_counter()
    for x in batches:
        streams = model.per_sample_noise(SEED, range(first, first + len(x)))
        terms = model.nelbo_terms(x, streams, config)
        found.append(terms.nelbo.double().cpu())
        nfe, first = nfe + terms.nfe, first + len(x)
    return torch.cat(found), nfe / len(batches), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/lsgm/mnist_demo", type=Path)
    parser.add_argument("--data", default="data/mnist", type=Path)
    parser.add_argument("--images", default=500, type=int)
    parser.add_argument("--batch", default=250, type=int)
    parser.add_argument("--runs", default=1, type=int)
    parser.add_argument("--only", nargs="*", help="estimates whose names contain one of these")
    parser.add_argument("--out", type=Path, help="folder of the figure")
    args = parser.parse_args()
    set_up_logging(quiet=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = lsgm.load(args.model, device=device).eval()
    test = ImageStore(args.data).images("test")
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(test))[: args.images])
    stored, generator = torch.from_numpy(np.array(test[chosen])), torch.Generator().manual_seed(SEED)
    x = preprocess(stored, generator, model.image.padded_size, model.image.binary)
    batches = list(x.to(device).split(args.batch))
    print(f"{args.model}: {args.images} images, from t = {model.time_eps:g}; {machine(device)}", flush=True)

    nelbo(model, batches[:1], {"steps": 4})  # warm-up
    cases = [("rk45, tol 1e-5", EXACT)]
    for name, estimates in ESTIMATES.items():
        if not args.only or any(word in name for word in args.only):
            cases += [(name, settings) for settings in estimates]
    turns = [[nelbo(model, batches, settings) for _, settings in cases] for _ in range(args.runs)]
    exact, rows, points = turns[0][0][0], [], {}
    for number, (name, _) in enumerate(cases):
        found, nfe, _ = turns[0][number]
        seconds = statistics.median(turn[number][2] for turn in turns)
        error = found - exact
        rms, mean = error.square().mean().sqrt().item(), f"{error.mean():+.3f} ± {error.std() / len(error) ** 0.5:.3f}"
        exactness = [mean, f"{rms:.3f}"] if number else ["", ""]
        rows.append([name, f"{nfe:.0f}", f"{found.mean():.3f}", *exactness, f"{seconds:.1f}"])
        if number:
            points.setdefault(name, []).append((nfe, abs(error.mean().item()), rms))
    print("\n" + table(["estimate", "evaluations", "NELBO", "mean difference", "rms", "seconds"], rows))
    if args.out:
        save(points, args.out / "likelihood.png")


def save(points: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """Mean and rms difference over the number of evaluations."""
    with canvas(path, (9, 4.5), layout="constrained") as figure:
        for axes, column, label in zip(
            figure.subplots(1, 2), (1, 2), ("mean difference, absolute", "rms difference"), strict=True
        ):
            for name, found in points.items():
                axes.plot(*zip(*((p[0], p[column]) for p in found), strict=True), marker="o", linewidth=1, label=name)
            axes.set(xscale="log", yscale="log", xlabel="evaluations of the score network", ylabel=f"{label}, nats")
            axes.set_xticks((8, 16, 32, 100, 1000), labels=["8", "16", "32", "100", "1000"])
            axes.tick_params(axis="x", which="minor", labelbottom=False)
            axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")


if __name__ == "__main__":
    main()
