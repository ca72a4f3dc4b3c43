"""Which t to draw for the prior's loss, and what weight the draw carries (LSGM, section 3.4 and appendix B).

The loss is E_t[c(t) ||noise - prediction||^2]. With z0 ~ N(0, I) and alpha -> 0 the squared error is proportional to
1 - sigma_t^2, so drawing t from r(t) proportional to c(t) (1 - sigma_t^2) makes the variance over t vanish there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lsgm.sde import SDE

Weighting = Literal["ll"]
Sampling = Literal["importance", "uniform"]


@dataclass
class TimeDraw:
    """Times and what they weigh; each [B]."""

    t: Tensor
    weight: Tensor  # c(t) / r(t): factor of the squared error in the loss
    likelihood_weight: Tensor  # the same for c = ll: what algorithm 3 gives to the encoder's loss


class TimeSampler:
    """Map rho ~ U[0, 1] to times in [time_eps, 1] and their weights.

    Weighting ``ll``: c(t) = g^2 / (2 sigma^2), the weighting of the likelihood. Its proposal is
    r(t) = d log sigma^2 / dt up to a constant: sigma^2 is log-uniform between its values at time_eps and at 1, and
    c / r = (log sigma_1^2 - log sigma_eps^2) / (2 (1 - sigma_t^2)).
    """

    def __init__(self, sde: SDE, weighting: Weighting, sampling: Sampling, time_eps: float) -> None:
        self.sde = sde
        self.weighting = weighting
        self.sampling = sampling
        self.time_eps = time_eps
        ends = sde.variance(torch.tensor([time_eps, 1.0], dtype=torch.float64))
        self._log_variance_eps, self._log_variance_1 = ends.log().tolist()

    def __call__(self, rho: Tensor) -> TimeDraw:
        if self.sampling == "uniform":
            t = self.time_eps + (1 - self.time_eps) * rho
            weight = self.sde.diffusion_squared(t) / (2 * self.sde.variance(t))
        else:
            span = self._log_variance_1 - self._log_variance_eps
            t = self.sde.time_at_variance(torch.exp(self._log_variance_eps + span * rho))
            weight = span / (2 * (1 - self.sde.variance(t)))
        return TimeDraw(t, weight, weight)

    def cross_entropy_constant(self) -> float:
        """What the cross entropy adds per latent dimension: (1 + log(2 pi sigma_eps^2)) / 2 nats (theorem 1)."""
        return 0.5 * (1 + math.log(2 * math.pi) + self._log_variance_eps)
