"""3x3 convolutions on CPUs by Winograd's algorithm F(2x2, 3x3) (arXiv 1509.09308): 16 products where there are 36."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lsgm.networks import kernels

NARROW = 4  # channels of a result that are computed one by one, from all of the input


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`convolve` accepts ``x`` [B, K, H, W] and ``weight`` [N, K, 3, 3], and is fast.

    That needs even sides, channels in sixteens, and more tiles of 2x2 pixels than channels: the filters are transformed
    in every call.
    """
    return (
        weight.shape[2:] == (3, 3)
        and (weight.shape[0] % kernels.WIDEST == 0 or weight.shape[0] <= NARROW)
        and x.shape[2] % 2 == x.shape[3] % 2 == 0
        and x.numel() // x.shape[1] // 4 >= max(weight.shape[:2])
        and kernels.fits(x, multiple_of=kernels.WIDEST)
        and not torch.is_autocast_enabled("cpu")
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution with stride 1 and zero padding 1, [B, N, H, W]."""
    result: Tensor = _Convolution.apply(x, weight, bias)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taps = weight.permute(0, 2, 3, 1).contiguous()
        ctx.save_for_backward(x, taps)
        y = x.new_empty(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)
        if len(weight) <= NARROW:
            kernels.call("narrow_convolution", x, *_size(x, taps), taps, bias, y)
        else:
            kernels.call("convolution", x, *_size(x, taps), taps, bias, 0, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, taps = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        batch, height, width, k, n = _size(x, taps)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            if n <= NARROW:
                of_x = conv2d_input(x.shape, taps.permute(0, 3, 1, 2), gradient, padding=1)
            else:
                of_x = torch.empty_like(x)
                kernels.call("convolution", gradient, batch, height, width, n, k, taps, None, 1, of_x)
        if ctx.needs_input_grad[1]:
            of_taps, of_bias = torch.empty_like(taps), x.new_empty(n)
            name = "narrow_convolution_weight_gradient" if n <= NARROW else "convolution_weight_gradient"
            kernels.call(name, x, gradient, *_size(x, taps), of_taps, of_bias)
            of_weight = of_taps.permute(0, 3, 1, 2)
        return of_x, of_weight, of_bias if ctx.needs_input_grad[2] else None


def _size(x: Tensor, taps: Tensor) -> tuple[int, ...]:
    """Batch, height, width, channels of the input and of the result."""
    return len(x), *x.shape[2:], x.shape[1], len(taps)
