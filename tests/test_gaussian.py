"""The log densities against torch.distributions."""

import math

import torch
from torch.distributions import Normal

from lsgm import gaussian

SHAPE = (3, 2, 4, 4)


def draws(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_densities_element_by_element():
    z, mu, log_sigma, noise = map(draws, range(4))
    standard = Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(gaussian.standard_log_prob(z), standard)
    sample = mu + log_sigma.exp() * noise
    log_q = Normal(mu, log_sigma.exp()).log_prob(sample)
    torch.testing.assert_close(gaussian.log_prob_of_noise(noise, log_sigma), log_q)
    torch.testing.assert_close(gaussian.log_prob_of_error(noise, log_sigma), log_q)
    torch.testing.assert_close(gaussian.kl_to_standard(log_q, z), log_q - standard)


def test_density_of_a_row():
    z, variance = draws(0), 0.3
    expected = Normal(0.0, math.sqrt(variance)).log_prob(z).sum(dim=(1, 2, 3))
    torch.testing.assert_close(gaussian.isotropic_log_prob(z.flatten(1), variance), expected)
