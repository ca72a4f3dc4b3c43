"""The grids of times at which a solver takes its steps; rho_t, phi_t and lambda_t: see :mod:`lsgm.noise_schedule`."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lsgm.arguments import check_choice, check_count
from lsgm.errors import LSGMError
from lsgm.noise_schedule import NoiseSchedule, time_at_noise_level
from lsgm.sde import SDE

Grid = Literal["t", "phi", "log_snr", "edm"]
GRIDS: tuple[Grid, ...] = get_args(Grid)
EDM_EXPONENT = 7  # rho of EDM, equation 5: steps are equal in the seventh root of the noise level


def time_grid(sde: SDE, grid: Grid, steps: int, t_end: float) -> NoiseSchedule:
    """The schedule at ``steps`` + 1 times from t = 1 down to ``t_end``.

    Args:
        grid: what the steps are equal in: `t`, `phi`, `log_snr`, or `edm` (EDM, equation 5: the seventh root of the
            noise level).
    Raises:
        LSGMError: there is no step, or there are too many, no path can end at ``t_end``, or the grid is another one.
    """
    check_choice("grid", grid, GRIDS)
    steps = check_count("steps", steps)
    ends = NoiseSchedule.at_ends(sde, t_end)
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)

    def between(x: Tensor) -> Tensor:
        return x[0] + share * (x[1] - x[0])

    if grid == "t":
        t = between(ends.t)
    else:
        if grid == "phi":
            level = between(ends.phi).tan()
        elif grid == "log_snr":
            level = between(ends.half_log_snr).neg().exp()
        else:
            level = between(ends.noise_level ** (1 / EDM_EXPONENT)) ** EDM_EXPONENT
        t = time_at_noise_level(sde, level, t_end)
    t[0], t[-1] = 1.0, t_end
    if not (t.diff() < 0).all():
        raise LSGMError(
            f"steps: {steps} steps of the grid {grid!r} down to t = {t_end:g} are too many to be told apart; choose "
            "fewer steps or a larger time_eps"
        )
    return NoiseSchedule.of(sde, t)
