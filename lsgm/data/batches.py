"""Training batches: gathered on the device or ahead of it, binarized and padded there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lsgm.errors import LSGMError
from lsgm.per_sample_noise import mix

SHARE = 0.1  # of the memory of a GPU that a set may take to live there
ON_HOST = 1 << 30  # bytes; what streams to the host is in the system's cache as far as there is memory
READERS = 2  # threads
AHEAD = 4  # batches


def preprocess(
    images: Tensor, generator: torch.Generator | None, pad_to: int = 32, binarize: bool = True, bits: int = 8
) -> Tensor:
    """What a model sees of stored images: uint8 [B, C, h, w] in 0..255 -> float32 [B, C, pad_to, pad_to] in [0, 1].

    With ``binarize`` each pixel is one Bernoulli draw with probability pixel / 255, from ``generator`` (on the
    images' device); without it, the upper ``bits`` bits of the pixel, from 0 to 1. The border is zero.
    """
    batch, channels, height, width = images.shape
    if binarize:
        # r uniform in 0..254: P(r < pixel) is pixel / 255 exactly, and no float image is made on the way.
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
    """Random batches of a training set, which lives on the device as bytes or, a large one, streams from the disk.

    Batch ``step`` of epoch ``epoch`` depends on (seed, epoch, step) alone, so a run that is resumed sees what an
    uninterrupted one sees. The order of the images is the same on every kind of device, and the same for a set that
    streams; the Bernoulli draws differ between kinds of device. An epoch is one permutation of the set without its
    last, incomplete batch.

    Args:
        stream: gather each batch from ``images`` (which may be mapped from the disk) in the background, ahead of its
            use. None: if the set would take more than a tenth of the GPU's memory, or a gigabyte of the host's.
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
            raise LSGMError(f"batch: expected a number from 1 to the {len(images)} images of the set, found {batch}")
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
        drawn = slice(None) if self.binarize else rows  # draws are for the whole batch, whoever shares it
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
        """The permutation of the set that ``epoch`` goes through: int64 [N], where the images are."""
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            self._order = epoch, order if self._stream is not None else order.to(self.device)
        return self._order[1]

    def _index(self, number: int, first: int, last: int) -> Tensor:
        """Rows ``first`` .. ``last`` - 1 of the batch ``number``, counted over all epochs, as rows of the set."""
        epoch, step = divmod(number, len(self))
        return self.order(epoch)[step * self.batch + first : step * self.batch + last]


class Stream:
    """Gathers batches from an array on the disk in threads, ahead of being asked.

    Whoever asks for some rows of a batch will ask for the same rows of the next: those are gathered meanwhile.
    """

    def __init__(
        self, images: NDArray[np.uint8], index: Callable[[int, int, int], Tensor], device: torch.device
    ) -> None:
        self._images, self._index, self._device = images, index, device
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="batches")
        self._coming: dict[tuple[int, int, int], Future[Tensor]] = {}

    def get(self, number: int, first: int, last: int) -> Tensor:
        """The rows of batch ``number``, on the device: uint8 [last - first, C, h, w]."""
        for key in [key for key in self._coming if not number <= key[0] <= number + AHEAD]:  # it went on elsewhere
            self._coming.pop(key).cancel()
        for ahead in range(number, number + AHEAD + 1):
            key = ahead, first, last
            if key not in self._coming:
                self._coming[key] = self._pool.submit(self._gather, self._index(*key).numpy())
        return self._coming.pop((number, first, last)).result().to(self._device, non_blocking=True)

    def _gather(self, index: NDArray[np.int64]) -> Tensor:
        shape = (len(index), *self._images.shape[1:])
        # Pinned memory lets the copy to a GPU run beside its computations.
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        # mode: the default checks the indices and goes through a buffer of its own
        np.take(self._images, index, axis=0, out=rows.numpy(), mode="clip")
        return rows


def room(device: torch.device) -> float:
    """Bytes that a set may take to live on the device."""
    if device.type == "cuda":
        return SHARE * torch.cuda.get_device_properties(device).total_memory
    return ON_HOST
