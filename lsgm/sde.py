"""Forward diffusions dz = f(t) z dt + g(t) dw on t in [0, 1], with q(z_t | z0) = N(m_t z0, sigma_t^2 I).

LSGM, section 2 and appendix B; arXiv 2011.13456, section 3.4. Every method maps a tensor of times of any shape to
a tensor of that shape. Float32 is enough: differences of numbers near 1 are taken by expm1 and log1p.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lsgm.config import SDEConfig


class SDE(ABC):
    """A linear forward diffusion."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t): the drift is f(t) z."""

    @abstractmethod
    def diffusion_squared(self, t: Tensor) -> Tensor:
        """g(t)^2."""

    @abstractmethod
    def mean_coefficient(self, t: Tensor) -> Tensor:
        """m_t."""

    @abstractmethod
    def variance(self, t: Tensor) -> Tensor:
        """sigma_t^2."""

    @abstractmethod
    def time_at_variance(self, variance: Tensor) -> Tensor:
        """The t at which sigma_t^2 = ``variance``."""

    @property
    def base_variance(self) -> float:
        """Variance of the base distribution p(z_1) = N(0, base_variance I)."""
        return 1.0

    def normal_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The noise prediction that is optimal where q(z0) = N(0, I): sigma_t z_t / (m_t^2 + sigma_t^2).

        ``t`` must broadcast against ``z_t`` [B, C, H, W].
        """
        variance = self.variance(t)
        return z_t * (variance.sqrt() / (self.mean_coefficient(t).square() + variance))

    def diffuse(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = m_t z0 + sigma_t noise, for times ``t`` that broadcast against ``z0``."""
        return self.mean_coefficient(t) * z0 + self.variance(t).sqrt() * noise


class VPSDE(SDE):
    """Variance-preserving SDE: beta(t) = beta_start + (beta_end - beta_start) t, f = -beta / 2, g^2 = beta.

    ``sigma2_0`` is the variance at t = 0.
    """

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

    def normal_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        # m_t^2 + sigma_t^2 is 1 for s = 0; the published models leave it out for s > 0 too.
        return z_t * self.variance(t).sqrt()

    def time_at_variance(self, variance: Tensor) -> Tensor:
        # B = log((1 - s) / (1 - v)); then the positive root of (b1 - b0) t^2 / 2 + b0 t - B, in the stable form
        integral = math.log1p(-self.sigma2_0) - torch.log1p(-variance)
        slope = self.beta_end - self.beta_start
        root = torch.sqrt(self.beta_start**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_start + root)


def build_sde(config: SDEConfig) -> SDE:
    """The diffusion that the configuration names."""
    return VPSDE(config.beta_start, config.beta_end, config.sigma2_0)
