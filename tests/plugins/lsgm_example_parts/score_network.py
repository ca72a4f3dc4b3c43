"""A score network of two linear layers."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from lsgm.config import PriorConfig
from lsgm.config.bounds import Channels


class MLPConfig(PriorConfig):
    """Its keys under `prior`, beside those of the mixed score."""

    implementation = "lsgm_example_parts.score_network:MLP"

    network: Literal["mlp"] = "mlp"
    hidden: Channels = 32


class MLP(nn.Module):
    """(z_t [B, C, H, W], t [B] or [1]) -> predicted noise [B, C, H, W]."""

    def __init__(self, *, hidden: int, latent_shape: tuple[int, int, int], image_size: int) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        self.layers = nn.Sequential(nn.Linear(size + 2, hidden), nn.SiLU(), nn.Linear(hidden, size))

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        t = t.expand(len(z_t))[:, None]
        features = [z_t.flatten(1), torch.sin(math.pi * t), torch.cos(math.pi * t)]
        return self.layers(torch.cat(features, dim=1)).view_as(z_t)
