"""The precisions that a training can have, on the CPU: the same curve, weights and states in float32."""

import pytest
import torch

from lsgm import checkpoint
from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage, TrainStage
from lsgm.training import pretrain, train

CPU = torch.device("cpu")
BLOCKS = {"blocks": 3, "cells": 1}
VAE = {
    "arch": "res_mbconv", "channels": 8, "channel_mult": [1, 1, 2, 2], "groups_per_scale": 2, "latents_per_group": 2,
    "cells_per_cond": 1, "preprocess": BLOCKS, "postprocess": BLOCKS,
}  # fmt: skip
SHORT = {"epochs": 0.02, "batch": 16, "warmup_epochs": 0}
STEPS = 5


def engines(mnist_store, folder, **options):
    """Both stages' engines; the second starts from an untrained VAE."""
    head = {"model": "m", "dataset": "mnist"}
    first = {**SHORT, "kl_anneal_portion": 1, "kl_max_coeff": 1, "spectral_reg": 1e-2, "lr": 1e-3, **options}
    stage = parse(PretrainStage, {**head, "vae": VAE, "pretrain": first}, "test")
    engine, model = pretrain.build(stage, mnist_store.path, CPU)
    checkpoint.save(model, folder, stages=[stage], summary={})
    prior = {"channels": 16, "scales": 2, "cells_per_scale": 1, "embedding_dim": 16, "mixing_logit_init": -1}
    second = {**SHORT, "algorithm": 3, "spectral_reg_prior": 1e-3, **options}
    sections = {"prior": {**prior, "attention_resolution": 2}, "sde": {}, "train": second}
    return {
        "VAE": engine,
        "LSGM": train.build(parse(TrainStage, {**head, **sections}, "test"), mnist_store.path, folder, CPU)[0],
    }


def weights(engine):
    return [p for item in engine.task.optimized for group in item.optimizer.param_groups for p in group["params"]]


def curves(engines):
    for engine in engines.values():
        for _ in range(STEPS):
            engine.one_step()
    return {
        name: torch.tensor([[row[k] for k in ("nelbo", "reconstruction", "spectral")] for row in engine.history.rows])
        for name, engine in engines.items()
    }


@pytest.fixture(scope="module")
def float32(mnist_store, tmp_path_factory):
    return curves(engines(mnist_store, tmp_path_factory.mktemp("fp32")))


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp16", 0.005), ("tf32", 0)])
def test_half_precision_follows_the_curve_of_float32(float32, mnist_store, tmp_path, precision, tolerance):
    made = engines(mnist_store, tmp_path, precision=precision)
    found = curves(made)
    for name, engine in made.items():
        assert engine.guard.skipped == 0 and engine.step == STEPS
        torch.testing.assert_close(found[name], float32[name], rtol=tolerance, atol=0)
        if tolerance:
            assert not torch.equal(found[name], float32[name])  # it really is another precision
        assert {p.dtype for p in weights(engine)} == {torch.float32}


def test_clipped_gradients_have_the_norm_asked_for(mnist_store, tmp_path):
    """And the history that before."""
    for engine in engines(mnist_store, tmp_path, grad_clip=0.1).values():
        engine.one_step()
        gradients = [p.grad for item in engine.task.optimized for g in item.optimizer.param_groups for p in g["params"]]
        assert torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item() == pytest.approx(
            0.1, rel=1e-3
        )
        assert engine.guard.norms[0] > 1
