"""Group norm (arXiv 1803.08494), on CPUs by kernels that fuse it with what stands beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lsgm.networks import kernels


class GroupNorm(nn.GroupNorm):
    """Group norm of min(C / 4, 32) groups."""

    swish = False  # whether the result is x * sigmoid(x) of the normalized map

    def __init__(self, channels: int) -> None:
        super().__init__(min(channels // 4, 32), channels, eps=1e-6)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """``shift`` [B, C], or [1, C], is added to ``x`` [B, C, H, W] first."""
        if kernels.fits(x, multiple_of=kernels.WIDEST) and not torch.is_autocast_enabled("cpu"):
            if shift is not None:
                shift = shift.expand(len(x), -1)
            result: Tensor = _GroupNorm.apply(x, shift, self.weight, self.bias, self.num_groups, self.eps, self.swish)
            return result
        y = super().forward(x if shift is None else x + shift[:, :, None, None])
        return F.silu(y) if self.swish else y


class GroupNormSwish(GroupNorm):
    """Group norm followed by swish, x * sigmoid(x)."""

    swish = True


class _GroupNorm(torch.autograd.Function):
    """(x [B, C, H, W], shift [B, C] or None, weight [C], bias [C], groups, eps, swish) -> result; keeps only ``x``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, swish: bool
    ) -> Tensor:
        batch, channels, height, width = x.shape
        ctx.size, ctx.swish = (batch, height * width, channels, groups), swish
        shift = None if shift is None else shift.contiguous()
        statistics, y = x.new_empty(batch, 2, channels), torch.empty_like(x)
        kernels.call("group_norm_forward", x, shift, *ctx.size, weight, bias, eps, swish, statistics, y)
        ctx.save_for_backward(x, shift, weight, bias, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, statistics = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of = [torch.empty_like(x), None if shift is None else torch.empty_like(shift)]
        of += [torch.empty_like(weight), torch.empty_like(bias)]
        kernels.call("group_norm_backward", x, shift, gradient, *ctx.size, weight, bias, ctx.swish, statistics, *of)
        return *of, None, None, None
