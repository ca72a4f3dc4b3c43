"""Priors whose noise prediction has a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lsgm.config import SampleConfig
from lsgm.prior import ScorePrior
from lsgm.registry import load
from lsgm.sde import SDE, VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.solvers.solution import Solution

SHAPE = (2, 2, 1)
DIMENSIONS = math.prod(SHAPE)
TIME_EPS = 0.01
SDES: dict[str, Callable[[], SDE]] = {
    "vpsde": lambda: VPSDE(0.1, 20.0),
    "geometric_vpsde": lambda: GeometricVPSDE(3e-5, 0.999, 3e-5),
    "sub_vpsde": lambda: SubVPSDE(0.1, 20.0),
    "vesde": lambda: VESDE(1e-4, 2500.0),
}


class Mixture(nn.Module):
    """E[noise | z_t] where z0 is drawn from equal parts N(mean_k, variance I)."""

    def __init__(self, sde: SDE, means: Tensor, variance: float) -> None:
        super().__init__()
        self.sde, self.variance = sde, variance
        self.register_buffer("means", means)  # [K, D]

    def components(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_t less the mean of each part, [B, K, D]; its variance and that of the noise at t, each [B or 1, 1]."""
        t = t.view(-1, 1)
        m, sigma2 = self.sde.mean_coefficient(t), self.sde.variance(t)
        delta = torch.addcmul(z_t.flatten(1)[:, None], m[..., None], self.means, value=-1)
        return delta, torch.addcmul(sigma2, m, m, value=self.variance), sigma2

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        delta, total, sigma2 = self.components(z_t, t)
        share = (delta.square().sum(-1) / (-2 * total)).softmax(1)
        return ((sigma2.sqrt() / total) * torch.einsum("bk,bkd->bd", share, delta)).view_as(z_t)

    def log_prob(self, z_t: Tensor, t: float) -> Tensor:
        """log p_t in nats, [B]."""
        delta, total, _ = self.components(z_t, torch.tensor([t], dtype=z_t.dtype))
        size = delta.shape[-1]
        each = -0.5 * (delta.square().sum(-1) / total + size * (math.tau * total).log())
        return each.logsumexp(1) - math.log(delta.shape[1])


@pytest.fixture(params=SDES)
def sde(request: pytest.FixtureRequest) -> SDE:
    """Each of the four SDEs, or those that the test names."""
    return SDES[request.param]()


@pytest.fixture
def of_parts() -> Callable[..., ScorePrior]:
    """(sde, means [K, D], variance) -> the prior that is exact for this mixture of Gaussians; float64."""

    def make(sde: SDE, means: Tensor, variance: float) -> ScorePrior:
        return ScorePrior(sde, Mixture(sde, means.double(), variance), SHAPE, mixing_logit=None).double()

    return make


@pytest.fixture
def mixture(sde: SDE, of_parts: Callable[..., ScorePrior]) -> ScorePrior:
    """The prior of three Gaussians with the variance 0.3."""
    means = 0.8 * torch.randn(3, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return of_parts(sde, means, 0.3)


@pytest.fixture
def noise() -> Tensor:
    """Eight starts of samples."""
    return torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _no_draw() -> Tensor:
    raise AssertionError("the ODE draws no noise")


@pytest.fixture
def solve() -> Callable[..., Solution]:
    """(prior, noise, draw, settings of SampleConfig ...) -> the samples at t = `time_eps` = 0.01."""

    def run(prior: ScorePrior, noise: Tensor, draw: Callable[[], Tensor] = _no_draw, **settings: Any) -> Solution:
        config = SampleConfig(count=1, **{"time_eps": TIME_EPS, **settings}).resolved()
        return load(config.implementation)(prior, noise, draw, config)

    return run
