"""A score network of your own: a residual MLP that sees all latents at once.

    python examples/my_score_network.py --data data/mnist --out my_score_network

In params.yaml it is `prior: {network: residual_mlp, width: 256, depth: 3, ...}`, once its package is installed
(`pip install --no-deps ./examples`; the entry points in examples/pyproject.toml are all that it takes).
"""

from __future__ import annotations

import math
from typing import Literal

import minimal_lsgm
import torch
from torch import Tensor, nn

from lsgm.config import PriorConfig
from lsgm.config.bounds import Channels, Layers


class ResidualMLP(nn.Module):
    """Predicts the noise in diffused latents: (z_t [B, C, H, W], t [B] or [1]) -> [B, C, H, W]."""

    def __init__(self, *, width: int, depth: int, latent_shape: tuple[int, int, int], image_size: int) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        self.frequencies = [math.pi * 2**k for k in range(4)]
        self.conv_in = nn.Linear(size, width)
        self.time = nn.Linear(2 * len(self.frequencies), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.conv_out = nn.Linear(width, size)
        nn.init.zeros_(self.conv_out.weight)  # at the start the prior is N(0, I), as with our own network

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * t.new_tensor(self.frequencies)
        h = self.conv_in(z_t.flatten(1)) + self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.conv_out(h).view_as(z_t)


class ResidualMLPConfig(PriorConfig):
    """Its keys in params.yaml, beside those of the mixed score."""

    implementation = "my_score_network:ResidualMLP"

    network: Literal["residual_mlp"] = "residual_mlp"
    width: Channels = 256
    depth: Layers = 3


if __name__ == "__main__":
    minimal_lsgm.main(prior=ResidualMLPConfig(mixing_logit_init=-2.5))
