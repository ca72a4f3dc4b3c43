"""Likelihoods p(x | z): what the decoder's output means (LSGM, appendix G; NVAE, section 4).

All compute in float32 or wider, whatever the precision around them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from lsgm.config import ImageConfig
from lsgm.gaussian import log_prob_of_error
from lsgm.networks.layers import wide

COMPONENTS = 10
MIN_LOG_SCALE = -7.0


class Likelihood(ABC):
    """A distribution over images in [0, 1], given the decoder's parameters.

    It is made with keyword arguments: ``image``, the images' format, and ``x_bits``, bits per value.
    """

    parameters_per_pixel: int

    @abstractmethod
    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """log p(x | parameters) in nats per image, [B], for images [B, C, H, W] in [0, 1]."""

    @abstractmethod
    def mean(self, parameters: Tensor) -> Tensor:
        """The mean image in [0, 1], [B, C, h, w]; what the model shows as its sample."""


def logistic_bin(x: Tensor, mean: Tensor, log_scale: Tensor, bits: int) -> Tensor:
    """log of the logistic distribution's mass in the bin of ``x``, an image of 2^bits values in [-1, 1].

    The first and the last bin reach to infinity. Where a bin's mass is below 1e-5, its density at the center times its
    width. All arguments broadcast (PixelCNN++, arXiv 1701.05517, section 2.1).
    """
    half_width = 1 / (2**bits - 1)
    inverse_scale = torch.exp(-log_scale)
    centered = x - mean
    above, below = inverse_scale * (centered + half_width), inverse_scale * (centered - half_width)
    mass = torch.sigmoid(above) - torch.sigmoid(below)
    middle = inverse_scale * centered
    log_density = middle - log_scale - 2 * F.softplus(middle) + math.log(2 * half_width)
    inner = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-10)), log_density)
    return torch.where(x < -0.999, F.logsigmoid(above), torch.where(x > 0.999, F.logsigmoid(-below), inner))


class Bernoulli(Likelihood):
    """One Bernoulli variable per pixel, over the central pixels only (the border is padding)."""

    parameters_per_pixel = 1

    def __init__(self, *, image: ImageConfig, x_bits: int = 8) -> None:
        self.size = image.size

    def _crop(self, image: Tensor) -> Tensor:
        border = (image.shape[-1] - self.size) // 2
        return image[..., border : border + self.size, border : border + self.size]

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits, target = wide(self._crop(parameters)), self._crop(x)
            return -F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=(1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        return torch.sigmoid(wide(self._crop(parameters)))


class DiscretizedLogistic(Likelihood):
    """One discretized logistic per value; ``channels`` means, then as many log scales."""

    def __init__(self, *, image: ImageConfig, x_bits: int) -> None:
        self.bits = x_bits
        self.parameters_per_pixel = 2 * image.channels

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            mean, log_scale = wide(parameters).chunk(2, dim=1)
            log_scale = log_scale.clamp(min=MIN_LOG_SCALE)
            return logistic_bin(2 * x - 1, mean, log_scale, self.bits).sum(dim=(1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        return (wide(parameters).chunk(2, dim=1)[0].clamp(-1, 1) + 1) / 2


class LogisticMixture(Likelihood):
    """Mixture of ten discretized logistics per pixel, its colors autoregressive (PixelCNN++, arXiv 1701.05517).

    Parameters, 100 channels: 10 mixture logits; then for each of three colors 10 means, 10 log scales and 10
    coefficients. The mean of green adds c_0 red, that of blue c_1 red + c_2 green, c_k = tanh of the coefficients that
    stand with the k-th color. For gray images: 30 channels, no coefficients.
    """

    def __init__(self, *, image: ImageConfig, x_bits: int) -> None:
        self.channels, self.bits = image.channels, x_bits
        self.parameters_per_pixel = COMPONENTS * (10 if self.channels == 3 else 3)

    def _split(self, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits [B, 10, H, W]; means, log scales and coefficients [B, C, 10, H, W]."""
        parameters = wide(parameters)
        logits, rest = parameters[:, :COMPONENTS], parameters[:, COMPONENTS:]
        mean, log_scale, *coefficients = rest.unflatten(1, (self.channels, -1)).split(COMPONENTS, dim=2)
        coefficient = torch.tanh(coefficients[0]) if coefficients else torch.zeros_like(mean)
        return logits, mean, log_scale.clamp(min=MIN_LOG_SCALE), coefficient

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits, mean, log_scale, c = self._split(parameters)
            colors = (2 * x - 1)[:, :, None]  # [B, C, 1, H, W]
            if self.channels == 3:
                red, green = colors[:, 0], colors[:, 1]
                shift = [torch.zeros_like(mean[:, 0]), c[:, 0] * red, c[:, 1] * red + c[:, 2] * green]
                mean = mean + torch.stack(shift, dim=1)
            log_p = logistic_bin(colors, mean, log_scale, self.bits).sum(dim=1)  # [B, 10, H, W]
            return torch.logsumexp(log_p + F.log_softmax(logits, dim=1), dim=1).sum(dim=(1, 2))

    def mean(self, parameters: Tensor) -> Tensor:
        logits, mean, _, c = self._split(parameters)
        share = F.softmax(logits, dim=1)[:, None]
        mean, c = (share * mean).sum(dim=2), (share * c).sum(dim=2)  # [B, C, H, W]
        if self.channels == 1:
            return (mean.clamp(-1, 1) + 1) / 2
        red = mean[:, 0].clamp(-1, 1)
        green = (mean[:, 1] + c[:, 0] * red).clamp(-1, 1)
        blue = (mean[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
        return (torch.stack([red, green, blue], dim=1) + 1) / 2


class Normal(Likelihood):
    """One normal density per value of the image in [-1, 1]; ``channels`` means, then as many log sigmas (a density, not
    a probability: its nats do not compare with the others')."""

    def __init__(self, *, image: ImageConfig, x_bits: int = 8) -> None:
        self.parameters_per_pixel = 2 * image.channels

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            mean, log_sigma = wide(parameters).chunk(2, dim=1)
            log_sigma = log_sigma.clamp(min=MIN_LOG_SCALE)
            error = (2 * x - 1 - mean) * torch.exp(-log_sigma)
            return log_prob_of_error(error, log_sigma).sum(dim=(1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        return (wide(parameters).chunk(2, dim=1)[0].clamp(-1, 1) + 1) / 2
