"""Computing feature maps twice changes memory, and nothing else."""

import copy

import pytest
import torch

from lsgm.config import ImageConfig, NCSNppConfig, SDEConfig, VAEConfig
from lsgm.model import LSGM
from lsgm.training.activation_checkpointing import checkpoint_activations
from lsgm.training.ema import EMA
from lsgm.training.objective import LSGMObjective, VAEObjective
from lsgm.weighting import TimeSampler

BLOCKS = {"blocks": 1, "cells": 2}


def make():
    torch.manual_seed(0)
    image = ImageConfig(channels=3, size=8, padded_size=8, binary=False)
    vae = VAEConfig(
        arch="res_mbconv", channels=4, channel_mult=[1, 2, 2], latent_scales=2, groups_per_scale=2,
        latents_per_group=2, cells_per_cond=1, preprocess=BLOCKS, postprocess=BLOCKS, num_nf=1, likelihood="dml",
        progressive_input="input_skip",
    )  # fmt: skip
    prior = NCSNppConfig(channels=8, scales=2, cells_per_scale=1, dropout=0.5, embedding_dim=16, mixing_logit_init=0)
    model = LSGM(image, vae, prior, SDEConfig(name="vpsde")).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def step(model, objective):
    """Loss, gradients and what the forward pass left in the buffers."""
    torch.manual_seed(1)
    x = torch.randint(0, 256, (4, 3, 8, 8)).double() / 255
    loss = objective(model, x, 0.7).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize("kind", ["vae", "shared", "reweighted", "own in turn", "own joint", "own, average", "frozen"])
def test_losses_gradients_and_statistics_stay_the_same(kind):
    """Dropout included, for every way through the score network."""
    one = make()
    two = copy.deepcopy(one)
    checkpoint_activations(two)
    found = []
    for model in (one, two):
        p = TimeSampler(model.prior.sde, "ll" if kind == "shared" else "re", "importance", 0.01)
        q = TimeSampler(model.prior.sde, "ll", "importance", 0.01)
        average = EMA(model.prior, 0.9)
        for weight in average.module.network.parameters():
            weight.mul_(1.5)
        objective = {
            "vae": VAEObjective(),
            "shared": LSGMObjective(p),
            "reweighted": LSGMObjective(p, 3),
            "own in turn": LSGMObjective(p, 2, q=q),
            "own joint": LSGMObjective(p, 2, q=q, joint=True),
            "own, average": LSGMObjective(p, 2, q=q, q_prior=average.module),
            "frozen": LSGMObjective(p, train_vae=False),
        }[kind]
        if kind == "frozen":
            model.vae.eval().requires_grad_(False)
        found.append(step(model, objective))
    (loss, gradients, buffers), (again, gradients_again, buffers_again) = found
    torch.testing.assert_close(again, loss)
    assert gradients.keys() == gradients_again.keys() and len(gradients) > 50
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, msg=name)
    for name, buffer in buffers.items():
        assert torch.equal(buffers_again[name], buffer), name
    assert kind == "frozen" or any("num_batches" in name and value == 1 for name, value in buffers_again.items())


def test_less_is_kept():
    """What autograd keeps of the blocks' insides is gone."""
    model = make().vae

    def kept():
        sizes = []
        pack = lambda t: sizes.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.encode(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
        return sum(sizes)

    before = kept()
    checkpoint_activations(model)
    assert kept() < 0.5 * before
