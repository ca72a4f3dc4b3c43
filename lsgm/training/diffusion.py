"""Draws z_t of the forward diffusion for training, and the target of the noise prediction.

The cross entropy is an expectation over z0 ~ q(z0 | x), t and the noise. Where q is a Gaussian N(mean, std^2), z0 need
not be drawn: z_t is Gaussian, too,

    z_t = m mean + s noise,   s^2 = m^2 std^2 + sigma^2,

and what is left of the noise given z_t and x is known,

    E[noise of the diffusion | z_t, x] = sigma noise / s.

With this target the squared error has the same gradient in expectation, both the prior's and the encoder's, without the
variance m^2 std^2 / s^2 that no prediction can explain (Rao-Blackwell; LSGM does not have it). With several latent
groups this holds for the last one, given the groups before it, whose std is 0 here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lsgm.networks.posterior import Posterior
from lsgm.sde import SDE


class Start(NamedTuple):
    """Where the diffusion starts, z0 ~ N(mean, std^2) elementwise, [B, C, H, W]; ``std`` None: at z0 = mean itself."""

    mean: Tensor
    std: Tensor | None = None

    @classmethod
    def of(cls, posterior: Posterior, repeats: int, marginal: bool) -> Start:
        """The start for each of ``repeats`` times [B]: the drawn z0, with ``marginal`` the last group's Gaussian."""
        z = posterior.z
        if not marginal or posterior.mean is None or posterior.std is None:
            return cls(z.repeat(repeats, 1, 1, 1))
        mean, std = posterior.mean, posterior.std
        drawn = z[:, : z.shape[1] - mean.shape[1]]
        mean, std = torch.cat([drawn, mean], dim=1), torch.cat([torch.zeros_like(drawn), std], dim=1)
        return cls(mean.repeat(repeats, 1, 1, 1), std.repeat(repeats, 1, 1, 1))

    def detach(self) -> Start:
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
