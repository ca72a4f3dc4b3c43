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


def test_without_mixing_the_network_is_all():
    prior = make(None)
    z, t = torch.randn(5, *SHAPE, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    assert (prior.predict_noise(z, t) == 7).all()
    assert not [name for name, _ in prior.named_parameters() if "mixing" in name]


def test_one_time_for_all_is_the_same_as_each_its_own():
    prior = make(0.3)
    z = torch.randn(5, *SHAPE, dtype=torch.float64)
    one = torch.tensor([0.4], dtype=torch.float64)
    np.testing.assert_allclose(prior(z, one).detach(), prior(z, one.expand(5)).detach(), rtol=1e-14)


def test_inactive_latents_are_hidden_and_left_to_the_normal_prior():
    class Sum(nn.Module):
        def forward(self, z_t, t):
            return z_t.sum(dim=1, keepdim=True).expand_as(z_t)

    prior = ScorePrior(VPSDE(0.1, 20.0), Sum(), SHAPE, 0.0).double()
    prior.deactivate(torch.tensor([False, True, False]))
    z, t = torch.randn(5, *SHAPE, dtype=torch.float64), torch.full((5,), 0.3, dtype=torch.float64)
    moved = z.clone()
    moved[:, 1] += 3.0
    change = (prior(moved, t) - prior(z, t)).detach()
    assert (change[:, [0, 2]] == 0).all()  # the network does not see channel 1
    sigma = VPSDE(0.1, 20.0).variance(t[:1]).sqrt().item()
    np.testing.assert_allclose(change[:, 1], 3 * sigma, rtol=1e-12)  # whose prediction is that of N(0, I)
    # and the mask is part of the state
    copy = ScorePrior(VPSDE(0.1, 20.0), Sum(), SHAPE, 0.0).double()
    copy.load_state_dict(prior.state_dict())
    np.testing.assert_array_equal(copy(z, t).detach(), prior(z, t).detach())
