"""NELBO over a set of images."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lsgm.model import LSGM, importance_weighted
from lsgm.progress import Progress


@dataclass
class SetNELBO:
    """The NELBO of each image of a set, nats; nelbo = reconstruction + kl. All [N], on the host, float64."""

    nelbo: Tensor  # mean over the encoder samples
    reconstruction: Tensor
    kl: Tensor
    iw_bound: Tensor | None  # the importance-weighted bound of all of an image's samples, if there are several
    iw_samples: int
    nats_per_bit_per_dimension: float  # ln 2 times the dimensions of an image
    nfe: float  # evaluations of the score network per batch and encoder sample
    seconds: float

    def summary(self) -> dict[str, float]:
        """Means over the images in nats and, `bpd`, bits per dimension; standard errors of the bounds' means."""
        found = {
            "nelbo": self.nelbo.mean().item(),
            "stderr": standard_error(self.nelbo),
            "bpd": self.nelbo.mean().item() / self.nats_per_bit_per_dimension,
            "reconstruction": self.reconstruction.mean().item(),
            "kl": self.kl.mean().item(),
            "nfe": self.nfe,
            "seconds": self.seconds,
        }
        if self.iw_bound is not None:
            found |= {
                "iw_samples": self.iw_samples,
                "iw_bound": self.iw_bound.mean().item(),
                "iw_stderr": standard_error(self.iw_bound),
                "iw_bpd": self.iw_bound.mean().item() / self.nats_per_bit_per_dimension,
            }
        return found


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values [N]."""
    return (values.std() / len(values) ** 0.5).item()


def set_nelbo(
    what: str, model: LSGM, x: Tensor, *, batch: int, seed: int, iw_samples: int = 1, **settings: Any
) -> SetNELBO:
    """NELBO of images ``x`` [N, C, H, W] in [0, 1]; ``settings`` are those of :meth:`LSGM.nelbo_terms`.

    The draws of image i depend on (``seed``, i) alone: models with latents of one shape see the same ones, so that
    their NELBOs can be compared image by image.
    """
    start = time.perf_counter()
    parts, bounds, nfe = [], [], 0
    chunks = torch.arange(len(x)).split(batch)
    with Progress(what, len(chunks), "img", batch) as bar:
        for chunk in chunks:
            streams = model.streams(seed, chunk.tolist())
            images = x[chunk].to(model.device)
            terms = [model.nelbo_terms(images, streams, **settings) for _ in range(iw_samples)]
            each = torch.stack([torch.stack([t.nelbo, t.reconstruction, t.kl]).double().cpu() for t in terms])
            parts.append(each.mean(dim=0))
            bounds.append(importance_weighted(each[:, 0]))
            nfe += sum(t.nfe for t in terms)
            bar.step(f"NFE {terms[0].nfe}")
    nelbo, reconstruction, kl = torch.cat(parts, dim=1)
    return SetNELBO(
        nelbo,
        reconstruction,
        kl,
        torch.cat(bounds) if iw_samples > 1 else None,
        iw_samples,
        math.log(2) * model.dimensions,
        nfe / (len(chunks) * iw_samples),
        time.perf_counter() - start,
    )
