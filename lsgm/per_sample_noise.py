"""Random numbers that belong to an image: the same whatever else is in its batch, on every device."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from lsgm.arguments import check_seed
from lsgm.errors import LSGMError


def mix(*numbers: int) -> int:
    """A seed in which neighboring numbers have nothing in common: 63 bits, of which the CPU generator uses 32.

    Raises :class:`LSGMError` for what is no whole number from -2^63 to 2^63 - 1.
    """
    try:
        packed = struct.pack(f"<{len(numbers)}q", *numbers)
    except struct.error:
        raise LSGMError(f"seed: expected whole numbers from -2^63 to 2^63 - 1, found {numbers}") from None
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class PerSampleNoise:
    """One stream of normal draws for each image of a batch, made on the host.

    Args:
        seed: of all, 0 to 2^63 - 1; what draws are for may be part of it (:func:`mix`).
        images: the images' numbers; the stream of image i depends on (seed, i) alone, and no two are the same.
        device: where draws are wanted.
    """

    def __init__(self, seed: int, images: Iterable[int], device: torch.device | str = "cpu") -> None:
        seed = check_seed(seed)
        self._generators = [torch.Generator().manual_seed((mix(seed) + i) % 2**32) for i in images]
        self._device = device

    def __len__(self) -> int:
        """The number of images."""
        return len(self._generators)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """The next draw from N(0, I), [B, *shape]."""
        draws = torch.empty(len(self._generators), *shape)
        for row, generator in zip(draws, self._generators, strict=True):
            row.normal_(generator=generator)
        return draws.to(self._device)

    def rademacher(self, shape: tuple[int, ...]) -> Tensor:
        """The next draw of random signs, [B, *shape]."""
        return torch.where(self.normal(shape) < 0, -1.0, 1.0)
