"""The adaptive SDE solver."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lsgm.config import SampleConfig
from lsgm.errors import SolverError
from lsgm.noise_schedule import NoiseSchedule
from lsgm.per_sample_noise import PerSampleNoise
from lsgm.prior import ScorePrior
from lsgm.solvers import adaptive_sde as module
from lsgm.solvers.adaptive_sde import adaptive_sde

SHAPE = (2, 2, 1)


def sample(prior, images, tol=0.02, time_eps=0.01, atol=0.01):
    """Solution for the images of these numbers: each has draws of its own."""
    streams = PerSampleNoise(3, images)

    def draw():
        return streams.normal(SHAPE).double()

    start = draw() * math.sqrt(prior.sde.base_variance)
    return adaptive_sde(prior, start, draw, time_eps, tol, atol)


def test_samples_of_a_gaussian(sde, of_parts):
    """600 samples at tolerance 0.02: mean and variance within five standard errors and 3 % for the steps."""
    mean = torch.tensor([[0.3, -0.2, 0.1, 0.0]], dtype=torch.float64)
    n = 600
    found = sample(of_parts(sde, mean, 0.25), range(n))
    z = found.y.flatten(1)
    end = NoiseSchedule.of(sde, torch.tensor([0.01]))
    variance = 0.25 * end.mean.item() ** 2 + end.sigma.item() ** 2
    np.testing.assert_allclose(z.mean(0), end.mean.item() * mean[0], atol=5 * math.sqrt(variance / n) + 0.01)
    np.testing.assert_allclose(z.T.cov(), variance * np.eye(4), atol=variance * (5 * math.sqrt(2 / n) + 0.03))
    assert 50 < found.nfe < 1000


def test_an_image_is_the_same_in_any_batch(mixture):
    """And its steps are its own."""
    together = sample(mixture, range(3), tol=0.1)
    alone = [sample(mixture, [i], tol=0.1) for i in range(3)]
    np.testing.assert_allclose(together.y, torch.cat([solution.y for solution in alone]), rtol=1e-9, atol=1e-11)
    assert together.nfe == pytest.approx(np.mean([solution.nfe for solution in alone]), rel=1e-12)
    assert len({solution.nfe for solution in alone}) > 1
    reordered = sample(mixture, [2, 0], tol=0.1)
    np.testing.assert_allclose(reordered.y, together.y[[2, 0]], rtol=1e-9, atol=1e-11)


def test_a_larger_tolerance_takes_fewer_evaluations(mixture):
    nfe = [sample(mixture, range(20), tol, atol=atol).nfe for tol, atol in
           ((0.03, 0.02), (0.1, 0.05), (0.3, 0.2))]  # fmt: skip
    assert nfe == sorted(nfe, reverse=True) and nfe[0] > 1.5 * nfe[-1]


@pytest.mark.parametrize("sde", ["vpsde"], indirect=True)
def test_evaluations_are_counted(mixture):
    seen = []
    mixture.network.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    found = sample(mixture, range(5), tol=0.1)
    assert sum(seen) / 5 == found.nfe


@pytest.mark.parametrize("sde", ["vpsde"], indirect=True)
def test_the_times_are_those_of_each_image(mixture):
    """From 1 down to `time_eps`, never beyond; a rejected step is repeated with the same draw and a smaller h."""
    times = []
    mixture.network.register_forward_hook(lambda module, inputs, output: times.append(inputs[1].clone()))
    sample(mixture, [0], time_eps=1e-4)
    firsts, seconds = torch.cat(times[::2]), torch.cat(times[1::2])
    assert firsts[0] == 1 and seconds[-1] == pytest.approx(1e-4, rel=1e-9)
    assert (firsts.diff() <= 0).all() and (seconds < firsts).all() and (seconds >= 1e-4 * (1 - 1e-9)).all()
    assert (firsts.diff() == 0).any()  # some were rejected


def test_the_denoised_end(mixture, noise, solve):
    """By default the last evaluation predicts z0 from the latents at `time_eps`."""
    given = [torch.randn(noise.shape, generator=torch.Generator().manual_seed(i)).double() for i in range(500)]
    results = []
    for denoise in (None, False):
        draws = iter(given)
        results.append(
            solve(mixture, noise, lambda draws=draws: next(draws), solver="adaptive_sde", tol=0.1, denoise=denoise)
        )
    last, before = results
    assert last.nfe == before.nfe + 1
    end = NoiseSchedule.of(mixture.sde, torch.tensor([0.01], dtype=torch.float64))
    expected = (before.y - end.sigma * mixture(before.y, torch.tensor([0.01], dtype=torch.float64))) / end.mean
    np.testing.assert_allclose(last.y, expected, rtol=1e-7)


class Broken(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, z, t):
        return torch.full_like(z, self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_diverged_is_reported(sde, value):
    prior = ScorePrior(sde, Broken(value), SHAPE, mixing_logit=None).double()
    with pytest.raises(SolverError, match="adaptive_sde: the state is not finite; the training may have diverged"):
        sample(prior, range(3))


@pytest.mark.parametrize("sde", ["vpsde"], indirect=True)
def test_too_many_steps_are_reported(mixture, monkeypatch):
    monkeypatch.setattr(module, "MAX_ITERATIONS", 20)
    with pytest.raises(SolverError, match="adaptive_sde: the tolerance 0.001 .absolute 0.01. .* choose a larger one"):
        sample(mixture, range(3), tol=1e-3)


@pytest.mark.parametrize("sde", ["vpsde"], indirect=True)
def test_a_tiny_last_step_is_no_failure(mixture):
    """What is left of the way may be shorter than any step that the tolerance asks for."""
    start = torch.zeros(2, *SHAPE, dtype=torch.float64)
    for left in (1e-10, 1e-13):
        found = adaptive_sde(mixture, start, lambda: torch.zeros_like(start), 1 - 0.01 - left, 0.5, 0.5)
        assert found.y.isfinite().all() and found.nfe == (4 if left > 1e-12 else 2)


@pytest.mark.parametrize("sde", ["vpsde"], indirect=True)
def test_settings_reach_the_solver(mixture, noise, solve):
    draws = [torch.randn(noise.shape, generator=torch.Generator().manual_seed(i)).double() for i in range(500)]
    found = []
    for settings in ({"tol": 0.1, "atol": 0.5}, {"tol": 0.1, "atol": 0.05}, {"tol": 0.5, "atol": 0.05}):
        given = iter(draws)
        solution = solve(mixture, noise, lambda given=given: next(given), solver="adaptive_sde", **settings)
        found.append(solution.nfe)
    assert found[0] < found[1] > found[2]
    assert SampleConfig(count=1, solver="adaptive_sde").resolved().denoise
