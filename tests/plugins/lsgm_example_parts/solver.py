"""The midpoint rule for the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lsgm.config import SampleConfig
from lsgm.config.bounds import Few
from lsgm.prior import ScorePrior
from lsgm.solvers.probability_flow import drift
from lsgm.solvers.solution import Solution


class MidpointConfig(SampleConfig):
    """Its keys under `sample`, beside those that all solvers have."""

    implementation = "lsgm_example_parts.solver:midpoint"

    solver: Literal["midpoint"]  # type: ignore[assignment]
    midpoints: Few = 4


@torch.no_grad()
def midpoint(prior: ScorePrior, noise: Tensor, draw: Callable[[], Tensor], settings: MidpointConfig) -> Solution:
    """Latents from ``noise`` [B, C, H, W] in `midpoints` steps of two evaluations."""
    z, h = noise * prior.sde.base_variance**0.5, (settings.time_eps - 1) / settings.midpoints
    for i in range(settings.midpoints):
        t = 1 + i * h
        z = z + h * drift(prior, t + h / 2, z + h / 2 * drift(prior, t, z))
    return Solution(z, 2 * settings.midpoints)
