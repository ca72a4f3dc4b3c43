"""NVAE: a hierarchical VAE whose groups of latents share features (arXiv 2007.03898; LSGM, appendix G).

The encoder runs bottom-up over the image; the decoder runs top-down and draws one group of latents after the
other. Every prior factor is N(0, I) and knows nothing of earlier groups: that is what lets one score-based prior
cover all groups, concatenated on the channels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.config import VAEConfig
from lsgm.networks.layers import BNSwishBranch, Cell, Conv2d, MBConvBranch, WNConv2d, soft_clamp

HALF_LOG_2PI = 0.9189385332046727  # log(2 pi) / 2
MBCONV_EXPANSION_TOWER = 6
MBCONV_EXPANSION_POST = 3


@dataclass
class Posterior:
    """What the encoder says of a batch: one sample of q(z0 | x) and its log density."""

    z: Tensor  # [B, C, H, W], all groups concatenated on the channels
    log_q: Tensor  # [B, C, H, W], nats per element
    groups: tuple[int, ...]  # channels of each group, top first; they sum to C


class NVAE(nn.Module):
    """The VAE of one latent scale with ``groups_per_scale`` groups.

    Args:
        config: the architecture.
        image_channels: channels of the images.
        image_size: their height and width; must be divisible by 2 ** preprocess.blocks.
        output_channels: parameters per pixel that the likelihood wants.
    """

    def __init__(self, config: VAEConfig, image_channels: int, image_size: int, output_channels: int) -> None:
        super().__init__()
        self.log_sigma_clamp = config.log_sigma_clamp
        widths = [config.channels * m for m in config.channel_mult]
        width = widths[-1]
        groups = config.groups_per_scale
        latents = config.latents_per_group
        size = image_size // 2**config.preprocess.blocks
        self.latent_shape = (groups * latents, size, size)
        self.latent_groups = (latents,) * groups

        def encoder_cell(c_in: int, c_out: int, resample: int = 0) -> Cell:
            return Cell(BNSwishBranch(c_in, c_out, resample), c_in, c_out, resample, config.use_se)

        def decoder_cell(c_in: int, c_out: int, resample: int, expansion: int) -> Cell:
            branch: nn.Module = (
                MBConvBranch(c_in, c_out, resample, expansion)
                if config.arch == "res_mbconv"
                else BNSwishBranch(c_in, c_out, resample)
            )
            return Cell(branch, c_in, c_out, resample, config.use_se)

        self.stem = WNConv2d(image_channels, widths[0], 3)
        # The last cell of a pre-process block halves the resolution and changes the channels ...
        self.preprocess = nn.Sequential()
        for c_in, c_out in itertools.pairwise(widths):
            self.preprocess.extend(encoder_cell(c_in, c_in) for _ in range(config.preprocess.cells - 1))
            self.preprocess.append(encoder_cell(c_in, c_out, resample=-1))

        self.encoder_groups = nn.ModuleList(
            nn.Sequential(*(encoder_cell(width, width) for _ in range(config.cells_per_cond))) for _ in range(groups)
        )
        # The decoder's first group is the encoder's last. Lists below are in the decoder's order, top first.
        self.encoder_combiners = nn.ModuleList(WNConv2d(width, width, 1) for _ in range(groups - 1))
        self.posterior_heads = nn.ModuleList(WNConv2d(width, 2 * latents, 3) for _ in range(groups))

        self.top = nn.Parameter(torch.rand(width, size, size))
        self.latent_convs = nn.ModuleList(WNConv2d(latents, latents, 3) for _ in range(groups))
        self.decoder_mixers = nn.ModuleList(WNConv2d(width + latents, width, 1) for _ in range(groups))
        self.decoder_groups = nn.ModuleList(
            nn.Sequential(
                *(decoder_cell(width, width, 0, MBCONV_EXPANSION_TOWER) for _ in range(config.cells_per_cond))
            )
            for _ in range(groups)
        )
        # ... and the first cell of a post-process block doubles it.
        self.postprocess = nn.Sequential()
        for c_in, c_out in zip(widths[::-1], widths[-2::-1], strict=False):
            self.postprocess.append(decoder_cell(c_in, c_out, 1, MBCONV_EXPANSION_POST))
            self.postprocess.extend(
                decoder_cell(c_out, c_out, 0, MBCONV_EXPANSION_POST) for _ in range(config.postprocess.cells - 1)
            )
        self.output_head: Conv2d = WNConv2d(widths[0], output_channels, 3)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> tuple[Posterior, Tensor]:
        """Draw z0 ~ q(z0 | x).

        Args:
            x: images in [-1, 1], [B, C, H, W].
            noise: standard normal draws in the shape of the latents; drawn here if None.
        Returns:
            the posterior sample and the likelihood's parameters [B, output_channels, H, W] that it decodes to
            (the decoder runs anyway: later groups depend on it).
        """
        s = self.preprocess(self.stem(x))
        states = []
        for cells in self.encoder_groups:
            s = cells(s)
            states.append(s)

        if noise is None:
            noise = torch.randn(x.shape[0], *self.latent_shape, device=x.device, dtype=x.dtype)
        zs: list[Tensor] = []
        log_qs: list[Tensor] = []
        h = self._top(x.shape[0])
        draws = noise.split(self.latent_groups, dim=1)
        for g, (state, draw) in enumerate(zip(reversed(states), draws, strict=True)):
            if g > 0:
                state = state + self.encoder_combiners[g - 1](h)
            mu, log_sigma = self.posterior_heads[g](F.elu(state)).chunk(2, dim=1)
            mu, log_sigma = soft_clamp(mu), soft_clamp(log_sigma, self.log_sigma_clamp)
            z = torch.addcmul(mu, log_sigma.exp(), draw)
            zs.append(z)
            log_qs.append(-0.5 * draw.square() - log_sigma - HALF_LOG_2PI)
            h = self._decode_group(g, h, z)
        posterior = Posterior(torch.cat(zs, dim=1), torch.cat(log_qs, dim=1), self.latent_groups)
        return posterior, self._image(h)

    def decode(self, z: Tensor) -> Tensor:
        """The likelihood's parameters [B, output_channels, H, W] for latents [B, C, h, w]."""
        h = self._top(z.shape[0])
        for g, z_g in enumerate(z.split(self.latent_groups, dim=1)):
            h = self._decode_group(g, h, z_g)
        return self._image(h)

    def _top(self, batch: int) -> Tensor:
        return self.top.expand(batch, -1, -1, -1)

    def _decode_group(self, g: int, h: Tensor, z: Tensor) -> Tensor:
        return self.decoder_groups[g](self.decoder_mixers[g](torch.cat([h, self.latent_convs[g](z)], dim=1)))

    def _image(self, h: Tensor) -> Tensor:
        return self.output_head(F.elu(self.postprocess(h)))
