"""z0 of the last group integrated out: the same means of losses and gradients, with less variance."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lsgm.errors import LSGMError
from lsgm.prior import ScorePrior
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.training.diffusion import Start
from lsgm.training.objective import LSGMObjective
from lsgm.weighting import TimeSampler

SHAPE, GROUPS, EPS, BETA = (3, 2, 2), (2, 1), 0.01, 0.7
SDES = [VPSDE(0.1, 10.0, 1e-2), GeometricVPSDE(2e-2, 0.99, 2e-2), SubVPSDE(0.1, 10.0, 1e-2), VESDE(1e-2, 50.0)]
each_sde = pytest.mark.parametrize("sde", SDES, ids=lambda sde: type(sde).__name__)


@each_sde
def test_the_target_is_the_noise_that_is_expected_at_z_t(sde):
    """Against the regression of the noise on z_t over many z0; where std is 0 it is the noise itself."""
    torch.manual_seed(0)
    n, mean, std = 200_000, 0.7, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    start = Start(torch.full((n, 3, 1, 1), mean).double(), std[:, None, None].expand(n, 3, 1, 1))
    t = torch.full((n,), 0.3, dtype=torch.float64)
    draws = torch.randn(n, 3, 1, 1, dtype=torch.float64)
    z_t, target = start.diffuse(sde, draws, t)
    assert torch.equal(target[:, 0], draws[:, 0])
    noise = torch.randn(n, 3, 1, 1, dtype=torch.float64)
    other = sde.diffuse(start.mean + start.std * torch.randn_like(noise), noise, t[:, None, None, None])
    for c in range(3):
        x, y = other[:, c].flatten(), noise[:, c].flatten()
        slope = torch.cov(torch.stack([x, y]))[0, 1] / x.var()
        found = torch.cov(torch.stack([z_t[:, c].flatten(), target[:, c].flatten()]))[0, 1] / z_t[:, c].var()
        assert abs(found - slope) < 5 * (y.var() / x.var() / n) ** 0.5
        assert abs(z_t[:, c].mean() - x.mean()) < 5 * (2 * x.var() / n) ** 0.5
        assert abs(z_t[:, c].var() / x.var() - 1) < 5 * (4 / n) ** 0.5


class Network(nn.Module):
    """Mixes the channels, so that a group's prediction depends on the other's z_t."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.5, -0.5, 0.3], [0.2, 0.8, -0.7], [0.6, -0.4, 1.1]]).double())

    def forward(self, z_t, t):
        return torch.tanh(torch.einsum("ij,bjhw->bihw", self.weight, z_t) + t[:, None, None, None])


class Encoder:
    """Two groups: the second one's mean depends on the first one's draw."""

    def __init__(self, sde, images):
        self.prior = ScorePrior(sde, Network(), SHAPE, -1.0).double()
        self.latent_shape, self.vae, self.likelihood, self.lower_scale_shapes = SHAPE, self, self, []
        self.mean = torch.linspace(-1.5, 2.0, 12, dtype=torch.float64).view(SHAPE).repeat(images, 1, 1, 1)
        self.std = torch.linspace(0.2, 1.0, 12, dtype=torch.float64).view(SHAPE).repeat(images, 1, 1, 1)
        self.parameters = [self.mean.requires_grad_(), self.std.requires_grad_()]

    def encode(self, x, noise):
        n, std = len(self.mean), self.std
        first = self.mean[:, :2] + std[:, :2] * noise[0][:, :2]
        mean = self.mean[:, 2:] + 0.5 * first[:, :1]
        z = torch.cat([first, mean + std[:, 2:] * noise[0][:, 2:]], dim=1)
        posterior = SimpleNamespace(
            z=z, log_q=torch.zeros_like(z), groups=GROUPS, lower_scales=[], mean=mean, std=std[:, 2:],
            lower_scales_kl=lambda: z.new_zeros(n, 0), kl_per_channel=lambda: z.new_zeros(3),
        )  # fmt: skip
        return posterior, z.new_zeros(n)

    def log_prob(self, x, parameters):
        return parameters


def runs(objective, sde, images=50, count=120):
    """[cross entropy], [gradients of the prior] and [gradients of the encoder] of ``count`` batches."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = Encoder(sde, images)
        value = objective(model, torch.zeros(images, 1, 1, 1, dtype=torch.float64), BETA)
        value.loss.backward()
        encoder = torch.cat([p.grad.sum(dim=0).flatten() for p in model.parameters])
        prior = torch.cat([p.grad.flatten() for p in model.prior.parameters()])
        found.append((value.terms["cross_entropy"][None], prior, encoder))
    return [torch.stack(values) for values in zip(*found, strict=True)]


@each_sde
@pytest.mark.parametrize(
    ("algorithm", "weighting", "more"),
    [(1, "ll", {}), (1, "ll", {"time_samples": 2}), (2, "un", {}), (2, "re", {"joint": True}), (3, "re", {})],
    ids=["1", "1, two samples", "2 in turn", "2 joint", "3"],
)
def test_same_means_and_smaller_variances(sde, algorithm, weighting, more):
    """120 batches of 50 images each; means agree within five standard errors."""
    values = {}
    for estimator in ("sampled", "marginal"):
        q = TimeSampler(sde, "ll", "importance", EPS)
        p = TimeSampler(sde, weighting, "importance", EPS)
        values[estimator] = runs(LSGMObjective(p, algorithm, q=q, cross_entropy=estimator, **more), sde)
    for one, other in zip(values["marginal"], values["sampled"], strict=True):
        error = ((one.var(dim=0) + other.var(dim=0)) / len(one)).sqrt()
        assert ((one.mean(dim=0) - other.mean(dim=0)).abs() < 5 * error).all()
        assert one.var(dim=0).sum() < other.var(dim=0).sum()


def test_a_posterior_that_is_no_gaussian_is_refused():
    posterior = SimpleNamespace(z=torch.zeros(2, *SHAPE), mean=None, std=None)
    assert Start.of(posterior, 3, marginal=False).mean.shape == (6, *SHAPE)
    with pytest.raises(LSGMError, match=r"num_nf: 0.*use cross_entropy: control_variate"):
        Start.of(posterior, 1, marginal=True)
