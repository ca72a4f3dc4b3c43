"""Batch norm over all processes, and what may be done with its running statistics (NVAE, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from lsgm.networks import kernels
from lsgm.networks.gather import gather
from lsgm.networks.layers import no_autocast, wide

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.05


class BatchNorm(nn.SyncBatchNorm):
    """Batch norm with NVAE's momentum, whose batch is that of all processes where several train one model.

    PyTorch's SyncBatchNorm does so on GPUs. On CPUs :class:`_Normalize` does, which is also faster for one process.
    While a pass is recomputed its momentum is 0.
    """

    swish = False  # whether the result is x * sigmoid(x) of the normalized map

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=BATCH_NORM_EPS, momentum=BATCH_NORM_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        several = dist.is_available() and dist.is_initialized()
        if not self.training or not ((several and x.device.type == "cpu") or kernels.fits(x)):
            y = super().forward(x)
            return F.silu(y) if self.swish else y
        with no_autocast(x):
            y, mean, variance = _Normalize.apply(wide(x), self.weight, self.bias, self.eps, self.swish)
        self.track(mean, variance, x.numel() // x.shape[1])
        return y.to(x.dtype)

    @torch.no_grad()
    def track(self, mean: Tensor, variance: Tensor, pixels: int) -> None:
        """Move the running statistics towards those of a batch, of so many pixels in each process."""
        if not self.momentum or self.running_mean is None or self.running_var is None:
            return
        n = pixels * (dist.get_world_size() if dist.is_initialized() else 1)
        running = (self.running_mean, self.running_var)
        if kernels.available(mean):
            kernels.call("track", mean, variance, len(mean), n, self.momentum, *running)
        else:
            running[0].lerp_(mean, self.momentum)
            running[1].lerp_(variance * (n / (n - 1)), self.momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


class BatchNormSwish(BatchNorm):
    """Batch norm followed by swish, x * sigmoid(x)."""

    swish = True


class _Map(NamedTuple):
    """z = weight (x - mean) / sqrt(variance + eps) + bias in each channel, and with ``swish`` z sigmoid(z).

    Vectors are [C], mean and biased variance those of the batch.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    swish: bool


class _Normalize(torch.autograd.Function):
    """Batch norm over all processes, with or without swish: one collective forward, one backward.

    (x [B, C, H, W], weight [C], bias [C], eps, swish) -> result, mean [C], biased variance [C]. Of the feature maps
    only ``x`` is kept for the backward pass, which recomputes what lies between.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, swish: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.operations = _Kernels if kernels.fits(x) else _Operations
        mean, variance = ctx.operations.statistics(x)
        mean, variance = joined(mean, variance)
        ctx.save_for_backward(x, mean, variance, weight, bias)
        ctx.settings = (eps, swish)
        ctx.mark_non_differentiable(mean, variance)
        return ctx.operations.forward(x, _Map(mean, variance, weight, bias, eps, swish)), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, *vectors = ctx.saved_tensors
        of = _Map(*vectors, *ctx.settings)
        dz, sums = ctx.operations.gradient_sums(x, gradient, of)
        means = means_over_processes(sums, x.numel() // x.shape[1])
        return ctx.operations.gradient(x, dz, of, means), sums[1], sums[0], None, None


def means_over_processes(sums: Tensor, pixels: int) -> Tensor:
    """Means over all processes, of sums over so many pixels in each, in one collective."""
    if dist.is_initialized():
        return gather(sums.flatten()).mean(dim=0).view_as(sums) / pixels
    return sums / pixels


def joined(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over all processes, which have equally many pixels, in one collective."""
    if not dist.is_initialized():
        return mean, variance
    means, variances = gather(torch.cat([mean, variance])).view(-1, 2, len(mean)).unbind(dim=1)
    return means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)


class _Operations:
    """The parts of batch norm, by PyTorch's operations."""

    @staticmethod
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, [C]."""
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        return mean, variance

    @staticmethod
    def forward(x: Tensor, of: _Map) -> Tensor:
        z = F.batch_norm(x, of.mean, of.variance, of.weight, of.bias, False, 0.0, of.eps)
        return F.silu(z) if of.swish else z

    @staticmethod
    def gradient_sums(x: Tensor, gradient: Tensor, of: _Map) -> tuple[Tensor, Tensor]:
        """dz, the gradient with respect to z, and the sums of dz and of dz x_hat, [2, C]; x_hat = (x - mean) / std."""
        if of.swish:
            z = F.batch_norm(x, of.mean, of.variance, of.weight, of.bias, False, 0.0, of.eps)
            gradient = torch.ops.aten.silu_backward(gradient, z)
        x_hat = F.batch_norm(x, of.mean, of.variance, None, None, False, 0.0, of.eps)
        return gradient, torch.stack([gradient.sum(dim=(0, 2, 3)), (gradient * x_hat).sum(dim=(0, 2, 3))])

    @staticmethod
    def gradient(x: Tensor, dz: Tensor, of: _Map, means: Tensor) -> Tensor:
        """weight / std (dz - mean(dz) - x_hat mean(dz x_hat)), with the means [2, C] over the whole batch."""
        x_hat = F.batch_norm(x, of.mean, of.variance, None, None, False, 0.0, of.eps)
        scale = of.weight * torch.rsqrt(of.variance + of.eps)
        mean_dz, mean_product = means[..., None, None].unbind()
        return scale[:, None, None] * (dz - mean_dz - x_hat * mean_product)


class _Kernels:
    """The same by the kernels in C."""

    @staticmethod
    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = x.new_empty(2, x.shape[1]).unbind()
        kernels.call("batch_norm_statistics", x, *_size(x), mean, variance)
        return mean, variance

    @staticmethod
    def forward(x: Tensor, of: _Map) -> Tensor:
        y = torch.empty_like(x)
        kernels.call("batch_norm_forward", x, *_size(x), *of, y)
        return y

    @staticmethod
    def gradient_sums(x: Tensor, gradient: Tensor, of: _Map) -> tuple[Tensor, Tensor]:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        dz, sums = torch.empty_like(x) if of.swish else gradient, x.new_empty(2, x.shape[1])
        kernels.call("batch_norm_backward_sums", x, gradient, *_size(x), *of, dz, sums)
        return dz, sums

    @staticmethod
    def gradient(x: Tensor, dz: Tensor, of: _Map, means: Tensor) -> Tensor:
        dx = torch.empty_like(x)
        kernels.call("batch_norm_backward", x, dz, *_size(x), of.mean, of.variance, of.weight, of.eps, means, dx)
        return dx


def _size(x: Tensor) -> tuple[int, int]:
    """Pixels and channels."""
    return x.numel() // x.shape[1], x.shape[1]


class Untracked:
    """Within it the batch norms of ``module`` leave their running statistics as they are. Can be entered again."""

    def __init__(self, module: nn.Module) -> None:
        self._norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self._before = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            batches = norm.num_batches_tracked
            norm.momentum, norm.num_batches_tracked = 0.0, None if batches is None else batches.clone()

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
