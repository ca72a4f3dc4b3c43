"""Training batches: what a model sees, and that it can be seen again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lsgm.data.batches import Batches, preprocess
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError

CPU = torch.device("cpu")


def numbered(count: int) -> np.ndarray:
    """Images that hold their own number in white pixels: binarisation leaves them as they are."""
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
    """Grey images, n = 64 * 784 pixels of probability 128/255: two independent draws differ in half of them."""
    images = np.full((64, 1, 28, 28), 128, np.uint8)
    batches = Batches(images, 64, CPU, seed=1)
    first, second = batches.batch_at(0, 0), batches.batch_at(1, 0)
    differ = (first != second)[:, :, 2:30, 2:30].double().mean().item()
    assert differ == pytest.approx(0.5, abs=5 * 0.5 / (64 * 784) ** 0.5)


def test_without_binarisation_values_are_kept() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = preprocess(images, None, pad_to=20, binarise=False)
    assert torch.equal(x[0, 0, 2:18, 2:18].flatten(), torch.arange(256) / 255)
    assert x.sum() == pytest.approx(128, rel=1e-5)


def test_images_of_the_full_size_are_not_padded() -> None:
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    assert torch.equal(preprocess(images, torch.Generator().manual_seed(1)), torch.ones(2, 3, 32, 32))


def test_odd_padding_fits() -> None:
    assert preprocess(torch.full((1, 1, 27, 27), 255, dtype=torch.uint8), None).sum() == 27 * 27


def test_faults() -> None:
    with pytest.raises(LSGMError, match="batch: expected a number from 1 to the 10 images of the set, found 11"):
        Batches(numbered(10), 11, CPU, seed=1)
    with pytest.raises(LSGMError, match="cannot be padded to 16x16"):
        Batches(numbered(10), 5, CPU, seed=1, pad_to=16)
    with pytest.raises(IndexError):
        Batches(numbered(10), 5, CPU, seed=1).batch_at(0, 2)


def test_real_images_keep_their_mean(mnist_store: ImageStore) -> None:
    """The mean of n binarised pixels is the mean of the images within 5 standard errors, at most 0.5 / sqrt(n)."""
    images = mnist_store.images("train")[:5000]
    x = torch.cat(list(Batches(images, 500, CPU, seed=1).epoch(0)))[:, :, 2:30, 2:30]
    assert x.mean().item() == pytest.approx(images.mean() / 255, abs=5 * 0.5 / images.size**0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_order_of_the_images_is_the_same_on_a_gpu() -> None:
    cpu, gpu = (Batches(numbered(40), 8, torch.device(kind), seed=1) for kind in ("cpu", "cuda"))
    for epoch in range(2):
        for a, b in zip(cpu.epoch(epoch), gpu.epoch(epoch), strict=True):
            assert b.device.type == "cuda"
            assert torch.equal(a, b.cpu())
