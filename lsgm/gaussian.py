"""Log densities of normal distributions, element by element, in nats; and what is made of them.

Each form is the one that its caller computes with: they differ in rounding, and in how many operations they take.
"""

from __future__ import annotations

import math

from torch import Tensor

HALF_LOG_2PI = 0.9189385332046727  # log(2 pi) / 2


def standard_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, 1)."""
    return -(0.5 * z.square() + HALF_LOG_2PI)


def log_prob_of_noise(noise: Tensor, log_sigma: Tensor) -> Tensor:
    """log N(z; mu, sigma^2) at z = mu + sigma noise."""
    return -0.5 * noise.square() - log_sigma - HALF_LOG_2PI


def log_prob_of_error(error: Tensor, log_sigma: Tensor) -> Tensor:
    """log N(x; mu, sigma^2) at x = mu + sigma error."""
    return -(0.5 * error.square() + log_sigma + HALF_LOG_2PI)


def kl_to_standard(log_q: Tensor, z: Tensor) -> Tensor:
    """log q(z) - log N(z; 0, 1), the KL to N(0, 1) at a sample of q."""
    return log_q + 0.5 * z.square() + HALF_LOG_2PI


def isotropic_log_prob(z: Tensor, variance: float) -> Tensor:
    """log N(z; 0, variance I) of each row of ``z`` [B, D], [B]."""
    return -0.5 * (z.square().sum(dim=1) / variance + z.shape[1] * math.log(math.tau * variance))
