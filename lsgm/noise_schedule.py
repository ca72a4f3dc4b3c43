"""Noise schedules: the coefficients of an SDE at given times, in three parametrizations of its noise level.

q(z_t | z0) = N(m_t z0, sigma_t^2 I). With R_t = sqrt(m_t^2 + sigma_t^2), z_t / R_t is a rotation of data and noise by
the angle phi_t = atan2(sigma_t, m_t); lambda_t = log(m_t / sigma_t) is half of the log-SNR (Kingma et al., arXiv
2107.00630), and rho_t = sigma_t / m_t is the noise level of EDM (Karras et al., arXiv 2206.00364).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.arguments import check_time_eps
from lsgm.errors import LSGMError
from lsgm.sde import SDE


@dataclass(frozen=True)
class NoiseSchedule:
    """Times and the coefficients at them, each float64 [N + 1] on the host."""

    t: Tensor
    mean: Tensor  # m_t
    sigma: Tensor  # sigma_t

    @classmethod
    def of(cls, sde: SDE, t: Tensor) -> NoiseSchedule:
        """The coefficients of ``sde`` at times ``t``; raises :class:`LSGMError` where sigma_t or m_t is 0."""
        t = t.double()
        found = cls(t, sde.mean_coefficient(t), sde.variance(t).sqrt())
        if not (found.sigma > 0).all():
            raise LSGMError(f"time_eps: sigma_t is 0 at t = {t.min().item():g}; choose a larger time_eps")
        if not (found.mean > 0).all():
            raise LSGMError(f"sde.beta_end: m_t is 0 at t = {t.max().item():g}; choose a smaller beta_end")
        return found

    @classmethod
    def at_ends(cls, sde: SDE, time_eps: float) -> NoiseSchedule:
        """The coefficients at t = 1 and at ``time_eps``; raises :class:`LSGMError` if no path can end there."""
        return cls.of(sde, torch.tensor([1.0, check_end(sde, time_eps)], dtype=torch.float64))

    @property
    def radius(self) -> Tensor:
        """R_t."""
        return torch.hypot(self.mean, self.sigma)

    @property
    def phi(self) -> Tensor:
        """The angle between data and noise, from 0 (data) to pi / 2 (noise)."""
        return torch.atan2(self.sigma, self.mean)

    @property
    def half_log_snr(self) -> Tensor:
        """lambda_t."""
        return self.mean.log() - self.sigma.log()

    @property
    def noise_level(self) -> Tensor:
        """rho_t."""
        return self.sigma / self.mean


def check_end(sde: SDE, time_eps: float) -> float:
    """Where sampling ends and the likelihood starts: above 0, or 0 if ``sde`` has noise there (sigma2_0)."""
    time_eps = check_time_eps(time_eps) if time_eps != 0 else 0.0
    NoiseSchedule.of(sde, torch.tensor([time_eps]))
    return time_eps


def time_at_noise_level(sde: SDE, level: Tensor, t_min: float) -> Tensor:
    """The times in [t_min, 1] at which sigma_t / m_t is ``level``, float64, by bisection: for any SDE.

    sigma_t / m_t rises with t, because noise is added and nothing else. Levels beyond the ends give the ends.
    """
    low, high = torch.full_like(level, t_min), torch.ones_like(level)
    for _ in range(60):
        middle = 0.5 * (low + high)
        below = sde.variance(middle).sqrt() < level * sde.mean_coefficient(middle)
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return 0.5 * (low + high)
