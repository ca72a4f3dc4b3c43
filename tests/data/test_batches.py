"""Training batches: what a model sees, and that it can be seen again."""

from __future__ import annotations

from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsgm.data import batches
from lsgm.data.batches import AHEAD, Batches, preprocess
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError

CPU = torch.device("cpu")


def numbered(count: int) -> np.ndarray:
    """Images that hold their own number in white pixels: binarization leaves them as they are."""
    bits = np.arange(count)[:, None] >> np.arange(28) & 1
    images = np.zeros((count, 1, 28, 28), np.uint8)
    images[:, 0, 0, :] = 255 * bits
    return images


def numbers(x: torch.Tensor) -> list[int]:
    return (x[:, 0, 2, 2:30].long() << torch.arange(28)).sum(1).tolist()


def test_values_shape_and_border() -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 1, 28, 28), dtype=np.uint8)
    for x in Batches(images, 16, CPU, seed=1).epoch(0):
        assert x.shape == (16, 1, 32, 32)
        assert x.dtype == torch.float32
        assert set(x.unique().tolist()) == {0.0, 1.0}
        inner = x[:, :, 2:30, 2:30]
        assert inner.sum() == x.sum() > 0  # the border is zero


def test_each_image_once_per_epoch_in_another_order() -> None:
    batches = Batches(numbered(40), 8, CPU, seed=1)
    assert len(batches) == 5
    epochs = [[n for x in batches.epoch(epoch) for n in numbers(x)] for epoch in range(3)]
    for seen in epochs:
        assert sorted(seen) == list(range(40))
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_last_short_batch_is_dropped() -> None:
    batches = Batches(numbered(43), 8, CPU, seed=1)
    seen = [n for x in batches.epoch(0) for n in numbers(x)]
    assert len(batches) == 5
    assert len(seen) == len(set(seen)) == 40


def test_a_batch_depends_on_seed_epoch_and_step_alone() -> None:
    images = np.full((40, 1, 28, 28), 128, np.uint8)
    batches = Batches(images, 8, CPU, seed=1)
    epoch = list(batches.epoch(3))
    again = Batches(images, 8, CPU, seed=1)
    torch.manual_seed(12345)  # the global generator plays no part
    assert torch.equal(again.batch_at(3, 4), epoch[4])
    assert torch.equal(again.batch_at(3, 1), epoch[1])
    others = [again.batch_at(2, 4), again.batch_at(3, 3), Batches(images, 8, CPU, seed=2).batch_at(3, 4)]
    for other in others:
        assert not torch.equal(other, epoch[4])


def test_bernoulli_probability_is_pixel_over_255() -> None:
    """For each of the 256 values: n draws, so the share of ones has standard error sqrt(p (1 - p) / n).

    The largest of 256 standard normals stays under 5 but for one run in 7000; 0 and 255 have no spread at all.
    """
    values = torch.arange(256, dtype=torch.uint8)
    n = 200 * 784 // 4
    images = values.repeat_interleave(n).reshape(-1, 1, 28, 28)
    generator = torch.Generator().manual_seed(1)
    ones = preprocess(images, generator, pad_to=28).reshape(256, n).double().mean(1)
    p = values.double() / 255
    assert ones[0] == 0
    assert ones[255] == 1
    z = (ones - p)[1:255] / (p * (1 - p) / n).sqrt()[1:255]
    assert z.abs().max() < 5
    assert z.square().mean() == pytest.approx(1, abs=0.36)  # 4 standard errors of a chi-square with 254 degrees


def test_a_fresh_draw_each_time_an_image_is_seen() -> None:
    """Gray images, n = 64 * 784 pixels of probability 128/255: two independent draws differ in half of them."""
    images = np.full((64, 1, 28, 28), 128, np.uint8)
    batches = Batches(images, 64, CPU, seed=1)
    first, second = batches.batch_at(0, 0), batches.batch_at(1, 0)
    differ = (first != second)[:, :, 2:30, 2:30].double().mean().item()
    assert differ == pytest.approx(0.5, abs=5 * 0.5 / (64 * 784) ** 0.5)


def test_without_binarization_values_are_kept() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = preprocess(images, None, pad_to=20, binarize=False)
    assert torch.equal(x[0, 0, 2:18, 2:18].flatten(), torch.arange(256) / 255)
    assert x.sum() == pytest.approx(128, rel=1e-5)


def test_images_of_the_full_size_are_not_padded() -> None:
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(preprocess(images, torch.Generator().manual_seed(1)), torch.ones(2, 3, 32, 32))


def test_odd_padding_fits() -> None:
    assert preprocess(torch.full((1, 1, 27, 27), 255, dtype=torch.uint8), None).sum() == 27 * 27


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """Gray images on the disk."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (43, 3, 16, 16), dtype=np.uint8))
    images: np.ndarray = np.load(tmp_path / "images.npy", mmap_mode="r")
    return images


def both(images: np.ndarray, device: torch.device = CPU, **settings: Any) -> list[Batches]:
    return [Batches(images, 8, device, seed=1, pad_to=16, stream=stream, **settings) for stream in (False, True)]


@pytest.mark.parametrize("binarize", [True, False])
def test_a_set_that_streams_gives_the_same_batches(mapped: np.ndarray, binarize: bool) -> None:
    resident, streamed = both(mapped, binarize=binarize, bits=5)
    assert isinstance(streamed.images, np.memmap) and isinstance(resident.images, torch.Tensor)
    for epoch in range(3):
        for a, b in zip(resident.epoch(epoch), streamed.epoch(epoch), strict=True):
            assert torch.equal(a, b)
    # From anywhere, back and forth, as after an interruption or a divergence.
    for epoch, step in ((7, 3), (7, 4), (0, 0), (7, 3), (2, 4), (3, 0)):
        assert torch.equal(resident.batch_at(epoch, step), streamed.batch_at(epoch, step))
    assert all(torch.equal(a, b) for a, b in zip(resident.in_order(10), streamed.in_order(10), strict=True))
    assert sum(map(len, streamed.in_order(10))) == 43


@pytest.mark.parametrize("binarize", [True, False])
def test_shares_of_a_batch_that_streams_make_the_batch(mapped: np.ndarray, binarize: bool) -> None:
    """Two parts of each of two processes, taken in turn, over the end of an epoch."""
    resident, *processes = both(mapped, binarize=binarize) + both(mapped, binarize=binarize)[1:]
    for number in range(7):
        place = divmod(number, len(resident))
        parts = [
            process.batch_at(*place, rows=slice(start, start + 2))
            for process, rows in zip(processes, (0, 4), strict=True)
            for start in (rows, rows + 2)
        ]
        assert torch.equal(torch.cat(parts), resident.batch_at(*place))


def test_the_next_batches_are_gathered_meanwhile(mapped: np.ndarray) -> None:
    """What is asked for next is there already; what is gathered for nothing stays bounded."""
    _, streamed = both(mapped, binarize=False)
    asked = []
    stream = streamed._stream
    assert stream is not None
    gather = stream._gather
    stream._gather = lambda index: (asked.append(index.tolist()), gather(index))[1]  # type: ignore[method-assign]
    streamed.batch_at(0, 0)
    streamed.batch_at(0, 1)
    wait([*stream._coming.values()])
    steps = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0)]
    assert sorted(asked) == sorted(streamed.order(epoch)[8 * step : 8 * step + 8].tolist() for epoch, step in steps)
    streamed.batch_at(5, 2)
    assert len(stream._coming) == AHEAD
    assert {number for number, *_ in stream._coming} == {28, 29, 30, 31}


def test_a_large_set_streams_and_a_small_one_does_not(mapped: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(Batches(mapped, 8, CPU, seed=1).images, torch.Tensor)
    monkeypatch.setattr(batches, "ON_HOST", mapped.nbytes - 1)
    assert isinstance(Batches(mapped, 8, CPU, seed=1).images, np.memmap)


def test_what_goes_wrong_in_the_background_is_raised(mapped: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise OSError("the disk is gone")

    _, streamed = both(mapped)
    monkeypatch.setattr(np, "take", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        streamed.batch_at(0, 0)


def test_faults() -> None:
    with pytest.raises(LSGMError, match="batch: expected 1 to 10, the number of images in the set, found 11"):
        Batches(numbered(10), 11, CPU, seed=1)
    with pytest.raises(LSGMError, match="cannot be padded to 16x16"):
        Batches(numbered(10), 5, CPU, seed=1, pad_to=16)
    with pytest.raises(IndexError):
        Batches(numbered(10), 5, CPU, seed=1).batch_at(0, 2)


def test_real_images_keep_their_mean(mnist_store: ImageStore) -> None:
    """The mean of n binarized pixels is the mean of the images within 5 standard errors, at most 0.5 / sqrt(n)."""
    images = mnist_store.images("train")[:5000]
    x = torch.cat(list(Batches(images, 500, CPU, seed=1).epoch(0)))[:, :, 2:30, 2:30]
    assert x.mean().item() == pytest.approx(images.mean() / 255, abs=5 * 0.5 / images.size**0.5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_order_of_the_images_is_the_same_on_a_gpu() -> None:
    cpu, gpu = (Batches(numbered(40), 8, torch.device(kind), seed=1) for kind in ("cpu", "cuda"))
    for epoch in range(2):
        for a, b in zip(cpu.epoch(epoch), gpu.epoch(epoch), strict=True):
            assert b.device.type == "cuda"
            assert torch.equal(a, b.cpu())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("binarize", [True, False])
def test_a_set_that_streams_to_a_gpu_gives_the_same_batches(mapped: np.ndarray, binarize: bool) -> None:
    resident, streamed = both(mapped, torch.device("cuda"), binarize=binarize)
    assert streamed._stream is not None and streamed._stream._gather(np.arange(4)).is_pinned()
    for epoch in range(20):
        for a, b in zip(resident.epoch(epoch), streamed.epoch(epoch), strict=True):
            assert b.device.type == "cuda" and torch.equal(a, b)
