"""Masked autoregressive, volume-preserving normalizing flows over the latents of a group (NVAE, appendix; IAF).

z <- z - mu(z), with mu at a pixel and channel a function of the pixels before it in raster order and, at the pixel
itself, of the channels before it: the Jacobian is triangular with a unit diagonal, log |det| = 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.networks.weight_norm import WNConv2d

EXPANSION = 6


def raster_mask(c_out: int, c_in: int, kernel: int, mirrored: bool, center: Tensor) -> Tensor:
    """[c_out, c_in, k, k]: rows above and pixels to the left are seen, at the center what ``center`` says.

    ``mirrored``: rows below and pixels to the right.
    """
    mask = torch.zeros(c_out, c_in, kernel, kernel)
    middle = kernel // 2
    mask[:, :, :middle] = 1
    mask[:, :, middle, :middle] = 1
    mask[:, :, middle, middle] = center
    return mask.flip(2, 3) if mirrored else mask


class MaskedConv2d(WNConv2d):
    """Weight-normalized convolution with the weight times a mask."""

    mask: Tensor

    def __init__(self, mask: Tensor, *, bias: bool, groups: int = 1) -> None:
        c_out, c_in, kernel, _ = mask.shape
        super().__init__(c_in * groups, c_out, kernel, bias=bias, groups=groups)
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            norm = torch.linalg.vector_norm(self.direction(), dim=(1, 2, 3), keepdim=True)
            self.log_weight_norm.copy_(torch.log(norm + 1e-2))

    def direction(self) -> Tensor:
        return self.weight * self.mask


class Shift(nn.Module):
    """mu(z): masked conv3x3 -> ELU -> masked depthwise 5x5 -> ELU -> masked conv1x1; 6 hidden channels per latent one.

    Hidden channels 6 i .. 6 i + 5 see, at their own pixel, the latent channels before i; output i sees hidden groups
    up to i. With ``mirrored`` the order of the pixels is reversed, that of the channels stays.
    """

    activation_checkpointing = True  # a block of which only the input need be kept

    def __init__(self, channels: int, mirrored: bool) -> None:
        super().__init__()
        hidden = EXPANSION * channels
        of_hidden, of_latent = torch.arange(hidden) // EXPANSION, torch.arange(channels)
        before = (of_latent[None, :] < of_hidden[:, None]).float()
        up_to = (of_hidden[None, :] <= of_latent[:, None]).float()
        self.conv_in = MaskedConv2d(raster_mask(hidden, channels, 3, mirrored, before), bias=False)
        own = raster_mask(hidden, 1, 5, mirrored, torch.ones(hidden, 1))
        self.depthwise = MaskedConv2d(own, bias=False, groups=hidden)
        self.conv_out = MaskedConv2d(up_to[:, :, None, None], bias=True)

    def forward(self, z: Tensor) -> Tensor:
        mu: Tensor = self.conv_out(F.elu(self.depthwise(F.elu(self.conv_in(z)))))
        return mu


class Flow(nn.Module):
    """``pairs`` pairs of steps, one in raster order and one mirrored: latents [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, pairs: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Shift(channels, mirrored) for _ in range(pairs) for mirrored in (False, True))

    def forward(self, z: Tensor) -> Tensor:
        for step in self.steps:
            z = z - step(z)
        return z
