"""Random numbers of a training step that do not depend on how many processes, or parts, share its batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """Draws for ``total`` images, of which the rows ``start`` .. ``start + count`` are wanted.

    Args:
        device: where they are made.
        generator: on that device, seeded alike in all processes; PyTorch's global one if None.
    """

    def __init__(
        self, start: int, count: int, total: int, device: torch.device, generator: torch.Generator | None = None
    ) -> None:
        self._rows, self._total = slice(start, start + count), total
        self._device, self._generator = device, generator

    def normal(self, shape: tuple[int, ...], repeats: int = 1) -> Tensor:
        """N(0, I), [repeats * count, *shape]; draw r of image i is in row r * count + i."""
        draws = torch.randn(repeats * self._total, *shape, generator=self._generator, device=self._device)
        return self._own(draws, repeats)

    def uniform(self, repeats: int = 1) -> Tensor:
        """U[0, 1), [repeats * count], in the same order."""
        return self._own(torch.rand(repeats * self._total, generator=self._generator, device=self._device), repeats)

    def _own(self, draws: Tensor, repeats: int) -> Tensor:
        return draws.unflatten(0, (repeats, self._total))[:, self._rows].flatten(0, 1)


def all_of(x: Tensor) -> Draws:
    """Draws for a whole batch, from PyTorch's global generator."""
    return Draws(0, len(x), len(x), x.device)
