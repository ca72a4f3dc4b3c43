"""Forward diffusions dz = f(t) z dt + g(t) dw on t in [0, 1], with q(z_t | z0) = N(m_t z0, sigma_t^2 I).

LSGM, section 2 and appendix B; arXiv 2011.13456, section 3.4. Every method maps a tensor of times of any shape to
a tensor of that shape. Float32 is precise enough: differences of numbers near 1 are computed by expm1 and log1p.

Below, B(t) is the integral of beta over [0, t].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lsgm.gaussian import isotropic_log_prob


class SDE(ABC):
    """A linear forward diffusion (LSGM, section 2). A new one implements the abstract methods.

    ``variance_preserving``: N(0, I) stays N(0, I) at all times (m_t^2 + sigma_t^2 = 1 where sigma_0^2 = 0), and
    :meth:`alpha_bar` is 1 - sigma_t^2: ancestral sampling needs both.
    """

    variance_preserving: ClassVar[bool] = False

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t), the factor of z_t in the drift f(t) z_t."""

    @abstractmethod
    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2, the square of the diffusion coefficient."""

    @abstractmethod
    def mean_coefficient(self, t: Tensor) -> Tensor:
        """m_t, the factor of z0 in the mean of q(z_t | z0): d m_t / dt = f m_t, m_0 = 1."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor:
        """sigma_t^2, the variance of q(z_t | z0): d sigma_t^2 / dt = 2 f sigma_t^2 + g^2."""

    @abstractmethod
    def time_at_variance(self, variance: Tensor) -> Tensor:
        """The time t at which sigma_t^2 = ``variance``, the inverse of :meth:`variance`."""

    def normal_variance(self, t: Tensor) -> Tensor:
        """Variance m_t^2 + sigma_t^2 of z_t if z0 ~ N(0, I), without sigma2_0, as the published models have it."""
        return torch.ones_like(t)

    @abstractmethod
    def alpha_bar(self, t: Tensor) -> Tensor:
        """m_t^2 / (m_t^2 + sigma_t^2): the mean of (noise - normal_noise)^2 per dimension if z0 ~ N(0, I).

        In the form that the published proposals use (LSGM, appendix B): 1 - sigma_t^2, and for the VESDE without
        sigma2_0.
        """

    @property
    def proposal(self) -> SDE:
        """The diffusion whose proposal r(t) importance sampling draws t from (LSGM, section 3.4)."""
        return self

    @property
    def base_variance(self) -> float:
        """Variance of the base distribution p(z_1) = N(0, base_variance I), from which sampling starts."""
        return 1.0

    def base_log_prob(self, z1: Tensor) -> Tensor:
        """log p(z_1) of the base distribution in nats, [B], for latents [B, ...]."""
        return isotropic_log_prob(z1.flatten(1), self.base_variance)

    def normal_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The best noise prediction if q(z0) = N(0, I), sigma_t z_t / var(z_t) (LSGM, section 3.2).

        ``t`` must broadcast against ``z_t`` [B, C, H, W].
        """
        return z_t * (self.variance(t).sqrt() / self.normal_variance(t))

    def diffuse(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A sample z_t = m_t z0 + sigma_t noise of q(z_t | z0), for times ``t`` that broadcast against ``z0``."""
        return self.mean_coefficient(t) * z0 + self.variance(t).sqrt() * noise


class VPSDE(SDE):
    """Variance-preserving SDE with a linear beta (LSGM, appendix B; arXiv 2011.13456, section 3.4).

        beta(t) = beta_start + (beta_end - beta_start) t,   f = -beta / 2,   g^2 = beta,
        m_t = e^(-B / 2),   sigma_t^2 = 1 - (1 - sigma2_0) e^-B

    ``sigma2_0`` is the variance at t = 0.
    """

    variance_preserving = True

    def __init__(self, beta_start: float, beta_end: float, sigma2_0: float = 0.0) -> None:
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.sigma2_0 = sigma2_0

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_start + (self.beta_end - self.beta_start) * t

    def beta_integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta over [0, t]."""
        return t * (self.beta_start + 0.5 * (self.beta_end - self.beta_start) * t)

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.beta(t)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        return self.beta(t)

    def mean_coefficient(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self.beta_integral(t))

    def variance(self, t: Tensor) -> Tensor:
        # 1 - (1 - s) e^-B = s e^-B + (1 - e^-B), without cancellation
        integral = self.beta_integral(t)
        return self.sigma2_0 * torch.exp(-integral) - torch.expm1(-integral)

    def alpha_bar(self, t: Tensor) -> Tensor:
        return (1 - self.sigma2_0) * torch.exp(-self.beta_integral(t))  # 1 - sigma_t^2

    def time_at_variance(self, variance: Tensor) -> Tensor:
        return self._time_at_integral(math.log1p(-self.sigma2_0) - torch.log1p(-variance))

    def _time_at_integral(self, integral: Tensor) -> Tensor:
        """The t at which B(t) = ``integral``: the root of (b1 - b0) t^2 / 2 + b0 t - B, in its stable form."""
        slope = self.beta_end - self.beta_start
        return 2 * integral / (self.beta_start + torch.sqrt(self.beta_start**2 + 2 * slope * integral))


class SubVPSDE(VPSDE):
    """Sub-VP SDE (arXiv 2011.13456, eq. 29): the drift of the VPSDE with a smaller variance.

    g^2 = beta (1 - e^-2B),   sigma_t^2 = (1 - e^-B)^2 + sigma2_0 e^-B
    """

    variance_preserving = False

    def diffusion_squared(self, t: Tensor) -> Tensor:
        return -self.beta(t) * torch.expm1(-2 * self.beta_integral(t))

    def variance(self, t: Tensor) -> Tensor:
        integral = self.beta_integral(t)
        return torch.expm1(-integral).square() + self.sigma2_0 * torch.exp(-integral)

    def normal_variance(self, t: Tensor) -> Tensor:
        integral = self.beta_integral(t)
        return torch.expm1(-integral).square() + torch.exp(-integral)

    def alpha_bar(self, t: Tensor) -> Tensor:
        decay = torch.exp(-self.beta_integral(t))
        return decay * (2 - decay - self.sigma2_0)  # 1 - sigma_t^2, which the weighting `rescale` divides by

    @property
    def proposal(self) -> SDE:
        return VPSDE(self.beta_start, self.beta_end, self.sigma2_0)

    def time_at_variance(self, variance: Tensor) -> Tensor:
        # w = 1 - e^-B is the (larger) root of w^2 - s w = v - s
        w = 0.5 * (self.sigma2_0 + torch.sqrt(self.sigma2_0**2 + 4 * (variance - self.sigma2_0)))
        return self._time_at_integral(-torch.log1p(-w))


class _Geometric(SDE):
    """sigma_t^2 = sigma2_min r^t - sigma2_min + sigma2_0 with r = sigma2_max / sigma2_min."""

    def __init__(self, sigma2_min: float, sigma2_max: float, sigma2_0: float) -> None:
        self.sigma2_min = sigma2_min
        self.sigma2_max = sigma2_max
        self.sigma2_0 = sigma2_0
        self.log_ratio = math.log(sigma2_max / sigma2_min)

    def variance(self, t: Tensor) -> Tensor:
        return self.sigma2_min * torch.expm1(self.log_ratio * t) + self.sigma2_0

    def variance_rate(self, t: Tensor) -> Tensor:
        """d sigma_t^2 / dt."""
        return self.sigma2_min * self.log_ratio * torch.exp(self.log_ratio * t)

    def time_at_variance(self, variance: Tensor) -> Tensor:
        return torch.log1p((variance - self.sigma2_0) / self.sigma2_min) / self.log_ratio


class GeometricVPSDE(_Geometric):
    """Geometric VPSDE: variance preserving, with a geometric progression of sigma_t^2 (LSGM, appendix B.3).

        beta = (d sigma_t^2 / dt) / (1 - sigma_t^2),   f = -beta / 2,   g^2 = beta,
        m_t = sqrt((1 - sigma_t^2) / (1 - sigma2_0))

    If sigma2_0 = sigma2_min, then d log sigma_t^2 / dt is constant, and uniform t are optimal for the weighting `ll`.
    """

    variance_preserving = True

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self.diffusion_squared(t)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        return self.variance_rate(t) / self.alpha_bar(t)

    def mean_coefficient(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.alpha_bar(t) / (1 - self.sigma2_0))

    def alpha_bar(self, t: Tensor) -> Tensor:
        # 1 - sigma_t^2 as (1 - sigma_1^2) + (sigma_1^2 - sigma_t^2), without cancellation at t = 1
        end = 1 - (self.sigma2_max - self.sigma2_min + self.sigma2_0)
        return end - self.sigma2_max * torch.expm1(self.log_ratio * (t - 1))


class VESDE(_Geometric):
    """Variance-exploding SDE without a drift (LSGM, appendix B; arXiv 2011.13456, section 3.4).

        f = 0,   g^2 = d sigma_t^2 / dt,   m_t = 1,   sigma_t^2 = sigma2_min r^t,   p(z_1) = N(0, sigma2_max I)

    ``sigma2_max`` should be at least the largest squared distance of two encodings, so that they overlap at t = 1.
    """

    def __init__(self, sigma2_min: float, sigma2_max: float) -> None:
        super().__init__(sigma2_min, sigma2_max, sigma2_0=sigma2_min)

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion_squared(self, t: Tensor) -> Tensor:
        return self.variance_rate(t)

    def mean_coefficient(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def normal_variance(self, t: Tensor) -> Tensor:
        return 1 + self.sigma2_min * torch.expm1(self.log_ratio * t)

    def alpha_bar(self, t: Tensor) -> Tensor:
        return 1 / self.normal_variance(t)

    @property
    def base_variance(self) -> float:
        return self.sigma2_max
