"""Training batches: gathered on the device, or prefetched from disk, then binarized and padded on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsgm.errors import LSGMError
from lsgm.per_sample_noise import mix

SHARE = 0.1  # fraction of a GPU's memory that a resident dataset may take
ON_HOST = 1 << 30  # bytes; larger datasets are streamed, and the page cache holds what fits into memory
READERS = 2  # threads
AHEAD = 4  # batches that are prefetched


def preprocess(
    images: Tensor, generator: torch.Generator | None, pad_to: int = 32, binarize: bool = True, bits: int = 8
) -> Tensor:
    """Turn stored images into model inputs: uint8 [B, C, h, w] in 0..255 -> float32 [B, C, pad_to, pad_to] in [0, 1].

    With ``binarize`` each pixel is drawn from Bernoulli(pixel / 255), with ``generator`` (on the images' device);
    otherwise only the upper ``bits`` bits of each pixel are kept and scaled to [0, 1]. The border is zero.
    """
    batch, channels, height, width = images.shape
    if binarize:
        # With r uniform in 0..254, P(r < pixel) is exactly pixel / 255, without an intermediate float image.
        noise = torch.empty_like(images).random_(0, 255, generator=generator)
        images = noise < images
    elif bits < 8:
        images = images >> (8 - bits)
    if (height, width) != (pad_to, pad_to):
        top, left = (pad_to - height) // 2, (pad_to - width) // 2
        padded = torch.zeros(batch, channels, pad_to, pad_to, dtype=torch.uint8, device=images.device)
        padded[:, :, top : top + height, left : left + width] = images
        images = padded
    return images.float() if binarize else images / (2**bits - 1)


class Batches:
    """Random batches of a training set, which is kept on the device as bytes or, if it is large, streamed from disk.

    Batch ``step`` of epoch ``epoch`` depends only on (seed, epoch, step), so a resumed run sees the same batches as an
    uninterrupted one. The order of the images is the same on every type of device, streamed or not; the Bernoulli
    samples differ between types of devices. An epoch is one permutation of the set without its last, incomplete batch.

    Args:
        stream: prefetch batches from ``images`` (which may be memory-mapped) in the background. None: only if the set
            takes more than a tenth of the GPU's memory, or on a CPU more than a gigabyte.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],  # [N, C, h, w]
        batch: int,
        device: torch.device,
        seed: int,
        pad_to: int = 32,
        binarize: bool = True,
        bits: int = 8,
        stream: bool | None = None,
    ) -> None:
        if not 1 <= batch <= len(images):
            raise LSGMError(f"batch: expected 1 to {len(images)}, the number of images in the set, found {batch}")
        if max(images.shape[-2:]) > pad_to:
            raise LSGMError(f"images of {images.shape[-2]}x{images.shape[-1]} cannot be padded to {pad_to}x{pad_to}")
        if stream is None:
            stream = images.nbytes > room(device)
        self.images: NDArray[np.uint8] | Tensor = (
            images if stream else torch.tensor(images, dtype=torch.uint8, device=device)
        )
        self.device = device
        self.batch = batch
        self.seed = seed
        self.pad_to = pad_to
        self.binarize = binarize
        self.bits = bits
        self._stream = Stream(images, self._index, device) if stream else None
        self._generator = torch.Generator(device)
        self._order: tuple[int, Tensor] | None = None  # epoch, permutation [N]

    def __len__(self) -> int:
        """The number of steps per epoch."""
        return len(self.images) // self.batch

    def epoch(self, epoch: int) -> Iterator[Tensor]:
        """The batches of one epoch, each float32 [batch, C, pad_to, pad_to] in [0, 1]."""
        for step in range(len(self)):
            yield self.batch_at(epoch, step)

    def batch_at(self, epoch: int, step: int, rows: slice = slice(None)) -> Tensor:
        """Batch ``step`` (0 .. len - 1) of epoch ``epoch``, or some of its ``rows``: float32 [B, C, pad_to, pad_to]."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of an epoch of {len(self)}")
        drawn = (
            slice(None) if self.binarize else rows
        )  # random numbers are drawn for the whole batch, however it is shared
        first, last, _ = drawn.indices(self.batch)
        number = epoch * len(self) + step
        if self._stream is not None:
            images = self._stream.get(number, first, last)
        else:
            assert isinstance(self.images, Tensor)
            images = self.images.index_select(0, self._index(number, first, last))
        self._generator.manual_seed(mix(self.seed, epoch, step))
        x = preprocess(images, self._generator, self.pad_to, self.binarize, self.bits)
        return x[rows] if self.binarize else x

    def in_order(self, batch: int) -> Iterator[Tensor]:
        """Every image once, in the order of the set: float32 [up to ``batch``, C, pad_to, pad_to]."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        for first in range(0, len(self.images), batch):
            images = self.images[first : first + batch]
            if isinstance(images, np.ndarray):
                images = torch.tensor(images, dtype=torch.uint8, device=self.device)
            yield preprocess(images, generator, self.pad_to, self.binarize, self.bits)

    def order(self, epoch: int) -> Tensor:
        """The permutation of the set in epoch ``epoch``: int64 [N], on the device of the images."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            if self._stream is None and self.device.type == "cuda":
                order = order.pin_memory()  # the copy does not wait for the GPU
            self._order = epoch, order if self._stream is not None else order.to(self.device, non_blocking=True)
        return self._order[1]

    def _index(self, number: int, first: int, last: int) -> Tensor:
        """The indices in the set of rows ``first`` .. ``last`` - 1 of batch ``number``, counted over all epochs."""
        epoch, step = divmod(number, len(self))
        return self.order(epoch)[step * self.batch + first : step * self.batch + last]


class Stream:
    """Gathers batches from an array on disk in background threads.

    Prefetches the same rows of the next batches.
    """

    def __init__(
        self, images: NDArray[np.uint8], index: Callable[[int, int, int], Tensor], device: torch.device
    ) -> None:
        self._images, self._index, self._device = images, index, device
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="batches")
        self._coming: dict[tuple[int, int, int], Future[Tensor]] = {}

    def get(self, number: int, first: int, last: int) -> Tensor:
        """The rows of batch ``number``, on the device: uint8 [last - first, C, h, w]."""
        for key in [
            key for key in self._coming if not number <= key[0] <= number + AHEAD
        ]:  # left over from another position
            self._coming.pop(key).cancel()
        for ahead in range(number, number + AHEAD + 1):
            key = ahead, first, last
            if key not in self._coming:
                self._coming[key] = self._pool.submit(self._gather, self._index(*key).numpy())
        return self._coming.pop((number, first, last)).result().to(self._device, non_blocking=True)

    def _gather(self, index: NDArray[np.int64]) -> Tensor:
        shape = (len(index), *self._images.shape[1:])
        # Pinned memory lets the copy to a GPU overlap with its computations.
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        # mode: the default checks the indices and makes an extra copy
        np.take(self._images, index, axis=0, out=rows.numpy(), mode="clip")
        return rows


def room(device: torch.device) -> float:
    """The number of bytes that a dataset kept on the device may take."""
    if device.type == "cuda":
        return SHARE * torch.cuda.get_device_properties(device).total_memory
    return ON_HOST
