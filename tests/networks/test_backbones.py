"""What holds for every backbone, one's own included: the contract of :class:`lsgm.networks.posterior.Backbone`."""

import math

import pytest
import torch

from lsgm.config import ConvVAEConfig, VAEConfig
from lsgm.networks.batch_norm import batch_statistics
from lsgm.training.objective import kl_to_normal

NVAE_SETTINGS = {
    "arch": "res_bnswish", "channels": 4, "channel_mult": [1, 2], "groups_per_scale": 2, "latents_per_group": 2,
    "cells_per_cond": 1, "preprocess": {"blocks": 1, "cells": 2}, "postprocess": {"blocks": 1, "cells": 1},
}  # fmt: skip
CONFIGS = {
    "nvae": VAEConfig(**NVAE_SETTINGS),
    "nvae, mbconv, flows": VAEConfig(**NVAE_SETTINGS | {"arch": "res_mbconv", "num_nf": 1}),
    "nvae, three scales": VAEConfig(
        **NVAE_SETTINGS
        | {"channel_mult": [1, 1, 2, 4], "latent_scales": 3, "num_nf": 1, "progressive_input": "input_skip"}
    ),
    "conv": ConvVAEConfig(backbone="conv", channels=4, channel_mult=[1, 2, 2], latents=3),
}
SIZE = 8


@pytest.fixture(params=CONFIGS)
def vae(request):
    torch.manual_seed(0)
    config = CONFIGS[request.param]
    vae = config.build(image_channels=1, image_size=SIZE, output_channels=1).double().eval()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return vae


def images(count=2):
    return torch.rand(count, 1, SIZE, SIZE, dtype=torch.float64) * 2 - 1


def test_shapes_and_the_way_back(vae):
    """The parameters that come with the posterior sample are what it decodes to."""
    posterior, parameters = vae.encode(images())
    assert posterior.z.shape == posterior.log_q.shape == (2, *vae.latent_shape)
    assert sum(posterior.groups) == sum(vae.latent_groups) == vae.latent_shape[0]
    for tensors in (posterior.lower_scales, posterior.lower_scales_log_q):
        assert [tuple(z.shape[1:]) for z in tensors] == list(vae.lower_scale_shapes)
    assert parameters.shape == (2, 1, SIZE, SIZE)
    torch.testing.assert_close(vae.decode(posterior.z, posterior.lower_scales), parameters)


def test_the_density_is_that_of_the_sample(vae):
    """z is a function of the normal draws, so log q(z) = log N(draws) - log |det dz / d draws|, flows and all."""
    shapes = [vae.latent_shape, *vae.lower_scale_shapes]
    sizes = [math.prod(shape) for shape in shapes]
    draws = torch.randn(sum(sizes), dtype=torch.float64)
    x = images(1)

    def posterior(flat):
        noise = [part.view(1, *shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return vae.encode(x, noise)[0]

    def z(flat):
        found = posterior(flat)
        return torch.cat([part.flatten() for part in (found.z, *found.lower_scales)])

    _, log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(z, draws))
    expected = -0.5 * (draws.square() + math.log(math.tau)).sum() - log_det
    found = posterior(draws)
    log_q = found.log_q.sum() + sum(part.sum() for part in found.lower_scales_log_q)
    torch.testing.assert_close(log_q, expected)
    log_normal = -0.5 * (z(draws).square() + math.log(math.tau)).sum()
    torch.testing.assert_close(kl_to_normal(found).sum(), expected - log_normal)


def test_every_latent_and_every_weight_matters(vae):
    posterior, parameters = vae.encode(images())
    latents = [z.detach().requires_grad_() for z in (posterior.z, *posterior.lower_scales)]
    for gradient in torch.autograd.grad(vae.decode(latents[0], latents[1:]).square().sum(), latents):
        assert (gradient != 0).any(dim=0).all()
    (parameters.square().sum() + posterior.log_q.sum() + sum(q.sum() for q in posterior.lower_scales_log_q)).backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None] == []


def test_batch_statistics_are_those_of_the_batch_and_leave_no_trace(vae):
    """As training does it, but for the running statistics."""
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    shapes = [vae.latent_shape, *vae.lower_scale_shapes]
    z, *lower_scales = (torch.randn(4, *shape, dtype=torch.float64) for shape in shapes)
    with batch_statistics(vae):
        found = vae.decode(z, lower_scales)
    assert not vae.training and not any(m.training for m in vae.modules())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert not torch.allclose(found, vae.decode(z, lower_scales))
    torch.testing.assert_close(found, vae.train().decode(z, lower_scales))
    assert any(not torch.equal(value, before[name]) for name, value in vae.state_dict().items())
