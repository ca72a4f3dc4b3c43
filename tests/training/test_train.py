"""The second stage with each of its switches: real MNIST, a tiny model, a few steps."""

import copy
import json
import math
import shutil
import sys

import pandas as pd
import pytest
import torch

import lsgm
from lsgm.config import ConfigError, NCSNppConfig, TrainConfig
from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, TrainStage
from lsgm.errors import LSGMError
from lsgm.training.latents import encodings
from lsgm.training.pretrain import pretrain
from lsgm.training.train import train

BLOCKS = {"blocks": 3, "cells": 1}
VAE = {
    "arch": "res_bnswish", "channels": 4, "channel_mult": [1, 2, 2, 2], "groups_per_scale": 2, "latents_per_group": 2,
    "cells_per_cond": 1, "preprocess": BLOCKS, "postprocess": BLOCKS,
}  # fmt: skip
SHORT = {"epochs": 0.001, "batch": 16, "warmup_epochs": 0, "lr_schedule": "iteration"}
PRIOR = {"channels": 8, "scales": 1, "cells_per_scale": 1, "dropout": 0, "embedding_dim": 16, "mixing_logit_init": -1}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae(mnist_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    section = {**SHORT, "epochs": 0.01, "kl_anneal_portion": 1, "kl_max_coeff": 0.7, "spectral_reg": 0.01}
    stage = {"model": "tiny", "dataset": "mnist", "vae": VAE, "pretrain": section}
    pretrain(parse(PretrainStage, stage, "test"), mnist_store.path, folder, CPU)
    return folder


@pytest.fixture
def trained(vae, mnist_store, tmp_path):
    """Train with some settings; the model, its configuration and its history."""

    def run(prior=(), sde=(), **settings):
        stage = {
            "model": "tiny", "dataset": "mnist", "prior": {**PRIOR, **dict(prior)}, "sde": dict(sde),
            "train": {**SHORT, "ema": 0.5, **settings},
        }  # fmt: skip
        train(parse(TrainStage, stage, "test"), mnist_store.path, vae, tmp_path, CPU)
        config = json.loads((tmp_path / "config.json").read_text())
        return lsgm.load(tmp_path), config, pd.read_csv(tmp_path / "history.csv")

    return run


def test_damaged_data_and_facts_are_refused_before_a_step(vae, mnist_store, tmp_path):
    """Of both splits: the test images are looked at on the way."""
    config = json.loads((vae / "config.json").read_text())
    first = PretrainStage.model_validate(config["stages"][0])
    second = {"model": "tiny", "dataset": "mnist", "prior": PRIOR, "sde": {}, "train": SHORT}
    second = parse(TrainStage, second, "test")
    for split in ("train", "test"):
        data = shutil.copytree(mnist_store.path, tmp_path / split)
        with open(data / f"{split}_images.npy", "r+b") as file:
            file.seek(10_000)
            file.write(b"\1\2\3")
        for run in (
            lambda data=data: pretrain(first, data, tmp_path / "out", CPU),
            lambda data=data: train(second, data, vae, tmp_path / "out", CPU),
        ):
            with pytest.raises(LSGMError, match=rf"{split}_images.npy: has changed: sha256"):
                run()
    start = tmp_path / "lsgm"
    train(second, mnist_store.path, vae, start, CPU)
    config = json.loads((start / "config.json").read_text()) | {"format": 1}
    config["training"]["seconds"] = None
    del config["config_sha256"]
    (start / "config.json").write_text(json.dumps(config))
    with pytest.raises(LSGMError, match=r"lsgm/config.json: training.seconds: expected a number, found None"):
        train(second, mnist_store.path, start, tmp_path / "out", CPU)


@pytest.mark.parametrize(
    "settings",
    [
        {"sde": {"name": "geometric_vpsde", "time_eps": 0.0}, "p_weighting": "un", "algorithm": 3},
        {"sde": {"name": "sub_vpsde"}, "p_weighting": "re", "algorithm": 2, "q_uses_ema": True},
        {"p_weighting": "un", "p_sampling": "uniform", "algorithm": 2, "q_pass": "joint", "q_sampling": "uniform"},
        {"p_weighting": "rescale", "algorithm": 3, "time_samples": 2},
        {"kl_balance": True, "kl_anneal": {}, "spectral_reg_prior": 1e-3},
        {"prior": {"mixed_prediction": False}},
    ],
    ids=str,
)
def test_every_switch_trains_a_model_that_samples(trained, settings):
    model, _, history = trained(**settings)
    assert history[["loss", "nelbo", "loss_prior", "cross_entropy"]].map(math.isfinite).all(axis=None)
    assert ("alpha_mean" in history) == ("prior" not in settings)
    x = model.sample(3, tol=1e-2, time_eps=1e-2)
    assert torch.isfinite(x).all() and x.shape == (3, 1, 28, 28)


def test_variance_of_the_vesde_comes_from_the_encodings(trained, monkeypatch):
    def of_some(model, batches):
        few = copy.copy(batches)
        few.images = batches.images[:4000]
        return encodings(model, few)

    monkeypatch.setattr(sys.modules[train.__module__], "encodings", of_some)  # of all: a minute
    model, config, _ = trained(sde={"name": "vesde", "sigma2_min": 1e-2})
    sigma2_max = config["sde"]["sigma2_max"]
    # 64 latent dimensions near N(0, I): squared distances about 2 * 64, the largest of many well above
    assert 128 < sigma2_max < 2000
    assert model.prior.sde.base_variance == sigma2_max
    assert torch.isfinite(model.sample(2, tol=1e-2, time_eps=1e-2)).all()


def test_a_frozen_vae_stays_as_it_was_pretrained(trained, vae):
    model, config, history = trained(train_vae=False, p_weighting="un")
    before = lsgm.load(vae).vae.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.vae.state_dict().items())
    assert "lr_vae" not in history and "lr_prior" in history
    assert config["stages"][1]["train"]["train_vae"] is False


def test_inactive_latents_are_dropped_and_stored(trained):
    everything = {"threshold": 1e6, "batches": 2}
    model, _, _ = trained(prior={"drop_inactive": everything})
    assert (model.prior.active == 0).all() and torch.sigmoid(model.prior.mixing_logit).max() < 1e-6
    model, _, _ = trained(prior={"drop_inactive": {"threshold": 0.0, "batches": 2}})
    assert (model.prior.active == 1).all()


def test_the_vae_is_averaged_with_the_statistics_of_its_batch_norms(trained):
    """With decay 0 the average is the last step's; with 1/2 it is not, and lies near it."""
    last, now, half = (trained(ema_vae=decay)[0].state_dict() for decay in (None, 0.0, 0.5))
    for name, value in last.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0)
    for name in ("vae.stem.weight", "vae.preprocess.0.branch.norm_1.running_mean"):
        apart = (half[name] - last[name]).norm() / last[name].norm()
        assert 0 < apart < 0.2, (name, apart)
    prior = next(name for name in last if name.startswith("prior.network") and name.endswith("weight"))
    torch.testing.assert_close(half[prior], last[prior], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"p_weighting": "un"}, r"algorithm: 1 .* must then be 'll', not 'un'.* use algorithm: 3"),
        ({"q_uses_ema": True}, "use algorithm: 2 with q_pass: in_turn"),
        ({"q_uses_ema": True, "algorithm": 2, "q_pass": "joint"}, "q_pass: in_turn"),
        ({"kl_balance": True, "algorithm": 2}, "kl_balance"),
        ({"kl_balance": True}, "kl_balance: .* set kl_anneal too"),
        ({"algorithm": "other"}, "algorithm: expected 1, 2 or 3, found 'other'"),
    ],
)
def test_combinations_that_fit_no_algorithm_are_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        parse(TrainConfig, {**SHORT, **section}, "params.yaml")
    with pytest.raises(ConfigError, match="mixed_prediction"):
        parse(NCSNppConfig, {**PRIOR, "mixed_prediction": False, "drop_inactive": {}}, "params.yaml")
