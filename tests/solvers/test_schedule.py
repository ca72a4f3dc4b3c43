"""Schedules, grids and the weights of multistep methods, against their definitions."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from lsgm.errors import LSGMError
from lsgm.noise_schedule import NoiseSchedule, time_at_noise_level
from lsgm.sde import VPSDE
from lsgm.solvers.adams_bashforth import weights
from lsgm.solvers.exponential import SERIES, moments
from lsgm.solvers.forms import ode
from lsgm.solvers.schedule import GRIDS, time_grid

EQUAL_IN = {
    "t": lambda s: s.t,
    "phi": lambda s: s.phi,
    "log_snr": lambda s: s.half_log_snr,
    "edm": lambda s: s.noise_level ** (1 / 7),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("time_eps", [0.01, 1e-6])
def test_steps_are_equal_in_what_the_grid_names(sde, grid, time_eps):
    schedule = time_grid(sde, grid, 9, time_eps)
    assert schedule.t.dtype == torch.float64 and schedule.t[0] == 1 and schedule.t[-1] == time_eps
    assert (schedule.t.diff() < 0).all() and (schedule.sigma.diff() < 0).all()
    steps = EQUAL_IN[grid](schedule).diff()
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-7)
    np.testing.assert_allclose(schedule.mean, sde.mean_coefficient(schedule.t))
    np.testing.assert_allclose(schedule.sigma.square(), sde.variance(schedule.t))


def test_coefficients_are_those_of_a_rotation(sde):
    schedule = time_grid(sde, "t", 5, 1e-3)
    np.testing.assert_allclose(schedule.radius * schedule.phi.cos(), schedule.mean, rtol=1e-10)
    np.testing.assert_allclose(schedule.radius * schedule.phi.sin(), schedule.sigma, rtol=1e-10)
    np.testing.assert_allclose(schedule.half_log_snr, -schedule.noise_level.log(), rtol=1e-10, atol=1e-12)


def test_times_of_noise_levels(sde):
    """The inverse of sigma / m, also by the closed form of the SDE; beyond the ends it gives the ends."""
    t = torch.tensor([1e-9, 1e-4, 0.3, 0.7, 1.0], dtype=torch.float64)
    schedule = NoiseSchedule.of(sde, t)
    found = time_at_noise_level(sde, schedule.noise_level, 0.0)
    np.testing.assert_allclose(found, t, rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(found[1:], sde.time_at_variance(schedule.sigma.square())[1:], rtol=1e-6)
    beyond = time_at_noise_level(sde, torch.tensor([0.0, 1e9], dtype=torch.float64), 0.1)
    np.testing.assert_allclose(beyond, [0.1, 1.0])


@pytest.mark.parametrize("form", ["drift", "velocity", "noise"])
def test_forms_are_the_same_ode(mixture, form):
    """dz/dt from each form, by the chain rule with numerical derivatives of x(t) and the scale, is the drift's."""
    sde, z = mixture.sde, torch.randn(3, 2, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for t in (0.05, 0.4, 0.9):
        h = 1e-6
        near = NoiseSchedule.of(sde, torch.tensor([t - h, t, t + h], dtype=torch.float64))
        equations = ode(sde, form, near)

        def rate(values, h=h):
            return (values[2] - values[0]) / (2 * h)

        def predict(z, t):
            return mixture(z, z.new_tensor([t]))

        y = z / equations.scale[1]
        found = rate(equations.scale) * y + equations.scale[1] * equations.slope(predict, 1, y) * rate(equations.x)
        exact = ode(sde, "drift", near).slope(predict, 1, z)
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-7)


def test_midpoints_are_halfway_in_the_variable(sde):
    for form in ("drift", "velocity", "noise"):
        equations = ode(sde, form, time_grid(sde, "phi", 6, 0.01), midpoints=True)
        x = np.array(equations.x)
        assert len(x) == 13
        np.testing.assert_allclose(x[1::2], 0.5 * (x[:-2:2] + x[2::2]), rtol=1e-9)


@pytest.mark.parametrize("h", [1e-9, 1e-3, 0.3, SERIES - 1e-9, SERIES, 2.0, 8.0, -0.3, -1.5])
def test_moments_of_the_exponential(h):
    """Against numerical integration, on both sides of the series' limit."""
    for k, found in enumerate(moments(h, 4)):
        exact = h * quad(lambda s, k=k: math.exp(h * (s - 1)) * s**k, 0, 1, epsabs=1e-14, epsrel=1e-13)[0]
        assert found == pytest.approx(exact, rel=1e-10)


def test_weights_are_exact_for_polynomials():
    """Adams-Bashforth's own for equal steps, and any powers for unequal ones."""
    np.testing.assert_allclose(weights([0.0, -1.0], [1, 1 / 2]), [3 / 2, -1 / 2])
    np.testing.assert_allclose(weights([0.0, -1.0, -2.0], [1, 1 / 2, 1 / 3]), [23 / 12, -16 / 12, 5 / 12])
    nodes, values = [0.0, -0.3, -1.7], [1.0, 0.37, -2.1]
    found = np.array(weights(nodes, values))
    for k in range(3):
        assert found @ np.array(nodes) ** k == pytest.approx(values[k], rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sde: time_grid(sde, "t", 0, 0.1), "steps: expected a whole number of at least 1, found 0"),
        (lambda sde: time_grid(sde, "t", 2.5, 0.1), "steps: expected .*, found 2.5"),
        (lambda sde: time_grid(sde, "time", 2, 0.1), "grid: expected one of t, phi, log_snr, edm, found 'time'"),
        (lambda sde: time_grid(sde, "t", 2, 1.0), "time_eps: expected a number above 0 and below 1, found 1.0"),
        (lambda sde: time_grid(sde, "t", 2, math.nan), "time_eps: expected .*, found nan"),
        (lambda sde: time_grid(sde, "t", 2, 0.0), "time_eps: sigma_t is 0 at t = 0; choose a larger time_eps"),
        (
            lambda sde: time_grid(sde, "phi", 100, 1 - 1e-15),
            "steps: 100 steps of the grid 'phi' down to t = 1 are too many .* fewer steps or a larger time_eps",
        ),
        (lambda sde: ode(sde, "data", time_grid(sde, "t", 2, 0.1)), "form: expected one of drift, velocity, noise"),
        (
            lambda sde: time_grid(VPSDE(0.1, 4000.0), "t", 2, 0.1),
            "sde.beta_end: m_t is 0 at t = 1; choose a smaller beta_end",
        ),
    ],
)
def test_what_is_no_grid_is_refused(call, message):
    with pytest.raises(LSGMError, match=f"^{message}") as error:
        call(VPSDE(0.1, 20.0))
    assert "\n" not in str(error.value)
