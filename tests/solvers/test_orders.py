"""Orders of convergence, on a mixture of Gaussians: twice the steps, 2^order times the accuracy."""

import math

import numpy as np
import pytest

# (solver's settings, order). The grid log_snr suits all four SDEs.
MULTISTEP = [
    *[({"form": form, "order": order}, order) for form in ("velocity", "noise", "data") for order in (1, 2, 3)],
    *[({"form": "data", "order": order, "corrector": True}, order + 1) for order in (1, 2, 3)],
]
ORDERS = {"euler": 1, "heun": 2, "rk4": 4}


solutions = {}  # of each SDE


@pytest.fixture
def exact(mixture, noise, solve):
    """The ODE's solution, to 3e-9."""
    if type(mixture.sde) not in solutions:
        found = solve(mixture, noise, solver="rk4", form="velocity", grid="phi", steps=480)
        solutions[type(mixture.sde)] = found.y
    return solutions[type(mixture.sde)]


@pytest.fixture
def errors(mixture, noise, solve, exact):
    """(numbers of evaluations, settings ...) -> distances to the solution, relative to its norm."""

    def run(*evaluations, **settings):
        found = [solve(mixture, noise, steps=steps, **settings) for steps in evaluations]
        assert [solution.nfe for solution in found] == list(evaluations)
        return [((solution.y - exact).norm() / exact.norm()).item() for solution in found]

    return run


def order_of(errors):
    """Of two errors, the second one with twice the steps."""
    return math.log2(errors[0] / errors[1])


def test_the_solution_is_that_of_rk45(mixture, noise, solve, exact):
    np.testing.assert_allclose(exact, solve(mixture, noise, solver="rk45", tol=1e-8).y, atol=1e-5)


def test_multistep(errors):
    """One evaluation per step. The corrector adds an order at no cost."""
    for settings, order in MULTISTEP:
        assert order_of(errors(64, 128, grid="log_snr", **settings)) == pytest.approx(order, rel=0.13), settings


def test_runge_kutta(errors):
    """Each form on the grid on which its own variable is smooth."""
    for form, grid in (("velocity", "phi"), ("noise", "edm"), ("drift", "log_snr")):
        for solver, order in ORDERS.items():
            found = order_of(errors(80, 160, solver=solver, form=form, grid=grid))
            assert found == pytest.approx(order, rel=0.13), (solver, form)


@pytest.mark.parametrize("sde", ["vpsde", "sub_vpsde", "vesde"], indirect=True)
def test_equal_steps_in_time(errors):
    """The default: velocity, order 2."""
    assert order_of(errors(64, 128)) == pytest.approx(2, rel=0.13)


@pytest.mark.parametrize("sde", ["geometric_vpsde"], indirect=True)
def test_equal_steps_in_time_do_not_suit_the_geometric_vpsde(errors):
    """1 - sigma_t^2 falls from 0.04 to 0.001 in the last 0.004 of t, where m_t is its root: d phi / dt is infinite at
    t = 1 but for the 0.001, and a step that is no shorter than that loses every order above 1. Equal steps in phi or
    in the log-SNR are short there."""
    for order in (2, 3):
        coarse, fine = errors(64, 128, order=order, grid="t")
        assert order_of((coarse, fine)) < 1.3
        for grid in ("phi", "log_snr"):
            assert errors(128, order=order, grid=grid)[0] < fine / 4


def test_order_3_starts_with_a_step_of_order_1(errors):
    """Its error is of order 2. On the grids log_snr and t, whose first steps hardly change phi, it is too small to be
    seen; with equal steps in phi it is what remains."""
    assert order_of(errors(128, 256, order=3, grid="phi")) == pytest.approx(2, rel=0.13)
