"""The diffusions against their definitions: the moment equations of dz = f z dt + g dw, integrated numerically."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from lsgm.sde import VPSDE

SDES = [VPSDE(0.1, 20.0), VPSDE(0.1, 20.0, sigma2_0=0.01), VPSDE(1.0, 5.0)]


@pytest.mark.parametrize("sde", SDES)
def test_moments_solve_the_moment_equations(sde):
    # d m / dt = f m, m(0) = 1;  d v / dt = 2 f v + g^2, v(0) = sigma2_0
    def moments(t, y):
        time = torch.tensor(t, dtype=torch.float64)
        f, g2 = sde.drift(time).item(), sde.diffusion_squared(time).item()
        return [f * y[0], 2 * f * y[1] + g2]

    grid = np.linspace(0, 1, 21)
    exact = solve_ivp(moments, (0, 1), [1.0, sde.sigma2_0], t_eval=grid, rtol=1e-11, atol=1e-13).y
    t = torch.from_numpy(grid)
    np.testing.assert_allclose(sde.mean_coefficient(t), exact[0], rtol=1e-8)
    np.testing.assert_allclose(sde.variance(t), exact[1], rtol=1e-8, atol=1e-12)


def test_moments_match_a_simulation_of_the_sde():
    """Euler-Maruyama from z0 = 1.5, 200,000 paths: mean and variance within four standard errors plus O(dt)."""
    sde, paths, steps = VPSDE(0.1, 20.0), 200_000, 400
    generator = torch.Generator().manual_seed(0)
    z = torch.full((paths,), 1.5)
    for i in range(steps // 2):  # up to t = 0.5
        t = torch.tensor(i / steps)
        noise = torch.randn(paths, generator=generator)
        z = z + sde.drift(t) * z / steps + (sde.diffusion_squared(t) / steps).sqrt() * noise
    t = torch.tensor(0.5)
    assert z.mean().item() == pytest.approx(1.5 * sde.mean_coefficient(t).item(), abs=4 / paths**0.5 + 0.01)
    assert z.var().item() == pytest.approx(sde.variance(t).item(), abs=0.02)


@pytest.mark.parametrize("sde", SDES)
def test_float32_variance_has_no_cancellation(sde):
    t = torch.tensor([1e-6, 1e-5, 1e-3, 0.1, 0.9, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(sde.variance(t.float()).double(), sde.variance(t), rtol=1e-4)


@pytest.mark.parametrize("sde", SDES)
def test_time_at_variance_inverts_variance(sde):
    t = torch.linspace(1e-4, 1, 50, dtype=torch.float64)
    np.testing.assert_allclose(sde.time_at_variance(sde.variance(t)), t, rtol=1e-7)
    t = torch.tensor([1e-6, 1e-3, 0.3], dtype=torch.float32)
    if sde.sigma2_0 == 0:
        np.testing.assert_allclose(sde.time_at_variance(sde.variance(t)), t, rtol=1e-4)


def test_normal_noise_is_the_conditional_expectation():
    """With z0 ~ N(0, I), E[noise | z_t] is linear in z_t with slope cov(noise, z_t) / var(z_t) (regression)."""
    sde = VPSDE(0.1, 20.0)
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for time in (0.05, 0.3, 0.8):
        t = torch.tensor(time, dtype=torch.float64)
        z_t = sde.diffuse(z0, noise, t)
        slope = (noise * z_t).mean() / z_t.square().mean()
        predicted = sde.normal_noise(torch.ones((), dtype=torch.float64), t)
        assert predicted.item() == pytest.approx(slope.item(), abs=0.01)  # standard error 0.0016
