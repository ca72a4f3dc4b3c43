"""Registry entries of likelihoods: the images they are for and where they are implemented. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lsgm.config.data import ImageConfig


@dataclass(frozen=True)
class LikelihoodEntry:
    """An entry of the registry of likelihoods.

    Attributes:
        implementation: "module:name" of a :class:`lsgm.likelihoods.Likelihood`, called with ``image`` (the ImageConfig)
            and ``x_bits``.
        binary: True for binary images, False for images with 2^x_bits values per pixel.
        channels: the numbers of channels that it accepts; empty: any.
    """

    implementation: Any
    binary: bool = False
    channels: tuple[int, ...] = ()

    def misfit(self, name: str, image: ImageConfig) -> str | None:
        """Why the likelihood ``name`` does not fit these images; None if it does."""
        if self.binary != image.binary:
            kind, others = ("binary", "bernoulli") if image.binary else ("not binary", "dml, dl or normal")
            return f"vae.likelihood: {name!r} does not fit: the images are {kind}; use {others}"
        if self.channels and image.channels not in self.channels:
            channels = " or ".join(map(str, self.channels))
            return f"vae.likelihood: {name!r} is for images of {channels} channels, not {image.channels}"
        return None


BERNOULLI = LikelihoodEntry("lsgm.likelihoods:Bernoulli", binary=True, channels=(1,))
LOGISTIC_MIXTURE = LikelihoodEntry("lsgm.likelihoods:LogisticMixture", channels=(1, 3))
DISCRETIZED_LOGISTIC = LikelihoodEntry("lsgm.likelihoods:DiscretizedLogistic")
NORMAL = LikelihoodEntry("lsgm.likelihoods:Normal")
