"""Models on disk and the public face: load, sample, encode, decode, nelbo."""

import json
import pickle

import pytest
import torch

import lsgm
from lsgm import checkpoint
from lsgm.config import ImageConfig, PretrainConfig, PretrainStage, PriorConfig, SDEConfig, VAEConfig
from lsgm.errors import LSGMError
from lsgm.model import LSGM

BLOCK = {"blocks": 2, "cells": 1}
VAE = VAEConfig(
    arch="res_mbconv", channels=4, channel_mult=[1, 1, 2], groups_per_scale=2, latents_per_group=1,
    cells_per_cond=1, preprocess=BLOCK, postprocess=BLOCK,
)  # fmt: skip
PRIOR = PriorConfig(channels=8, scales=1, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=0)
IMAGE = ImageConfig(channels=1, size=28, padded_size=32, binary=True)
STAGE = PretrainStage(
    model="m",
    dataset="mnist",
    vae=VAE,
    pretrain=PretrainConfig(epochs=1, batch=2, kl_anneal_portion=1, kl_max_coeff=1, spectral_reg=0),
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = LSGM(IMAGE, VAE, PRIOR, SDEConfig())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    checkpoint.save(model, tmp_path / "m", [STAGE], {"seconds": 1.5})
    return tmp_path / "m"


def test_round_trip_is_exact(folder):
    model = lsgm.load(folder)
    again = lsgm.load(folder)
    checkpoint.save(again, folder, [STAGE], {})
    state = lsgm.load(folder).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    config = checkpoint.read_config(folder)
    assert config.stages == [STAGE] and config.training["parameters"] == sum(p.numel() for p in model.parameters())


def test_public_face(folder):
    model = lsgm.load(folder)
    x, info = model.sample(5, seed=0, tol=1e-2, batch=2, return_info=True)
    assert x.shape == (5, 1, 28, 28) and x.min() >= 0 and x.max() <= 1
    assert info.images == 5 and info.solver == "rk45" and info.nfe >= 8 and info.seconds > 0
    q = model.encode(x)
    assert q.z.shape == (5, *model.latent_shape) and model.decode(q.z).shape == x.shape
    nelbo = model.nelbo((x > 0.5).float(), tol=1e-2)
    assert nelbo.shape == (5,) and torch.isfinite(nelbo).all()
    z, t = torch.randn(2, *model.latent_shape), torch.tensor([0.1, 0.9])
    sigma = model.prior.sde.variance(t).sqrt()[:, None, None, None]
    torch.testing.assert_close(model.prior.score(z, t), -model.prior.predict_noise(z, t) / sigma)


def test_samples_depend_on_the_seed_and_not_on_the_batch(folder):
    model = lsgm.load(folder)
    one, two = (model.sample(6, seed=3, tol=1e-4, batch=batch) for batch in (6, 4))
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)  # the solver's steps depend on the batch, within tol
    assert not torch.allclose(one, model.sample(6, seed=4, tol=1e-4, batch=6), atol=1e-2)


def test_nelbo_of_a_model_with_a_closed_form():
    """Encoder q = N(0, I) for every x and a decoder that ignores z: KL = 0 and the pixels are coin flips.

    The NELBO is then 784 ln 2 whatever the sample, for the prior N(0, I) and for a score prior with alpha = 0.
    """
    model = LSGM(IMAGE, VAE, PRIOR, SDEConfig())
    with torch.no_grad():
        for layer in (*model.vae.posterior_heads, model.vae.output_head):
            layer.log_weight_norm.fill_(-60)
            layer.bias.zero_()
        model.prior.mixing_logit.fill_(-60)
    x = (torch.rand(4, 1, 28, 28) < 0.5).float()
    expected = torch.full((4,), 784 * torch.log(torch.tensor(2.0)).item())
    terms = model.nelbo_terms(x, tol=1e-6)
    torch.testing.assert_close(terms.reconstruction, expected)
    torch.testing.assert_close(terms.kl, torch.zeros(4), atol=2e-3, rtol=0)
    torch.testing.assert_close(terms.nelbo, terms.reconstruction + terms.kl)
    model.prior = None
    torch.testing.assert_close(model.nelbo(x), expected, atol=2e-3, rtol=0)
    bits = model.bits_per_dimension(model.nelbo(x))
    torch.testing.assert_close(bits, torch.ones(4), atol=1e-5, rtol=0)


def test_missing_and_damaged_files_are_named(folder, tmp_path):
    with pytest.raises(LSGMError, match=r"none/config.json: not found"):
        lsgm.load(tmp_path / "none")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(LSGMError, match=r"model.safetensors: damaged"):
        lsgm.load(folder)
    weights.write_bytes(pickle.dumps({"weights": 1}))  # never unpickled
    with pytest.raises(LSGMError, match=r"model.safetensors: damaged"):
        lsgm.load(folder)
    weights.unlink()
    with pytest.raises(LSGMError, match=r"model.safetensors: not found; restore"):
        lsgm.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["vae"]["channels"] = "four"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(LSGMError, match=r"config.json: vae.channels: expected .* found 'four'"):
        lsgm.load(folder)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(LSGMError, match="prior.scales: 5 scales need latents of a size divisible by 16, not 8x8"):
        LSGM(IMAGE, VAE, PRIOR.model_copy(update={"scales": 5}), SDEConfig())
    with pytest.raises(LSGMError, match="vae.preprocess.blocks: 2 blocks need an image size divisible by 4, not 30"):
        LSGM(IMAGE.model_copy(update={"padded_size": 30}), VAE)
