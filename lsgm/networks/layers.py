"""What all networks use: convolutions, and precision under autocast. Feature maps are [B, C, H, W]."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.networks import winograd


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it operations on ``x``'s device keep the precision of their arguments."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def wide(x: Tensor) -> Tensor:
    """Half precisions as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def soft_clamp(x: Tensor, limit: float = 5.0) -> Tensor:
    """limit * tanh(x / limit): the identity near 0, never beyond ``limit``."""
    return torch.tanh(x / limit) * limit


class Conv2d(nn.Conv2d):
    """Convolution with zero padding k // 2."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        *,
        bias: bool = True,
        groups: int = 1,
        padding: int = -1,
    ) -> None:
        padding = kernel // 2 if padding < 0 else padding
        super().__init__(c_in, c_out, kernel, stride, padding, groups=groups, bias=bias)

    def effective_weight(self) -> Tensor:
        """The weight that the convolution applies, [C_out, C_in / groups, k, k]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        weight = self.effective_weight()
        plain = self.kernel_size == self.stride == (1, 1) and self.groups == 1 and self.padding == (0, 0)
        if plain and x.is_contiguous(memory_format=torch.channels_last):
            # The pixels are the rows of a matrix already: a product of matrices is faster than a convolution.
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        if self.stride == self.padding == (1, 1) and self.groups == 1 and winograd.fits(x, weight):
            return winograd.convolve(x, weight, self.bias)
        return self._conv_forward(x, weight, self.bias)
