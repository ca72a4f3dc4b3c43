"""Sampling 64 latents by the probability-flow ODE: our RK45 against torchdiffeq's dopri5 and scipy's RK45.

    python benchmarks/rk45.py [--model checkpoints/lsgm/mnist_demo] [--tol 1e-5] [--runs 5]

Errors are relative, in the root mean square, to a solve in float64 at a thirtieth of the tolerance. Which steps an
adaptive solver takes is partly chance, and its error varies from start to start: errors and NFE are means over a dozen
starts of 8 latents, times are those of 64, and our NFE at the error of another solver is read from a line fitted to log
NFE against log error at five tolerances. All three run the same network; the runs are interleaved, so that a machine
whose speed drifts is fair to all. "Beyond the network" is what is not spent in the score network: solver, drift and,
where it is not compiled together with the network, the mixing. torchdiffeq comes with
`pip install 'lsgm[benchmarks]'`. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import machine, table
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torchdiffeq import odeint

import lsgm
from lsgm.config import SampleConfig
from lsgm.prior import ScorePrior
from lsgm.solvers.probability_flow import drift, rk45_sample
from lsgm.solvers.solution import Solution

Solve = Callable[[], tuple[Tensor, int]]
Make = Callable[[ScorePrior, Tensor, float, float], Solve]


def by_rk45(prior: ScorePrior, noise: Tensor, tol: float, time_eps: float) -> Solution:
    """Latents by the library's solver."""
    return rk45_sample(prior, noise, lambda: noise, SampleConfig(count=1, tol=tol, time_eps=time_eps))


def ours(prior: ScorePrior, noise: Tensor, tol: float, end: float) -> Solve:
    def solve() -> tuple[Tensor, int]:
        solution = by_rk45(prior, noise, tol, end)
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


class Timed(nn.Module):
    """A score network or a prior, and the seconds spent in it."""

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device, self.seconds = network, device, 0.0
        self.sde = getattr(network, "sde", None)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        synchronize(self.device)
        start = time.perf_counter()
        noise: Tensor = self.network(z, t)
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return noise


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/lsgm/mnist_demo")
    parser.add_argument("--tol", type=float, default=1e-5)
    parser.add_argument("--time-eps", type=float, default=1e-2, help="where the ODE ends (the demo's is 0.01)")
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--noises", type=int, default=12, help="starts of 8 latents over which errors are averaged")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    prior = lsgm.load(args.model, args.device).prior
    assert prior is not None
    shape = (args.latents, *prior.latent_shape)
    print(f"{list(shape)} latents, t from 1 to {args.time_eps:g}; {machine(device)}", flush=True)
    few = (8, *prior.latent_shape)
    noises = [torch.randn(few, generator=torch.Generator().manual_seed(i)).to(device) for i in range(args.noises)]
    double = copy.deepcopy(prior).double()
    exact = [by_rk45(double, noise.double(), args.tol / 30, args.time_eps).y for noise in noises]

    def measure(make: Make, tol: float) -> tuple[float, float]:
        """Geometric means over the noises of the relative error and of the NFE."""
        found = [make(prior, noise, tol, args.time_eps)() for noise in noises]
        errors = [
            ((y.double() - truth).norm() / truth.norm()).item() for (y, _), truth in zip(found, exact, strict=True)
        ]
        return statistics.geometric_mean(errors), statistics.geometric_mean([nfe for _, nfe in found])

    solvers: dict[str, Make] = {"torchdiffeq dopri5, step_t": torchdiffeq, "scipy RK45": scipy, "ours": ours}
    reached = {name: measure(make, args.tol) for name, make in solvers.items()}
    own = [reached["ours"]] + [measure(ours, args.tol * factor) for factor in (0.4, 0.6, 1.5, 2.2)]
    slope, level = np.polyfit(np.log([error for error, _ in own]), np.log([nfe for _, nfe in own]), 1)

    for compiled in (False, True):
        if compiled:
            prior.compile(dynamic=False, options={"freezing": True})  # as LSGM.compile_prior
            solved: Any = (timed := Timed(prior, device))
        else:
            prior.network = timed = Timed(prior.network, device)
            solved = prior
        start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        solves = {name: make(solved, start, args.tol, args.time_eps) for name, make in solvers.items()}
        solves["ours"]()  # compiles
        each: dict[str, list[float]] = {name: [] for name in solves}  # seconds per evaluation
        beyond: dict[str, list[float]] = {name: [] for name in solves}
        for _ in range(args.runs):
            for name, solve in solves.items():
                timed.seconds = 0.0
                begin = time.perf_counter()
                _, nfe = solve()
                synchronize(device)
                seconds = time.perf_counter() - begin
                each[name].append(seconds / nfe)
                beyond[name].append(seconds / timed.seconds - 1)
        rows = []
        for name, (error, nfe) in reached.items():
            low, median, high = statistics.quantiles(each[name], n=4)
            same = math.exp(level + slope * math.log(error))  # our NFE at this error
            row = [name, f"{error:.1e}", f"{nfe:.0f}", f"{1e3 * median:.1f} ± {1e3 * (high - low) / 2:.1f}"]
            row += [f"{100 * statistics.median(beyond[name]):.1f} %", f"{median * nfe:.2f}"]
            rows.append([*row, f"{statistics.median(each['ours']) * same:.2f} ({same:.0f})"])
        print(f"\n{'Prior compiled' if compiled else 'Eager'}; tol {args.tol:g}, medians of {args.runs} runs\n")
        header = ["solver", "relative error", "NFE", "ms per evaluation", "beyond the network", "seconds"]
        print(table([*header, "ours at this error: seconds (NFE)"], rows), flush=True)
        if not compiled:
            prior.network = timed.network


if __name__ == "__main__":
    main()
