"""Where sigma_t goes to 0: every solver ends with finite float32 latents, or says in one line what to change."""

import pytest
import torch

from lsgm.config import EstimatorConfig, SampleConfig
from lsgm.errors import LSGMError
from lsgm.per_sample_noise import PerSampleNoise
from lsgm.prior import ScorePrior
from lsgm.registry import load
from lsgm.sde import VESDE, VPSDE, GeometricVPSDE, SubVPSDE
from lsgm.solvers.likelihood import estimate_log_prob
from lsgm.solvers.schedule import GRIDS

# name -> (SDE, time_eps): the smallest that a configuration allows, and 0 where there is noise at t = 0
LIMITS = {
    "vpsde": (VPSDE(0.1, 20.0), 1e-12),
    "vpsde_sigma2_0": (VPSDE(0.1, 20.0, 1e-4), 0.0),
    "geometric_vpsde": (GeometricVPSDE(3e-5, 0.999, 3e-5), 0.0),
    "geometric_vpsde_from_0": (GeometricVPSDE(3e-5, 0.999, 0.0), 1e-12),
    "sub_vpsde": (SubVPSDE(0.1, 20.0), 1e-12),
    "sub_vpsde_sigma2_0": (SubVPSDE(0.1, 20.0, 1e-4), 0.0),
    "vesde": (VESDE(3e-5, 2500.0), 0.0),
}
FORMS = [
    *[{"form": form, "order": order} for form in ("velocity", "noise", "data", "drift") for order in (1, 3)],
    *[{"form": "data", "order": order, "corrector": True} for order in (1, 3)],
    *[{"form": "data", "order": order, "tau": 1.0} for order in (1, 3)],
    *[
        {"solver": solver, "form": form}
        for solver in ("euler", "heun", "rk4")
        for form in ("velocity", "noise", "drift")
    ],
]
AS_DOCUMENTED = [
    *[{"solver": solver} for solver in ("ab", "ddim", "dpmpp_2m", "deis")],
    *[{"solver": "ab", "denoise": True}, {"solver": "ddim", "tau": 1.0}, {"solver": "dpmpp_2m", "tau": 1.0}],
    *[{"solver": "dpmpp_2m", "corrector": True}],
]


@pytest.fixture(params=LIMITS)
def limit(request, of_parts):
    """A mixture of Gaussians as a float32 prior, and `time_eps`."""
    sde, time_eps = LIMITS[request.param]
    means = 0.8 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    prior = of_parts(sde, means, 0.3).float()
    return ScorePrior(sde, prior.network, prior.latent_shape, mixing_logit=0.0), time_eps


def sample(prior, time_eps, **settings):
    config = SampleConfig(count=1, **settings).resolved().model_copy(update={"time_eps": time_eps})
    generator = torch.Generator().manual_seed(1)

    def draw():
        return torch.randn(4, 2, 2, 1, generator=generator)

    return load(config.implementation)(prior, draw(), draw, config).y


def test_samples_are_finite(limit):
    for settings in FORMS:
        for grid in GRIDS:
            denoise = grid == "t"
            found = sample(*limit, grid=grid, steps=4 + denoise, denoise=denoise, **settings)
            assert found.isfinite().all(), (settings, grid)
    for solver, tol in (("rk45", 1e-2), ("adaptive_sde", 0.1)):
        assert sample(*limit, solver=solver, tol=tol).abs().max() < 6


def test_what_is_documented_gives_samples(limit):
    """On their own grids, with 24 evaluations: nothing grows where sigma goes to 0."""
    for settings in AS_DOCUMENTED:
        assert sample(*limit, steps=24, **settings).abs().max() < 6, settings


def test_likelihoods_are_finite(limit):
    prior, time_eps = limit
    z0 = torch.randn(4, 2, 2, 1, generator=torch.Generator().manual_seed(3))
    for settings in ({}, {"solver": "heun"}, {"solver": "ab"}, {"solver": "rk45", "tol": 1e-2}, {"estimator": "bound"}):
        values, _ = estimate_log_prob(prior, z0, PerSampleNoise(0, range(4)), EstimatorConfig(**settings), time_eps)
        assert values.isfinite().all(), settings


@pytest.mark.parametrize("sde", ["vpsde", "sub_vpsde"], indirect=True)
def test_no_path_ends_where_there_is_no_noise(mixture):
    """Which a configuration does not allow."""
    for settings in [*FORMS, *AS_DOCUMENTED, {"solver": "edm"}, {"solver": "rk45"}, {"solver": "adaptive_sde"}]:
        with pytest.raises(LSGMError, match="^time_eps: sigma_t is 0 at t = 0; choose a larger time_eps$"):
            sample(mixture.float(), 0.0, **settings)
    with pytest.raises(LSGMError, match="time_eps: expected a number here; only a model knows what null stands for"):
        sample(mixture.float(), None)
