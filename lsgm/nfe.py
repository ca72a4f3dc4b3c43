"""Numbers of function evaluations (NFE), that is of the score network, where a configuration leaves them open."""

from __future__ import annotations

SAMPLING = 10
ANCESTRAL = 1000
ESTIMATOR = {"ode": 16, "bound": 32, "discretized": 1000}  # of log p(z0)
PER_STEP = {"euler": 1, "heun": 2, "rk4": 4}  # of Runge-Kutta methods
