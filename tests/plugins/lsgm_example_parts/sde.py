"""A variance-preserving SDE whose m_t is a cosine."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lsgm.config import DiffusionConfig
from lsgm.config.bounds import BelowOne
from lsgm.sde import SDE


class CosineConfig(DiffusionConfig):
    """Its keys under `sde`."""

    implementation = "lsgm_example_parts.sde:Cosine"
    variance_preserving = True

    name: Literal["cosine"] = "cosine"
    end: BelowOne = 0.95


class Cosine(SDE):
    """m_t = cos(w t), sigma_t = sin(w t) with w = end pi / 2."""

    variance_preserving = True

    def __init__(self, *, end: float) -> None:
        self.w = end * math.pi / 2

    def drift(self, t: Tensor) -> Tensor:
        return -self.w * torch.tan(self.w * t)  # d log m_t / dt

    def diffusion_squared(self, t: Tensor) -> Tensor:
        return 2 * self.w * torch.tan(self.w * t)

    def mean_coefficient(self, t: Tensor) -> Tensor:
        return torch.cos(self.w * t)

    def variance(self, t: Tensor) -> Tensor:
        return torch.sin(self.w * t).square()

    def alpha_bar(self, t: Tensor) -> Tensor:
        return torch.cos(self.w * t).square()

    def time_at_variance(self, variance: Tensor) -> Tensor:
        return torch.asin(variance.sqrt()) / self.w
