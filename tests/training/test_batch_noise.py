"""Stratified times: one in every cell, the same for any number of processes, uniform for each image."""

import math

import pytest
import torch

from lsgm.training.batch_noise import BatchNoise

CPU = torch.device("cpu")


def noise(seed, total, start=0, count=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return BatchNoise(start, total if count is None else count, total, CPU, generator, dtype)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("total", [1, 7, 64])
def test_every_cell_has_one_sample(total, repeats):
    rho = noise(0, total).stratified(repeats)
    cells = (rho * total * repeats).floor().long()
    assert torch.equal(cells.sort().values, torch.arange(total * repeats))
    # sample r of an image lies in the r-th part
    assert torch.equal(cells.view(repeats, total) // total, torch.arange(repeats)[:, None].expand(-1, total))


@pytest.mark.parametrize("repeats", [1, 2])
def test_processes_and_parts_share_the_samples_of_one_batch(repeats):
    def draws(start, count):
        own = noise(3, 8, start, count)
        return own.stratified(repeats).view(repeats, count), own.normal((2,), repeats), own.stratified()

    rho, _, second = draws(0, 8)
    halves = [draws(0, 4), draws(4, 4)]
    assert torch.equal(torch.cat([half[0] for half in halves], dim=1), rho)
    assert torch.equal(torch.cat([half[2] for half in halves]), second)
    assert torch.equal(draws(0, 8)[0], rho) and not torch.equal(draws(0, 8)[2], rho[0])


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_samples_of_one_image_are_uniform(repeats):
    """4,000 batches: histogram of one image in 20 bins to 4.5 standard errors."""
    n, bins = 4000, 20
    generator = torch.Generator().manual_seed(1)
    batch = BatchNoise(0, 5, 5, CPU, generator, torch.float64)
    rho = torch.stack([batch.stratified(repeats).view(repeats, 5) for _ in range(n)])  # [n, R, B]
    for image in (0, 3):
        counts = torch.histc(rho[:, :, image], bins, 0, 1) / (n * repeats)
        assert ((counts - 1 / bins).abs() < 4.5 / math.sqrt(bins * n * repeats)).all()


def test_samples_are_below_one():
    """In float32 the last of many cells could round to 1."""
    rho = noise(0, 50_000, dtype=torch.float32).stratified(4)
    assert rho.dtype == torch.float32 and rho.min() >= 0 and rho.max() < 1
