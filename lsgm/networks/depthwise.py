"""Depthwise convolution, with kernels of its own on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lsgm.networks import kernels
from lsgm.networks.layers import Conv2d


class DepthwiseConv2d(Conv2d):
    """A k x k filter of its own for each channel, without bias."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel_size == (5, 5) and kernels.fits(x, multiple_of=16) and not torch.is_autocast_enabled("cpu"):
            return _Depthwise5x5.apply(x, self.weight)
        return super().forward(x)


class _Depthwise5x5(torch.autograd.Function):
    """Depthwise 5x5 convolution of channels-last maps by the kernels in C. oneDNN's weight gradient takes ten times as
    long as its forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolve(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        taps = x.new_empty(5, 5, x.shape[1])
        kernels.call("depthwise_weight_gradient", x, gradient, *_size(x), taps)
        return _convolve(gradient, weight.flip(2, 3)), taps.permute(2, 0, 1)[:, None]


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, C, H, W] with weight [C, 1, 5, 5]."""
    y = torch.empty_like(x)
    kernels.call("depthwise_forward", x, weight.flatten(1).t().contiguous(), *_size(x), y)
    return y


def _size(x: Tensor) -> tuple[int, int, int, int]:
    batch, channels, height, width = x.shape
    return batch, height, width, channels
