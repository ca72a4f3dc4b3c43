"""The variational bound in continuous time against closed forms for Gaussian latents."""

import math

import numpy as np
import pytest
import torch

from lsgm.config import EstimatorConfig
from lsgm.errors import LSGMError
from lsgm.noise_schedule import NoiseSchedule, time_at_noise_level
from lsgm.normal_error import gauss_legendre, normal_error
from lsgm.per_sample_noise import PerSampleNoise
from lsgm.solvers.bound import variational_bound
from lsgm.solvers.likelihood import estimate_log_prob

D, TIME_EPS = 4, 0.01


def draws(like, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(like.shape, generator=generator, dtype=torch.float64)


def latents(n, variance, seed=1):
    return math.sqrt(variance) * draws(torch.empty(n, 2, 2, 1), seed)()


def gaussian(z, variance):
    """log N(z; 0, variance I), [B]."""
    return -0.5 * (z.square().flatten(1).sum(1) / variance + D * math.log(math.tau * variance))


def bound_in_closed_form(sde, z0, variance):
    """For data N(0, variance I) and their exact prediction: the mean of log p_t(z_t) over q(z_t | z0) at `time_eps`,
    less what the base distribution is off at t = 1, KL(q || base) - KL(q || p_1)."""
    ends = NoiseSchedule.of(sde, torch.tensor([1.0, TIME_EPS], dtype=torch.float64))
    (m1, m), (s1, s) = ends.mean.tolist(), ends.sigma.tolist()
    norm = z0.square().flatten(1).sum(1)

    def mean_log_prob(m, s, variance):
        return -0.5 * ((m**2 * norm + D * s**2) / variance + D * math.log(math.tau * variance))

    exact = mean_log_prob(m, s, m**2 * variance + s**2)
    return exact + mean_log_prob(m1, s1, sde.base_variance) - mean_log_prob(m1, s1, m1**2 * variance + s1**2)


@pytest.mark.parametrize("variance", [0.25, 3.0])
def test_expectation_is_that_of_the_closed_form(sde, of_parts, variance):
    """Three latents, 4,000 times each, 32 nodes: within four standard errors and 1e-3 nats of the quadrature."""
    prior, n = of_parts(sde, torch.zeros(1, D), variance), 4000
    z0 = latents(3, variance)
    found, nfe = variational_bound(prior, z0.repeat_interleave(n, 0), 32, draws(z0.repeat_interleave(n, 0)), TIME_EPS)
    assert nfe == 32 and found.dtype == torch.float64
    found = found.view(3, n)
    error = (found.mean(1) - bound_in_closed_form(sde, z0, variance)).abs()
    assert (error < 4 * found.std(1) / math.sqrt(n) + 1e-3).all()


def test_bound_of_normal_data_is_exact_for_any_draw(sde, of_parts):
    """The control variate is then all there is: no noise, and one node is enough."""
    prior, z0 = of_parts(sde, torch.zeros(1, D), 1.0), latents(5, 1.0)
    sigma2_0 = sde.variance(torch.zeros(1)).item()  # normal_noise leaves sigma2_0 out
    for nodes, seed in ((1, 0), (8, 1)):
        found, _ = variational_bound(prior, z0, nodes, draws(z0, seed), TIME_EPS)
        np.testing.assert_allclose(found, bound_in_closed_form(sde, z0, 1.0), atol=1e-6 + 300 * sigma2_0)


def test_bound_is_below_the_likelihood(mixture):
    """Of 4,000 latents of the mixture, whose prediction is exact: not above it on average by more than four standard
    errors. Near t = 0 hardly anything is lost; at t = 0.7 it is what the noise there hides.

    -log p(z0) <= D/2 log(2 pi e sigma^2 / m^2) + KL(q(z_t | z0) || p_t) at t = `time_eps`: the bound less D log m.
    """
    generator, n = torch.Generator().manual_seed(4), 4000
    means = mixture.network.means[torch.randint(3, (n,), generator=generator)]
    z0 = (means + math.sqrt(0.3) * torch.randn(n, D, generator=generator, dtype=torch.float64)).view(n, 2, 2, 1)
    gaps = []
    for time_eps in (1e-3, 0.7):
        found, _ = variational_bound(mixture, z0, 32, draws(z0), time_eps)
        m = mixture.sde.mean_coefficient(torch.tensor(time_eps, dtype=torch.float64))
        gap = mixture.network.log_prob(z0, 0.0) - (found + D * m.log())
        gaps.append(gap.mean().item())
        assert gaps[-1] > -4 * gap.std().item() / math.sqrt(n)
    assert gaps[0] < 0.1 < gaps[1]


@pytest.mark.parametrize("variance", [0.7, 1.5])
def test_control_variate_takes_noise_out(sde, of_parts, variance):
    """Without it: the same expectation with the same draws, and many times the variance."""
    prior, n = of_parts(sde, torch.zeros(1, D), variance), 1000
    z0 = latents(1, variance).expand(n, -1, -1, -1)
    found, _ = variational_bound(prior, z0, 16, draws(z0), TIME_EPS)

    schedule, node_weights = gauss_legendre(sde, 16, TIME_EPS)
    draw, plain = draws(z0), torch.zeros(n, dtype=torch.float64)
    for t, m, sigma, w in zip(schedule.t, schedule.mean, schedule.sigma, node_weights, strict=True):
        noise = draw()
        predicted = prior(m * z0 + sigma * noise, t[None])
        plain -= w * (noise - predicted).square().flatten(1).sum(1)
    plain += (found - plain).mean()  # what does not depend on the draws
    assert plain.var() > 4 * found.var()


def test_nodes_integrate_the_normal_error(sde):
    """sum w E||noise - eps_normal||^2 against quadrature in t; the expectation against Monte Carlo."""
    z0 = latents(1, 1.0)
    schedule, w = gauss_legendre(sde, 64, TIME_EPS)
    assert (schedule.half_log_snr.diff() > 0).all()
    ends = NoiseSchedule.of(sde, torch.tensor([1.0, TIME_EPS], dtype=torch.float64)).half_log_snr
    assert w.sum().item() == pytest.approx((ends[1] - ends[0]).item(), rel=1e-10)
    a, b = normal_error(sde, schedule)
    lam = torch.linspace(*ends.tolist(), 20_001, dtype=torch.float64)
    fine = NoiseSchedule.of(sde, time_at_noise_level(sde, lam.neg().exp(), TIME_EPS))
    for coarse, exact in zip((a, b), normal_error(sde, fine), strict=True):
        assert (w * coarse).sum().item() == pytest.approx(torch.trapezoid(exact, lam).item(), rel=1e-5)
    t, m, sigma = schedule.t[20], schedule.mean[20], schedule.sigma[20]
    noise = draws(torch.empty(40_000, 2, 2, 1), 5)()
    error = (noise - sde.normal_noise(m * z0 + sigma * noise, t)).square().flatten(1).sum(1)
    expected = a[20] * D + b[20] * z0.square().sum()
    assert abs(error.mean() - expected) < 4 * error.std() / 200


def test_it_is_an_estimator(mixture):
    """By the configuration: an image's value depends on its own draws alone."""
    z0, settings = latents(4, 1.0), EstimatorConfig(estimator="bound", steps=6)
    together, nfe = estimate_log_prob(mixture, z0, PerSampleNoise(1, range(4)), settings, TIME_EPS)
    alone = [estimate_log_prob(mixture, z0[i : i + 1], PerSampleNoise(1, [i]), settings, TIME_EPS)[0] for i in range(4)]
    assert nfe == 6
    np.testing.assert_allclose(together, torch.cat(alone), rtol=1e-10)
    default = EstimatorConfig(estimator="bound")
    assert estimate_log_prob(mixture, z0, PerSampleNoise(1, range(4)), default, TIME_EPS)[1] == 32


def test_no_backward_pass_is_needed(mixture):
    z0 = latents(2, 1.0).requires_grad_()
    assert not variational_bound(mixture, z0, 2, draws(z0), TIME_EPS)[0].requires_grad


@pytest.mark.parametrize("nodes", [0, 1.5, -3])
def test_no_nodes_are_refused(mixture, nodes):
    z0 = latents(2, 1.0)
    with pytest.raises(LSGMError, match="steps: expected a whole number of at least 1, found"):
        variational_bound(mixture, z0, nodes, draws(z0), TIME_EPS)
