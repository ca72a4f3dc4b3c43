"""Compiled networks (`compile: true`) train as eager ones do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lsgm.config.mistakes import parse
from lsgm.config.stages import PretrainStage
from lsgm.data.store import ImageStore
from lsgm.training import pretrain

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler (g++)")

VAE = {"backbone": "conv", "channels": 4, "channel_mult": [1, 2], "latents": 2}
STEPS = 2
TOLERANCE = 1e-4  # relative: a compiled kernel rounds differently, and the second step starts from changed weights


def losses(store: ImageStore, **options: Any) -> list[float]:
    """The losses of the first steps of a tiny VAE."""
    settings: dict[str, Any] = {"epochs": 1, "batch": 8, "warmup_epochs": 0, "lr": 1e-3, "spectral_reg": 1e-2}
    settings |= {"kl_anneal_portion": 1, "kl_max_coeff": 1}
    raw = {"model": "tiny", "dataset": "mnist", "vae": VAE, "pretrain": {**settings, **options}}
    engine, _ = pretrain.build(parse(PretrainStage, raw, "test"), store.path, torch.device("cpu"))
    found = []
    for step in range(STEPS):
        outcome = engine.take_step(step, engine.guard, lambda: (False, False))
        assert outcome.good
        found.append(outcome.terms["loss"].item())
    return found


def test_compiled_networks_have_the_same_losses(
    mnist_store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = losses(mnist_store, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > counted
    torch.testing.assert_close(compiled, losses(mnist_store), rtol=TOLERANCE, atol=0)
