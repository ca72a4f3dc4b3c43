"""Draws z_t of the forward diffusion for training, and the target of the noise prediction.

The cross entropy is an expectation over z0 ~ q(z0 | x), t and the noise. If q is a Gaussian N(mean, std^2), z0 need not
be drawn, because z_t is Gaussian, too, and the mean of the diffusion's noise given z_t and x is known:

    z_t = m mean + s e,   s^2 = m^2 std^2 + sigma^2,   e ~ N(0, I),
    E[noise | z_t, x] = sigma e / s.

With this mean as the target, the squared error loses the variance of the noise given z_t and x, m^2 std^2 / s^2, which
no prediction can explain (Rao-Blackwell; LSGM does not do this). The prior's gradient keeps its mean. So does the
encoder's, because the control variate (:mod:`lsgm.training.control_variate`) subtracts an error that has lost the same
variance. With several latent groups this works for the last one, given the groups before it: their std is 0 here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsgm.errors import LSGMError
from lsgm.networks.posterior import Posterior
from lsgm.sde import SDE


class Start(NamedTuple):
    """The start of the diffusion: z0 ~ N(mean, std^2) elementwise, [B, C, H, W]; if ``std`` is None, z0 = mean."""

    mean: Tensor
    std: Tensor | None = None

    @classmethod
    def of(cls, posterior: Posterior, repeats: int, marginal: bool) -> Start:
        """The start of ``repeats`` diffusions per image: z0 as drawn, or with ``marginal`` the last group's Gaussian.

        Raises :class:`LSGMError` if the backbone's posterior has none.
        """
        z = posterior.z
        if not marginal:
            return cls(z.repeat(repeats, 1, 1, 1))
        mean, std = posterior.mean, posterior.std
        if mean is None or std is None:
            raise LSGMError(
                "train.cross_entropy: marginal needs a backbone whose last latent group has a Gaussian posterior "
                "(without normalizing flows, vae.num_nf: 0); use cross_entropy: control_variate"
            )
        drawn = z[:, : z.shape[1] - mean.shape[1]]
        mean, std = torch.cat([drawn, mean], dim=1), torch.cat([torch.zeros_like(drawn), std], dim=1)
        return cls(mean.repeat(repeats, 1, 1, 1), std.repeat(repeats, 1, 1, 1))

    def detach(self) -> Start:
        """The same without a gradient."""
        return Start(self.mean.detach(), None if self.std is None else self.std.detach())

    def second_moment(self) -> Tensor:
        """E[z0^2], elementwise."""
        return self.mean.square() if self.std is None else self.mean.square() + self.std.square()

    def diffuse(self, sde: SDE, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """z_t at times [B] for N(0, I) draws like ``mean``, and the target of the noise prediction."""
        t = t[:, None, None, None]
        if self.std is None:
            return sde.diffuse(self.mean, noise, t), noise
        m, variance = sde.mean_coefficient(t), sde.variance(t)
        total = (m.square() * self.std.square() + variance).sqrt()
        return m * self.mean + total * noise, variance.sqrt() / total * noise
