"""Layers that the VAE is built from (NVAE, arXiv 2007.03898, section 3).

Feature maps are [B, C, H, W]. All arithmetic is plain PyTorch; nothing here is specific to a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.05


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
        return self._conv_forward(x, weight, self.bias)


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


class WNConv2d(Conv2d):
    """Weight-normalized convolution: w = exp(log_norm) * v / (||v|| + 1e-5), one norm per output channel."""

    normalized: Tensor | None = None  # the weight, where NormalizedWeights has computed it

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, **options: Any) -> None:
        super().__init__(c_in, c_out, kernel, stride, **options)
        norm = torch.linalg.vector_norm(self.weight.detach(), dim=(1, 2, 3), keepdim=True)
        self.log_weight_norm = nn.Parameter(torch.log(norm + 1e-2))

    def direction(self) -> Tensor:
        """v, [C_out, C_in / groups, k, k]."""
        return self.weight

    def effective_weight(self) -> Tensor:
        return normalize_weight(self.direction(), self.log_weight_norm) if self.normalized is None else self.normalized


def normalize_weight(v: Tensor, log_norm: Tensor) -> Tensor:
    """exp(log_norm) * v / (||v|| + 1e-5), the norm over the last three dimensions (leading ones are batched)."""
    norm = torch.linalg.vector_norm(v, dim=(-3, -2, -1), keepdim=True)
    return v * (torch.exp(log_norm) / (norm + 1e-5))


class NormalizedWeights:
    """Within it the weight-normalized convolutions of ``networks`` have their weights, computed at once for each shape.

    A training step does so: there are many of them, and a few operations on each are many operations.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self._by_shape: dict[torch.Size, list[WNConv2d]] = {}
        for network in networks:
            for module in network.modules():
                if isinstance(module, WNConv2d):
                    self._by_shape.setdefault(module.weight.shape, []).append(module)

    def __enter__(self) -> None:
        for convs in self._by_shape.values():
            v = torch.stack(
                [conv.direction().permute(0, 2, 3, 1) for conv in convs]
            )  # channels-last, as they lie in memory
            weights = normalize_weight(v, torch.stack([conv.log_weight_norm for conv in convs]))
            for conv, weight in zip(convs, weights.permute(0, 1, 4, 2, 3), strict=True):
                conv.normalized = weight

    def __exit__(self, *_: object) -> None:
        for convs in self._by_shape.values():
            for conv in convs:
                conv.normalized = None


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, gradient)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm with NVAE's momentum, whose batch is that of all processes where several train one model.

    (PyTorch's SyncBatchNorm is for GPUs only.) While a pass is recomputed its momentum is 0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        with no_autocast(x):
            world, wide_x = dist.get_world_size(), wide(x)
            mean = _SumOverProcesses.apply(wide_x.mean(dim=(0, 2, 3))) / world
            centered = wide_x - mean[:, None, None]
            variance = _SumOverProcesses.apply(centered.square().mean(dim=(0, 2, 3))) / world
            if self.momentum and self.running_mean is not None and self.running_var is not None:
                n = world * x.numel() // x.shape[1]
                with torch.no_grad():
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_var.lerp_(variance * (n / (n - 1)), self.momentum)
                    if self.num_batches_tracked is not None:
                        self.num_batches_tracked.add_(1)
            scale = self.weight * torch.rsqrt(variance + self.eps)
            return torch.addcmul(self.bias[:, None, None], centered, scale[:, None, None]).to(x.dtype)


class BatchNormSwish(BatchNorm):
    """Batch norm followed by swish, x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Untracked:
    """Within it the batch norms of ``module`` leave their running statistics as they are. Can be entered again."""

    def __init__(self, module: nn.Module) -> None:
        self._norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self._before = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, batches) in zip(self._norms, self._before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms take the mean and variance of the batch, and leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [norm.training for norm in norms]
    try:
        with Untracked(module):
            for norm in norms:
                norm.train()
            yield
    finally:
        for norm, training in zip(norms, before, strict=True):
            norm.train(training)


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


class MBConvBranch(nn.Module):
    """`mbconv`: batch norm -> expand 1x1 -> depthwise 5x5 -> project 1x1 -> batch norm, no weight norm, no biases."""

    def __init__(self, c_in: int, c_out: int, resample: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.upsample = resample > 0
        self.norm_in = BatchNorm(c_in)
        self.expand = Conv2d(c_in, hidden, 1, bias=False)
        self.norm_1 = BatchNormSwish(hidden)
        self.depthwise = DepthwiseConv2d(hidden, 5)
        self.norm_2 = BatchNormSwish(hidden)
        self.project = Conv2d(hidden, c_out, 1, bias=False)
        self.norm_out = BatchNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_1(self.expand(self.norm_in(x)))
        if self.upsample:
            # The definition repeats pixels first. Everything up to here works pixel by pixel, and a batch's mean and
            # variance do not see repetition: repeating here is the same function at a quarter of the work.
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        return self.norm_out(self.project(self.norm_2(self.depthwise(h))))


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
        return torch.addcmul(self.skip(x), h, self.gate(h).to(h.dtype), value=0.1)
