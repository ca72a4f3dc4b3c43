"""A plain convolutional VAE with one group of latents: the smallest backbone, to copy when you bring your own.

What :class:`lsgm.model.LSGM` asks of a backbone is :class:`Backbone`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lsgm.gaussian import log_prob_of_noise
from lsgm.networks.batch_norm import BatchNormSwish
from lsgm.networks.layers import soft_clamp
from lsgm.networks.posterior import Posterior
from lsgm.networks.weight_norm import WNConv2d


class ConvVAE(nn.Module):
    """Strided convolutions down to the latents, upsampling and convolutions back.

    Args:
        channels, channel_mult: width at each resolution.
        latents: latent channels.
        log_sigma_clamp: soft clamp of the posterior's log sigma.
        image_channels, image_size: of the images; the size must be divisible by 2 ** (len(channel_mult) - 1).
        output_channels: parameters per pixel that the likelihood wants.
    """

    lower_scale_shapes: tuple[tuple[int, int, int], ...] = ()

    def __init__(
        self,
        *,
        channels: int,
        channel_mult: Sequence[int],
        latents: int,
        log_sigma_clamp: float = 5.0,
        image_channels: int,
        image_size: int,
        output_channels: int,
    ) -> None:
        super().__init__()
        self.log_sigma_clamp = log_sigma_clamp
        widths = [channels * m for m in channel_mult]
        size = image_size // 2 ** (len(widths) - 1)
        self.latent_shape = (latents, size, size)
        self.latent_groups = (latents,)
        self.encoder = nn.Sequential(WNConv2d(image_channels, widths[0], 3))
        for c_in, c_out in itertools.pairwise(widths):
            self.encoder.extend([BatchNormSwish(c_in), WNConv2d(c_in, c_out, 3, stride=2)])
        self.encoder.extend([BatchNormSwish(widths[-1]), WNConv2d(widths[-1], 2 * latents, 3)])
        self.decoder = nn.Sequential(WNConv2d(latents, widths[-1], 3))
        for c_in, c_out in itertools.pairwise(reversed(widths)):
            self.decoder.extend([BatchNormSwish(c_in), nn.Upsample(scale_factor=2), WNConv2d(c_in, c_out, 3)])
        self.decoder.extend([BatchNormSwish(widths[0]), WNConv2d(widths[0], output_channels, 3)])

    def encode(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Posterior, Tensor]:
        """Draw z0 ~ q(z0 | x) for images in [-1, 1]; see :meth:`Backbone.encode`."""
        mu, log_sigma = self.encoder(x).chunk(2, dim=1)
        mu, log_sigma = soft_clamp(mu), soft_clamp(log_sigma, self.log_sigma_clamp)
        draw = torch.randn_like(mu) if noise is None else noise[0]
        sigma = log_sigma.exp()
        z = torch.addcmul(mu, sigma, draw)
        log_q = log_prob_of_noise(draw, log_sigma)
        return Posterior(z, log_q, self.latent_groups, mean=mu, std=sigma), self.decode(z)

    def decode(self, z: Tensor, lower_scales: Sequence[Tensor] = ()) -> Tensor:
        """The likelihood's parameters for latents [B, C, h, w]."""
        parameters: Tensor = self.decoder(z)
        return parameters
