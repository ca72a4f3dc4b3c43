"""What is said of shapes without building anything, held against networks that are built (on the meta device)."""

import random

import pytest
import torch

from lsgm.config import ConvVAEConfig, ImageConfig, NCSNppConfig, SDEConfig, VAEConfig
from lsgm.describe import describe
from lsgm.errors import LSGMError
from lsgm.model import LSGM
from lsgm.networks import ncsnpp
from lsgm.shapes import misfits


def drawn(seed):
    """Sections of a model as one might write them: about half of them fit together."""
    rng = random.Random(seed)
    binary = rng.random() < 0.4
    size = rng.choice([1, 8, 12, 16, 16, 32, 32, 64, 64])
    image = ImageConfig(channels=1 if binary else rng.choice([1, 3]), size=size, padded_size=size, binary=binary)
    fitting = ["bernoulli"] if binary else ["dml", "dl", "normal"]
    likelihood = rng.choice(fitting * 5 + ["bernoulli", "dl"])
    common = {"channels": rng.randint(1, 9), "likelihood": likelihood}
    if rng.random() < 0.3:
        mult = [rng.randint(1, 3) for _ in range(rng.randint(2, 4))]
        vae = ConvVAEConfig(backbone="conv", channel_mult=mult, latents=rng.randint(1, 5), **common)
    else:
        blocks, scales = rng.randint(1, 3), rng.choice([1, 1, 2])
        vae = VAEConfig(
            arch=rng.choice(["res_bnswish", "res_mbconv"]),
            channel_mult=[rng.randint(1, 3) for _ in range(blocks + scales)],
            latent_scales=scales,
            groups_per_scale=rng.randint(1, 2),
            latents_per_group=rng.randint(1, 5),
            cells_per_cond=1,
            preprocess={"blocks": blocks, "cells": 1},
            postprocess={"blocks": blocks, "cells": 1},
            use_se=rng.random() < 0.5,
            num_nf=rng.choice([0, 1]),
            progressive_input=rng.choice(["none", "input_skip"]),
            **common,
        )
    prior = NCSNppConfig(
        channels=rng.choice([rng.randint(4, 140), 8 * rng.randint(1, 16), 4 * rng.randint(1, 8), 64]),
        scales=rng.choice([1, 1, 2, 3, 4, 5]),
        cells_per_scale=1,
        fir=rng.random() < 0.5,
        embedding_dim=rng.choice([4, 6, 16]),
        attention_resolution=rng.choice([1, 8, 16]),
        mixing_logit_init=-1,
    )
    return image, vae, prior


def built(image, vae, prior):
    """The model, once through its networks and its likelihood; the score network is not asked whether it fits."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lsgm.model.misfits", lambda image, vae, prior: misfits(image, vae))
        model = LSGM(image, vae, prior, SDEConfig())
        x = torch.zeros(2, image.channels, image.padded_size, image.padded_size)
        model.vae.encode(x)
        model.prior(torch.zeros(2, *model.latent_shape), torch.zeros(2))
    shape = (1, model.likelihood.parameters_per_pixel, image.padded_size, image.padded_size)
    model.likelihood.log_prob(torch.zeros(1, *x.shape[1:]), torch.zeros(shape))
    return model


def test_what_is_accepted_can_be_built_and_nothing_else():
    accepted = 0
    for seed in range(40):
        sections = drawn(seed)
        reasons = misfits(*sections)
        try:
            model = built(*sections)
        except (LSGMError, ValueError, RuntimeError) as error:
            assert reasons, (seed, sections, error)
            continue
        assert not reasons, (seed, sections, reasons)
        assert sections[1].latent_shapes(sections[0]) == [model.latent_shape, *model.vae.lower_scale_shapes]
        accepted += 1
    assert 12 < accepted < 28


@pytest.mark.parametrize(("size", "scales"), [(32, 1), (64, 3), (64, 4), (64, 5)])
def test_the_group_norms_of_the_score_network(size, scales):
    """Every number of channels: the norms of the network with 128, made anew in proportion."""
    image = ImageConfig(channels=3, size=size, padded_size=size, binary=False)
    vae = ConvVAEConfig(backbone="conv", channels=4, channel_mult=[1, 1], latents=2, likelihood="dl")
    sections = {"scales": scales, "cells_per_scale": 2, "mixing_logit_init": 0}
    with torch.device("meta"):
        network = NCSNppConfig(channels=128, **sections).build(latent_shape=(2, size // 2, size // 2), image_size=size)
        norms = {m.num_channels // 128 for m in network.modules() if isinstance(m, torch.nn.GroupNorm)}
        for channels in range(4, 300):
            try:
                [ncsnpp.GroupNorm(multiple * channels) for multiple in norms]
                fits = True
            except ValueError:
                fits = False
            reasons = misfits(image, vae, NCSNppConfig(channels=channels, **sections))
            assert fits == (not reasons), (channels, reasons)


@pytest.mark.parametrize(
    ("image", "vae", "prior", "message"),
    [
        ({}, {}, {"channels": 7}, "prior.channels: expected 6 or 8 or another number .* found 7 .14 channels"),
        ({}, {}, {"scales": 4}, "prior.scales: 4 scales need a latent size divisible by 8, not 4x4"),
        ({"size": 36, "padded_size": 36}, {}, {}, "channel_mult: 3 halvings need an image size divisible by 8, not 36"),
        ({}, {"likelihood": "dl"}, {}, "vae.likelihood: 'dl' does not fit: the images are binary; use bernoulli"),
        ({"binary": False}, {}, {}, "vae.likelihood: 'bernoulli' does not fit: the images are not binary; use dml, dl"),
        ({"channels": 3}, {}, {}, "vae.likelihood: 'bernoulli' is for images of 1 channels, not 3"),
        ({"binary": False, "channels": 2}, {"likelihood": "dml"}, {}, "'dml' is for images of 1 or 3 channels, not 2"),
        ({}, {}, {"cells_per_scale": 501}, "prior.cells_per_scale: 501 residual blocks .* expected at most 500"),
    ],
)  # fmt: skip
def test_reasons(image, vae, prior, message):
    image = ImageConfig(**{"channels": 1, "size": 32, "padded_size": 32, "binary": True} | image)
    vae = ConvVAEConfig(**{"backbone": "conv", "channels": 4, "channel_mult": [1, 1, 1, 1], "latents": 2} | vae)
    prior = NCSNppConfig(**{"channels": 8, "scales": 1, "cells_per_scale": 1, "mixing_logit_init": 0} | prior)
    with pytest.raises(LSGMError, match=message):
        describe(image, vae, prior, SDEConfig())
