import numpy as np
import torch

from lsgm.likelihoods import Bernoulli


def test_bernoulli_counts_the_central_pixels_only():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 32, 32, generator=generator, dtype=torch.float64)
    x = (torch.rand(3, 1, 32, 32, generator=generator) < 0.4).double()
    p = 1 / (1 + np.exp(-logits.numpy()))[:, 0, 2:30, 2:30]
    pixels = x.numpy()[:, 0, 2:30, 2:30]
    expected = np.log(np.where(pixels == 1, p, 1 - p)).sum(axis=(1, 2))
    likelihood = Bernoulli(28)
    np.testing.assert_allclose(likelihood.log_prob(x, logits), expected, rtol=1e-12)
    np.testing.assert_allclose(likelihood.mean(logits)[:, 0], p, rtol=1e-12)
    assert likelihood.mean(logits).shape == (3, 1, 28, 28)


def test_bernoulli_is_finite_for_extreme_logits():
    logits = torch.full((1, 1, 4, 4), 1e4, requires_grad=True)
    value = Bernoulli(4).log_prob(torch.zeros(1, 1, 4, 4), logits)
    value.sum().backward()
    assert value.item() == -16e4 and torch.isfinite(logits.grad).all()


def test_bernoulli_sums_to_one():
    logits = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4).view(-1, 1, 2, 2)
    total = Bernoulli(2).log_prob(images, logits.expand(16, -1, -1, -1)).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))
