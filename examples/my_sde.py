"""An SDE of your own: the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, section 3.2), in continuous time.

    python examples/my_sde.py --data data/mnist --out my_sde

In params.yaml it is `sde: {name: cosine, end: 0.95}`, once its package is installed (`pip install
--no-deps ./examples`). The library needs six functions of t; importance sampling of t and the ODE follow from them.
"""

from __future__ import annotations

import math
from typing import Literal

import minimal_lsgm
import torch
from torch import Tensor

from lsgm.config import DiffusionConfig
from lsgm.config.bounds import BelowOne
from lsgm.sde import SDE


class CosineSDE(SDE):
    """q(z_t | z0) = N(m_t z0, sigma_t^2 I) with m_t = cos(w t), sigma_t = sin(w t), w = end pi / 2.

    It preserves variance, so f = d log m_t / dt = -w tan(w t) and g^2 = -2 f.
    """

    variance_preserving = True

    def __init__(self, *, end: float) -> None:
        self.w = end * math.pi / 2

    def drift(self, t: Tensor) -> Tensor:
        return -self.w * torch.tan(self.w * t)

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


class CosineConfig(DiffusionConfig):
    """Its keys in params.yaml. It must end before 1, where nothing of z0 is left and the drift is infinite."""

    implementation = "my_sde:CosineSDE"
    variance_preserving = True

    name: Literal["cosine"] = "cosine"
    end: BelowOne = 0.95


if __name__ == "__main__":
    minimal_lsgm.main(sde=CosineConfig())
