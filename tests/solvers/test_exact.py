"""Where a form has a straight path, one evaluation is exact; and samples of Gaussians have their moments."""

import math

import numpy as np
import pytest
import torch

from lsgm.noise_schedule import NoiseSchedule
from lsgm.solvers.schedule import time_grid

D = 4


def ends(sde, time_eps=0.01):
    return NoiseSchedule.of(sde, torch.tensor([1.0, time_eps], dtype=torch.float64))


def test_standard_normal_data_need_one_evaluation(sde, noise, of_parts, solve):
    """z / R does not move in the velocity form, for any SDE, grid, order and solver."""
    prior, (start, end) = of_parts(sde, torch.zeros(1, D), 1.0), ends(sde).radius
    expected = noise * math.sqrt(sde.base_variance) * end / start
    for settings in ({"steps": 1}, {"steps": 1, "solver": "euler", "form": "velocity"}, {"steps": 3, "order": 3},
                     {"steps": 2, "solver": "heun", "form": "velocity"},
                     {"steps": 4, "solver": "rk4", "form": "velocity", "grid": "edm"}):  # fmt: skip
        found = solve(prior, noise, **settings)
        np.testing.assert_allclose(found.y, expected, rtol=1e-12, atol=1e-13)
        assert found.nfe == settings["steps"]
    assert not torch.allclose(solve(prior, noise, form="data", order=1, steps=1).y, expected, rtol=1e-2)


def test_one_point_needs_one_evaluation(sde, noise, of_parts, solve):
    """All data are one point x0: the noise is constant along a path, and the prediction of z0 is x0."""
    point = torch.tensor([[0.5, -1.0, 2.0, 0.0]], dtype=torch.float64)
    prior, schedule = of_parts(sde, point, 0.0), ends(sde)
    (m, m_end), (sigma, sigma_end), x0 = schedule.mean, schedule.sigma, point.view(1, 2, 2, 1)
    epsilon = (noise * math.sqrt(sde.base_variance) - m * x0) / sigma
    expected = m_end * x0 + sigma_end * epsilon
    tolerance = 1e-9 * epsilon.abs().max().item() / m.item()  # rounding of the path's first point is enlarged by 1 / m
    for settings in ({"form": "noise"}, {"form": "data"}, {"form": "data", "corrector": True}, {"solver": "ddim"}):
        for steps in (1, 4):
            found = solve(prior, noise, steps=steps, **settings)
            np.testing.assert_allclose(found.y, expected, atol=tolerance)
    np.testing.assert_allclose(
        solve(prior, noise, solver="ddim", steps=2, denoise=True).y, x0.expand_as(noise), atol=tolerance
    )
    assert not torch.allclose(solve(prior, noise, steps=1).y, expected, rtol=1e-2)


def response(solve, prior, start, steps, **settings):
    """The variance of a latent at the end, from the solver's response to the start and to each draw: it is linear.

    The start has the variance ``start`` times that of the base distribution.
    """

    def unit(index):
        found = torch.zeros(1 + steps, 2, 2, 1, dtype=torch.float64)
        found[index] = 1.0
        return found

    indices = iter(range(1, 1 + steps))
    solution = solve(prior, math.sqrt(start) * unit(0), lambda: unit(next(indices)), steps=steps, **settings)
    assert next(indices, None) is None  # one draw a step
    return solution.y[:, 0, 0, 0].square().sum().item()


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_noisy_steps_have_their_order_in_the_variance(sde, of_parts, solve, tau):
    """Data N(0, 0.25 I): the variance that all draws leave together converges to that of the diffused data.

    Of order 2 at most, as what the noise does within a step is not resolved; three values have a smaller error.
    """
    prior, schedule = of_parts(sde, torch.zeros(1, D), 0.25), ends(sde)
    start, truth = (0.25 * schedule.mean.square() + schedule.sigma.square()).tolist()
    fine = {}
    for order in (1, 2, 3):
        found = [
            response(solve, prior, start / sde.base_variance, steps, form="data", order=order, tau=tau)
            for steps in (64, 128)
        ]
        coarse, fine[order] = (abs(variance / truth - 1) for variance in found)
        if order < 3:
            assert math.log2(coarse / fine[order]) == pytest.approx(order, rel=0.13)
    assert fine[3] < fine[2] / 4 < fine[1] / 40


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_samples_of_a_gaussian(sde, of_parts, solve, tau):
    """10,000 samples in 100 evaluations: mean and covariance within five standard errors, and 1 % for the steps."""
    mean = torch.tensor([[0.3, -0.2, 0.1, 0.0]], dtype=torch.float64)
    prior, n = of_parts(sde, mean, 0.25), 10_000
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(n, 2, 2, 1, generator=generator, dtype=torch.float64)

    z = solve(prior, draw(), draw, form="data", order=2, steps=100, tau=tau).y.flatten(1)
    m, sigma = ends(sde).mean[1].item(), ends(sde).sigma[1].item()
    variance = 0.25 * m**2 + sigma**2
    # the base N(0, I) stands for N(m_1 mean, I), an error that is the model's: up to 0.03 of the mean is left of it
    np.testing.assert_allclose(z.mean(0), m * mean[0], atol=5 * math.sqrt(variance / n) + 0.03 * 0.3)
    error = 5 * variance * math.sqrt(2 / n) + 0.01 * variance
    np.testing.assert_allclose(z.T.cov(), variance * np.eye(D), atol=error)


def test_noise_needs_its_draws(mixture, noise, solve):
    """Without it none is drawn; with it one a step, and other draws give other samples."""
    settings = {"form": "data", "tau": 0.5, "steps": 5}
    found = []
    for seed in (0, 0, 1):
        generator, count = torch.Generator().manual_seed(seed), []

        def draw(generator=generator, count=count):
            count.append(1)
            return torch.randn(noise.shape, generator=generator, dtype=torch.float64)

        found.append(solve(mixture, noise, draw, **settings).y)
        assert len(count) == 5
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2], atol=1e-2)


def test_a_path_that_has_arrived_stays(sde):
    """A schedule of one step has two times; the last one is exactly the end."""
    for grid in ("t", "phi", "log_snr", "edm"):
        schedule = time_grid(sde, grid, 1, 0.0123)
        assert schedule.t.tolist() == [1.0, 0.0123]
