"""Solvers with a fixed number of steps in a CUDA graph: the same samples as without, for the weights of the moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lsgm.config import ConvVAEConfig, ImageConfig, NCSNppConfig, SampleConfig, SDEConfig
from lsgm.model import LSGM
from lsgm.registry import load
from lsgm.solvers import cuda_graph, sampling

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

FIXED: list[dict[str, Any]] = [
    *({"form": form, "order": order} for form in ("velocity", "noise", "data", "drift") for order in (1, 2, 3)),
    {"form": "data", "corrector": True},
    {"form": "data", "tau": 0.5},
    {"solver": "edm", "steps": 9},
    *({"solver": solver, "steps": 8} for solver in ("euler", "heun", "rk4")),
]


@pytest.fixture
def model() -> LSGM:
    torch.manual_seed(0)
    return LSGM(
        ImageConfig(channels=1, size=28, padded_size=32, binary=True),
        ConvVAEConfig(backbone="conv", channels=8, channel_mult=[1, 2], latents=4),
        NCSNppConfig(channels=32, scales=2, cells_per_scale=2, mixing_logit_init=-2.0),
        SDEConfig(),
    ).to("cuda").eval()  # fmt: skip


def draw(model: LSGM, count: int, settings: dict[str, Any]) -> Tensor:
    config = SampleConfig(count=count, time_eps=0.01, **settings).resolved()
    generator = torch.Generator().manual_seed(count)

    def normal() -> Tensor:
        return torch.randn(count, *model.latent_shape, generator=generator).to("cuda")

    assert model.prior is not None
    found: Tensor = load(config.implementation)(model.prior, normal(), normal, config).y
    return found


@pytest.mark.parametrize("settings", FIXED, ids=str)
def test_the_same_latents_as_without_a_graph(
    model: LSGM, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [draw(model, count, settings) for count in (3, 8, 3)]
    assert torch.equal(found[0], found[2])
    monkeypatch.setattr(sampling, "recorded", lambda prior, z, t: prior)
    for count, latents in zip((3, 8), found, strict=False):
        torch.testing.assert_close(latents, draw(model, count, settings), rtol=1e-4, atol=1e-4)


def test_new_weights_are_seen(model: LSGM, monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(model, 4, {})
    with torch.no_grad():
        for parameter in model.prior.parameters():  # in place, as an optimizer changes them
            parameter.mul_(1.1)
    second = draw(model, 4, {})
    model.to("cpu").to("cuda")  # the weights are other tensors now
    third = draw(model, 4, {})
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, third, rtol=1e-4, atol=1e-4)


def test_few_recordings_are_kept(model: LSGM) -> None:
    for count in range(1, cuda_graph.KEPT + 4):
        draw(model, count, {})
    assert len(cuda_graph._recordings[model.prior]) == cuda_graph.KEPT
