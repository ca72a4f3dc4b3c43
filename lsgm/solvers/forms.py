"""The probability-flow ODE in three forms, each exact for every SDE (LSGM, section 2; arXiv 2011.13456, section 4.3).

Each is dy/dx = a eps(z, t) + b y with z = scale y:

    drift      y = z,           x = t      dz/dt = f z + g^2 / (2 sigma) eps
    velocity   y = z / R = u,   x = phi    du/dphi = (eps - sin(phi) u) / cos(phi)
    noise      y = z / m,       x = rho    d(z / m)/drho = eps

The velocity form is made for the mixed score: for z0 ~ N(0, I) the exact eps is sin(phi) u, so u does not move. With
eps = (1 - alpha) sin(phi) u + alpha eps' (LSGM, section 3.2), du/dphi = alpha (eps' - sin(phi) u) / cos(phi): what is
integrated is only the mismatch with N(0, I), and the smaller alpha is, the straighter is the path. It follows from
d(z / m) = eps d rho, the noise form (DDIM, arXiv 2010.02502, equation 14), by rho = tan(phi).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lsgm.arguments import check_choice
from lsgm.noise_schedule import NoiseSchedule, time_at_noise_level
from lsgm.sde import SDE
from lsgm.solvers.solution import NoisePrediction

Form = Literal["drift", "velocity", "noise"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class LinearODE:
    """dy/dx = a eps(scale y, t) + b y at the nodes of a solver, from the first to the last; lists of numbers."""

    t: list[float]
    x: list[float]
    scale: list[float]
    a: list[float]
    b: list[float]

    def slope(self, predict: NoisePrediction, i: int, y: Tensor) -> Tensor:
        """dy/dx at node ``i``; one evaluation of ``predict``."""
        return torch.add(self.b[i] * y, predict(self.scale[i] * y, self.t[i]), alpha=self.a[i])

    def reversed(self) -> LinearODE:
        """The same nodes from the last to the first."""
        return LinearODE(*(values[::-1] for values in (self.t, self.x, self.scale, self.a, self.b)))


def ode(sde: SDE, form: Form, schedule: NoiseSchedule, midpoints: bool = False) -> LinearODE:
    """The ODE in this form at the times of the schedule, and halfway between them in x if ``midpoints``.

    Raises:
        LSGMError: the form is another one.
    """
    check_choice("form", form, FORMS)
    if midpoints:
        schedule = _with_midpoints(sde, form, schedule)
    s, one, zero = schedule, torch.ones_like(schedule.t), torch.zeros_like(schedule.t)
    if form == "drift":
        columns = (s.t, one, sde.diffusion_squared(s.t) / (2 * s.sigma), sde.drift(s.t))
    elif form == "velocity":
        columns = (s.phi, s.radius, s.radius / s.mean, -s.noise_level)  # 1 / cos(phi), -tan(phi)
    else:
        columns = (s.noise_level, s.mean, one, zero)
    return LinearODE(s.t.tolist(), *(column.tolist() for column in columns))


def _with_midpoints(sde: SDE, form: Form, schedule: NoiseSchedule) -> NoiseSchedule:
    """2 N + 1 times: those of the schedule, and between each two the one whose x is halfway."""
    x = {"drift": schedule.t, "velocity": schedule.phi, "noise": schedule.noise_level}[form]
    middle = 0.5 * (x[1:] + x[:-1])
    if form != "drift":
        level = middle.tan() if form == "velocity" else middle
        middle = time_at_noise_level(sde, level, schedule.t.min().item())
    t = torch.empty(2 * len(x) - 1, dtype=torch.float64)
    t[::2], t[1::2] = schedule.t, middle
    return NoiseSchedule.of(sde, t)
