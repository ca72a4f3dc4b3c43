"""`lsgm nelbo`: NELBO over the test images, in parts that several jobs share; an interrupted part resumes.

The images are taken in chunks of `batch`; part p of P has the chunks p, p + P, p + 2 P ... What is computed for a chunk
does not depend on the others, so the result is the same for any P. A part grows line by line as a state file, and
becomes the output when all its lines are there (:mod:`lsgm.evaluation.parts`).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsgm import checkpoint
from lsgm.config import EstimatorConfig, NELBOConfig
from lsgm.config.stages import NELBOStage
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError, SolverError
from lsgm.evaluation.parts import FORMAT, Job, State, locked
from lsgm.files import sha256
from lsgm.model import LSGM, importance_weighted
from lsgm.per_sample_noise import mix
from lsgm.prior import ScorePrior
from lsgm.progress import Progress, log
from lsgm.solvers.likelihood import evaluations

OTHER_DRAWS = 1  # mixed into the seed: draws for a second, independent estimate


def make_part(
    stage: NELBOStage,
    data: Path,
    model: Path,
    vae: Path,
    out: Path,
    device: torch.device,
    part: int = 0,
    parts: int = 1,
    state: Path | None = None,
) -> None:
    """Write part ``part`` of ``parts`` of the NELBOs of an LSGM and of the VAE that it began with to the file ``out``.

    They are of the same test images, each binarized once, with the same draws: those of image i depend on the seed and
    i alone. Compared are the VAE, the LSGM (once for each estimator) and the LSGM with the prior N(0, I).

    Args:
        state: file that an interrupted job resumes from, beside ``out`` if None; one of other settings, another model
            or other data is started over.

    Raises:
        LSGMError: the data are damaged or do not have so many test images, a model is not what it should be, or another
            process is computing this part.
    """
    if parts < 1:
        raise LSGMError(f"--parts: expected at least 1, found {parts}")
    if not 0 <= part < parts:
        raise LSGMError(f"--part: expected 0 to {parts - 1}, found {part}")
    if out.is_dir():
        raise LSGMError(f"--out: expected a file, found the folder {out}")
    path = state if state is not None else out.with_name(f"{out.name}.resume")
    what = "NELBO" if parts == 1 else f"NELBO, part {part} of {parts}"
    with locked(path) as file:
        images = _Images(stage, data)
        compared = _compared(stage.nelbo, model, vae, device)
        images.prepare(compared["lsgm"].model)
        header = {
            "format": FORMAT,
            "stage": stage.model_dump(),
            "model": sha256(model / "model.safetensors"),
            "vae": sha256(vae / "model.safetensors"),
            "data": images.store.hashes("test"),
            "parts": parts,
            "part": part,
            "images": images.count,
            "dimensions": compared["lsgm"].model.dimensions,
        }
        chunks = torch.arange(images.count).split(stage.nelbo.batch)
        jobs: list[Job] = [(index, key) for index in range(part, len(chunks), parts) for key in compared]
        saved, note = State(file, path, header, jobs), ""
        done, total = len(saved.done) // len(compared), len(jobs) // len(compared)
        with Progress(what, total, "img", stage.nelbo.batch, done=done) as bar:
            for job in jobs:
                if job in saved.done:
                    continue
                index, key = job
                numbers = _measure(compared[key], key, images(chunks[index]), chunks[index], stage.nelbo)
                saved.add(job, numbers)
                if key == "lsgm":
                    note = f"NFE {numbers['nfe']:.0f}"
                if key == "lsgm_with_normal_prior":  # the last of the chunk
                    bar.step(note)
        saved.finish(out)


@dataclass
class _Compared:
    """A model under one of its priors, and the estimator of log p(z0)."""

    model: LSGM
    prior: ScorePrior | None
    settings: EstimatorConfig


def _compared(config: NELBOConfig, model: Path, vae: Path, device: torch.device) -> dict[str, _Compared]:
    """What a part has NELBOs of, by the name of the prior."""
    lsgm, backbone = checkpoint.load(model, device), checkpoint.load(vae, device)
    if lsgm.prior is None or backbone.prior is not None:
        raise LSGMError(f"expected an LSGM in {model} and a VAE with the prior N(0, I) in {vae}; are they swapped?")
    settings = EstimatorConfig(**config.model_dump(include=set(EstimatorConfig.model_fields)))
    found = {"vae": _Compared(backbone, None, settings), "lsgm": _Compared(lsgm, lsgm.prior, settings)}
    for estimator in config.extra_estimators:
        other = settings.model_copy(update={"estimator": estimator, "steps": None})
        found[f"lsgm_{estimator}"] = _Compared(lsgm, lsgm.prior, other)
    # its own encoder and decoder
    return found | {"lsgm_with_normal_prior": _Compared(lsgm, None, settings)}


class _Images:
    """The test images of an evaluation, by their numbers in it."""

    def __init__(self, stage: NELBOStage, data: Path) -> None:
        self.store = ImageStore(data, stage.dataset)
        self.store.verify("test")
        self.test, self.seed = self.store.images("test"), stage.nelbo.seed
        self.count = len(self.test) if stage.nelbo.images is None else stage.nelbo.images
        if self.count > len(self.test):
            raise LSGMError(
                f"evaluate.images: expected at most the {len(self.test)} test images of {data}, found {self.count}"
            )
        # A random subset: the order of the set is not random (the first MNIST test images are the easier ones).
        self.chosen = np.sort(np.random.default_rng(self.seed).permutation(len(self.test))[: self.count])

    def prepare(self, model: LSGM) -> None:
        """Preprocess images for this model from now on."""
        self.size, self.bits, self.binarized = model.image.padded_size, model.vae_config.x_bits, None
        if model.image.binary:  # all at once: an image is the same whatever part and chunk it is in
            generator = torch.Generator().manual_seed(self.seed)
            self.binarized = preprocess(torch.from_numpy(np.array(self.test[self.chosen])), generator, self.size)

    def __call__(self, chunk: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] of these numbers [B]."""
        if self.binarized is not None:
            return self.binarized[chunk]
        chosen = torch.from_numpy(np.array(self.test[self.chosen[chunk.numpy()]]))
        return preprocess(chosen, None, self.size, False, self.bits)


def _measure(compared: _Compared, key: str, x: Tensor, numbers: Tensor, config: NELBOConfig) -> dict[str, Any]:
    """A line of the part: NELBOs of the images ``x``, which have these ``numbers`` [B]; lists of B."""
    compared.model.prior = compared.prior
    try:
        return _estimate(compared, x.to(compared.model.device), numbers, config)
    except SolverError as error:
        if config.on_failure == "error":
            raise
        log.info(f"NELBO: images {numbers[0]} to {numbers[-1]} have none ({key}): {error}")
    unknown = [math.nan] * len(numbers)
    line: dict[str, Any] = dict.fromkeys(("nelbo", "reconstruction", "kl", "iw_bound"), unknown)
    return line | {"nfe": math.nan, "seconds": 0.0}


def _estimate(compared: _Compared, x: Tensor, numbers: Tensor, config: NELBOConfig) -> dict[str, Any]:
    start = time.perf_counter()
    model, settings = compared.model, compared.settings
    streams = model.per_sample_noise(config.seed, numbers.tolist())
    terms = [model.nelbo_terms(x, streams, settings) for _ in range(config.iw_samples)]
    each = torch.stack([torch.stack([t.nelbo, t.reconstruction, t.kl]).double().cpu() for t in terms])
    nelbo, reconstruction, kl = each.mean(dim=0).tolist()
    line = {
        "nfe": sum(t.nfe for t in terms) / config.iw_samples,
        "seconds": time.perf_counter() - start,
        "nelbo": nelbo,
        "reconstruction": reconstruction,
        "kl": kl,
        "iw_bound": importance_weighted(each[:, 0]).tolist(),
    }
    checked = int((numbers < config.check_images).sum())  # the first ones
    if checked and compared.prior is not None:
        line["check"] = _check(compared, x[:checked], numbers[:checked], config, each[0, 0, :checked])
    return line


def _check(
    compared: _Compared, x: Tensor, numbers: Tensor, config: NELBOConfig, nelbo: Tensor
) -> dict[str, list[float]]:
    """The differences of ``nelbo``, the first estimates of these images, to others of the same encoder samples."""
    model, settings = compared.model, compared.settings

    def again(settings: EstimatorConfig, seed: int) -> list[float]:
        encoder, _ = model.per_sample_noise(config.seed, numbers.tolist())
        _, prior = model.per_sample_noise(seed, numbers.tolist())
        found = model.nelbo_terms(x, (encoder, prior), settings).nelbo.double().cpu()
        return (nelbo - found).tolist()

    finer = None
    if settings.estimator == "ode" and settings.solver == "rk45":
        finer = settings.model_copy(update={"tol": max(settings.tol / 10, 1e-9)})
    elif settings.estimator == "ode":
        finer = settings.model_copy(update={"steps": 2 * evaluations(settings)})
    unknown = [math.nan] * len(numbers)
    return {
        "solver": unknown if finer is None else again(finer, config.seed),
        "noise": again(settings, mix(config.seed, OTHER_DRAWS)),
    }
