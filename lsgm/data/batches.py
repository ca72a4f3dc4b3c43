"""Training batches, gathered, binarised and padded on the device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsgm.errors import LSGMError
from lsgm.streams import mix


def preprocess(
    images: Tensor, generator: torch.Generator | None, pad_to: int = 32, binarise: bool = True, bits: int = 8
) -> Tensor:
    """What a model sees of stored images: uint8 [B, C, h, w] in 0..255 -> float32 [B, C, pad_to, pad_to] in [0, 1].

    With ``binarise`` each pixel is one Bernoulli draw with probability pixel / 255, from ``generator`` (on the
    images' device); without it, the upper ``bits`` bits of the pixel, from 0 to 1. The border is zero.
    """
    batch, channels, height, width = images.shape
    if binarise:
        # r uniform in 0..254: P(r < pixel) is pixel / 255 exactly, and no float image is made on the way.
        noise = torch.empty_like(images).random_(0, 255, generator=generator)
        images = noise < images
    elif bits < 8:
        images = images >> (8 - bits)
    top, left = (pad_to - height) // 2, (pad_to - width) // 2
    padded = torch.zeros(batch, channels, pad_to, pad_to, dtype=torch.uint8, device=images.device)
    padded[:, :, top : top + height, left : left + width] = images
    x = padded.float()
    return x if binarise else x.div_(2**bits - 1)


class Batches:
    """Random batches of a training set that lives on the device as bytes.

    Batch ``step`` of epoch ``epoch`` depends on (seed, epoch, step) alone, so a run that is resumed sees what an
    uninterrupted one sees. The order of the images is the same on every kind of device; the Bernoulli draws are
    not. An epoch is one permutation of the set without its last, incomplete batch.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],  # [N, C, h, w]
        batch: int,
        device: torch.device,
        seed: int,
        pad_to: int = 32,
        binarise: bool = True,
        bits: int = 8,
    ) -> None:
        if not 1 <= batch <= len(images):
            raise LSGMError(f"batch: expected a number from 1 to the {len(images)} images of the set, found {batch}")
        if max(images.shape[-2:]) > pad_to:
            raise LSGMError(f"images of {images.shape[-2]}x{images.shape[-1]} cannot be padded to {pad_to}x{pad_to}")
        self.images = torch.tensor(images, dtype=torch.uint8, device=device)
        self.batch = batch
        self.seed = seed
        self.pad_to = pad_to
        self.binarise = binarise
        self.bits = bits
        self._generator = torch.Generator(device)
        self._order: tuple[int, Tensor] | None = None  # the epoch it belongs to, [N]

    def __len__(self) -> int:
        """Steps of an epoch."""
        return len(self.images) // self.batch

    def epoch(self, epoch: int) -> Iterator[Tensor]:
        """The batches of one epoch, each float32 [batch, C, pad_to, pad_to] in [0, 1]."""
        for step in range(len(self)):
            yield self.batch_at(epoch, step)

    def batch_at(self, epoch: int, step: int, rows: slice = slice(None)) -> Tensor:
        """Batch ``step`` (0 .. len - 1) of epoch ``epoch``, or some of its ``rows``: float32 [B, C, pad_to, pad_to]."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)}")
        index = self.order(epoch)[step * self.batch : (step + 1) * self.batch]
        self._generator.manual_seed(mix(self.seed, epoch, step))
        if not self.binarise:  # nothing is drawn
            index, rows = index[rows], slice(None)
        x = preprocess(self.images.index_select(0, index), self._generator, self.pad_to, self.binarise, self.bits)
        return x[rows]

    def order(self, epoch: int) -> Tensor:
        """The permutation of the set that ``epoch`` goes through: int64 [N] on the device."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._order = epoch, torch.randperm(len(self.images), generator=generator).to(self.images.device)
        return self._order[1]
