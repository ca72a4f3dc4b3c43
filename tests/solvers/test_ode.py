"""The ODE solver against scipy, sampling and likelihood against Gaussian closed forms."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from lsgm.config import SampleConfig
from lsgm.errors import LSGMError, SolverError
from lsgm.nfe import PER_STEP
from lsgm.prior import ScorePrior
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.solvers.bound import variational_bound
from lsgm.solvers.probability_flow import drift, fixed_steps_log_prob, log_prob
from lsgm.solvers.rk45 import rk45
from lsgm.solvers.runge_kutta import METHODS, MIDPOINTS, runge_kutta
from lsgm.solvers.sampling import rk45_sample, runge_kutta_sample

SHAPE = (2, 2, 2)
DIMENSIONS = math.prod(SHAPE)
EPS = 1e-5


class GaussianNoise(nn.Module):
    """The exact noise prediction where z0 ~ N(mean, covariance): -sigma_t * score of N(m mean, m^2 cov + sigma^2 I)."""

    def __init__(self, sde, mean, covariance):
        super().__init__()
        self.sde, self.mean, self.covariance = sde, mean, covariance

    def forward(self, z_t, t):
        m, v = self.sde.mean_coefficient(t[0]), self.sde.variance(t[0])
        total = m**2 * self.covariance + v * torch.eye(DIMENSIONS, dtype=z_t.dtype)
        delta = z_t.flatten(1) - m * self.mean
        return (v.sqrt() * torch.linalg.solve(total, delta.T).T).view_as(z_t)


SDES = {
    "vpsde": VPSDE(0.1, 20.0),
    "geometric": GeometricVPSDE(1e-5, 0.9999, 0.0),
    "sub": SubVPSDE(0.1, 20.0),
    "ve": VESDE(1e-5, 2500.0),
}


@pytest.fixture(params=SDES)
def gaussian(request):
    """A prior whose score is exact for a correlated Gaussian, its mean and its covariance."""
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(DIMENSIONS, DIMENSIONS, generator=generator, dtype=torch.float64) / 3
    covariance = factor @ factor.T + 0.1 * torch.eye(DIMENSIONS, dtype=torch.float64)
    # small: N(0, I) at t = 1 stands for N(m_1 mean, ...) with m_1 = 6.6e-3, an error that belongs to the model
    mean = 0.1 * torch.randn(DIMENSIONS, generator=generator, dtype=torch.float64)
    sde = SDES[request.param]
    prior = ScorePrior(sde, GaussianNoise(sde, mean, covariance), SHAPE, mixing_logit=60.0).double()
    return prior, mean, covariance


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
@pytest.mark.parametrize("t1", [3.0, -2.0])
def test_rk45_takes_the_steps_of_scipy(tol, t1):
    """Same evaluations, same result, and exactly at the end point."""

    def numpy_f(t, y):
        return np.sin(3 * t) * y[::-1] - 0.3 * y + np.cos(t)

    start = np.linspace(-1, 2, 6)
    scipy = solve_ivp(numpy_f, (0.0, t1), start, method="RK45", rtol=tol, atol=tol)
    times = []

    def f(t, y):
        times.append(t)
        return torch.from_numpy(numpy_f(t, y.numpy().ravel())).view_as(y)

    ours = rk45(f, torch.from_numpy(start).view(2, 3), 0.0, t1, tol)
    assert ours.nfe == scipy.nfev == len(times)
    np.testing.assert_allclose(ours.y.ravel(), scipy.y[:, -1], rtol=1e-10)
    assert times[-1] == t1 and max(map(abs, times)) <= abs(t1)


def test_rk45_converges_to_the_exact_solution():
    y = rk45(lambda t, y: -2 * t * y, torch.ones(3, dtype=torch.float64), 0.0, 1.5, 1e-9).y
    np.testing.assert_allclose(y, math.exp(-(1.5**2)), rtol=1e-7)


def test_rk45_reports_a_state_that_is_not_finite():
    with pytest.raises(LSGMError, match="t = "):
        rk45(lambda t, y: y * math.nan, torch.ones(3), 0.0, 1.0, 1e-5)


def unused():
    raise AssertionError("the ODE draws no noise")


def by_rk45(prior, noise, tol, time_eps):
    return rk45_sample(prior, noise, unused, SampleConfig.model_construct(tol=tol, time_eps=time_eps))


def test_sampler_reproduces_a_gaussian(gaussian):
    """The ODE is linear here: 2,000 equal and opposite starts give mean and covariance by their exact propagation."""
    prior, mean, covariance = gaussian
    basis = torch.eye(DIMENSIONS, dtype=torch.float64)
    starts = torch.cat([torch.zeros(1, DIMENSIONS, dtype=torch.float64), basis]).view(-1, *SHAPE)
    ends = by_rk45(prior, starts, tol=1e-8, time_eps=EPS).y.flatten(1)
    propagated_mean, columns = ends[0], (ends[1:] - ends[0]).T  # z0 = propagated_mean + columns @ z1
    # the base has mean 0, not m_1 mean: that is left of it, 1 in 50 for the VESDE
    np.testing.assert_allclose(propagated_mean, mean, atol=1e-2)
    np.testing.assert_allclose(columns @ columns.T, covariance, atol=2e-3)


def test_sampler_statistics(gaussian):
    """20,000 samples: mean and covariance within four standard errors and the base's own error."""
    prior, mean, covariance = gaussian
    n = 20_000
    noise = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = by_rk45(prior, noise, tol=1e-5, time_eps=EPS).y.flatten(1)
    np.testing.assert_allclose(z.mean(0), mean, atol=4 * covariance.diagonal().max().sqrt().item() / n**0.5 + 5e-3)
    np.testing.assert_allclose(z.T.cov(), covariance, atol=4 * 1.5 * covariance.diagonal().max().item() / n**0.5)


def test_likelihood_of_a_gaussian_is_exact(gaussian):
    """log p(z0) with the exact trace against the closed form: 3e-3 nats per dimension, which the base's mean takes."""
    prior, mean, covariance = gaussian
    truth = torch.distributions.MultivariateNormal(mean, covariance)
    torch.manual_seed(0)
    z0 = truth.sample((4,))
    values, nfe = log_prob(prior, z0.view(-1, *SHAPE), None, 1e-7, EPS)
    error = (values - truth.log_prob(z0)).abs().max().item() / DIMENSIONS
    assert error < 3e-3
    assert nfe > 0


@pytest.mark.parametrize("probe", ["gaussian", "rademacher"])
@pytest.mark.parametrize("gaussian", ["vpsde"], indirect=True)
def test_hutchinson_probes_are_unbiased(gaussian, probe):
    """Mean over 4,000 images of one probe, and of three, within four standard errors of the exact value.

    Three probes have a third of the variance.
    """
    prior, mean, covariance = gaussian
    truth = torch.distributions.MultivariateNormal(mean, covariance)
    torch.manual_seed(0)
    z0 = truth.sample((1,)).expand(4000, -1).reshape(-1, *SHAPE)
    probes = torch.randn(3, *z0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if probe == "rademacher":
        probes = probes.sign()
    exact = truth.log_prob(z0[0].flatten()).item()
    spread = []
    for chosen in (probes[0], probes):
        values, _ = log_prob(prior, z0, chosen, 1e-4, EPS)
        standard_error = values.std().item() / 4000**0.5
        assert abs(values.mean().item() - exact) < 4 * standard_error + 1e-3 * DIMENSIONS
        spread.append(values.var().item())
    assert spread[1] == pytest.approx(spread[0] / 3, rel=0.25)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_fixed_grids_have_their_order(method, order):
    """Twice the steps: 2^order times the accuracy; NFE as counted; the nodes are those of the grid, in any spacing."""
    exact = math.exp(-(1.5**2))
    errors, seen = [], []

    def f(i, y):
        seen.append(i)
        return -2 * x[i] * y

    for steps in (40, 80):
        seen.clear()
        ends = 1.5 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.2
        x = ends.tolist()
        if method in MIDPOINTS:
            x = torch.stack([ends, torch.cat([0.5 * (ends[1:] + ends[:-1]), ends[:1]])], dim=1).flatten()[:-1].tolist()
        y = runge_kutta(f, torch.ones(3, dtype=torch.float64), x, method)
        assert len(seen) == steps * PER_STEP[method]
        assert max(seen) == len(x) - 1 - (method == "euler") and min(seen) == 0
        errors.append((y - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", METHODS)
@pytest.mark.parametrize("gaussian", ["vpsde", "sub"], indirect=True)
def test_fixed_grids_reach_what_rk45_reaches(gaussian, solver):
    prior, _, _ = gaussian
    noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = by_rk45(prior, noise, tol=1e-7, time_eps=1e-3).y
    steps = 400
    settings = SampleConfig(count=1, solver=solver, steps=steps, time_eps=1e-3)
    found = runge_kutta_sample(prior, noise, unused, settings.resolved())
    assert found.nfe == steps
    np.testing.assert_allclose(found.y, exact, atol={"euler": 0.1, "heun": 5e-3, "rk4": 1e-3}[solver])


def test_normal_prior_is_a_fixed_point():
    """alpha -> 0: the ODE does not move N(0, I), and its likelihood is the normal density."""
    prior = ScorePrior(VPSDE(0.1, 20.0), nn.Identity(), SHAPE, mixing_logit=-60.0).double()
    prior.network.forward = lambda z, t: torch.zeros_like(z)
    z = torch.randn(16, *SHAPE, dtype=torch.float64)
    solution = by_rk45(prior, z, tol=1e-6, time_eps=EPS)
    np.testing.assert_allclose(solution.y, z, atol=1e-9)
    values, _ = log_prob(prior, z, torch.randn_like(z), 1e-6, EPS)
    np.testing.assert_allclose(values, torch.distributions.Normal(0, 1).log_prob(z).sum(dim=(1, 2, 3)), atol=1e-8)


def growth(t, y):
    return y


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: rk45(growth, y, 0.5, 0.5, 1e-3), "t0, t1: expected two different times, found 0.5 twice"),
        (lambda y: rk45(growth, y, math.nan, 1.0, 1e-3), "t0: expected a number that is finite, found nan"),
        (lambda y: rk45(growth, y, 0.0, math.inf, 1e-3), "t1: expected a number that is finite, found inf"),
        (lambda y: rk45(growth, y, 0.0, 1.0, 0.0), "tol: expected a number above 0 and at most 1, found 0"),
        (lambda y: rk45(growth, y, 0.0, 1.0, -1e-3), "tol: expected .*, found -0.001"),
        (lambda y: rk45(growth, y, 0.0, 1.0, math.nan), "tol: expected .*, found nan"),
        (lambda y: rk45(growth, y[:0], 0.0, 1.0, 1e-3), r"y: expected .*, found torch.float64 of the shape \[0\]"),
        (lambda y: rk45(growth, y.long(), 0.0, 1.0, 1e-3), r"y: expected floating-point values, found torch.int64"),
        (lambda y: rk45(growth, y, 0.0, 1.0, 1e-3, math.nan), "max_nfe: expected a whole number of at least 1, found"),
        (lambda y: runge_kutta(growth, y, [0, 1], "midpoint"), "method: expected one of euler, heun, rk4, found 'mid"),
    ],
)
def test_solvers_refuse_what_they_cannot_solve(call, message):
    with pytest.raises(LSGMError, match=f"^{message}"):
        call(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("gaussian", ["vpsde"], indirect=True)
def test_the_flow_refuses_what_it_cannot_solve(gaussian):
    prior, z = gaussian[0], torch.zeros(2, *SHAPE, dtype=torch.float64)
    calls = (
        lambda time_eps: by_rk45(prior, z, tol=1e-5, time_eps=time_eps),
        lambda time_eps: log_prob(prior, z, z, time_eps=time_eps),
        lambda time_eps: fixed_steps_log_prob(prior, z, z, "rk4", 4, time_eps),
        lambda time_eps: variational_bound(prior, z, 4, lambda: z, time_eps),
    )
    for call in calls:
        for time_eps in (1.0, -1.0, math.nan):
            with pytest.raises(LSGMError, match="time_eps: expected a number above 0 and below 1, found"):
                call(time_eps)
        with pytest.raises(LSGMError, match="time_eps: sigma_t is 0 at t = 0; choose a larger time_eps"):
            call(0.0)
    for probes in (z[:1], z.new_zeros(0, *z.shape), z[None, :, :1]):
        with pytest.raises(LSGMError, match=r"probes: expected \[P, 2, .*found \["):
            log_prob(prior, z, probes)
    for t1 in (0.0, 1e-320):
        with pytest.raises(SolverError, match=r"the ODE has no solution at t = .* larger time_eps"):
            rk45(partial(drift, prior), z, 0.1, t1, 1e-1)
    with pytest.raises(LSGMError, match="y: expected .* of the shape"):
        log_prob(prior, z[:0], z[:0])
