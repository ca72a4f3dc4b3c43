"""The VAE and the score network by themselves: forward, and forward with backward; eager and compiled; in PyTorch's
default layout and channels-last.

    python benchmarks/networks.py [--models mnist_demo mnist cifar10_slim] [--networks vae score] [--runs 7] [--eager]

A forward pass is that of evaluation (no graph). Forward and backward is what a training step does with the network:
for the VAE the loss of the first stage, for the score network the squared error of its prediction. The optimizer and
the regularization are not in it. `cifar10_slim` is the paper's CIFAR-10 model with a quarter of the channels, 4 groups
in place of 20 and 2 score-network blocks per resolution in place of 8. The variants of one network are timed in turn,
so that a machine whose speed drifts is fair to all. Compiling takes minutes on the CPU the first time (PyTorch keeps
what it compiled); it is not in the figures, and `--eager` leaves it out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from machine import machine, table
from torch import Tensor

from lsgm.config import BackboneConfig, ImageConfig, PriorConfig
from lsgm.data.registry import DATASETS
from lsgm.model import LSGM
from lsgm.params import load_params
from lsgm.runtime import keep_freed_memory
from lsgm.training.objective import VAEObjective

BATCH = {"mnist_demo": 64, "mnist": 16, "cifar10_slim": 8}
LAYOUTS = {"default layout": torch.contiguous_format, "channels-last": torch.channels_last}


def configs(name: str) -> tuple[ImageConfig, BackboneConfig, PriorConfig]:
    params = load_params("params.yaml")
    if name == "cifar10_slim":
        full = params.models["cifar10_best_fid"]
        vae = params.vae("cifar10_best_fid").model_copy(update={"channels": 32, "groups_per_scale": 4})
        prior = full.prior.model_copy(update={"channels": 128, "cells_per_scale": 2})
        return DATASETS["cifar10"].image, vae, prior
    model = params.models[name]
    return DATASETS[model.dataset].image, params.vae(name), model.prior


def passes(model: LSGM, x: Tensor, z: Tensor, t: Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    """What is timed."""
    objective = VAEObjective()
    if compiled:
        model.vae.encode = torch.compile(model.vae.encode, dynamic=False)  # type: ignore[method-assign]
        assert model.prior is not None
        model.prior.network.compile(dynamic=False)
    network = model.prior.network if model.prior is not None else model

    def vae_forward() -> object:
        model.eval()
        with torch.no_grad():
            return model.vae.encode(2 * x - 1)

    def vae_both() -> None:
        model.train().zero_grad(set_to_none=True)
        objective(model, x, 0.5).loss.backward()

    def score_forward() -> object:
        model.eval()
        with torch.no_grad():
            return network(z, t)

    def score_both() -> None:
        model.train().zero_grad(set_to_none=True)
        network(z, t).square().mean().backward()

    return {
        "VAE forward": vae_forward,
        "VAE forward + backward": vae_both,
        "score network forward": score_forward,
        "score network forward + backward": score_both,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BATCH), choices=list(BATCH))
    parser.add_argument("--networks", nargs="+", default=["vae", "score"], choices=["vae", "score"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), help="of compiled ones")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    keep_freed_memory()
    print(machine(device), flush=True)
    for name in args.models:
        image, vae, prior = configs(name)
        sde = load_params("params.yaml").models["mnist"].sde
        batch = BATCH[name]
        variants: dict[str, dict[str, Callable[[], object]]] = {}
        for compiled in (False,) if args.eager else (False, True):
            for layout, memory_format in LAYOUTS.items():
                if compiled and layout not in args.layouts:
                    continue
                torch.manual_seed(0)
                model = LSGM(image, vae, prior, sde).to(device)
                model.to(memory_format=memory_format)  # type: ignore[call-overload]
                x = torch.rand(batch, image.channels, image.padded_size, image.padded_size, device=device).round()
                z, t = torch.randn(batch, *model.latent_shape, device=device), torch.rand(batch, device=device)
                x, z = x.to(memory_format=memory_format), z.to(memory_format=memory_format)
                label = f"{'compiled' if compiled else 'eager'}, {layout}"
                variants[label] = passes(model, x, z, t, compiled)
        rows = []
        for what in next(iter(variants.values())):
            if not any(what.lower().startswith(network) for network in args.networks):
                continue
            seconds: dict[str, list[float]] = {label: [] for label in variants}
            for run in range(args.runs + 2):
                for label, timed in variants.items():
                    start = time.perf_counter()
                    timed[what]()
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    seconds[label].append(time.perf_counter() - start)
                    if run == 0:
                        print(f"{name}: {what}, {label}: first call {seconds[label][0]:.1f} s", file=sys.stderr)
            later = {label: values[2:] for label, values in seconds.items()}  # the first ones compile and warm up
            medians = {label: statistics.median(values) for label, values in later.items()}
            cells = []
            for label, median in medians.items():
                cell = f"{1e3 * median:.1f} ± {1e3 * spread(later[label]):.1f}"
                cell = f"**{cell}**" if median == min(medians.values()) else cell
                cells.append(cell)
            rows.append([what, *cells])
            print(f"{name}: {what}: {', '.join(cells)} ms", file=sys.stderr)
        print(f"\n{name}: batch {batch}, ms (median of {args.runs} ± half the interquartile range)\n")
        print(table(["", *variants], rows), flush=True)


def spread(values: list[float]) -> float:
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


if __name__ == "__main__":
    main()
