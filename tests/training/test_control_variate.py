"""The control variate of the cross entropy: same mean, smaller variance, and the prior's gradient untouched."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lsgm.config import TrainConfig
from lsgm.prior import ScorePrior
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.training.objective import LSGMObjective
from lsgm.weighting import TimeSampler

SHAPE, GROUPS, EPS, BETA = (3, 2, 2), (2, 1), 0.01, 0.7
SDES = {
    "vpsde": VPSDE(0.1, 10.0),
    "vpsde, s0": VPSDE(0.1, 10.0, 1e-2),
    "geometric": GeometricVPSDE(2e-2, 0.99, 2e-2),
    "sub": SubVPSDE(0.1, 10.0),
    "ve": VESDE(1e-2, 50.0),
}
# algorithm, p's weighting and sampling, further arguments
CASES = {
    "1": (1, "ll", "importance", {}),
    "1, uniform, two samples": (1, "ll", "uniform", {"time_samples": 2}),
    "2 in turn": (2, "un", "importance", {}),
    "2 joint": (2, "re", "importance", {"joint": True}),
    "3": (3, "re", "importance", {}),
    "3, rescale": (3, "rescale", "importance", {}),
}
each_sde = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Network(nn.Module):
    """Not the prediction for any data: bounded, and different in every channel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, -0.5, 0.8], dtype=torch.float64)[:, None, None])

    def forward(self, z_t, t):
        return torch.tanh(self.weight * z_t + t[:, None, None, None])


class Encoder:
    """A model whose z0 is given: the same for all images. Its gradient is then one sample for each image."""

    def __init__(self, sde, mixing_logit, images):
        self.prior = ScorePrior(sde, Network(), SHAPE, mixing_logit).double()
        self.latent_shape, self.vae, self.likelihood = SHAPE, self, self
        self.lower_scale_shapes = []
        z0 = torch.linspace(-1.5, 2.0, 12, dtype=torch.float64).view(SHAPE)
        self.z0 = z0.repeat(images, 1, 1, 1).requires_grad_()

    def encode(self, x, noise):
        n = len(self.z0)
        posterior = SimpleNamespace(
            z=self.z0, log_q=torch.zeros_like(self.z0), groups=GROUPS, lower_scales=[],
            lower_scales_kl=lambda: self.z0.new_zeros(n, 0), kl_per_channel=lambda: self.z0.new_zeros(3),
        )  # fmt: skip
        return posterior, self.z0.new_zeros(n)

    def log_prob(self, x, parameters):
        return parameters


def make(sde, case, cross_entropy, *, stratified_t=False, **more):
    algorithm, weighting, sampling, settings = case
    return LSGMObjective(
        TimeSampler(sde, weighting, sampling, EPS), algorithm, q=TimeSampler(sde, "ll", "importance", EPS),
        cross_entropy=cross_entropy, stratified_t=stratified_t, **settings, **more,
    )  # fmt: skip


def run(objective, mixing_logit, images, seed, inactive=False):
    """The objective, and the gradients with respect to the z0 of each image and to the prior's weights."""
    model = Encoder(objective.p.sde, mixing_logit, images)
    if inactive:
        model.prior.deactivate(torch.tensor([False, True, False]))
    torch.manual_seed(seed)
    value = objective(model, torch.zeros(images, 1, 1, 1, dtype=torch.float64), BETA)
    value.loss.backward()
    gradient = model.z0.grad * images if model.z0.grad is not None else None
    return value, gradient, {name: p.grad for name, p in model.prior.named_parameters()}


def many(objective, mixing_logit):
    """Cross entropies and losses of 60 batches, [60, 2], and gradients of their 3,000 images, [3000, 12]."""
    found = [run(objective, mixing_logit, 50, seed, inactive=True) for seed in range(60)]
    values = torch.stack([torch.stack([v.terms["cross_entropy"], v.loss.detach()]) for v, _, _ in found])
    return values, torch.cat([gradient.flatten(1) for _, gradient, _ in found])


@each_sde
@each_case
@pytest.mark.parametrize("mixing_logit", [-3.0, None], ids=["mixed", "unmixed"])
def test_same_mean_and_smaller_variance(sde, case, mixing_logit):
    """From the same draws, so that the difference is the control variate: its mean is 0 within five standard errors."""
    values, gradients = many(make(sde, case, "control_variate"), mixing_logit)
    values_sampled, gradients_sampled = many(make(sde, case, "sampled"), mixing_logit)
    for one, other in ((values, values_sampled), (gradients, gradients_sampled)):
        difference = one - other
        error = difference.std(dim=0) / len(difference) ** 0.5
        assert (error > 0).all() and (difference.mean(dim=0).abs() < 5 * error + 1e-4 * other.mean(dim=0).abs()).all()
    if mixing_logit is not None:  # alpha = 0.05: a small part of the noise is left
        assert values[:, 0].var() < 0.25 * values_sampled[:, 0].var()
        assert gradients.var(dim=0).sum() < 0.25 * gradients_sampled.var(dim=0).sum()


@each_sde
@each_case
def test_the_priors_gradient_is_the_same(sde, case):
    """To rounding, for the same random numbers."""
    one, _, with_variate = run(make(sde, case, "control_variate"), -1.0, 8, 0)
    two, _, sampled = run(make(sde, case, "sampled"), -1.0, 8, 0)
    torch.testing.assert_close(one.terms["loss_prior"], two.terms["loss_prior"])
    assert one.loss != two.loss
    for name, gradient in sampled.items():
        assert gradient.any()
        torch.testing.assert_close(with_variate[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@each_sde
def test_normal_latents_leave_no_noise(sde):
    """With alpha = 0 the cross entropy and its gradient do not depend on the draws; for a frozen VAE's log too."""
    for settings in ({}, {"train_vae": False}):
        objective = make(sde, CASES["1"], "control_variate", **settings)
        (one, gradient, _), (two, gradient_2, _) = (run(objective, -60.0, 4, seed) for seed in (1, 2))
        torch.testing.assert_close(one.terms["nelbo"], two.terms["nelbo"], rtol=1e-8, atol=1e-8)
        if not settings:
            torch.testing.assert_close(gradient, gradient_2, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("samples", [1, 2])
def test_stratified_times_have_the_same_mean_and_less_noise(samples):
    """Of the cross entropy of an unmixed prior with uniform times, 400 batches each, five standard errors."""
    values = {}
    for stratified in (False, True):
        case = (1, "ll", "uniform", {"time_samples": samples})
        objective = make(SDES["vpsde"], case, "sampled", stratified_t=stratified)
        found = [run(objective, None, 8, seed)[0].terms["cross_entropy"] for seed in range(400)]
        values[stratified] = torch.stack(found)
    error = (sum(x.var() for x in values.values()) / 400).sqrt()
    assert abs(values[True].mean() - values[False].mean()) < 5 * error
    assert values[True].var() < 0.7 * values[False].var()


def test_configurations_without_the_keys_are_read():
    config = TrainConfig.model_validate({"epochs": 1, "batch": 8})
    assert (config.cross_entropy, config.stratified_t) == ("control_variate", True)
    paper = TrainConfig.model_validate({"epochs": 1, "batch": 8, "cross_entropy": "sampled", "stratified_t": False})
    assert (paper.cross_entropy, paper.stratified_t) == ("sampled", False)
