"""Weight-normalized convolutions (arXiv 1602.07868; NVAE, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lsgm.networks.layers import Conv2d


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
