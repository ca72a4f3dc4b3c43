"""Random numbers of a training step, independent of how many processes and parts share its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BatchNoise:
    """Draws random numbers for ``total`` images and returns rows ``start`` .. ``start + count - 1``.

    Args:
        device, dtype: device and dtype of the random numbers.
        generator: generator on that device with the same seed in all processes; None: PyTorch's global one.
    """

    def __init__(
        self,
        start: int,
        count: int,
        total: int,
        device: torch.device,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._rows, self._total = slice(start, start + count), total
        self._kind: dict[str, Any] = {"device": device, "generator": generator, "dtype": dtype}

    def normal(self, shape: tuple[int, ...], repeats: int = 1) -> Tensor:
        """Samples of N(0, I), [repeats * count, *shape]; sample r of image i is in row r * count + i."""
        return self._own(torch.randn(repeats * self._total, *shape, **self._kind), repeats)

    def uniform(self, repeats: int = 1) -> Tensor:
        """Samples of U[0, 1), [repeats * count], in the same order."""
        return self._own(torch.rand(repeats * self._total, **self._kind), repeats)

    def stratified(self, repeats: int = 1) -> Tensor:
        """Stratified samples of [0, 1), [repeats * count], in the same order: one in each of repeats * total cells.

        Sample r of an image lies in a random cell of the r-th of ``repeats`` equal parts of [0, 1), so that an image's
        samples together are uniform.
        """
        cells = repeats * self._total
        permutations = [self._permutation() + r * self._total for r in range(repeats)]
        rho = (torch.cat(permutations) + torch.rand(cells, **self._kind).double()) / cells
        dtype = self._kind["dtype"]
        return self._own(rho.to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2), repeats)

    def _permutation(self) -> Tensor:
        kind = {key: value for key, value in self._kind.items() if key != "dtype"}
        return torch.randperm(self._total, **kind)

    def _own(self, draws: Tensor, repeats: int) -> Tensor:
        return draws.unflatten(0, (repeats, self._total))[:, self._rows].flatten(0, 1)


def all_of(x: Tensor) -> BatchNoise:
    """Noise for a whole batch, from PyTorch's global generator."""
    return BatchNoise(0, len(x), len(x), x.device, dtype=x.dtype)
