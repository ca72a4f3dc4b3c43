"""Sampling on a GPU with and without CUDA graphs: milliseconds for a batch of latents, and images per second.

    python benchmarks/cuda_graphs.py [--models mnist_demo mnist cifar10_best_fid] [--batches 64 512] [--runs 15]

Models of params.yaml with random weights: times do not depend on them. The runs are in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from machine import machine, table

from lsgm.config import SampleConfig
from lsgm.data.registry import dataset
from lsgm.model import LSGM
from lsgm.params import load_params
from lsgm.prior import ScorePrior
from lsgm.solvers import sampling
from lsgm.solvers.cuda_graph import recorded

STEPS = 10


def eager(prior: ScorePrior, z: torch.Tensor, t: torch.Tensor) -> ScorePrior:
    return prior


@torch.no_grad()
def seconds(model: LSGM, batch: int) -> float:
    assert model.prior is not None
    noise = torch.randn(batch, *model.latent_shape, device="cuda")
    config = SampleConfig(count=batch, steps=STEPS, time_eps=0.01).resolved()
    torch.cuda.synchronize()
    start = time.perf_counter()
    sampling.multistep_sample(model.prior, noise, lambda: noise, config)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mnist_demo", "mnist", "cifar10_best_fid"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 512])
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    params = load_params(Path("params.yaml"))
    print(machine(torch.device("cuda")), flush=True)
    rows = []
    for name in args.models:
        config = params.models[name]
        image = dataset(config.dataset, params.datasets[config.dataset]).image
        model = LSGM(image, config.vae, config.prior, config.sde.resolved()).cuda().eval()
        for batch in args.batches:
            found: dict[str, list[float]] = {"eager": [], "graph": []}
            for run in range(args.runs + 2):
                for kind, chosen in (("eager", eager), ("graph", recorded)):
                    sampling.recorded = chosen  # type: ignore[assignment]  # or without a graph
                    took = seconds(model, batch)
                    if run >= 2:  # warm, and recorded
                        found[kind].append(took)
            without, graph = (statistics.median(found[kind]) for kind in ("eager", "graph"))
            row = [f"{name}, {batch}", f"{1e3 * without:.1f}", f"{1e3 * graph:.1f}", f"{without / graph:.2f}"]
            rows.append([*row, f"{batch / graph:.0f}"])
            print(rows[-1], flush=True)
    header = ["model, images", "without, ms", "CUDA graph, ms", "times faster", "images/s"]
    print("\n" + table(header, rows))


if __name__ == "__main__":
    main()
