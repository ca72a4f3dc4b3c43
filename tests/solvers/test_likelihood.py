"""Likelihoods with fixed steps against the closed-form density of a mixture of Gaussians."""

import math

import numpy as np
import pytest
import torch

from lsgm.config import EstimatorConfig
from lsgm.errors import LSGMError, SolverError
from lsgm.per_sample_noise import PerSampleNoise
from lsgm.solvers.likelihood import estimate_log_prob, evaluations
from lsgm.solvers.probability_flow import fixed_steps_log_prob, log_prob

TIME_EPS = 0.01
ORDERS = {"ab": 2, "heun": 2, "rk4": 4}


@pytest.fixture
def matched(mixture):
    """The mixture's prior with the density that it has at t = 1 as its base: the ODE's log p is then exact."""
    mixture.sde.base_log_prob = lambda z1: mixture.network.log_prob(z1, 1.0)
    return mixture


@pytest.fixture
def z0():
    return torch.randn(6, 2, 2, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("solver", ORDERS)
def test_order_and_limit_with_the_exact_trace(matched, z0, solver):
    """Twice the evaluations, 2^order times the accuracy, towards the density of the data diffused to `time_eps`."""
    exact, errors = matched.network.log_prob(z0, TIME_EPS), []
    for steps in (32, 64):
        values, nfe = fixed_steps_log_prob(matched, z0, None, solver, steps, TIME_EPS)
        assert nfe == steps
        errors.append((values - exact).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[solver], rel=0.13)
    assert errors[1] < {"ab": 6e-2, "heun": 6e-2, "rk4": 2e-3}[solver]


def test_rk45_reaches_the_same(matched, z0):
    exact = matched.network.log_prob(z0, TIME_EPS)
    np.testing.assert_allclose(log_prob(matched, z0, None, 1e-6, TIME_EPS)[0], exact, atol=1e-4)


def test_a_dozen_evaluations_are_enough(matched, z0):
    """rk4 with the default of 16: 0.02 nats."""
    exact = matched.network.log_prob(z0, TIME_EPS)
    values, nfe = estimate_log_prob(matched, z0, PerSampleNoise(0, range(6)), EstimatorConfig(probe="exact"), TIME_EPS)
    assert nfe == 16
    np.testing.assert_allclose(values, exact, atol=0.02)


def test_probes_are_unbiased(matched, z0):
    """2,000 Rademacher probes of an image: the mean within four standard errors. Of forty each, a fortieth of the
    variance, to a half for 50 values."""
    n = 2000
    same = z0[:1].expand(n, -1, -1, -1)
    probes = torch.randn(same.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).sign()
    exact = fixed_steps_log_prob(matched, z0[:1], None, "rk4", 16, TIME_EPS)[0]
    values, _ = fixed_steps_log_prob(matched, same, probes, "rk4", 16, TIME_EPS)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(n)
    several, _ = fixed_steps_log_prob(matched, same[:50], probes.view(40, 50, 2, 2, 1), "rk4", 16, TIME_EPS)
    assert several.var().item() == pytest.approx(values.var().item() / 40, rel=0.5)


def test_normal_data_leave_no_noise(sde, z0, of_parts):
    """One step is exact for N(0, I), whatever the probes."""
    prior = of_parts(sde, torch.zeros(1, 4), 1.0)
    sde.base_log_prob = lambda z1: prior.network.log_prob(z1, 1.0)
    exact = prior.network.log_prob(z0, TIME_EPS)
    for solver, steps in (("ab", 1), ("heun", 2), ("rk4", 4)):
        for seed in (0, 1):
            probes = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            values, _ = fixed_steps_log_prob(prior, z0, probes, solver, steps, TIME_EPS)
            np.testing.assert_allclose(values, exact, rtol=1e-10)


@pytest.mark.parametrize("solver", ORDERS)
def test_an_image_has_its_value_in_any_batch(mixture, z0, solver):
    settings = EstimatorConfig(solver=solver, steps=8)
    together, _ = estimate_log_prob(mixture, z0, PerSampleNoise(2, range(6)), settings, TIME_EPS)
    alone = [estimate_log_prob(mixture, z0[i : i + 1], PerSampleNoise(2, [i]), settings, TIME_EPS)[0] for i in range(6)]
    np.testing.assert_allclose(together, torch.cat(alone), rtol=1e-9)


@pytest.mark.parametrize("sde", ["geometric_vpsde", "vesde"], indirect=True)
def test_it_starts_at_0_where_there_is_noise(matched, z0):
    """The density is then that of the data with sigma2_0."""
    exact = matched.network.log_prob(z0, 0.0)
    np.testing.assert_allclose(log_prob(matched, z0, None, 1e-6, 0.0)[0], exact, atol=1e-3)
    np.testing.assert_allclose(fixed_steps_log_prob(matched, z0, None, "rk4", 64, 0.0)[0], exact, atol=5e-3)


def test_numbers_of_evaluations_by_default():
    found = {name: evaluations(EstimatorConfig(estimator=name)) for name in ("ode", "bound", "discretized")}
    assert found == {"ode": 16, "bound": 32, "discretized": 1000}
    assert evaluations(EstimatorConfig(steps=8)) == 8


@pytest.mark.parametrize("sde", ["vpsde"], indirect=True)
def test_what_cannot_be_estimated_is_refused(mixture, z0):
    for call, message in (
        (lambda: fixed_steps_log_prob(mixture, z0, z0, "euler", 8, TIME_EPS), "solver: expected one of rk4, heun, ab"),
        (lambda: fixed_steps_log_prob(mixture, z0, z0, "rk45", 8, TIME_EPS), "solver: expected one of rk4, heun, ab"),
        (
            lambda: fixed_steps_log_prob(mixture, z0, z0, "rk4", 6, TIME_EPS),
            "steps: expected a multiple of 4, the evaluations of a step of rk4, found 6",
        ),
        (lambda: fixed_steps_log_prob(mixture, z0, z0, "ab", 0, TIME_EPS), "steps: expected a whole number"),
        (lambda: fixed_steps_log_prob(mixture, z0, z0[:2], "ab", 4, TIME_EPS), r"probes: expected \[P, 6, .*found"),
    ):
        with pytest.raises(LSGMError, match=f"^{message}"):
            call()
    for solver in ORDERS:
        with pytest.raises(SolverError, match=f"{solver}: the result is not finite"):
            fixed_steps_log_prob(mixture, z0 * math.nan, z0, solver, 8, TIME_EPS)
