"""Which images, VAEs and score networks fit together, said without building them, and without torch."""

from __future__ import annotations

from lsgm.config import BackboneConfig, ImageConfig, PriorConfig
from lsgm.registry import LIKELIHOODS


def misfits(image: ImageConfig, vae: BackboneConfig, prior: PriorConfig | None = None) -> list[str]:
    """Why no model can be built of these sections, one line for each reason, which begins with its key in a model."""
    likelihood = LIKELIHOODS.entry(vae.likelihood).misfit(vae.likelihood, image)
    found = [likelihood] if likelihood is not None else []
    of_vae = list(vae.misfits(image))
    found += of_vae
    if prior is not None and not of_vae:
        found += prior.misfits(vae.latent_shapes(image)[0], image)
    return found
