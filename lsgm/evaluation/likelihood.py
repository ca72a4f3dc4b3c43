"""NELBO over a set of images."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from lsgm.model import LSGM
from lsgm.progress import Progress


@dataclass
class SetNELBO:
    """The NELBO of each image of a set, nats; nelbo = reconstruction + kl. All [N], on the host, float64."""

    nelbo: Tensor
    reconstruction: Tensor
    kl: Tensor
    nfe: float  # evaluations of the score network per batch, mean over batches
    seconds: float

    def summary(self) -> dict[str, float]:
        """Means over the images, and the standard error of the NELBO's."""
        return {
            "nelbo": self.nelbo.mean().item(),
            "stderr": standard_error(self.nelbo),
            "reconstruction": self.reconstruction.mean().item(),
            "kl": self.kl.mean().item(),
            "nfe": self.nfe,
            "seconds": self.seconds,
        }


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values [N]."""
    return (values.std() / len(values) ** 0.5).item()


def set_nelbo(what: str, model: LSGM, x: Tensor, *, batch: int, seed: int, tol: float, time_eps: float) -> SetNELBO:
    """NELBO of images ``x`` [N, C, H, W] in [0, 1], one posterior sample and one Hutchinson probe per image.

    The draws depend on ``seed`` and ``batch`` alone: models with latents of one shape see the same ones, so that
    their NELBOs can be compared image by image.
    """
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    parts, nfe = [], 0
    chunks = x.split(batch)
    with Progress(what, len(chunks), "img", batch) as bar:
        for chunk in chunks:
            terms = model.nelbo_terms(chunk.to(model.device), generator=generator, tol=tol, time_eps=time_eps)
            parts.append(torch.stack([terms.nelbo, terms.reconstruction, terms.kl]).double().cpu())
            nfe += terms.nfe
            bar.step(f"NFE {terms.nfe}")
    nelbo, reconstruction, kl = torch.cat(parts, dim=1)
    return SetNELBO(nelbo, reconstruction, kl, nfe / len(chunks), time.perf_counter() - start)
