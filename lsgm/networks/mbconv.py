"""The branch of NVAE's `mbconv` cells (arXiv 2007.03898, section 3), on CPUs by kernels that fuse its operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lsgm.networks import kernels
from lsgm.networks.batch_norm import BatchNorm, BatchNormSwish, joined, means_over_processes
from lsgm.networks.layers import Conv2d


class MBConvBranch(nn.Module):
    """`mbconv`: batch norm -> expand 1x1 -> depthwise 5x5 -> project 1x1 -> batch norm, no weight norm, no biases."""

    def __init__(self, c_in: int, c_out: int, resample: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        self.upsample = resample > 0
        self.norm_in = BatchNorm(c_in)
        self.expand = Conv2d(c_in, hidden, 1, bias=False)
        self.norm_1 = BatchNormSwish(hidden)
        self.depthwise = Conv2d(hidden, hidden, 5, groups=hidden, bias=False)
        self.norm_2 = BatchNormSwish(hidden)
        self.project = Conv2d(hidden, c_out, 1, bias=False)
        self.norm_out = BatchNorm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        if self._fits_kernels(x):
            result: Tensor = _Fused.apply(x, self, *self.parameters())
            return result
        h = self.norm_1(self.expand(self.norm_in(x)))
        if self.upsample:
            # The definition repeats pixels first. Everything up to here works pixel by pixel, and a batch's mean and
            # variance do not see repetition: repeating here is the same function at a quarter of the work.
            h = F.interpolate(h, scale_factor=2, mode="nearest")
        return self.norm_out(self.project(self.norm_2(self.depthwise(h))))

    def _fits_kernels(self, x: Tensor) -> bool:
        widths = (self.expand.in_channels, self.expand.out_channels, self.project.out_channels)
        return (
            all(width % kernels.WIDEST == 0 for width in widths)
            and x.shape[2] * x.shape[3] % 4 == 0
            and kernels.fits(x)
            and not torch.is_autocast_enabled("cpu")
        )


class _Norm(NamedTuple):
    """What kernels need of a batch norm: vectors [C], and eps."""

    mean: Tensor
    variance: Tensor
    weight: Tensor
    bias: Tensor
    eps: float


class _Fused(torch.autograd.Function):
    """(x, branch, its parameters) -> the branch's result.

    Each kernel takes the output of a linear operation, applies batch norm and swish to a few rows of it that stay in
    the cache, the next linear operation to these, and adds up the statistics that the next batch norm needs. Only
    the outputs of the linear operations are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: MBConvBranch, *parameters: Tensor) -> Tensor:
        batch, c_in, height, width = x.shape
        expand, depthwise, project = _weights(branch)
        hidden, c_out = len(expand), len(project)
        scale = 2 if branch.upsample else 1
        small, large = height * width, height * width * scale**2  # pixels

        found = _vectors(x, c_in)
        kernels.call("batch_norm_statistics", x, batch * small, c_in, *found)
        norm_in = _norm(branch.norm_in, *found, batch * small)
        expanded, found = x.new_empty(batch * small * hidden), _vectors(x, hidden)
        size: tuple[int, ...] = (batch, small, c_in, hidden)
        kernels.call("pointwise_forward", x, *size, *norm_in, 0, expand, expanded, *found)
        norm_1 = _norm(branch.norm_1, *found, batch * small)
        filtered, found = x.new_empty(batch * large * hidden), _vectors(x, hidden)
        size = (batch, height, width, hidden)
        kernels.call("depthwise_forward", expanded, *size, *norm_1, depthwise, branch.upsample, filtered, *found)
        norm_2 = _norm(branch.norm_2, *found, batch * large)
        shape = (batch, c_out, height * scale, width * scale)
        projected = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        found = _vectors(x, c_out)
        size = (batch, large, hidden, c_out)
        kernels.call("pointwise_forward", filtered, *size, *norm_2, 1, project, projected, *found)
        norm_out = _norm(branch.norm_out, *found, batch * large)
        result = torch.empty_like(projected)
        kernels.call("batch_norm_forward", projected, batch * large, c_out, *norm_out, 0, result)

        ctx.branch, ctx.training = branch, [norm.training for norm in _norms(branch)]
        norms = (norm_in, norm_1, norm_2, norm_out)
        ctx.save_for_backward(x, expanded, filtered, projected, *parameters, *(v for n in norms for v in n[:2]))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, expanded, filtered, projected, *rest = ctx.saved_tensors
        branch, statistics = ctx.branch, rest[-8:]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        expand, depthwise, project = _weights(branch)
        (hidden, c_in), c_out = expand.shape, len(project)
        batch, _, height, width = x.shape
        small, large = height * width, projected.shape[2] * projected.shape[3]  # pixels
        norm_in, norm_1, norm_2, norm_out = (
            _Norm(mean, variance, norm.weight, norm.bias, norm.eps)
            for mean, variance, norm in zip(statistics[::2], statistics[1::2], _norms(branch), strict=True)
        )

        def means(sums: Tensor, i: int, pixels: int) -> Tensor:
            """What the gradient through the statistics needs: nothing where they are not those of the batch."""
            return means_over_processes(sums, batch * pixels) if ctx.training[i] else torch.zeros_like(sums)

        of_out = x.new_empty(2, c_out)
        size: tuple[int, ...] = (batch * large, c_out)
        kernels.call("batch_norm_backward_sums", projected, gradient, *size, *norm_out, 0, gradient, of_out)
        after = (projected, gradient, *norm_out[:3], means(of_out, 3, large))
        dz, of_2, of_project = torch.empty_like(filtered), x.new_empty(2, hidden), torch.empty_like(project)
        size = (batch, large, hidden, c_out)
        kernels.call("pointwise_backward", filtered, *size, *norm_2, 1, project, *after, dz, of_2, of_project)
        after = (filtered, dz, *norm_2[:3], means(of_2, 2, large))
        dz, of_1, of_depthwise = torch.empty_like(expanded), x.new_empty(2, hidden), torch.empty_like(depthwise)
        size, up = (batch, height, width, hidden), branch.upsample
        kernels.call("depthwise_backward", expanded, *size, *norm_1, depthwise, up, *after, dz, of_1, of_depthwise)
        after = (expanded, dz, *norm_1[:3], means(of_1, 1, small))
        dz, of_in, of_expand = torch.empty_like(x), x.new_empty(2, c_in), torch.empty_like(expand)
        size = (batch, small, c_in, hidden)
        kernels.call("pointwise_backward", x, *size, *norm_in, 0, expand, *after, dz, of_in, of_expand)
        size, means_in = (batch * small, c_in), means(of_in, 0, small)
        kernels.call("batch_norm_backward", x, dz, *size, *norm_in[:3], norm_in.eps, means_in, dz)
        of = {
            branch.norm_in: of_in, branch.norm_1: of_1, branch.norm_2: of_2, branch.norm_out: of_out,
            branch.expand: of_expand, branch.depthwise: of_depthwise, branch.project: of_project,
        }  # fmt: skip
        gradients: list[Tensor] = []
        for module, found in ((module, of[module]) for module in branch.children()):  # in the order of parameters()
            gradients += found.flip(0) if isinstance(module, BatchNorm) else [found.view_as(module.weight)]
        return dz, None, *gradients


def _norms(branch: MBConvBranch) -> tuple[BatchNorm, BatchNorm, BatchNorm, BatchNorm]:
    return branch.norm_in, branch.norm_1, branch.norm_2, branch.norm_out


def _weights(branch: MBConvBranch) -> list[Tensor]:
    """Of expand, depthwise and project, as matrices."""
    convs = (branch.expand, branch.depthwise, branch.project)
    return [conv.weight.detach().flatten(1).contiguous() for conv in convs]


def _norm(norm: BatchNorm, mean: Tensor, variance: Tensor, pixels: int) -> _Norm:
    """With these statistics of the batch while training, then also tracked; else with the running ones."""
    if norm.training:
        mean, variance = joined(mean, variance)
        norm.track(mean, variance, pixels)
    else:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, variance = norm.running_mean, norm.running_var
    return _Norm(mean, variance, norm.weight, norm.bias, norm.eps)


def _vectors(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Room for a mean and a variance."""
    return x.new_empty(channels), x.new_empty(channels)
