"""The adaptive SDE solver of "Gotta Go Fast" (Jolicoeur-Martineau et al., arXiv 2105.14080, algorithm 1).

    dz = D(z, t) dt + g(t) dw,   D(z, t) = f(t) z + g(t)^2 / sigma_t eps(z, t),   from t = 1 down

Each image has its own steps: its images are the same whatever else is in its batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lsgm.errors import SolverError
from lsgm.prior import ScorePrior
from lsgm.sde import SDE
from lsgm.solvers.solution import Solution

FIRST_STEP = 0.01
SAFETY, EXPONENT = 0.9, 0.9  # the paper's theta and r
MAX_ITERATIONS, SMALLEST_STEP = 10_000, 1e-12


class _Reverse:
    """D and g of the reverse SDE for a column of times [B, 1 ...], float64, and latents [B, ...]."""

    def __init__(self, prior: ScorePrior) -> None:
        self.prior = prior
        self.sde: SDE = prior.sde

    def drift(self, z: Tensor, t: Tensor) -> Tensor:
        f, g2, sigma = self.sde.drift(t), self.sde.diffusion_squared(t), self.sde.variance(t).sqrt()
        return f.to(z.dtype) * z + (g2 / sigma).to(z.dtype) * self.prior(z, t.flatten().to(z.dtype))

    def step(self, z: Tensor, t: Tensor, h: Tensor, noise: Tensor) -> Tensor:
        """The increment of an Euler-Maruyama step from t to t - h."""
        g = self.sde.diffusion_squared(t).sqrt()
        return -h.to(z.dtype) * self.drift(z, t) + (g * h.sqrt()).to(z.dtype) * noise


@torch.no_grad()
def adaptive_sde(
    prior: ScorePrior, z: Tensor, draw: Callable[[], Tensor], t_end: float, tol: float, atol: float
) -> Solution:
    """Latents [B, ...] at ``t_end`` from ``z`` at t = 1, and the mean NFE of an image.

    A step is taken twice, by Euler-Maruyama (z') and by stochastic improved Euler (z''), with the same noise. It is
    accepted if the root mean square of (z'' - z') / max(atol, tol |z'|, tol |z' of the step before|) is at most 1, and
    z'' is kept. A rejected step is repeated with a smaller h and the same N(0, I) draw, scaled by the new sqrt(h): each
    draw is used exactly once, so rejection does not choose among draws.

    Args:
        draw: gives N(0, I) like ``z``; called once for each iteration, until the last image arrives.
        tol, atol: relative tolerance, and the absolute one in units of the latents.
    Raises:
        SolverError: the steps become too small, or the state is no longer finite.
    """
    reverse, shape = _Reverse(prior), (-1, *(1 for _ in z.shape[1:]))
    t = torch.ones(len(z), dtype=torch.float64, device=z.device).view(shape)
    h = torch.full_like(t, FIRST_STEP).clamp(max=1 - t_end)
    before, noise = z, torch.zeros_like(z)
    fresh = torch.ones(len(z), dtype=torch.bool, device=z.device)  # needs a new draw
    result, rows = torch.empty_like(z), torch.arange(len(z), device=z.device)  # rows that are not there yet
    evaluations = 0
    for _ in range(MAX_ITERATIONS):
        drawn = draw()[rows]
        noise = torch.where(fresh.view(shape), drawn, noise)
        first = reverse.step(z, t, h, noise)
        euler = z + first
        second = reverse.step(euler, t - h, h, noise)
        evaluations += 2 * len(rows)
        scale = torch.maximum(euler.abs(), before.abs()).mul(tol).clamp(min=atol)
        error = ((second - first) / (2 * scale)).double().square().flatten(1).mean(dim=1).sqrt().view(shape)
        if not error.isfinite().all():
            raise SolverError("adaptive_sde: the state is not finite; the training may have diverged")
        accepted = error <= 1
        z = torch.where(accepted, z + (first + second) / 2, z)
        before = torch.where(accepted, euler, before)
        t = torch.where(accepted, t - h, t)
        left, h = t - t_end, SAFETY * h * error.clamp(min=1e-12) ** -EXPONENT
        fresh, keep = accepted.flatten(), (left > SMALLEST_STEP).flatten()
        result[rows[~keep]] = z[~keep]
        rows, z, t, h, left, before, noise, fresh = (x[keep] for x in (rows, z, t, h, left, before, noise, fresh))
        if len(rows) == 0:
            return Solution(result, evaluations / len(result))
        if (h < SMALLEST_STEP).any():
            break
        h = torch.minimum(left, h)
    raise SolverError(
        f"adaptive_sde: the tolerance {tol:g} (absolute {atol:g}) asks for more than {MAX_ITERATIONS} steps; choose a "
        "larger one, if the training did not diverge"
    )
