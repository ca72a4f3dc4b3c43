"""Sampling 64 latents by the probability-flow ODE: our RK45 against torchdiffeq's dopri5 and scipy's RK45.

    python benchmarks/sampling.py [--model checkpoints/lsgm/mnist_demo] [--tol 1e-5] [--runs 7]

Errors are relative, in the root mean square, to a solve in float64 at a hundredth of the tolerance (minutes). All three
run the same network on the same noise; the runs are interleaved, so that a machine whose speed drifts is fair to all.
torchdiffeq comes with `pip install 'lsgm[benchmarks]'`.
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
from torch import Tensor
from torchdiffeq import odeint

import lsgm
from lsgm.prior import ScorePrior
from lsgm.sampling.ode import drift, sample

Solve = Callable[[], tuple[Tensor, int]]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/lsgm/mnist_demo")
    parser.add_argument("--tol", type=float, default=1e-5)
    parser.add_argument("--time-eps", type=float, default=1e-2, help="where the ODE ends (the demo's is 0.01)")
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    prior = lsgm.load(args.model, device).prior
    assert prior is not None
    noise = torch.randn(args.latents, *prior.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    exact = sample(copy.deepcopy(prior).double(), noise.double(), args.tol / 100, args.time_eps).y

    def error(y: Tensor) -> float:
        return ((y.double() - exact).norm() / exact.norm()).item()

    def seconds(f: Callable[[], object]) -> float:
        start = time.perf_counter()
        f()
        synchronise(device)
        return time.perf_counter() - start

    print(f"{args.latents} latents {list(prior.latent_shape)}, t from 1 to {args.time_eps:g}; {machine(device)}\n")
    for compiled in (False, True):
        if compiled:
            prior.network.compile(dynamic=False, options={"freezing": True})
        print(f"score network {'compiled' if compiled else 'eager'}\n")
        candidates = {"torchdiffeq dopri5, step_t": torchdiffeq, "scipy RK45": scipy}
        candidates["ours"] = ours
        settings = {
            f"{name}, tol {args.tol:g}": make(prior, noise, args.tol, args.time_eps)
            for name, make in candidates.items()
        }
        errors = {name: error(solve()[0]) for name, solve in settings.items()}
        for name in list(errors)[:-1]:  # ours at the coarsest tolerance that reaches their error
            for tol in args.tol * 10 ** np.arange(0.5, -1.1, -0.125):
                solve = ours(prior, noise, float(tol), args.time_eps)
                if (reached := error(solve()[0])) <= errors[name]:
                    key = f"ours at the error of {name.split(',')[0]}: tol {tol:.2g}"
                    settings[key], errors[key] = solve, reached
                    break
        t = torch.full((1,), 0.5, device=device)

        @torch.no_grad()
        def network(calls: int = 20, t: Tensor = t) -> None:
            for _ in range(calls):
                prior.network(noise, t)

        network()
        times: dict[str, list[float]] = {name: [] for name in settings}
        beyond: dict[str, list[float]] = {name: [] for name in settings}
        alone = []
        for _ in range(args.runs):
            for name, solve in settings.items():
                before = seconds(network) / 20
                start = time.perf_counter()
                _, nfe = solve()
                synchronise(device)
                times[name].append(time.perf_counter() - start)
                alone += [before, seconds(network) / 20]
                beyond[name].append(times[name][-1] / nfe / statistics.mean(alone[-2:]) - 1)
        rows = []
        for name, solve in settings.items():
            nfe = solve()[1]
            low, median, high = statistics.quantiles(times[name], n=4)
            spread = f"{median:.3f} ± {(high - low) / 2:.3f}"
            overhead = f"{100 * statistics.median(beyond[name]):.1f} %"
            rows.append([name, str(nfe), f"{errors[name]:.1e}", spread, f"{1e3 * median / nfe:.2f}", overhead])
        print(table(["solver", "NFE", "relative error", "seconds", "ms per evaluation", "beyond the network"], rows))
        each = 1e3 * statistics.median(alone)
        print(f"\nThe network alone: {each:.2f} ms; medians of {args.runs} runs ± half the interquartile range.\n")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
