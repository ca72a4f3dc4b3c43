"""Sampling 64 latents by the probability-flow ODE: our RK45 against torchdiffeq's dopri5 and scipy's RK45.

    python benchmarks/sampling.py [--model checkpoints/lsgm/mnist_demo] [--tol 1e-5] [--runs 7]

Errors are relative, in the root mean square, to a solve in float64 at a thirtieth of the tolerance, on average over
some noises: which steps an adaptive solver takes is chance (rounding decides), and its error varies by half. All three
run the same network; the runs are interleaved, so that a machine whose speed drifts is fair to all. torchdiffeq comes
with `pip install 'lsgm[benchmarks]'`. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from machine import machine, table
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torchdiffeq import odeint

import lsgm
from lsgm.prior import ScorePrior
from lsgm.sampling.ode import drift, sample

Solve = Callable[[], tuple[Tensor, int]]
Make = Callable[[ScorePrior, Tensor, float, float], Solve]


def ours(prior: ScorePrior, noise: Tensor, tol: float, end: float) -> Solve:
    def solve() -> tuple[Tensor, int]:
        solution = sample(prior, noise, tol, end)
        return solution.y, solution.nfe

    return solve


def torchdiffeq(prior: ScorePrior, noise: Tensor, tol: float, end: float) -> Solve:
    def solve() -> tuple[Tensor, int]:
        nfe = 0

        def f(t: Tensor, z: Tensor) -> Tensor:
            nonlocal nfe
            nfe += 1
            return drift(prior, t.item(), z)

        times = torch.tensor([1.0, end], device=noise.device)
        with torch.no_grad():  # step_t: without it the solver steps past the end, into the singularity
            y = odeint(f, noise, times, rtol=tol, atol=tol, method="dopri5", options={"step_t": times[1:]})[-1]
        return y, nfe

    return solve


def scipy(prior: ScorePrior, noise: Tensor, tol: float, end: float) -> Solve:
    def solve() -> tuple[Tensor, int]:
        @torch.no_grad()
        def f(t: float, y: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(y).to(noise).view_as(noise)
            return drift(prior, t, z).cpu().numpy().ravel()

        found = solve_ivp(f, (1.0, end), noise.cpu().numpy().ravel(), method="RK45", rtol=tol, atol=tol)
        return torch.from_numpy(found.y[:, -1]).to(noise).view_as(noise), found.nfev

    return solve


class NetworkTime:
    """Seconds spent within a module's forward."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.seconds, self.device = 0.0, device
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave)

    def enter(self, *_: object) -> None:
        synchronise(self.device)
        self.start = time.perf_counter()

    def leave(self, *_: object) -> None:
        synchronise(self.device)
        self.seconds += time.perf_counter() - self.start


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/lsgm/mnist_demo")
    parser.add_argument("--tol", type=float, default=1e-5)
    parser.add_argument("--time-eps", type=float, default=1e-2, help="where the ODE ends (the demo's is 0.01)")
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=3, help="noises over which errors are averaged")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    prior = lsgm.load(args.model, args.device).prior
    assert prior is not None
    shape = (args.latents, *prior.latent_shape)
    print(f"{list(shape)} latents, t from 1 to {args.time_eps:g}; {machine(device)}", flush=True)
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device) for i in range(args.seeds)]
    double = copy.deepcopy(prior).double()
    exact = [sample(double, noise.double(), args.tol / 30, args.time_eps).y for noise in noises]

    def measure(make: Make, tol: float) -> float:
        """Geometric mean over the noises of the relative error."""
        found = [make(prior, noise, tol, args.time_eps)()[0].double() for noise in noises]
        errors = [((y - truth).norm() / truth.norm()).item() for y, truth in zip(found, exact, strict=True)]
        return statistics.geometric_mean(errors)

    others: dict[str, Make] = {"torchdiffeq dopri5, step_t": torchdiffeq, "scipy RK45": scipy}
    chosen = {f"{name}, tol {args.tol:g}": (make, args.tol) for name, make in others.items()}
    errors = {name: measure(*setting) for name, setting in chosen.items()}
    own = {tol: measure(ours, tol) for tol in (args.tol * 10.0**i for i in (0.5, 0.25, 0.0, -0.25, -0.5))}
    for name in list(chosen):
        tol = max((t for t in own if own[t] <= 1.1 * errors[name]), default=min(own))
        key = f"ours, tol {tol:.2g} (the error of {name.split()[0]})"
        chosen[key], errors[key] = (ours, tol), own[tol]

    inside = NetworkTime(prior.network, device)
    for compiled in (False, True):
        if compiled:
            prior.network.compile(dynamic=False, options={"freezing": True})
        solves = {name: make(prior, noises[0], tol, args.time_eps) for name, (make, tol) in chosen.items()}
        solves[next(iter(solves))]()  # compiles
        times: dict[str, list[float]] = {name: [] for name in solves}
        beyond: dict[str, list[float]] = {name: [] for name in solves}
        nfe = {}
        for _ in range(args.runs):
            for name, solve in solves.items():
                inside.seconds = 0.0
                start = time.perf_counter()
                _, nfe[name] = solve()
                synchronise(device)
                times[name].append(time.perf_counter() - start)
                beyond[name].append(times[name][-1] / inside.seconds - 1)
        rows = []
        for name in solves:
            low, median, high = statistics.quantiles(times[name], n=4)
            spread = f"{median:.2f} ± {(high - low) / 2:.2f}"
            overhead = f"{100 * statistics.median(beyond[name]):.1f} %"
            each = f"{1e3 * median / nfe[name]:.1f}"
            rows.append([name, f"{errors[name]:.1e}", str(nfe[name]), spread, each, overhead])
        print(f"\nScore network {'compiled' if compiled else 'eager'}; medians of {args.runs} runs\n")
        header = ["solver", "relative error", "NFE", "seconds", "ms per evaluation", "beyond the network"]
        print(table(header, rows), flush=True)


if __name__ == "__main__":
    main()
