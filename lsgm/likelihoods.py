"""Likelihoods p(x | z): what the decoder's output means (LSGM, appendix G; NVAE, section 4)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor


class Likelihood(ABC):
    """A distribution over images in [0, 1], given the decoder's parameters."""

    parameters_per_pixel: int

    @abstractmethod
    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """log p(x | parameters) in nats per image, [B], for images [B, C, H, W] in [0, 1]."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """The mean image in [0, 1], [B, C, h, w]; what the model shows as its sample."""


class Bernoulli(Likelihood):
    """One Bernoulli variable per pixel, over the central ``size`` x ``size`` pixels only (the rest is padding)."""

    parameters_per_pixel = 1

    def __init__(self, size: int) -> None:
        self.size = size

    def _crop(self, image: Tensor) -> Tensor:
        border = (image.shape[-1] - self.size) // 2
        return image[..., border : border + self.size, border : border + self.size]

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits, target = self._crop(parameters), self._crop(x)
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            return -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=(1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        return torch.sigmoid(self._crop(parameters))
