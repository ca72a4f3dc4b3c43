"""Weight-normalized convolutions (arXiv 1602.07868; NVAE, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lsgm.networks import kernels
from lsgm.networks.layers import Conv2d

EPS = 1e-5


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
    return v * (torch.exp(log_norm) / (norm + EPS))


class NormalizedWeights:
    """Within it the weight-normalized convolutions of ``networks`` have their weights, computed at once.

    A training step does so: there are many of them, and a few operations on each are many operations.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self._convs = [module for network in networks for module in network.modules() if isinstance(module, WNConv2d)]
        self._by_shape: dict[torch.Size, list[WNConv2d]] = {}
        for conv in self._convs:
            self._by_shape.setdefault(conv.weight.shape, []).append(conv)

    def __enter__(self) -> None:
        directions = [conv.direction() for conv in self._convs]
        if directions and all(kernels.available(v) and dense(v) for v in directions):
            weights = _NormalizedWeights.apply(*directions, *(conv.log_weight_norm for conv in self._convs))
            for conv, weight in zip(self._convs, weights, strict=True):
                conv.normalized = weight
            return
        for convs in self._by_shape.values():  # channels-last, as they lie in memory
            v = torch.stack([conv.direction().permute(0, 2, 3, 1) for conv in convs])
            batch = normalize_weight(v, torch.stack([conv.log_weight_norm for conv in convs]))
            for conv, weight in zip(convs, batch.permute(0, 1, 4, 2, 3), strict=True):
                conv.normalized = weight

    def __exit__(self, *_: object) -> None:
        for conv in self._convs:
            conv.normalized = None


def dense(v: Tensor) -> bool:
    """Whether the rows of ``v`` [C_out, ...] lie one after the other in memory."""
    return v.is_contiguous() or v.is_contiguous(memory_format=torch.channels_last)


class _NormalizedWeights(torch.autograd.Function):
    """(directions, log norms) -> weights: :func:`normalize_weight` of many convolutions on CPUs."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        directions, log_norms = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.sizes = torch.tensor([size for v in directions for size in (len(v), v[0].numel())])
        weights = tuple(map(torch.empty_like, directions))
        count, addresses = len(weights), map(kernels.addresses, (directions, log_norms))
        kernels.call("normalize_weights", *addresses, ctx.sizes, count, EPS, kernels.addresses(weights))
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        tensors = ctx.saved_tensors
        directions, log_norms = tensors[: len(gradients)], tensors[len(gradients) :]
        gradients = tuple(
            torch.empty_like(v).copy_(g) if g.stride() != v.stride() else g
            for g, v in zip(gradients, directions, strict=True)
        )
        of = tuple(map(torch.empty_like, tensors))
        addresses = [kernels.addresses(some) for some in (directions, log_norms, gradients)]
        results = [kernels.addresses(some) for some in (of[: len(gradients)], of[len(gradients) :])]
        kernels.call("normalize_weights_backward", *addresses, ctx.sizes, len(gradients), EPS, *results)
        return of
