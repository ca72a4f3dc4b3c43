"""The score-based prior over the latents, with the mixed score (LSGM, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsgm.sde import SDE

INACTIVE_LOGIT = -15.0


class ScorePrior(nn.Module):
    """p(z0) through its mixed noise prediction

        eps(z_t, t) = (1 - alpha) eps_normal(z_t, t) + alpha eps'_theta(z_t, t),   alpha = sigmoid(mixing_logit),

    where eps_normal is exact for z0 ~ N(0, I) (:meth:`SDE.normal_noise`). There is one alpha per latent channel.
    This is the mixed score of LSGM, section 3.2: the prior is a geometric mixture of N(0, I) and a score-based model.

    Args:
        sde: the forward diffusion.
        network: a module (z_t [B, C, H, W], t [B] or [1]) -> [B, C, H, W]. Each row of a batch must be independent of
            the others.
        latent_shape: (C, H, W).
        mixing_logit: value of the logits at the start; None: no mixing, the network alone (the paper's ablation).
    """

    mixing_logit: nn.Parameter | None
    active: Tensor

    def __init__(
        self, sde: SDE, network: nn.Module, latent_shape: tuple[int, int, int], mixing_logit: float | None
    ) -> None:
        super().__init__()
        self.sde = sde
        self.network = network
        self.latent_shape = latent_shape
        shape = (1, latent_shape[0], 1, 1)
        self.register_parameter(
            "mixing_logit", None if mixing_logit is None else nn.Parameter(torch.full(shape, float(mixing_logit)))
        )
        self.register_buffer("active", torch.ones(shape))  # 0 hides a channel from the network

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The noise prediction [B, C, H, W] for diffused latents [B, C, H, W] and times [B], or [1]: one for all."""
        noise = self.network(z_t * self.active.to(z_t.dtype), t)
        if self.mixing_logit is None:
            return noise
        normal = self.sde.normal_noise(z_t, t[:, None, None, None])
        return torch.lerp(normal, noise.to(normal.dtype), torch.sigmoid(self.mixing_logit) * self.active)

    def predict_noise(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The mixed noise prediction; the same as calling the prior."""
        noise: Tensor = self(z_t, t)
        return noise

    def score(self, z_t: Tensor, t: Tensor) -> Tensor:
        """The score, the gradient of log p_t at ``z_t``, as -eps(z_t, t) / sigma_t; shapes as in :meth:`forward`."""
        return -self.predict_noise(z_t, t) / self.sde.variance(t)[:, None, None, None].sqrt()

    @torch.no_grad()
    def deactivate(self, inactive: Tensor) -> None:
        """Give N(0, I) to the channels where ``inactive`` (bool [C]): the network neither sees nor predicts them."""
        inactive = inactive.to(self.active.device)[None, :, None, None]
        self.active.masked_fill_(inactive, 0.0)
        if self.mixing_logit is not None:
            self.mixing_logit.masked_fill_(inactive, INACTIVE_LOGIT)
