"""Properties of the two networks that hold for any weights."""

import pytest
import torch
import torch.nn.functional as F

from lsgm.config import NCSNppConfig, VAEConfig
from lsgm.networks.ncsnpp import Resample
from lsgm.widths import width_multipliers


def vae_config(arch="res_bnswish", blocks=2, groups=3):
    return VAEConfig(
        arch=arch, channels=4, channel_mult=[1, 2, 2, 2][: blocks + 1], groups_per_scale=groups, latents_per_group=2,
        cells_per_cond=1, preprocess={"blocks": blocks, "cells": 2}, postprocess={"blocks": blocks, "cells": 2},
    )  # fmt: skip


def prior_config(**settings):
    return NCSNppConfig(channels=8, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=0, **settings)


def test_each_group_sees_the_groups_before_it():
    """Changing group g's draw changes the posteriors of later groups only."""
    torch.manual_seed(0)
    vae = vae_config().build(image_channels=1, image_size=32, output_channels=1).eval()
    x = torch.rand(1, 1, 32, 32)
    noise = torch.randn(1, *vae.latent_shape)
    changed = noise.clone()
    changed[:, 2:4] += 1.0  # group 1 of 0, 1, 2
    with torch.no_grad():
        a, b = (vae.encode(x, [n])[0] for n in (noise, changed))
    assert torch.equal(a.z[:, :2], b.z[:, :2])
    assert not torch.allclose(a.z[:, 2:4], b.z[:, 2:4])
    assert not torch.equal(a.z[:, 4:], b.z[:, 4:])


def test_score_network_starts_at_zero_and_keeps_the_shape():
    for settings, shape in [
        ({"scales": 2}, (6, 8, 8)),
        ({"scales": 1}, (3, 4, 4)),
        ({"scales": 3, "fir": True}, (5, 16, 16)),
    ]:
        network = prior_config(**settings).build(latent_shape=shape, image_size=32)
        out = network(torch.randn(2, *shape), torch.rand(2))
        assert out.shape == (2, *shape)
        assert out.abs().max() < 1e-3


def test_score_network_depends_on_time_and_on_every_latent():
    torch.manual_seed(0)
    network = prior_config(scales=2).build(latent_shape=(3, 4, 4), image_size=32).double()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    z = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    gradient_z, gradient_t = torch.autograd.grad(network(z, t)[0, 1, 2, 2], (z, t))
    assert (gradient_z != 0).all() and (gradient_t != 0).all()


def test_width_multipliers_of_the_paper():
    assert width_multipliers(2, 32) == (1, 1)
    assert width_multipliers(3, 32) == width_multipliers(3, 256) == (1, 1, 1)
    assert width_multipliers(4, 256) == (1, 2, 2, 2)
    assert width_multipliers(5, 256) == (1, 1, 2, 2, 2)


def test_fir_resampling_against_its_definition():
    kernel = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0])] * 2) / 64
    x = torch.randn(2, 3, 6, 6)
    stuffed = torch.zeros(2, 3, 12, 12)
    stuffed[:, :, ::2, ::2] = x
    weight = kernel.expand(3, 1, 4, 4)
    up = F.conv2d(F.pad(stuffed, (2, 1, 2, 1)), 4 * weight, groups=3)
    torch.testing.assert_close(Resample(1, fir=True)(x), up)
    down = F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, groups=3)[:, :, ::2, ::2]
    torch.testing.assert_close(Resample(-1, fir=True)(x), down)
    constant = torch.ones(1, 1, 8, 8)
    torch.testing.assert_close(Resample(1, fir=True)(constant)[..., 3:-3, 3:-3], torch.ones(1, 1, 10, 10))


@pytest.mark.parametrize("direction", [1, -1])
def test_fir_resampling_is_in_float32_under_autocast(direction):
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found, exact = (Resample(direction, fir=True)(value) for value in (x, x.double()))
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
        assert Resample(direction, fir=True)(x.bfloat16()).dtype == torch.float32


def test_the_latents_of_all_scales_are_asked_for():
    config = vae_config(blocks=1).model_copy(update={"latent_scales": 2, "channel_mult": [1, 1, 1]})
    vae = config.build(image_channels=1, image_size=16, output_channels=1)
    with pytest.raises(ValueError, match="expected the latents of 3 groups, got 0"):
        vae.decode(torch.zeros(1, *vae.latent_shape))
