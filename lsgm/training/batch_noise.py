"""Random numbers of a training step that do not depend on how many processes, or parts, share its batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BatchNoise:
    """Draws for ``total`` images, of which the rows ``start`` .. ``start + count`` are wanted.

    Args:
        device, dtype: of the draws.
        generator: on that device, seeded alike in all processes; PyTorch's global one if None.
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
        """N(0, I), [repeats * count, *shape]; draw r of image i is in row r * count + i."""
        return self._own(torch.randn(repeats * self._total, *shape, **self._kind), repeats)

    def uniform(self, repeats: int = 1) -> Tensor:
        """U[0, 1), [repeats * count], in the same order."""
        return self._own(torch.rand(repeats * self._total, **self._kind), repeats)

    def _own(self, draws: Tensor, repeats: int) -> Tensor:
        return draws.unflatten(0, (repeats, self._total))[:, self._rows].flatten(0, 1)


def all_of(x: Tensor) -> BatchNoise:
    """Draws for a whole batch, from PyTorch's global generator."""
    return BatchNoise(0, len(x), len(x), x.device, dtype=x.dtype)
