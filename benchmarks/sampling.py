"""Sampling in few evaluations: solvers and grids against the exact ODE, with Fréchet distance and seconds.

    python benchmarks/sampling.py [--model checkpoints/lsgm/mnist_demo] [--statistics FILE] [--images 1000] [--runs 9]

`rms` is the distance of the latents to those of rk45 with tolerance 1e-5 from the same noise, relative to their norm.
The Fréchet distance is that of the images to the training set, in the features that FILE (what `lsgm statistics` wrote)
is of. Both matter: a distance below that of the exact ODE is a lucky error, not a better model. Seconds are for 64
images,
drawn and decoded: medians of runs in turns, after a warm-up. Writes a table, and sampling.png beside it with --out.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import machine, median_seconds, table
from torch import Tensor

import lsgm
from lsgm.config import SampleConfig
from lsgm.data.store import ImageStore
from lsgm.evaluation.canvas import COLOURS, canvas
from lsgm.evaluation.fidelity import frechet_distance, real_vs_real
from lsgm.evaluation.statistics import measure, read_reference
from lsgm.model import LSGM
from lsgm.per_sample_noise import PerSampleNoise
from lsgm.progress import set_up_logging
from lsgm.registry import load
from lsgm.solvers.solution import Solution

SEED = 1
SHOWN = 64  # images that are timed
EXACT = {"solver": "rk45", "tol": 1e-5}
FEW, MORE = (3, 5, 8, 10, 12), (4, 8, 12)
SOLVERS: dict[str, tuple[dict[str, Any], tuple[int | None, ...]]] = {
    "rk45, tol 1e-4": ({"solver": "rk45", "tol": 1e-4}, (None,)),
    "rk45, tol 1e-1": ({"solver": "rk45", "tol": 1e-1}, (None,)),
    **{f"velocity AB{p}, equal {g}": ({"form": "velocity", "order": p, "grid": g}, FEW)
       for p in (1, 2, 3) for g in ("t", "phi", "log_snr")},
    **{f"noise AB{p} (DEIS), {g}": ({"form": "noise", "order": p, "grid": g}, FEW)
       for p, g in ((2, "t"), (2, "edm"), (3, "edm"))},
    "DDIM, equal log-SNR": ({"solver": "ddim"}, FEW),
    "DPM-Solver++(2M), equal log-SNR": ({"solver": "dpmpp_2m"}, FEW),
    "DPM-Solver++(2M), equal t": ({"solver": "dpmpp_2m", "grid": "t"}, FEW),
    "data AB3, equal log-SNR": ({"form": "data", "order": 3}, FEW),
    "data AB2 with corrector, equal log-SNR": ({"form": "data", "corrector": True}, FEW),
    "data AB2, tau 0.5": ({"form": "data", "tau": 0.5}, (5, 10, 20)),
    "EDM": ({"solver": "edm"}, (5, 9, 13)),
    "Heun, equal t": ({"solver": "heun"}, MORE),
    "Heun in velocity, equal phi": ({"solver": "heun", "form": "velocity", "grid": "phi"}, MORE),
    "RK4 in velocity, equal phi": ({"solver": "rk4", "form": "velocity", "grid": "phi"}, MORE),
    "adaptive SDE, tol 0.1": ({"solver": "adaptive_sde", "tol": 0.1}, (None,)),
    "adaptive SDE, tol 0.02": ({"solver": "adaptive_sde", "tol": 0.02}, (None,)),
    "ancestral": ({"solver": "ancestral"}, (10, 50, 200)),
}  # fmt: skip


@torch.no_grad()
def latents(model: LSGM, images: int, settings: dict[str, Any]) -> Solution:
    """The latents of images 0, 1 ... of seed SEED, as `lsgm sample` draws them."""
    assert model.prior is not None
    config = SampleConfig(count=images, time_eps=model.time_eps or 1e-5, **settings).resolved()
    noise = PerSampleNoise(SEED, range(images), model.device)
    solve = load(config.implementation)
    return solve(model.prior, noise.normal(model.latent_shape), lambda: noise.normal(model.latent_shape), config)


@torch.no_grad()
def pixels(model: LSGM, z: Tensor) -> Tensor:
    """Images as bytes."""
    torch.manual_seed(0)  # of the scales below, if there are any
    return torch.cat([model.decode(part).mul(255).round().byte() for part in z.split(250)])


def times(model: LSGM, cases: list[dict[str, Any]], runs: int, device: torch.device) -> list[float]:
    """Median seconds for SHOWN images of each case; the cases take turns, after a turn that warms up."""
    found: list[list[float]] = [[] for _ in cases]
    for turn in range(runs + 1 if runs else 0):
        for case, seconds in zip(cases, found, strict=True):
            took = median_seconds(lambda case=case: pixels(model, latents(model, SHOWN, case).y), device, 1, 0)[0]
            if turn:
                seconds.append(took)
    return [statistics.median(seconds) if seconds else 0.0 for seconds in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/lsgm/mnist_demo", type=Path)
    parser.add_argument("--statistics", default="evaluation/statistics/mnist/mnist_classifier.safetensors", type=Path)
    parser.add_argument("--data", default="data/mnist", type=Path)
    parser.add_argument("--images", default=1000, type=int)
    parser.add_argument("--runs", default=9, type=int, help="0: no times")
    parser.add_argument("--only", nargs="*", help="solvers whose names contain one of these")
    parser.add_argument("--out", type=Path, help="folder of the figure")
    args = parser.parse_args()
    set_up_logging(quiet=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = lsgm.load(args.model, device=device).eval()
    reference = read_reference(args.statistics, ImageStore(args.data))
    print(f"{args.model}: {args.images} images, end at t = {model.time_eps:g}; {machine(device)}", flush=True)
    floor = real_vs_real(reference, args.images, SEED)
    print(f"Fréchet distance of as many real images to as many others: {floor:.2f}")
    exact = latents(model, args.images, EXACT).y

    cases = [
        (name, settings if steps is None else {**settings, "steps": steps})
        for name, (settings, evaluations) in SOLVERS.items()
        for steps in evaluations
        if not args.only or any(word in name for word in args.only)
    ]
    seconds = times(model, [settings for _, settings in cases], args.runs, device)
    rows, points = [], {}
    for (name, given), took in zip(cases, seconds, strict=True):
        found = latents(model, args.images, given)
        rms = ((found.y - exact).norm() / exact.norm()).item()
        distance = frechet_distance(measure(pixels(model, found.y), reference.extractor, device), reference)
        random = given.get("solver") in ("ancestral", "adaptive_sde") or "tau" in given
        rows.append([name, f"{found.nfe:.0f}", "random" if random else f"{rms:.4f}", f"{distance:.2f}", f"{took:.3f}"])
        points.setdefault(name, []).append((found.nfe, rms, distance))
        print(rows[-1], flush=True)
    print("\n" + table(["solver", "evaluations", "rms", "Fréchet distance", "seconds for 64"], rows))
    if args.out:
        save(points, args.out / "sampling.png")


IN_THE_FIGURE = (
    "velocity AB2, equal phi", "velocity AB2, equal t", "DPM-Solver++(2M), equal log-SNR", "DDIM, equal log-SNR",
    "noise AB3 (DEIS), edm", "Heun, equal t", "EDM", "adaptive SDE, tol 0.1", "ancestral",
)  # fmt: skip
RANDOM = ("ancestral", "adaptive SDE, tol 0.1")


def save(points: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """rms and Fréchet distance over the number of evaluations."""
    exact = [found for name, found in points.items() if name.startswith("rk45")]
    shown = {name: points[name] for name in IN_THE_FIGURE if name in points} | {
        "rk45": [point for found in exact for point in found]
    }
    with canvas(path, (12, 5), layout="constrained") as figure:
        left, right = figure.subplots(1, 2)
        for (name, found), color, marker in zip(shown.items(), COLOURS * 2, "osD^vP*Xpd", strict=False):
            nfe, rms, distance = zip(*sorted(found), strict=True)
            style = {"color": color, "marker": marker, "linewidth": 2.5 if "equal phi" in name else 1.2, "label": name}
            right.plot(nfe, distance, **style)
            if name not in RANDOM:
                left.plot(nfe, rms, **style)
        left.set(yscale="log", ylabel="rms distance to the exact ODE, relative")
        right.set(ylabel="Fréchet distance", yscale="log")
        right.set_yticks([4, 5, 6, 8, 10, 12], labels=["4", "5", "6", "8", "10", "12"], minor=False)
        right.tick_params(axis="y", which="minor", labelleft=False)
        for axes, ticks in ((left, (3, 5, 10, 20, 50)), (right, (3, 5, 10, 20, 50, 100, 200))):
            axes.set(xscale="log", xlabel="evaluations of the score network")
            axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
            axes.tick_params(axis="x", which="minor", labelbottom=False)
            axes.grid(alpha=0.3)
        right.legend(fontsize="small")


if __name__ == "__main__":
    main()
