"""The discretized diffusion against closed forms for Gaussian latents."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lsgm.errors import LSGMError, SolverError
from lsgm.prior import ScorePrior
from lsgm.sde import SDE, VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.solvers.ancestral import Discretization, elbo, sample

SHAPE = (2, 2, 2)
DIMENSIONS = math.prod(SHAPE)
SDES = [VPSDE(0.1, 20.0), GeometricVPSDE(1e-4, 0.999, 1e-4)]


class ExactNoise(nn.Module):
    """E[noise | z_t] where z0 ~ N(0, variance I)."""

    def __init__(self, sde, variance):
        super().__init__()
        self.sde, self.variance = sde, variance

    def forward(self, z_t, t):
        sigma2 = self.sde.variance(t)[:, None, None, None]
        return sigma2.sqrt() * z_t / ((1 - sigma2) * self.variance + sigma2)


def gaussian(sde, variance):
    return ScorePrior(sde, ExactNoise(sde, variance), SHAPE, mixing_logit=None).double()


def draws(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_steps_compose_to_the_diffusion(sde, steps):
    process = Discretization(sde, steps)
    np.testing.assert_allclose(process.alpha.cumprod(0), 1 - sde.variance(process.t), rtol=1e-10)
    assert (process.posterior_beta <= process.beta + 1e-15).all() and (process.posterior_beta > 0).all()


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small"])
@pytest.mark.parametrize("sde", SDES, ids=["vpsde", "geometric"])
def test_samples_of_a_gaussian_have_its_variance(sde, variance):
    """z0 ~ N(0, 0.25 I), 300 steps, 3,000 samples: the variance that the linear recursion gives, to four standard
    errors, and within 5 % of the truth (10 % for the geometric SDE, whose first steps are coarse)."""
    prior, steps, n = gaussian(sde, 0.25), 300, 3000
    draw = draws((n, *SHAPE))
    solution = sample(prior, draw(), steps, draw, variance)
    assert solution.nfe == steps
    process = Discretization(sde, steps)
    spread = process.beta if variance == "fixed_large" else process.posterior_beta
    variance = 1.0
    for i in reversed(range(steps)):
        v = process.variance[i].item()
        slope = v**0.5 / ((1 - v) * 0.25 + v)
        factor = (1 - process.beta[i].item() / v**0.5 * slope) / process.alpha[i].item() ** 0.5
        variance = factor**2 * variance + (spread[i].item() if i > 0 else 0.0)
    standard_error = variance * (2 / (n * DIMENSIONS)) ** 0.5
    assert solution.y.var().item() == pytest.approx(variance, abs=4 * standard_error)
    assert variance == pytest.approx(0.25, rel=0.05 if isinstance(sde, VPSDE) else 0.1)


@pytest.mark.parametrize("sde", SDES, ids=["vpsde", "geometric"])
def test_bound_of_a_gaussian_is_below_its_likelihood_and_close(sde):
    """With the exact prediction: not above it by more than four standard errors over 4,000 latents, and with many steps
    within 0.05 nats per dimension."""
    prior, n = gaussian(sde, 0.25), 4000
    z0 = 0.5 * draws((n, *SHAPE), seed=1)()
    exact = torch.distributions.Normal(0.0, 0.5).log_prob(z0).sum(dim=(1, 2, 3))
    gaps = []
    for steps in (50, 1000):
        bound, nfe = elbo(prior, z0, steps, draws((n, *SHAPE), seed=2))
        assert nfe == steps
        gap = exact - bound
        gaps.append(gap.mean().item() / DIMENSIONS)
        assert gap.mean() > -4 * gap.std() / n**0.5
    assert gaps[1] < 0.05
    assert gaps[1] < gaps[0]


def test_bound_is_the_sum_of_its_gaussian_terms():
    """Three steps against torch's KL divergences, written out."""
    sde, steps = VPSDE(0.1, 3.0), 3
    prior = gaussian(sde, 0.5)
    z0 = draws((4, *SHAPE), seed=3)()
    found, _ = elbo(prior, z0, steps, draws((4, *SHAPE), seed=4))
    process, draw = Discretization(sde, steps), draws((4, *SHAPE), seed=4)
    Normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    total = kl(Normal(process.alpha_bar[-1].sqrt() * z0, process.variance[-1].sqrt()), Normal(0.0, 1.0))
    for i in (2, 1, 0):
        a, a_bar, beta = process.alpha[i], process.alpha_bar[i], process.beta[i]
        z = a_bar.sqrt() * z0 + (1 - a_bar).sqrt() * draw()
        predicted = prior(z, process.t[i].expand(4))
        mean = (z - beta / (1 - a_bar).sqrt() * predicted) / a.sqrt()
        if i == 0:
            total = total - Normal(mean, beta.sqrt()).log_prob(z0)
        else:
            before = process.alpha_bar[i - 1]
            true_mean = (before.sqrt() * beta * z0 + a.sqrt() * (1 - before) * z) / (1 - a_bar)
            exact = beta * (1 - before) / (1 - a_bar)
            np.testing.assert_allclose(process.posterior_beta[i], exact, rtol=1e-9)
            total = total + kl(Normal(true_mean, exact.sqrt()), Normal(mean, beta.sqrt()))
    np.testing.assert_allclose(found, -total.sum(dim=(1, 2, 3)).detach(), rtol=1e-6)


@pytest.mark.parametrize("sde", [SubVPSDE(0.1, 20.0), VESDE(1e-4, 100.0)])
def test_other_diffusions_are_refused(sde):
    with pytest.raises(LSGMError, match="use the solver rk45 and the estimator ode"):
        Discretization(sde, 10)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, math.nan])
def test_no_steps_are_refused(steps):
    prior, draw = gaussian(SDES[0], 0.25), draws((2, *SHAPE))
    for call in (lambda: sample(prior, draw(), steps, draw), lambda: elbo(prior, draw(), steps, draw)):
        with pytest.raises(LSGMError, match="steps: expected a whole number of at least 1, found"):
            call()


def test_latents_that_are_not_finite_are_no_samples():
    """Clamping would make 3 of infinity."""
    prior, draw = gaussian(SDES[0], 0.25), draws((2, *SHAPE))
    with pytest.raises(SolverError, match="ancestral: the result is not finite"):
        sample(prior, draw() + math.inf, 3, draw)


class Cosine(SDE):
    """A variance-preserving diffusion that is none of ours: alpha_bar = cos^2(0.49 pi t)."""

    variance_preserving = True

    def alpha_bar(self, t):
        return torch.cos(0.49 * math.pi * t).square()

    def variance(self, t):
        return torch.sin(0.49 * math.pi * t).square()

    def mean_coefficient(self, t):
        return torch.cos(0.49 * math.pi * t)

    def diffusion_squared(self, t):
        return 0.98 * math.pi * torch.tan(0.49 * math.pi * t)

    def drift(self, t):
        return -0.5 * self.diffusion_squared(t)

    def time_at_variance(self, variance):
        return torch.asin(variance.sqrt()) / (0.49 * math.pi)


def test_another_variance_preserving_diffusion_is_sampled():
    """Mean 0 and variance 0.25, to 5 %: that of the latents that the exact prediction belongs to."""
    prior, draw = gaussian(Cosine(), 0.25), draws((3000, *SHAPE))
    found = sample(prior, draw(), 300, draw).y
    assert found.var().item() == pytest.approx(0.25, rel=0.05)
