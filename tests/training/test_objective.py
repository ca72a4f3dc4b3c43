"""Objectives against closed forms."""

import copy
import math

import pytest
import torch
from torch import nn

from lsgm.config import ImageConfig, NCSNppConfig, SDEConfig, VAEConfig
from lsgm.model import LSGM
from lsgm.prior import ScorePrior
from lsgm.sde import VPSDE
from lsgm.training.algorithms import squared_error
from lsgm.training.diffusion import Start
from lsgm.training.objective import LSGMObjective, VAEObjective
from lsgm.training.schedule import linear_anneal
from lsgm.weighting import TimeDraw, TimeSampler

BLOCK = {"blocks": 2, "cells": 1}


@pytest.fixture
def model():
    torch.manual_seed(0)
    vae = VAEConfig(
        arch="res_bnswish", channels=4, channel_mult=[1, 1, 2], groups_per_scale=2, latents_per_group=1,
        cells_per_cond=1, preprocess=BLOCK, postprocess=BLOCK,
    )  # fmt: skip
    prior = NCSNppConfig(channels=8, scales=1, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=-1)
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
    draw = TimeSampler(sde, "ll", sampling, eps)(rho)
    values = (draw.weight * squared_error(prior, Start(z0), draws[1], draw.t).sum(dim=1)).detach()
    t = torch.tensor(eps, dtype=torch.float64)
    m2, v = sde.mean_coefficient(t).item() ** 2, sde.variance(t).item()
    expected = 0.5 * (math.log(2 * math.pi) + m2 * (mu**2 + s**2) + v)
    constant = TimeSampler(sde, "ll", sampling, eps).cross_entropy_constant()
    factor = 1 - eps if sampling == "uniform" else 1.0  # which the weights leave out
    assert constant + factor * values.mean().item() == pytest.approx(
        expected, abs=4 * values.std().item() / n**0.5 + 5e-4
    )


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


IMAGES = (torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(7)) < 0.3).double()
PRIORS = {
    "vpsde": SDEConfig(beta_end=10.0),
    "geometric": SDEConfig(name="geometric_vpsde"),
    "sub": SDEConfig(name="sub_vpsde", beta_end=10.0),
    "ve": SDEConfig(name="vesde", sigma2_min=1e-2, sigma2_max=50.0),
}


@pytest.fixture(params=PRIORS)
def double(model, request):
    """A model in float64 whose score network does something."""
    model = LSGM(model.image, model.vae_config, model.prior_config, PRIORS[request.param]).double().train()
    with torch.no_grad():
        for p in model.prior.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype))
    return model


def sampler(model, weighting, sampling="importance"):
    return TimeSampler(model.prior.sde, weighting, sampling, 0.01)


class Given:
    """Draws of a step: these where they are given, else the same every time."""

    def __init__(self, rho, q_rho, noise):
        self.uniforms, self.noise = iter([rho, q_rho]), noise
        self.generator = torch.Generator().manual_seed(3)
        self.encoder = True

    def normal(self, shape, repeats=1):
        if self.noise is not None and not self.encoder:
            return self.noise.repeat(repeats, 1, 1, 1)
        self.encoder = False
        return torch.randn(repeats * len(IMAGES), *shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, repeats=1):
        given = next(self.uniforms)
        return torch.rand(repeats * len(IMAGES), generator=self.generator).double() if given is None else given

    stratified = uniform


def gradients(model, objective, beta, rho=None, q_rho=None, noise=None):
    """Gradients by name after one backward pass, with the posterior's and the diffusion's noise held fixed."""
    model.zero_grad()
    value = objective(model, IMAGES, beta, Given(rho, q_rho, noise))
    value.loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, value


def assert_same(one, two, prefix, **tolerance):
    assert one.keys() == two.keys()
    scale = max(g.abs().max() for n, g in one.items() if n.startswith(prefix))
    for name in one:
        if name.startswith(prefix):
            torch.testing.assert_close(one[name] / scale, two[name] / scale, **tolerance)


def test_algorithm_1_is_algorithm_3_with_ll(double):
    """One loss or two, for one weighting: the same gradients, everywhere, to rounding."""
    rho = torch.rand(8, dtype=torch.float64)
    one, value_1 = gradients(double, LSGMObjective(sampler(double, "ll"), 1, time_samples=2), 1.0, rho)
    three, value_3 = gradients(double, LSGMObjective(sampler(double, "ll"), 3, time_samples=2), 1.0, rho)
    assert_same(one, three, "", rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(value_1.terms["nelbo"], value_3.terms["nelbo"])


@pytest.mark.parametrize("weighting", ["un", "re", "rescale"])
def test_one_backward_pass_of_algorithm_3_is_the_two_of_the_paper(double, weighting):
    """Against one loss for each, differentiated on its own: p's with respect to theta, q's to encoder and decoder."""
    beta, rho = 0.8, torch.rand(4, dtype=torch.float64)
    p = sampler(double, weighting)
    found, _ = gradients(double, LSGMObjective(p, 3, cross_entropy="sampled"), beta, rho)

    torch.manual_seed(3)
    posterior, parameters = double.vae.encode(2 * IMAGES - 1)
    draw = p(rho)
    error = squared_error(double.prior, Start(posterior.z), torch.randn_like(posterior.z), draw.t).sum(dim=1)
    kl = posterior.log_q.sum(dim=(1, 2, 3)) + draw.likelihood_weight * error
    loss_q = (beta * kl - double.likelihood.log_prob(IMAGES, parameters)).mean()
    of_q = dict(double.vae.named_parameters(prefix="vae"))
    of_p = dict(double.prior.named_parameters(prefix="prior"))
    exact = dict(zip(of_q, torch.autograd.grad(loss_q, list(of_q.values()), retain_graph=True), strict=True))
    exact |= dict(zip(of_p, torch.autograd.grad((draw.weight * error).mean(), list(of_p.values())), strict=True))
    for prefix in ("vae", "prior"):
        assert_same(exact, found, prefix, rtol=1e-9, atol=1e-12)


def test_all_algorithms_give_the_vae_the_same_expected_gradient(double):
    """Over t, by a midpoint rule with 200 nodes: 4 % of the largest gradient, where p's proposal is far from q's."""
    n = 200
    noise = torch.randn(4, *double.latent_shape, dtype=torch.float64)
    rho = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).repeat_interleave(4)
    one, _ = gradients(double, LSGMObjective(sampler(double, "ll"), 1, time_samples=n), 0.9, rho, noise=noise)
    others = {
        "2": LSGMObjective(sampler(double, "un"), 2, q=sampler(double, "ll"), time_samples=n),
        "3, un": LSGMObjective(sampler(double, "un"), 3, time_samples=n),
        "3, re": LSGMObjective(sampler(double, "re"), 3, time_samples=n),
    }
    for objective in others.values():
        other, _ = gradients(double, objective, 0.9, rho, rho, noise)
        assert_same(one, other, "vae", rtol=0, atol=0.04)


@pytest.mark.parametrize("joint", [False, True])
def test_losses_train_only_what_they_should(double, joint, monkeypatch):
    """Other losses for p change nothing in the VAE's gradient, another loss for q nothing in the prior's."""
    rho, q_rho = torch.rand(2, 4, dtype=torch.float64)

    def of(p, q, beta=1.0):
        objective = LSGMObjective(sampler(double, p), 2, q=sampler(double, "ll", q), joint=joint)
        return gradients(double, objective, beta, rho, q_rho)[0]

    base = of("un", "importance")
    assert_same(base, of("re", "importance"), "vae", rtol=1e-9, atol=1e-13)
    assert_same(base, of("un", "uniform"), "prior", rtol=1e-9, atol=1e-13)
    assert_same(base, of("un", "importance", beta=0.3), "prior", rtol=1e-9, atol=1e-13)
    with pytest.raises(AssertionError):
        assert_same(base, of("re", "importance"), "prior", rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError):
        assert_same(base, of("un", "uniform"), "vae", rtol=1e-3, atol=1e-3)
    # without p's loss the prior gets nothing at all
    zero = LSGMObjective(sampler(double, "un"), 2, q=sampler(double, "ll"), joint=joint)
    monkeypatch.setattr(zero, "p", lambda rho: TimeDraw(rho, 0 * rho, 0 * rho))
    monkeypatch.setattr(zero.p, "cross_entropy_constant", lambda: 0.0, raising=False)
    found, _ = gradients(double, zero, 1.0)
    assert all(not g.any() for n, g in found.items() if n.startswith("prior"))
    assert any(g.any() for n, g in found.items() if n.startswith("vae"))


def test_own_samples_in_one_pass_or_in_turn_are_the_same(double):
    rho, q_rho = torch.rand(2, 8, dtype=torch.float64)
    p, q = sampler(double, "re"), sampler(double, "ll")
    found = []
    for joint in (False, True):
        objective = LSGMObjective(p, 2, q=q, joint=joint, time_samples=2)
        found.append(gradients(double, objective, 0.9, rho, q_rho))
    assert_same(found[0][0], found[1][0], "", rtol=1e-9, atol=1e-12)
    assert found[0][1].terms.keys() == found[1][1].terms.keys()


def test_q_can_see_the_averaged_prior(double):
    """The VAE's gradient is that of a model whose prior has the average's weights, the prior's its own."""
    rho, q_rho = torch.rand(2, 4, dtype=torch.float64)
    average = copy.deepcopy(double.prior)
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(1.2)
    samplers = {"p": sampler(double, "un"), "algorithm": 2, "q": sampler(double, "ll")}
    plain, _ = gradients(double, LSGMObjective(**samplers), 1.0, rho, q_rho)
    mixed, _ = gradients(double, LSGMObjective(**samplers, q_prior=average), 1.0, rho, q_rho)
    assert_same(plain, mixed, "prior", rtol=1e-9, atol=1e-13)
    with torch.no_grad():
        for p, other in zip(double.prior.parameters(), average.parameters(), strict=True):
            p.copy_(other)
    averaged, _ = gradients(double, LSGMObjective(**samplers), 1.0, rho, q_rho)
    assert_same(averaged, mixed, "vae", rtol=1e-9, atol=1e-13)


def test_a_frozen_vae_gets_no_gradient(model):
    model.vae.eval().requires_grad_(False)
    x = IMAGES.float()
    before = {n: b.clone() for n, b in model.vae.named_buffers()}
    for weighting in ("ll", "un"):
        objective = LSGMObjective(TimeSampler(model.prior.sde, weighting, "importance", 0.01), train_vae=False)
        value = objective(model, x, 1.0)
        value.loss.backward()
        torch.testing.assert_close(value.loss.detach(), value.terms["loss_prior"])
    assert all(p.grad is None for p in model.vae.parameters())
    assert all(torch.equal(b, before[n]) for n, b in model.vae.named_buffers())
    assert model.prior.network.conv_out.weight.grad.norm() > 0


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
