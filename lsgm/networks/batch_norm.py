"""Batch norm over all processes, and what may be done with its running statistics (NVAE, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lsgm.networks.layers import no_autocast, wide

BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.05


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
