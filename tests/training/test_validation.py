"""A look at a model leaves it as it was, and the training after it too."""

import torch

from lsgm import checkpoint
from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, TrainStage
from lsgm.training import pretrain, train
from lsgm.training.validation import Validation

BLOCKS = {"blocks": 3, "cells": 1}
VAE = {
    "arch": "res_mbconv", "channels": 4, "channel_mult": [1, 1, 2, 2], "groups_per_scale": 1, "latents_per_group": 2,
    "cells_per_cond": 1, "preprocess": BLOCKS, "postprocess": BLOCKS,
}  # fmt: skip


def engine(mnist_store, folder, eval_every_epochs):
    """One whose VAE sees the averaged prior, with dropout."""
    head, short = {"model": "m", "dataset": "mnist"}, {"epochs": 0.003, "batch": 16, "warmup_epochs": 0}
    first = {"vae": VAE, "pretrain": {**short, "kl_anneal_portion": 1, "kl_max_coeff": 1, "spectral_reg": 0}}
    stage = parse(PretrainStage, {**head, **first}, "test")
    checkpoint.save(pretrain.build(stage, mnist_store.path, torch.device("cpu"))[1], folder, stages=[stage], summary={})
    prior = {"channels": 8, "scales": 1, "cells_per_scale": 1, "embedding_dim": 16, "mixing_logit_init": -1}
    training = {**short, "algorithm": 2, "q_uses_ema": True, "eval_every_epochs": eval_every_epochs, "eval_images": 4}
    stage = parse(TrainStage, {**head, "prior": {**prior, "dropout": 0.5}, "sde": {}, "train": training}, "test")
    return train.build(stage, mnist_store.path, folder, torch.device("cpu"))


def test_looks_change_no_bit_of_the_training(mnist_store, tmp_path):
    found = {}
    for eval_every_epochs in (0, 0.0005):
        trained, model, averages = engine(mnist_store, tmp_path, eval_every_epochs)
        trained.fit()
        assert all(module.training for module in (*model.modules(), *averages.prior.module.modules()))
        found[eval_every_epochs] = (
            [*model.state_dict().values(), *averages.prior.module.state_dict().values()],
            trained.history.rows,
        )
    looks = [row.pop("test_nelbo", None) for row in found[0.0005][1]]
    assert sum(look is not None for look in looks) >= 5
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[0.0005][0], strict=True))
    assert [row["loss"] for row in found[0][1]] == [row["loss"] for row in found[0.0005][1]]


def test_a_model_that_falls_apart_is_not_looked_at(mnist_store, tmp_path):
    _, model, averages = engine(mnist_store, tmp_path, 0)
    for p in averages.prior.module.parameters():
        p.fill_(torch.nan)
    assert Validation(model, mnist_store, 2, averages.prior.module)() == ({}, {})
    assert model.prior is not averages.prior.module and model.training
