import numpy as np
import torch
from torch import nn

from lsgm.prior import ScorePrior
from lsgm.sde import VPSDE

SHAPE = (3, 4, 4)


class Constant(nn.Module):
    def forward(self, z_t, t):
        return torch.full_like(z_t, 7.0)


def make(logit):
    return ScorePrior(VPSDE(0.1, 20.0), Constant(), SHAPE, logit).double()


def test_alpha_to_zero_is_the_normal_prior():
    z, t = torch.randn(5, *SHAPE, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    noise = make(-60).predict_noise(z, t)
    sigma = VPSDE(0.1, 20.0).variance(t).sqrt()[:, None, None, None]
    np.testing.assert_allclose(noise.detach(), sigma * z, rtol=1e-12)
    np.testing.assert_allclose(make(-60).score(z, t).detach(), -z, rtol=1e-12)  # the score of N(0, I)


def test_alpha_to_one_is_the_network():
    z, t = torch.randn(5, *SHAPE, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    np.testing.assert_allclose(make(60).predict_noise(z, t).detach(), 7.0, rtol=1e-12)


def test_alpha_mixes_each_channel_by_its_own_logit():
    prior = make(0)
    with torch.no_grad():
        prior.mixing_logit.copy_(torch.tensor([-60.0, 0.0, 60.0])[None, :, None, None])
    z, t = torch.ones(1, *SHAPE, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    sigma = VPSDE(0.1, 20.0).variance(t).sqrt().item()
    means = prior.predict_noise(z, t).mean(dim=(0, 2, 3)).detach()
    np.testing.assert_allclose(means, [sigma, (sigma + 7) / 2, 7], rtol=1e-12)
