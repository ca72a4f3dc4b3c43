"""The residual cells of NVAE (arXiv 2007.03898, section 3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lsgm.networks import kernels
from lsgm.networks.batch_norm import BatchNormSwish
from lsgm.networks.layers import no_autocast, wide
from lsgm.networks.weight_norm import WNConv2d


class SqueezeExcite(nn.Module):
    """Per-channel gate in (0, 1) from the global mean (arXiv 1709.01507); hidden width max(C / 16, 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """The gate, [B, C, 1, 1]; float32 whatever the precision of ``x``."""
        with no_autocast(x):
            # Not mean(): its gradient would be written out in the default layout, and added to one in channels-last.
            mean = wide(x).sum(dim=(2, 3)) / (x.shape[2] * x.shape[3])
            return torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))[:, :, None, None]

    def gated_sum(self, skip: Tensor, x: Tensor) -> Tensor:
        """skip + 0.1 * gate(x) * x."""
        if kernels.fits(x) and kernels.fits(skip) and not torch.is_autocast_enabled("cpu"):
            weights = (self.squeeze.weight, self.squeeze.bias, self.excite.weight, self.excite.bias)
            total: Tensor = _GatedSum.apply(skip, x, *weights)
            return total
        return torch.addcmul(skip, x, self(x).to(x.dtype), value=0.1)


class _GatedSum(torch.autograd.Function):
    """:meth:`SqueezeExcite.gated_sum` on CPUs: each feature map is read as few times as possible."""

    @staticmethod
    def forward(
        ctx: Any, skip: Tensor, x: Tensor, squeeze: Tensor, squeeze_bias: Tensor, excite: Tensor, excite_bias: Tensor
    ) -> Tensor:
        batch, channels, height, width = x.shape
        hidden = len(squeeze)
        ctx.size = (batch, height * width, channels, hidden)
        kept = (x.new_empty(batch, channels), x.new_empty(batch, hidden), x.new_empty(batch, channels))
        out = torch.empty_like(x)
        weights = (squeeze, squeeze_bias, excite, excite_bias)
        kernels.call("gated_sum_forward", skip, x, *ctx.size, *weights, *kept, out)
        ctx.save_for_backward(x, *weights, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, *weights, mean, hidden, gate = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of = [torch.empty_like(x), *map(torch.empty_like, weights)]
        kernels.call("gated_sum_backward", x, gradient, *ctx.size, weights[0], weights[2], mean, hidden, gate, *of)
        return gradient, *of


class DownSkip(nn.Module):
    """Halve the resolution: swish, then four 1x1 stride-2 convolutions on the four shifted grids."""

    SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))  # (row, column)

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        widths = [c_out // 4] * 3 + [c_out - 3 * (c_out // 4)]
        self.convs = nn.ModuleList(WNConv2d(c_in, width, 1, 2, padding=0) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        # As one 2x2 convolution whose weights are zero but at each quarter's own place: a quarter of the time.
        weights, biases = [], []
        for conv, (i, j) in zip(self.convs, self.SHIFTS, strict=True):
            assert isinstance(conv, WNConv2d) and conv.bias is not None
            weights.append(F.pad(conv.effective_weight(), (j, 1 - j, i, 1 - i)))
            biases.append(conv.bias)
        return F.conv2d(F.silu(x), torch.cat(weights), torch.cat(biases), stride=2)


class UpSkip(nn.Module):
    """Double the resolution: bilinear (corners aligned), then a 1x1 convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = WNConv2d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution commutes with interpolation (its weights sum to 1): convolve the small map.
        return F.interpolate(self.conv(x), scale_factor=2, mode="bilinear", align_corners=True)


class BNSwishBranch(nn.Module):
    """`res_bnswish`: two times batch norm -> swish -> conv3x3; the first resamples and changes the channels."""

    def __init__(self, c_in: int, c_out: int, resample: int) -> None:
        super().__init__()
        self.upsample = resample > 0
        self.norm_1 = BatchNormSwish(c_in)
        self.conv_1 = WNConv2d(c_in, c_out, 3, stride=2 if resample < 0 else 1)
        self.norm_2 = BatchNormSwish(c_out)
        self.conv_2 = WNConv2d(c_out, c_out, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(x)
        if self.upsample:
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        return self.conv_2(self.norm_2(self.conv_1(h)))


class Cell(nn.Module):
    """Residual cell: skip(x) + 0.1 * gate * branch(x).

    ``resample`` is -1 (halve), 0 or +1 (double); the skip is then a :class:`DownSkip` or :class:`UpSkip`.
    """

    activation_checkpointing = True  # a block of which only the input need be kept

    def __init__(self, branch: nn.Module, c_in: int, c_out: int, resample: int, use_se: bool) -> None:
        super().__init__()
        self.branch = branch
        self.gate = SqueezeExcite(c_out) if use_se else None
        self.skip: nn.Module = (DownSkip(c_in, c_out), nn.Identity(), UpSkip(c_in, c_out))[resample + 1]

    def forward(self, x: Tensor) -> Tensor:
        h = self.branch(x)
        if self.gate is None:
            return torch.add(self.skip(x), h, alpha=0.1)
        return self.gate.gated_sum(self.skip(x), h)
