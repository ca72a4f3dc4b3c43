"""The error of the prediction that is best for N(0, I), and its integral over the diffusion.

With lambda = log(m / sigma), half of the log-SNR, the likelihood weighting satisfies g^2 / (2 sigma^2) dt = -d lambda
for every SDE. For a given z0, the Gaussian part of the cross entropy (LSGM, theorem 1) is therefore

    integral over lambda of E||noise - eps_normal(z_t, t)||^2 = A D + B ||z0||^2   in D dimensions,

with two numbers A and B that depend on the SDE and on its smallest time alone. For the VPSDE with sigma2_0 = 0 and
v = sigma_t^2, they are A = (log(v_1 / v_eps) - (v_1 - v_eps)) / 2 and B = (v_1 - v_eps) / 2.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lsgm.noise_schedule import NoiseSchedule, time_at_noise_level
from lsgm.sde import SDE

QUADRATURE = 256  # nodes of the integral: exact to rounding


def normal_error(sde: SDE, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """(a, b), each [N]: E||noise - eps_normal(z_t, t)||^2 = a D + b ||z0||^2 at the times of the schedule.

    eps_normal = sigma z_t / var(z_t), see :meth:`SDE.normal_noise`.
    """
    ratio = schedule.sigma / sde.normal_variance(schedule.t)
    return (1 - ratio * schedule.sigma).square(), (ratio * schedule.mean).square()


def gauss_legendre(sde: SDE, nodes: int, t_end: float) -> tuple[NoiseSchedule, Tensor]:
    """Times and weights [N] of the integral over lambda from its value at t = 1 to that at ``t_end``."""
    low, high = NoiseSchedule.at_ends(sde, t_end).half_log_snr.tolist()
    x, w = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(nodes))
    lam = low + 0.5 * (high - low) * (x + 1)
    t = time_at_noise_level(sde, lam.neg().exp(), t_end)
    return NoiseSchedule.of(sde, t), 0.5 * (high - low) * w


def integrated_normal_error(sde: SDE, time_eps: float) -> tuple[float, float]:
    """(A, B): the integral of the expected error over all times from ``time_eps`` to 1 is A D + B ||z0||^2, in nats.

    Raises:
        LSGMError: sigma is 0 at ``time_eps``, or m is 0 at t = 1.
    """
    schedule, weights = gauss_legendre(sde, QUADRATURE, time_eps)
    a, b = ((weights * values).sum().item() for values in normal_error(sde, schedule))
    return a, b
