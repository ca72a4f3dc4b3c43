"""Spectral regularization (NVAE, section 3.2), which bounds the Lipschitz constant of the networks.

lambda * (sum over convolutions of the largest singular value + sum over norm layers of max |gamma|).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from lsgm.networks import kernels
from lsgm.networks.layers import Conv2d
from lsgm.networks.weight_norm import dense

FIRST_ITERATIONS = 40
ITERATIONS = 4


class SpectralRegularizer:
    """The sum of largest singular values and of max |gamma| in one network.

    Singular values are estimated by power iteration (40 steps on the first call, 4 on each later call), batched over
    weights of the same shape. The weight of a convolution, after weight norm, counts as a matrix [C_out, rest]. With
    ``convs=False`` convolutions do not count.
    """

    def __init__(self, network: nn.Module, seed: int = 0, convs: bool = True) -> None:
        generator = torch.Generator().manual_seed(seed)
        by_shape: dict[torch.Size, list[nn.Conv2d]] = defaultdict(list)
        norms: dict[int, list[Tensor]] = defaultdict(list)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                if convs:
                    by_shape[module.weight.shape].append(module)
            elif isinstance(module, (_BatchNorm, nn.GroupNorm)):
                norms[module.weight.numel()].append(module.weight)
        self._convs, self._norms = list(by_shape.values()), list(norms.values())
        self._left = []  # estimates of the left singular vectors, [N, 1, C_out] for each shape
        for group in self._convs:
            start = torch.randn(len(group), 1, group[0].weight.shape[0], generator=generator)
            self._left.append(F.normalize(start, dim=2).to(group[0].weight))
        self._iterations = FIRST_ITERATIONS

    def spectral(self) -> Tensor:
        """Sum over all convolutions of the largest singular value."""
        weights = [
            [conv.effective_weight() if isinstance(conv, Conv2d) else conv.weight for conv in group]
            for group in self._convs
        ]
        iterations, self._iterations = self._iterations, ITERATIONS
        every = [weight for group in weights for weight in group]
        if every and all(kernels.available(weight) and dense(weight) for weight in every):
            total: Tensor = _SpectralSum.apply(self._left, iterations, *every)
            return total
        values = []
        for i, group in enumerate(weights):
            matrix = torch.stack([w.permute(0, 2, 3, 1) for w in group]).flatten(2)  # [N, C_out, rest], in any order
            value, self._left[i] = _LargestSingularValues.apply(matrix, self._left[i], iterations)
            values.append(value)
        return torch.stack(values).sum() if values else torch.zeros(())

    def state_dict(self) -> dict[str, Any]:
        """The vectors of the power iteration."""
        return {"left": list(self._left), "iterations": self._iterations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, left in enumerate(state["left"]):
            self._left[i] = left.to(self._left[i])
        self._iterations = int(state["iterations"])

    def norm_scales(self) -> Tensor:
        """Sum over all norm layers of max |gamma|."""
        return torch.stack([torch.stack(group).abs().amax(dim=1).sum() for group in self._norms]).sum()

    def __call__(self) -> Tensor:
        return self.spectral() + self.norm_scales()


class _LargestSingularValues(torch.autograd.Function):
    """The sum of the largest singular values of matrices [N, R, C], and improved left singular vectors [N, 1, R].

    The gradient of a singular value is left^T right.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, left: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        transposed = matrices.transpose(1, 2)
        for _ in range(iterations):
            right = left @ matrices
            left = F.normalize(right @ transposed, dim=2)
        right = F.normalize(right, dim=2)
        ctx.save_for_backward(left, right)
        ctx.mark_non_differentiable(left)
        return (left @ matrices * right).sum(), left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        return (gradient * left).transpose(1, 2) * right, None, None


class _SpectralSum(torch.autograd.Function):
    """The same on CPUs, of weights of all shapes at once and without copies of them; improves ``lefts`` in place."""

    @staticmethod
    def forward(ctx: Any, lefts: list[Tensor], iterations: int, *weights: Tensor) -> Tensor:
        sizes = torch.tensor([size for w in weights for size in (len(w), w[0].numel())])
        rights = list(weights[0].new_empty(int(sizes[1::2].sum())).split(sizes[1::2].tolist()))
        ctx.vectors = [left[0] for group in lefts for left in group], rights  # as they are until the next call
        addresses, values = [kernels.addresses(some) for some in ctx.vectors], weights[0].new_empty(len(weights))
        matrices = kernels.addresses(weights)
        kernels.call("power_iteration", matrices, sizes, len(weights), iterations, *addresses, values)
        ctx.sizes, ctx.shapes = sizes, [(w.shape, w.stride()) for w in weights]
        return values.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of = [torch.empty_strided(*shape) for shape in ctx.shapes]
        addresses = [kernels.addresses(some) for some in ctx.vectors]
        kernels.call("outer_products", *addresses, ctx.sizes, len(of), gradient, kernels.addresses(of))
        return None, None, *of
