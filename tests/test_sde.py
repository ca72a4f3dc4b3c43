"""The diffusions against their definitions: the moment equations of dz = f z dt + g dw, integrated numerically."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from lsgm.config import ConfigError, SDEConfig
from lsgm.config.mistakes import parse
from lsgm.errors import LSGMError
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, SubVPSDE

SDES = [
    VPSDE(0.1, 20.0),
    VPSDE(0.1, 20.0, sigma2_0=0.01),
    VPSDE(1.0, 5.0),
    GeometricVPSDE(3e-5, 0.999, 3e-5),
    GeometricVPSDE(1e-4, 0.99, 0.0),
    SubVPSDE(0.1, 20.0),
    SubVPSDE(0.1, 20.0, sigma2_0=0.01),
    VESDE(3e-5, 400.0),
]
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: f"{type(sde).__name__}, {sde.sigma2_0:g}")


@each_sde
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


@each_sde
def test_float32_is_enough(sde):
    """Relative to float64, at both ends of time too: variances and shares of the signal cancel near 0 and 1."""
    t = torch.tensor([1e-6, 1e-5, 1e-3, 0.1, 0.9, 0.999, 1.0], dtype=torch.float32)
    for quantity in ("variance", "alpha_bar", "mean_coefficient", "diffusion_squared", "normal_variance"):
        f = getattr(sde, quantity)
        np.testing.assert_allclose(f(t).double(), f(t.double()), rtol=1e-4, err_msg=quantity)


@each_sde
def test_gradients_are_finite_on_all_of_time(sde):
    t = torch.linspace(0, 1, 101, requires_grad=True)
    for quantity in ("variance", "alpha_bar", "mean_coefficient", "diffusion_squared", "drift", "normal_variance"):
        value = getattr(sde, quantity)(t)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), t)
            assert torch.isfinite(gradient).all(), quantity


@each_sde
def test_time_at_variance_inverts_variance(sde):
    t = torch.linspace(1e-4, 1, 50, dtype=torch.float64)
    if isinstance(sde, SubVPSDE) and sde.sigma2_0 > 0:
        t = t[10:]  # the variance falls at first: the larger time of two is given
    np.testing.assert_allclose(sde.time_at_variance(sde.variance(t)), t, rtol=1e-6)
    t = torch.tensor([1e-6, 1e-3, 0.3], dtype=torch.float32)
    if sde.sigma2_0 == 0:
        np.testing.assert_allclose(sde.time_at_variance(sde.variance(t)), t, rtol=1e-3)


@each_sde
def test_alpha_bar_is_the_error_of_the_best_prediction_for_normal_latents(sde):
    """m^2 / (m^2 + sigma^2) where sigma2_0 is next to nothing; 1 - sigma^2 for the others, as published."""
    t = torch.linspace(0, 0.6, 21, dtype=torch.float64)
    signal, variance = sde.mean_coefficient(t).square(), sde.variance(t)
    if sde.sigma2_0 > 3e-5 or isinstance(sde, SubVPSDE):
        np.testing.assert_allclose(sde.alpha_bar(t), 1 - variance, rtol=1e-9)
    else:
        np.testing.assert_allclose(sde.alpha_bar(t), signal / (signal + variance), atol=4e-5)


def test_base_is_what_latents_diffuse_to():
    """For z0 ~ N(0, I) variance and density at t = 1 are the base's, up to what is left of the signal."""
    for sde in SDES:
        one = torch.ones((), dtype=torch.float64)
        left = sde.mean_coefficient(one).item() ** 2
        assert left + sde.variance(one).item() == pytest.approx(sde.base_variance, rel=0.02)
    z = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, 20.0).log_prob(z).sum(dim=(1, 2, 3))
    np.testing.assert_allclose(VESDE(3e-5, 400.0).base_log_prob(z), exact, rtol=1e-7)


@pytest.mark.parametrize(
    "sde", [VPSDE(0.1, 20.0), GeometricVPSDE(1e-4, 0.99, 0.0), SubVPSDE(0.1, 20.0), VESDE(3e-5, 400.0)]
)
def test_normal_noise_is_the_conditional_expectation(sde):
    """With z0 ~ N(0, I), E[noise | z_t] is linear in z_t with slope cov(noise, z_t) / var(z_t) (regression)."""
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for time in (0.05, 0.3, 0.8):
        t = torch.tensor(time, dtype=torch.float64)
        z_t = sde.diffuse(z0, noise, t)
        slope = (noise * z_t).mean() / z_t.square().mean()
        predicted = sde.normal_noise(torch.ones((), dtype=torch.float64), t)
        assert predicted.item() == pytest.approx(slope.item(), abs=0.01)  # standard error 0.0016


def test_build():
    assert isinstance(SDEConfig().build(), VPSDE)
    geometric = SDEConfig(name="geometric_vpsde").build()
    assert (geometric.sigma2_min, geometric.sigma2_max, geometric.sigma2_0) == (3e-5, 0.999, 3e-5)
    assert SDEConfig(name="geometric_vpsde", sigma2_0=0.0).build().sigma2_0 == 0
    assert type(SDEConfig(name="sub_vpsde", beta_end=10.0).build()) is SubVPSDE
    assert SDEConfig(name="vesde", sigma2_max=100.0).build().base_variance == 100
    with pytest.raises(LSGMError, match="sigma2_max"):
        SDEConfig(name="vesde").build()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"time_eps": 0.0}, "time_eps or sigma2_0"),
        ({"name": "geometric_vpsde", "time_eps": 0.0, "sigma2_0": 0.0}, "time_eps or sigma2_0"),
        ({"name": "geometric_vpsde", "sigma2_max": 1.0}, "below 1"),
        ({"name": "geometric_vpsde", "sigma2_0": 0.5}, "below 1, not 1.5"),
        ({"name": "vesde", "sigma2_max": 1e-6}, "above sigma2_min"),
        ({"beta_end": 0.05}, "beta_end"),
        ({"name": "ddpm"}, "name"),
    ],
)
def test_settings_that_make_no_diffusion_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        parse(SDEConfig, section, "params.yaml")
    assert SDEConfig(name="geometric_vpsde", time_eps=0.0).sigma2_0 is None  # starts at sigma2_min: fine
