"""Objectives against closed forms."""

import math

import pytest
import torch
from torch import nn

from lsgm.config import ImageConfig, PriorConfig, SDEConfig, VAEConfig
from lsgm.model import LSGM
from lsgm.prior import ScorePrior
from lsgm.sde import VPSDE
from lsgm.training.objective import LSGMObjective, VAEObjective, linear_anneal
from lsgm.weighting import TimeSampler

BLOCK = {"blocks": 2, "cells": 1}


@pytest.fixture
def model():
    torch.manual_seed(0)
    vae = VAEConfig(
        arch="res_bnswish", channels=4, channel_mult=[1, 1, 2], groups_per_scale=2, latents_per_group=1,
        cells_per_cond=1, preprocess=BLOCK, postprocess=BLOCK,
    )  # fmt: skip
    prior = PriorConfig(channels=8, scales=1, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=-1)
    return LSGM(ImageConfig(channels=1, size=28, padded_size=32, binary=True), vae, prior, SDEConfig())


@pytest.mark.parametrize("sampling", ["importance", "uniform"])
def test_cross_entropy_of_a_gaussian_encoder(sampling):
    """CE(N(mu, s^2) || N(0, I)) is known; theorem 1 must give it when the prior is N(0, I).

    At time eps both are diffused: CE_eps = (log 2 pi + (m mu)^2 + m^2 s^2 + sigma^2) / 2 per dimension, from 400,000
    draws to four standard errors, and 5e-4 for what lies beyond t = 1.
    """
    sde, eps, n = VPSDE(0.1, 20.0), 0.01, 400_000
    prior = ScorePrior(sde, nn.Identity(), (1, 1, 1), -60.0).double()
    prior.network.forward = lambda z, t: torch.zeros_like(z)
    generator = torch.Generator().manual_seed(1)
    mu, s = 0.8, 0.5
    draws = torch.randn(2, n, 1, 1, 1, generator=generator, dtype=torch.float64)
    rho = torch.rand(n, generator=generator, dtype=torch.float64)
    z0 = mu + s * draws[0]
    values = LSGMObjective(TimeSampler(sde, "ll", sampling, eps)).cross_entropy(prior, z0, rho, draws[1]).detach()
    t = torch.tensor(eps, dtype=torch.float64)
    m2, v = sde.mean_coefficient(t).item() ** 2, sde.variance(t).item()
    expected = 0.5 * (math.log(2 * math.pi) + m2 * (mu**2 + s**2) + v)
    constant = 0.5 * (1 + math.log(2 * math.pi * v))
    mean = values.mean().item()
    if sampling == "uniform":  # its weights leave out the factor 1 - eps
        mean = constant + (mean - constant) * (1 - eps)
    assert mean == pytest.approx(expected, abs=4 * values.std().item() / n**0.5 + 5e-4)


def test_vae_loss_is_the_negative_elbo_at_beta_one(model):
    model.eval()
    x = (torch.rand(8, 1, 32, 32) < 0.3).float()
    torch.manual_seed(5)
    value = VAEObjective()(model, x, beta=1.0)
    torch.manual_seed(5)
    posterior, parameters = model.vae.encode(2 * x - 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    pixels = torch.distributions.Bernoulli(logits=parameters[..., 2:30, 2:30]).log_prob(x[..., 2:30, 2:30])
    elbo = pixels.sum() + normal.log_prob(posterior.z).sum() - posterior.log_q.sum()
    torch.testing.assert_close(value.loss, -elbo / 8)
    torch.testing.assert_close(value.terms["nelbo"], value.loss.detach())


def test_balancing_weights_have_mean_one_and_follow_the_kl(model):
    """With two groups the loss is reconstruction + beta * sum gamma_g KL_g, gamma from the batch's mean KLs."""
    model.eval()
    x = (torch.rand(8, 1, 32, 32) < 0.3).float()
    torch.manual_seed(5)
    posterior, _ = model.vae.encode(2 * x - 1)
    normal = torch.distributions.Normal(0.0, 1.0)
    kl = (posterior.log_q - normal.log_prob(posterior.z)).sum(dim=(2, 3))  # one channel per group
    gamma = kl.abs().mean(dim=0) + 0.01
    gamma = gamma / gamma.mean()
    torch.manual_seed(5)
    value = VAEObjective()(model, x, beta=0.5)
    expected = value.terms["reconstruction"] + 0.5 * (kl * gamma).sum(dim=1).mean()
    torch.testing.assert_close(value.loss, expected)


def test_one_loss_trains_encoder_decoder_and_prior(model):
    x = (torch.rand(8, 1, 32, 32) < 0.3).float()
    objective = LSGMObjective(TimeSampler(model.prior.sde, "ll", "importance", 0.01))
    # a fresh network's last layer is near zero and hides the layers before it
    nn.init.normal_(model.prior.network.conv_out.weight, std=0.1)
    objective(model, x, 1.0).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for module in (model.vae.stem, model.vae.output_head, model.prior.network.conv_in):
        assert module.weight.grad.norm() > 0
    assert model.prior.mixing_logit.grad.norm() > 0


def test_linear_anneal():
    def beta(step):
        return linear_anneal(step, 1000, const_portion=0.1, portion=0.5, start=0.2, end=0.7)

    assert beta(0) == beta(100) == 0.2
    assert beta(350) == pytest.approx(0.45)
    assert beta(600) == beta(999) == 0.7
    assert linear_anneal(0, 10, 0.0, 0.0, 0.1, 1.0) == 1.0
