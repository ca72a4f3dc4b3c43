"""Binary pixels that a noisy channel flips."""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm.config import ImageConfig, LikelihoodEntry
from lsgm.likelihoods import Likelihood

FLIPPED = 0.01


class NoisyBernoulli(Likelihood):
    """A Bernoulli variable per pixel, flipped with probability 0.01."""

    parameters_per_pixel = 1

    def __init__(self, *, image: ImageConfig, x_bits: int) -> None:
        self.size = image.size

    def _probability(self, parameters: Tensor) -> Tensor:
        border = (parameters.shape[-1] - self.size) // 2
        inner = slice(border, border + self.size)
        return FLIPPED + (1 - 2 * FLIPPED) * torch.sigmoid(parameters.float()[..., inner, inner])

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        p, border = self._probability(parameters), (x.shape[-1] - self.size) // 2
        x = x[..., border : border + self.size, border : border + self.size]
        return (x * p.log() + (1 - x) * (1 - p).log()).sum(dim=(1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        return self._probability(parameters)


NOISY_BERNOULLI = LikelihoodEntry("lsgm_example_parts.likelihood:NoisyBernoulli", binary=True, channels=(1,))
