"""NCSN++: the U-Net that predicts the noise in a diffused latent (arXiv 2011.13456, appendix H; LSGM, appendix G)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.networks.group_norm import GroupNorm, GroupNormSwish
from lsgm.networks.layers import Conv2d, no_autocast, wide
from lsgm.widths import width_multipliers

NEAR_ZERO = 1e-10
RSQRT2 = 1 / math.sqrt(2)


def variance_scaling_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Uniform variance scaling with the mean of fan-in and fan-out, in place."""
    receptive = weight[0, 0].numel() if weight.dim() > 2 else 1
    fan_average = receptive * (weight.shape[0] + weight.shape[1]) / 2
    limit = math.sqrt(3 * scale / fan_average)
    return nn.init.uniform_(weight, -limit, limit)


def conv(c_in: int, c_out: int, kernel: int = 3, scale: float = 1.0) -> Conv2d:
    layer = Conv2d(c_in, c_out, kernel)
    variance_scaling_(layer.weight, scale)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def linear(c_in: int, c_out: int, scale: float = 1.0) -> nn.Linear:
    layer = nn.Linear(c_in, c_out)
    variance_scaling_(layer.weight, scale)
    nn.init.zeros_(layer.bias)
    return layer


class TimeEmbedding(nn.Module):
    """[sin, cos] of t times h frequencies, then linear -> swish -> linear -> swish.

    Frequencies: scale * 10000^(-i / (h - 1)), or with ``fourier`` 2 pi N(0, scale^2), drawn once.
    The last swish, which every residual block would apply to the same vector, is applied here once.
    """

    frequencies: Tensor

    def __init__(self, dim: int, scale: float, fourier: bool) -> None:
        super().__init__()
        half = dim // 2
        frequencies = scale * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.register_buffer("frequencies", None if fourier else frequencies[None], persistent=False)
        self.w = nn.Parameter(torch.randn(1, half) * scale, requires_grad=False) if fourier else None
        self.linear_1 = linear(dim, 4 * dim)
        self.linear_2 = linear(4 * dim, 4 * dim)

    def forward(self, t: Tensor) -> Tensor:
        """[B] -> [B, 4 * dim]; float32 (or t's own, wider type) whatever the precision around it."""
        with no_autocast(t):
            angles = t[:, None] * (self.frequencies if self.w is None else math.tau * self.w)
            embedding = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)
            return F.silu(self.linear_2(F.silu(self.linear_1(embedding))))


class Resample(nn.Module):
    """Double (+1) or halve (-1) the resolution, by the FIR kernel [1, 3, 3, 1] (in float32) or by nearest / average."""

    kernel: Tensor

    def __init__(self, direction: int, fir: bool) -> None:
        super().__init__()
        self.direction = direction
        self.fir = fir
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(taps, taps) / 64
        self.register_buffer("kernel", kernel * 4 if direction > 0 else kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fir:
            return F.interpolate(x, scale_factor=2, mode="nearest") if self.direction > 0 else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        with no_autocast(x):
            x = wide(x)
            kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
            if self.direction < 0:
                return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)
            # Zeros between the pixels and the (symmetric) kernel: a transposed convolution.
            return F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=channels)


class ResidualBlock(nn.Module):
    """BigGAN residual block: (shortcut(x) + h) / sqrt(2), both branches resampled by ``resample`` (-1, 0, +1)."""

    activation_checkpointing = True  # a block of which only the input need be kept

    def __init__(
        self, c_in: int, c_out: int, embedding: int, dropout: float, resample: int = 0, fir: bool = False
    ) -> None:
        super().__init__()
        self.norm_1 = GroupNormSwish(c_in)
        self.resample = Resample(resample, fir) if resample else None
        self.conv_1 = conv(c_in, c_out)
        self.time = linear(embedding, c_out)
        self.norm_2 = GroupNormSwish(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = conv(c_out, c_out, scale=NEAR_ZERO)
        self.shortcut = conv(c_in, c_out, 1) if c_in != c_out or resample else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.norm_1(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.norm_2(self.conv_1(h), shift=self.time(embedding))
        h = self.conv_2(self.dropout(h))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return (x + h) * RSQRT2


class Attention(nn.Module):
    """Single-head self-attention over the pixels: (x + out(softmax(q k / sqrt C) v)) / sqrt(2)."""

    activation_checkpointing = True  # a block of which only the input need be kept

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.query = linear(channels, channels)
        self.key = linear(channels, channels)
        self.value = linear(channels, channels)
        self.out = linear(channels, channels, scale=NEAR_ZERO)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # [B, H W, C]
        h = F.scaled_dot_product_attention(self.query(pixels), self.key(pixels), self.value(pixels))
        return (x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])) * RSQRT2


class Stage(nn.ModuleList):
    """Blocks that are applied in turn."""

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        for module in self:
            h = module(h, embedding)
        return h


class NCSNpp(nn.Module):
    """The score network eps'_theta(z_t, t).

    Args:
        channels: width of the network, multiplied at each resolution as :func:`width_multipliers` says.
        scales, cells_per_scale: resolutions, and residual blocks at each.
        fir: resample with the FIR kernel [1, 3, 3, 1]; False: nearest and average.
        dropout: rate in the residual blocks.
        embedding: of t, `positional` or `fourier`; embedding_dim, embedding_scale: its size and scale.
        attention_resolution: attention where the feature map has this size.
        latent_shape: (C, H, W) of the latents; H and W must be divisible by 2 ** (scales - 1).
        image_size: height and width of the images, which the widths depend on.
    """

    def __init__(
        self,
        *,
        channels: int,
        scales: int,
        cells_per_scale: int,
        fir: bool = False,
        dropout: float = 0.2,
        embedding: str = "positional",
        embedding_dim: int = 128,
        embedding_scale: float = 1000.0,
        attention_resolution: int = 16,
        latent_shape: tuple[int, int, int],
        image_size: int,
    ) -> None:
        super().__init__()
        latent_channels, size, _ = latent_shape
        widths = [channels * m for m in width_multipliers(scales, image_size)]
        features = 4 * embedding_dim

        def block(c_in: int, c_out: int, resample: int = 0) -> ResidualBlock:
            return ResidualBlock(c_in, c_out, features, dropout, resample, fir)

        def attend(resolution: int, width: int) -> list[nn.Module]:
            return [Attention(width)] if resolution == attention_resolution else []

        self.embedding = TimeEmbedding(embedding_dim, embedding_scale, embedding == "fourier")
        self.conv_in = conv(latent_channels, widths[0])

        # The result of each stage of the way down is a skip; each stage of the way up starts by joining one.
        self.down = nn.ModuleList()
        skips = [width := widths[0]]
        for level, level_width in enumerate(widths):
            for _ in range(cells_per_scale):
                self.down.append(Stage([block(width, level_width), *attend(size, level_width)]))
                skips.append(width := level_width)
            if level < len(widths) - 1:
                self.down.append(Stage([block(width, width, resample=-1)]))
                skips.append(width)
                size //= 2

        self.middle = Stage([block(width, width), Attention(width), block(width, width)])

        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for last in [False] * cells_per_scale + [True]:
                stage = Stage([block(width + skips.pop(), level_width)])
                width = level_width
                if last:
                    stage.extend(attend(size, level_width))
                    if level > 0:
                        stage.append(block(width, width, resample=1))
                        size *= 2
                self.up.append(stage)

        self.norm_out = GroupNormSwish(width)
        self.conv_out = conv(width, latent_channels, scale=NEAR_ZERO)

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Diffused latents [B, C, H, W] and times [B] in [0, 1] -> predicted noise [B, C, H, W]."""
        embedding = self.embedding(t)
        h = self.conv_in(z_t)
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.conv_out(self.norm_out(h))
