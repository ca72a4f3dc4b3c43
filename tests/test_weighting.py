"""Time sampling against quadrature and against statistics of its draws."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from lsgm.sde import VPSDE
from lsgm.weighting import TimeSampler

SDE = VPSDE(0.1, 20.0)
EPS = 0.01


def likelihood_weight(t):
    time = torch.tensor(t, dtype=torch.float64)
    return (SDE.diffusion_squared(time) / (2 * SDE.variance(time))).item()


@pytest.mark.parametrize("sampling", ["uniform", "importance"])
def test_estimates_the_integral_of_the_weighting(sampling):
    """E[weight h(t)] is the integral of c(t) h(t) over [eps, 1] (uniform: / (1 - eps), the factor that is left out)."""

    def h(t):
        return (1 - SDE.variance(t)) * (1 + t)

    rho = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000  # midpoint rule instead of random draws
    draw = TimeSampler(SDE, "ll", sampling, EPS)(rho)
    exact, _ = quad(lambda t: likelihood_weight(t) * h(torch.tensor(t, dtype=torch.float64)).item(), EPS, 1)
    if sampling == "uniform":
        exact /= 1 - EPS
    assert (draw.weight * h(draw.t)).mean().item() == pytest.approx(exact, rel=1e-5)
    assert draw.t.min() >= EPS - 1e-12 and draw.t.max() <= 1 + 1e-12


def test_importance_draws_follow_their_density():
    """Histogram of 400,000 draws against r(t) = (d log sigma^2 / dt) / span; four standard errors per bin."""
    n = 400_000
    rho = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = TimeSampler(SDE, "ll", "importance", EPS)(rho).t
    edges = torch.linspace(EPS, 1, 21, dtype=torch.float64)
    log_variance = SDE.variance(edges).log()
    expected = (log_variance.diff() / (log_variance[-1] - log_variance[0])).numpy()
    counts, _ = np.histogram(t.numpy(), edges.numpy())
    assert (np.abs(counts / n - expected) < 4 * np.sqrt(expected / n) + 1e-9).all()


def test_importance_sampling_has_no_variance_for_normal_latents():
    """For z0 ~ N(0, I) and alpha = 0 the squared error is 1 - sigma_t^2 per dimension: weight times it is constant."""
    rho = torch.rand(1000, dtype=torch.float64)
    draw = TimeSampler(SDE, "ll", "importance", EPS)(rho)
    term = draw.weight * (1 - SDE.variance(draw.t))
    np.testing.assert_allclose(term, term[0].item(), rtol=1e-12)
    uniform = TimeSampler(SDE, "ll", "uniform", EPS)(rho)
    assert (uniform.weight * (1 - SDE.variance(uniform.t))).std() > 0.5


def test_cross_entropy_of_normal_latents_is_exact():
    """Theorem 1 with z0 ~ N(0, I) and the exact noise prediction must give the entropy of N(0, I) diffused to eps.

    CE at time eps is that of N(0, I) (variance preserving): (1 + log 2 pi) / 2 nats per dimension.
    """
    sampler = TimeSampler(SDE, "ll", "importance", EPS)
    rho = torch.rand(10, dtype=torch.float64)
    draw = sampler(rho)
    per_dimension = draw.weight * (1 - SDE.variance(draw.t)) + sampler.cross_entropy_constant()
    # the integral stops at t = 1, where the diffusion has nearly, not quite, reached its base
    np.testing.assert_allclose(per_dimension, 0.5 * (1 + math.log(2 * math.pi)), atol=5e-5)
