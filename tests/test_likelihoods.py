import numpy as np
import pytest
import torch

from lsgm.config import ImageConfig
from lsgm.likelihoods import Bernoulli, DiscretizedLogistic, LogisticMixture, Normal, logistic_bin


def images_of(channels, size=8, binary=False):
    return ImageConfig(channels=channels, size=size, padded_size=size, binary=binary)


def test_bernoulli_counts_the_central_pixels_only():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 32, 32, generator=generator, dtype=torch.float64)
    x = (torch.rand(3, 1, 32, 32, generator=generator) < 0.4).double()
    p = 1 / (1 + np.exp(-logits.numpy()))[:, 0, 2:30, 2:30]
    pixels = x.numpy()[:, 0, 2:30, 2:30]
    expected = np.log(np.where(pixels == 1, p, 1 - p)).sum(axis=(1, 2))
    likelihood = Bernoulli(image=images_of(1, 28, binary=True))
    np.testing.assert_allclose(likelihood.log_prob(x, logits), expected, rtol=1e-12)
    np.testing.assert_allclose(likelihood.mean(logits)[:, 0], p, rtol=1e-12)
    assert likelihood.mean(logits).shape == (3, 1, 28, 28)


def test_bernoulli_is_finite_for_extreme_logits():
    logits = torch.full((1, 1, 4, 4), 1e4, requires_grad=True)
    value = Bernoulli(image=images_of(1, 4, binary=True)).log_prob(torch.zeros(1, 1, 4, 4), logits)
    value.sum().backward()
    assert value.item() == -16e4 and torch.isfinite(logits.grad).all()


def test_bernoulli_sums_to_one():
    logits = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    images = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 4).view(-1, 1, 2, 2)
    total = Bernoulli(image=images_of(1, 2, binary=True)).log_prob(images, logits.expand(16, -1, -1, -1)).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))


def grid(bits):
    """Every value of an image of so many bits, in [0, 1]."""
    return torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
@pytest.mark.parametrize("log_scale", [-9.0, -7.0, -4.0, -1.0, 1.0])
def test_probabilities_of_a_logistic_sum_to_one(bits, log_scale):
    """Over all 2^b values, the open edge bins included, for means in and outside of the range."""
    x = grid(bits)[:, None, None, None]
    n = len(x)
    for mean in (-1.4, -1.0, -0.31, 0.0, 0.77, 1.0, 1.2):
        parameters = torch.tensor([mean, log_scale], dtype=torch.float64).view(1, 2, 1, 1).expand(n, -1, -1, -1)
        log_p = DiscretizedLogistic(image=images_of(1), x_bits=bits).log_prob(x, parameters)
        # where a bin's mass is taken from the density at its center, the sum is not exact
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_probabilities_of_a_mixture_sum_to_one(bits):
    """Color by color: given red and green, over all blues, and so on; the product of three sums is one."""
    torch.manual_seed(0)
    likelihood = LogisticMixture(image=images_of(3), x_bits=bits)
    parameters = torch.randn(1, 100, 1, 1, dtype=torch.float64)
    values = grid(min(bits, 3)) if bits > 3 else grid(bits)
    if bits <= 3:  # all combinations
        x = torch.cartesian_prod(values, values, values)[:, :, None, None]
        log_p = likelihood.log_prob(x, parameters.expand(len(x), -1, -1, -1))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    # the marginal of red alone: all blues and greens of one red sum to its own mixture's mass
    blue = grid(bits)
    fixed = torch.stack([torch.full_like(blue, 0.2), torch.full_like(blue, 0.6), blue], dim=1)[:, :, None, None]
    fixed = (fixed * (2**bits - 1)).round() / (2**bits - 1)
    joint = torch.logsumexp(likelihood.log_prob(fixed, parameters.expand(len(blue), -1, -1, -1)), dim=0)
    logits, mean, log_scale, c = likelihood._split(parameters)
    red, green = (2 * fixed[0, k] - 1 for k in (0, 1))
    of_red = logistic_bin(red, mean[:, 0], log_scale[:, 0], bits)
    of_green = logistic_bin(green, mean[:, 1] + c[:, 0] * red, log_scale[:, 1], bits)
    exact = torch.logsumexp(torch.log_softmax(logits, 1) + of_red + of_green, dim=1).squeeze()
    torch.testing.assert_close(joint, exact, atol=1e-3, rtol=0)


def test_gradients_are_finite_at_the_edges():
    for likelihood in (
        LogisticMixture(image=images_of(3), x_bits=8),
        DiscretizedLogistic(image=images_of(3), x_bits=8),
        Normal(image=images_of(3)),
    ):
        parameters = 30 * torch.randn(2, likelihood.parameters_per_pixel, 4, 4)
        parameters.requires_grad_()
        for value in (0.0, 1.0, 0.5):
            log_p = likelihood.log_prob(torch.full((2, 3, 4, 4), value), parameters)
            (gradient,) = torch.autograd.grad(log_p.sum(), parameters)
            assert torch.isfinite(log_p).all() and torch.isfinite(gradient).all()


def test_mean_of_a_mixture_by_brute_force():
    """Color by color: the expectation over all 256 values, the later colors given the means of the earlier.

    Scales are small and means inside, so that neither clamping nor the open edge bins matter: 1e-3.
    """
    torch.manual_seed(1)
    parameters = torch.randn(1, 100, 1, 1, dtype=torch.float64)
    parameters[:, 10:] *= 0.1
    rest = parameters[:, 10:].unflatten(1, (3, 30))
    rest[:, :, 10:20] -= 4.0
    likelihood = LogisticMixture(image=images_of(3), x_bits=8)
    logits, mean, log_scale, c = likelihood._split(parameters)
    share, values = logits.softmax(1), 2 * grid(8) - 1
    c = (share[:, None] * c).sum(2)[0, :, 0, 0]
    found = []
    for k, shift in ((0, lambda: 0.0), (1, lambda: c[0] * found[0]), (2, lambda: c[1] * found[0] + c[2] * found[1])):
        probability = logistic_bin(values[:, None], mean[0, k, :, 0, 0], log_scale[0, k, :, 0, 0], 8).exp()
        found.append((share[0, :, 0, 0] * (probability * values[:, None]).sum(0)).sum() + shift())
    expected = (torch.stack(found) + 1) / 2
    torch.testing.assert_close(likelihood.mean(parameters).flatten(), expected, atol=1e-3, rtol=0)


def test_normal_is_the_density():
    torch.manual_seed(0)
    x, parameters = torch.rand(2, 3, 4, 4), torch.randn(2, 6, 4, 4)
    mean, log_sigma = parameters.chunk(2, dim=1)
    exact = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(2 * x - 1).sum(dim=(1, 2, 3))
    torch.testing.assert_close(Normal(image=images_of(3)).log_prob(x, parameters), exact)
    torch.testing.assert_close(Normal(image=images_of(3)).mean(parameters), (mean.clamp(-1, 1) + 1) / 2)
