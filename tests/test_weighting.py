"""Time sampling against quadrature, statistics of its draws, and its two kinds of proposal against each other."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.weighting import TimeSampler, closed_form, coefficient, tabulated

EPS = 0.01
SDES = {
    "vpsde": VPSDE(0.1, 20.0),
    "vpsde, s0": VPSDE(0.1, 20.0, 1e-3),
    "geometric": GeometricVPSDE(3e-5, 0.999, 3e-5),
    "geometric, s0 = 0": GeometricVPSDE(1e-4, 0.99, 0.0),
    "sub": SubVPSDE(0.1, 20.0),
    "ve": VESDE(3e-5, 400.0),
}
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
each_weighting = pytest.mark.parametrize("weighting", ["ll", "un", "re", "rescale"])


def c(sde, weighting, t):
    """The published coefficients; those of `rescale` for the VESDE are ours (1 - sigma^2 is negative there)."""
    g2, v = sde.diffusion_squared(t), sde.variance(t)
    rescale = 0.5 * (1 + v - sde.sigma2_0) if isinstance(sde, VESDE) else 0.5 / (1 - v)
    return {"ll": g2 / (2 * v), "un": torch.ones_like(t), "re": g2 / 2, "rescale": rescale}[weighting]


def integral(f):
    """Over [EPS, 1], in pieces: some integrands live near one of the ends."""
    edges = [EPS, 0.03, 0.1, 0.3, 0.6, 0.8, 0.9, 0.97, 1.0]
    time = lambda t: torch.tensor(t, dtype=torch.float64)  # noqa: E731
    return sum(quad(lambda t: f(time(t)).item(), a, b, limit=200)[0] for a, b in itertools.pairwise(edges))


@each_sde
@each_weighting
@pytest.mark.parametrize("sampling", ["uniform", "importance"])
def test_estimates_the_weighted_integral(sde, weighting, sampling):
    """E[weight h(t)] is the integral of c h over [EPS, 1], E[likelihood_weight h(t)] that of g^2 / (2 sigma^2) h.

    Uniform sampling leaves out the factor 1 - EPS. The expectation over rho is a midpoint rule: relative error 1e-4,
    more for the likelihood where the proposal hardly draws the times that it lives on.
    """

    def h(t):
        return sde.alpha_bar(t) * (1 + t)  # the shape of a squared error near alpha = 0, made lopsided

    rho = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    draw = TimeSampler(sde, weighting, sampling, EPS)(rho)
    factor = 1 - EPS if sampling == "uniform" or weighting == "rescale" else 1.0
    assert draw.t.min() >= EPS and draw.t.max() <= 1
    for weight, name, rel in ((draw.weight, weighting, 1e-4), (draw.likelihood_weight, "ll", 3e-3)):
        exact = integral(lambda t, name=name: c(sde, name, t) * h(t))
        assert factor * (weight * h(draw.t)).mean().item() == pytest.approx(exact, rel=rel)


@each_sde
@each_weighting
def test_random_draws_have_the_expectation_of_uniform_ones(sde, weighting):
    """Both estimators, of an error that is not that of normal latents, from 200,000 draws: four standard errors."""
    n, generator = 200_000, torch.Generator().manual_seed(1)
    estimates = []
    for sampling in ("importance", "uniform"):
        draw = TimeSampler(sde, weighting, sampling, EPS)(torch.rand(n, generator=generator, dtype=torch.float64))
        values = draw.weight * sde.alpha_bar(draw.t) * (1 + torch.sin(5 * draw.t))
        if sampling == "uniform" or weighting == "rescale":
            values = values * (1 - EPS)
        estimates.append((values.mean().item(), values.var().item() / n))
    (one, var_one), (two, var_two) = estimates
    assert abs(one - two) < 4 * math.sqrt(var_one + var_two)


@each_sde
@each_weighting
def test_importance_draws_follow_their_density(sde, weighting):
    """Histogram of 400,000 draws against c s / Z of the proposal's diffusion; 4.5 standard errors per bin."""
    n = 400_000
    rho = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = TimeSampler(sde, weighting, "importance", EPS)(rho).t
    of = sde.proposal
    fine = torch.linspace(EPS, 1, 20_001, dtype=torch.float64)
    density = c(of, weighting, fine) * of.alpha_bar(fine)
    mass = torch.trapezoid(density.unfold(0, 1001, 1000), dx=1.0)  # 20 bins
    expected = (mass / mass.sum()).numpy()
    counts, _ = np.histogram(t.numpy(), fine[::1000].numpy())
    assert (np.abs(counts / n - expected) < 4.5 * np.sqrt(expected / n) + 1e-5).all()


@pytest.mark.parametrize("sde", [s for n, s in SDES.items() if n != "sub"], ids=[n for n in SDES if n != "sub"])
@pytest.mark.parametrize("weighting", ["ll", "un", "re"])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_tabulated_proposal_agrees_with_the_closed_form(sde, weighting, eps):
    closed, table = closed_form(sde, weighting, eps), tabulated(sde, weighting, eps)
    assert (closed is None) == (isinstance(sde, GeometricVPSDE) and weighting == "un")
    if closed is not None:
        rho = torch.linspace(0, 1, 1001, dtype=torch.float64)
        np.testing.assert_allclose(table.time_at(rho), closed.time_at(rho), rtol=1e-5)
        assert table.integral == pytest.approx(closed.integral, rel=2e-6)


@pytest.mark.parametrize("beta_end", [10.0, 10.01, 10.1, 12.0])
def test_nearly_constant_beta_has_a_proposal(beta_end):
    """Where the closed form for `un` would be the far tail of a Gaussian."""
    sde = VPSDE(10.0, beta_end)
    draw = TimeSampler(sde, "un", "importance", EPS)(torch.linspace(0, 1, 11, dtype=torch.float64))
    exact = tabulated(sde, "un", EPS)
    np.testing.assert_allclose(draw.weight * sde.alpha_bar(draw.t), exact.integral, rtol=1e-5)
    assert draw.t[0] == EPS and draw.t[-1] == pytest.approx(1) and (draw.t.diff() > 0).all()


@pytest.mark.parametrize("name", ["vpsde", "geometric", "ve"])
@each_weighting
def test_importance_sampling_has_no_variance_for_normal_latents(name, weighting):
    """For z0 ~ N(0, I) and alpha = 0 the squared error is m^2 / (m^2 + sigma^2) per dimension: weighted, a constant."""
    sde = SDES[name]
    rho = torch.rand(1000, dtype=torch.float64)

    def spread(sampling):
        draw = TimeSampler(sde, weighting, sampling, EPS)(rho)
        signal, noise = sde.mean_coefficient(draw.t).square(), sde.variance(draw.t)
        term = draw.weight * signal / (signal + noise)
        return (term.std() / term.mean()).item()

    assert spread("importance") < 1e-3  # the published proposals leave sigma2_0 = 3e-5 out
    if weighting != "rescale" and not (name == "geometric" and weighting == "ll"):  # uniform is the best there is
        assert spread("uniform") > 0.2


def test_float32_draws_are_the_rounded_ones():
    """Near t = 1, 1 - sigma^2 is 4e-5: weights in float32 must not be made of it."""
    rho = torch.linspace(0, 1, 101)
    for weighting in ("ll", "un", "re"):
        sampler = TimeSampler(SDES["vpsde"], weighting, "importance", 1e-6)
        single, double = sampler(rho), sampler(rho.double())
        for field in ("t", "weight", "likelihood_weight"):
            assert getattr(single, field).dtype == torch.float32
            np.testing.assert_allclose(getattr(single, field).double(), getattr(double, field), rtol=1e-6)


def test_cross_entropy_of_normal_latents_is_exact():
    """Theorem 1 with z0 ~ N(0, I) and the exact noise prediction must give the entropy of N(0, I) diffused to eps.

    CE at time eps is that of N(0, I) (variance preserving): (1 + log 2 pi) / 2 nats per dimension.
    """
    for name in ("vpsde", "geometric, s0 = 0"):
        sde = SDES[name]
        sampler = TimeSampler(sde, "ll", "importance", EPS)
        draw = sampler(torch.rand(10, dtype=torch.float64))
        per_dimension = draw.weight * sde.alpha_bar(draw.t) + sampler.cross_entropy_constant()
        # the integral stops at t = 1, where the diffusion has nearly, not quite, reached its base
        left = -0.5 * math.log(sde.variance(torch.ones((), dtype=torch.float64)).item())
        np.testing.assert_allclose(per_dimension + left, 0.5 * (1 + math.log(2 * math.pi)), atol=1e-9)


def test_coefficients_are_the_published_ones():
    t = torch.linspace(0.02, 0.98, 7, dtype=torch.float64)
    for sde in SDES.values():
        for weighting in ("ll", "un", "re", "rescale"):
            np.testing.assert_allclose(coefficient(sde, weighting, t), c(sde, weighting, t), rtol=1e-10)


class Quadratic(VPSDE):
    """beta(t) = b t^2, from outside of the library."""

    def beta(self, t):
        return self.beta_end * t.square()

    def beta_integral(self, t):
        return self.beta_end * t**3 / 3


@pytest.mark.parametrize("weighting", ["ll", "un", "re"])
def test_a_subclass_with_another_schedule_has_its_own_proposal(weighting):
    sde = Quadratic(0.1, 20.0, 1e-3)
    t = torch.linspace(0.01, 1, 200_001, dtype=torch.float64)
    density = coefficient(sde, weighting, t) * sde.alpha_bar(t)
    mass = torch.cumulative_trapezoid(density, t)
    proposal, rho = TimeSampler(sde, weighting, "importance", 0.01).proposal, torch.linspace(0.05, 0.95, 19).double()
    assert proposal.integral == pytest.approx(mass[-1].item(), rel=1e-4)
    drawn = mass[torch.searchsorted(t, proposal.time_at(rho)) - 1] / mass[-1]
    torch.testing.assert_close(drawn, rho, rtol=0, atol=1e-3)
