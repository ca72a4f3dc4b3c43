"""Distances and KLs of encodings against brute force."""

import math

import numpy as np
import pytest
import torch

from lsgm.data.batches import Batches
from lsgm.training.latents import encodings, kl_per_channel, largest_squared_distance


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_largest_distance_in_blocks_is_that_of_all_pairs(block):
    z = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) + 100.0  # far from 0: must not cancel
    exact = torch.cdist(z.double(), z.double()).square().max().item()
    assert largest_squared_distance(z, block) == pytest.approx(exact, rel=1e-12)


class Encoder(torch.nn.Module):
    """q(z|x) = N(0.1 + 0.05 c, (1 - 0.3 c)^2) in channel c, whatever x."""

    latent_shape = (3, 4, 4)
    device = torch.device("cpu")
    vae = property(lambda self: self)

    def encode(self, x):
        from lsgm.networks.posterior import Posterior

        c = torch.arange(3.0)[None, :, None, None]
        noise = torch.randn(len(x), *self.latent_shape)
        sigma = 1 - 0.3 * c
        log_q = torch.distributions.Normal(0.0, 1.0).log_prob(noise) - sigma.log()
        return Posterior(0.1 + 0.05 * c + sigma * noise, log_q, (3,)), x


def black() -> Batches:
    """Batches of 100 of 300 black images."""
    return Batches(np.zeros((300, 1, 8, 8), np.uint8), 100, torch.device("cpu"), seed=0, pad_to=8)


def test_kl_per_channel_is_that_of_the_gaussians():
    """Closed form of KL(N(mu, s^2) || N(0, 1)), 16 pixels a channel, from 2,000 samples: within 0.15 nats."""
    torch.manual_seed(0)
    found = kl_per_channel(Encoder(), black(), count=20)
    for c in range(3):
        mu, s = 0.1 + 0.05 * c, 1 - 0.3 * c
        exact = 16 * (-math.log(s) + 0.5 * (s * s + mu * mu - 1))
        assert found[c].item() == pytest.approx(exact, abs=0.15)


def test_encodings_are_one_sample_of_each_image():
    torch.manual_seed(0)
    z = encodings(Encoder(), black(), batch=128)
    assert z.shape == (300, 48)
    assert len(z.unique(dim=0)) == 300
