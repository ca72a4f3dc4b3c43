"""What an encoder says, and what a model asks of its VAE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lsgm.gaussian import kl_to_standard


@dataclass
class Posterior:
    """What the encoder says of a batch: one sample of q(z0 | x) and its log density.

    ``z`` are the latents that the score prior covers: those of the top (smallest) scale, all its groups concatenated on
    the channels. Further scales have N(0, I), group by group.
    """

    z: Tensor  # [B, C, H, W]
    log_q: Tensor  # [B, C, H, W], nats per element
    groups: tuple[int, ...]  # channels of each group of the top scale, first drawn first; they sum to C
    lower_scales: tuple[Tensor, ...] = ()  # latents of each group of the lower scales, [B, C_g, H_g, W_g]
    lower_scales_log_q: tuple[Tensor, ...] = ()
    # Of N(mean, std^2), from which the last group of the top scale was drawn given those before it, [B, C_g, H, W];
    # None: it is not a Gaussian (or the backbone does not say).
    mean: Tensor | None = None
    std: Tensor | None = None

    def kl_per_channel(self) -> Tensor:
        """log q - log N(0, I) of each of the prior's channels at the sample, [C], mean over the batch."""
        return kl_to_standard(self.log_q, self.z).sum(dim=(2, 3)).mean(dim=0)

    def lower_scales_kl(self) -> Tensor:
        """log q - log N(0, I) of each group of the lower scales at the sample, [B, number of groups]."""
        pairs = zip(self.lower_scales, self.lower_scales_log_q, strict=True)
        kl = [kl_to_standard(log_q, z).sum(dim=(1, 2, 3)) for z, log_q in pairs]
        return torch.stack(kl, dim=1) if kl else self.z.new_zeros(len(self.z), 0)


class Backbone(Protocol):
    """A VAE as :class:`lsgm.model.LSGM` uses it: an `nn.Module` that also has this."""

    latent_shape: tuple[int, int, int]  # (C, H, W) of the latents that the score prior covers
    latent_groups: tuple[int, ...]  # their groups; they sum to C. One group: (C,)
    lower_scale_shapes: tuple[
        tuple[int, int, int], ...
    ]  # of groups of lower scales, whose prior stays N(0, I); none: ()

    def encode(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> tuple[Posterior, Tensor]:
        """Draw z0 ~ q(z0 | x) for images [B, C, H, W] in [-1, 1]; also the parameters that z0 decodes to.

        ``noise`` replaces the normal draws: one tensor [B, *latent_shape], then one for each of ``lower_scale_shapes``.
        """

    def decode(self, z: Tensor, lower_scales: Sequence[Tensor] = ()) -> Tensor:
        """The likelihood's parameters [B, parameters per pixel, H, W]."""
