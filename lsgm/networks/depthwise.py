"""Depthwise convolution, with a CPU kernel for the gradient of its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsgm.networks.layers import Conv2d


class DepthwiseConv2d(Conv2d):
    """A k x k filter of its own for each channel, without bias."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pairs = (
            self.kernel_size == (5, 5) and x.shape[3] % 2 == 0 and x.is_contiguous(memory_format=torch.channels_last)
        )
        if pairs and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            return _Depthwise5x5.apply(x, self.weight)
        return super().forward(x)


class _Depthwise5x5(torch.autograd.Function):
    """Depthwise 5x5 convolution of channels-last maps of even width, whose weight gradient is fast on CPUs.

    oneDNN's is five to ten times as fast for kernels of width 3 as for wider ones. Taps 1 to 3 of each row are such a
    kernel. In memory, two neighboring columns of C channels are one column of 2 C: seen like that, taps 0, 2 and 4 are
    such a kernel too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=2, groups=x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        channels = x.shape[1]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        inner = _depthwise_weight_gradient(gradient, x)
        outer = _depthwise_weight_gradient(_pair_columns(gradient), _pair_columns(x)).view(2, channels, 1, 5, 3).sum(0)
        taps = [outer[..., 0], inner[..., 0], inner[..., 1], inner[..., 2], outer[..., 2]]
        return F.conv2d(gradient, weight.flip(2, 3), padding=2, groups=channels), torch.stack(taps, dim=3)


def _pair_columns(x: Tensor) -> Tensor:
    """[B, C, H, W] in channels-last as [B, 2 C, H, W / 2]: a column's channels, then the next one's."""
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).view(batch, height, width // 2, 2 * channels).permute(0, 3, 1, 2)


def _depthwise_weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Of a 5x3 kernel, [C, 1, 5, 3]."""
    weight = x.new_empty(x.shape[1], 1, 5, 3)
    one, no = [1, 1], [0, 0]
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, one, [2, 1], one, False, no, x.shape[1], [False, True, False]
    )[1]
