"""The score-based prior over the latents: a mixture of N(0, I) and a score network (LSGM, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsgm.sde import SDE


class ScorePrior(nn.Module):
    """p(z0) through its mixed noise prediction

        eps(z_t, t) = (1 - alpha) eps_normal(z_t, t) + alpha eps'_theta(z_t, t),   alpha = sigmoid(mixing_logit),

    where eps_normal is exact for z0 ~ N(0, I). One alpha per latent channel.

    Args:
        sde: the forward diffusion.
        network: a module (z_t [B, C, H, W], t [B]) -> [B, C, H, W].
        latent_shape: (C, H, W).
        mixing_logit: value of the logits at the start.
    """

    def __init__(self, sde: SDE, network: nn.Module, latent_shape: tuple[int, int, int], mixing_logit: float) -> None:
        super().__init__()
        self.sde = sde
        self.network = network
        self.latent_shape = latent_shape
        self.mixing_logit = nn.Parameter(torch.full((1, latent_shape[0], 1, 1), float(mixing_logit)))

    def predict_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The mixed noise prediction [B, C, H, W] for diffused latents [B, C, H, W] and times [B]."""
        normal = self.sde.normal_noise(z_t, t[:, None, None, None])
        return torch.lerp(normal, self.network(z_t, t).to(normal.dtype), torch.sigmoid(self.mixing_logit))

    def score(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p_t at ``z_t``: -noise / sigma_t."""
        return -self.predict_noise(z_t, t) / self.sde.variance(t)[:, None, None, None].sqrt()
