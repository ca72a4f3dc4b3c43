"""A control variate for the cross entropy: the error of the prediction for N(0, I), whose expectation is known.

Given z0, the mean of w_ll ||noise - eps_normal(z_t, t)||^2 over (t, noise) is A D + B ||z0||^2, see
:mod:`lsgm.normal_error`. What is left of the cross entropy is then estimated with the same t and noise,

    w_ll (||noise - eps||^2 - ||noise - eps_normal||^2) + A D + B ||z0||^2,

which has the same expectation and, for small mixing coefficients, a much smaller variance. It takes no further pass
through the score network, and the prior's weights are not in it: their gradient stays the same. LSGM does not have it.
"""

from __future__ import annotations

from torch import Tensor

from lsgm.sde import SDE
from lsgm.training.diffusion import Start
from lsgm.weighting import TimeDraw, TimeSampler


class ControlVariate:
    """A term with mean 0 for every z0; adding it to the cross entropy lowers the variance.

    Args:
        sampler: draws the times of the cross entropy.
    """

    def __init__(self, sampler: TimeSampler) -> None:
        self.a, self.b = sampler.normal_cross_entropy()

    def __call__(self, sde: SDE, start: Start, noise: Tensor, draw: TimeDraw) -> Tensor:
        """A + B z0^2 - w_ll (noise - eps_normal(z_t, t))^2 in nats, elementwise [B, C, H, W].

        For a Gaussian ``start``, z0^2 is its second moment, and the error is that of the target of ``start``.
        """
        z_t, target = start.diffuse(sde, noise, draw.t)
        error = target - sde.normal_noise(z_t, draw.t[:, None, None, None])
        return self.a + self.b * start.second_moment() - draw.likelihood_weight[:, None, None, None] * error.square()
