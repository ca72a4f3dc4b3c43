"""A VAE whose encoder and decoder are one linear layer each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lsgm.config import BackboneConfig, ImageConfig
from lsgm.config.bounds import Channels
from lsgm.networks.posterior import Posterior


class LinearVAEConfig(BackboneConfig):
    """Its keys under `vae`."""

    implementation = "lsgm_example_parts.backbone:LinearVAE"

    backbone: Literal["linear"] = "linear"
    latents: Channels = 8

    def latent_shapes(self, image: ImageConfig) -> list[tuple[int, int, int]]:
        return [(self.latents, 1, 1)]


class LinearVAE(nn.Module):
    """q(z0 | x) = N(W x + b, sigma^2) with one latent group of size 1x1."""

    lower_scale_shapes: tuple[tuple[int, int, int], ...] = ()

    def __init__(
        self, *, latents: int, log_sigma_clamp: float, image_channels: int, image_size: int, output_channels: int
    ) -> None:
        super().__init__()
        self.latent_shape, self.latent_groups = (latents, 1, 1), (latents,)
        self.clamp, self.output_shape = log_sigma_clamp, (output_channels, image_size, image_size)
        self.encoder = nn.Linear(image_channels * image_size**2, 2 * latents)
        self.decoder = nn.Linear(latents, math.prod(self.output_shape))

    def encode(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Posterior, Tensor]:
        mu, log_sigma = self.encoder(x.flatten(1))[:, :, None, None].chunk(2, dim=1)
        log_sigma = log_sigma.clamp(-self.clamp, self.clamp)
        draw = torch.randn_like(mu) if noise is None else noise[0]
        z = mu + log_sigma.exp() * draw
        log_q = -0.5 * draw.square() - log_sigma - 0.5 * math.log(math.tau)
        return Posterior(z, log_q, self.latent_groups), self.decode(z)

    def decode(self, z: Tensor, lower_scales: Sequence[Tensor] = ()) -> Tensor:
        return self.decoder(z.flatten(1)).unflatten(1, self.output_shape)
