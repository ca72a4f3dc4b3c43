"""NELBO over the test images: in parts that several jobs share, each of which goes on where it was stopped.

The images are taken in chunks of `batch`; part p of P has the chunks p, p + P, p + 2 P ... What is computed for a chunk
does not depend on the others, so the result is the same for any P. A part grows line by line as a state file, and
becomes the output when all its lines are there (:mod:`lsgm.evaluation.parts`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsgm import checkpoint
from lsgm.config.stages import NELBOStage
from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError, SolverError
from lsgm.evaluation.parts import FORMAT, Job, Line, State, locked, read_part
from lsgm.files import sha256
from lsgm.model import LSGM, importance_weighted
from lsgm.progress import Progress, log


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
        bit = self.nats_per_bit_per_dimension
        found = {
            "nelbo": self.nelbo.mean().item(),
            "stderr": standard_error(self.nelbo),
            "bpd": self.nelbo.mean().item() / bit,
            "bpd_stderr": standard_error(self.nelbo) / bit,
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
                "iw_bpd": self.iw_bound.mean().item() / bit,
                "iw_bpd_stderr": standard_error(self.iw_bound) / bit,
            }
        return found


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values [N]; NaN of a single one."""
    if len(values) < 2:
        return math.nan
    return (values.std() / len(values) ** 0.5).item()


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
        state: what an interrupted job goes on from, beside ``out`` if None; one of other settings, another model or
            other data is begun anew.

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
        work = _plan(stage, data, model, vae, device, part, parts)
        saved, note = State(file, path, work.header, work.jobs), ""
        priors = len({prior for _, prior in work.jobs}) or 1
        done, total = len(saved.done) // priors, len(work.jobs) // priors
        with Progress(what, total, "img", stage.nelbo.batch, done=done) as bar:
            for job in work.jobs:
                if job in saved.done:
                    continue
                numbers = work.measure(*job)
                saved.add(job, numbers)
                if job[1] == "lsgm":
                    note = f"NFE {numbers['nfe']:.0f}"
                if job[1] == "lsgm_with_normal_prior":  # the last of the chunk
                    bar.step(note)
        saved.finish(out)


@dataclass
class _Plan:
    """A part of the work: chunk by chunk and prior by prior, and how the numbers of one of these jobs are computed."""

    header: dict[str, Any]
    jobs: list[Job]
    measure: Callable[[int, str], dict[str, Any]]


def _plan(stage: NELBOStage, data: Path, model: Path, vae: Path, device: torch.device, part: int, parts: int) -> _Plan:
    config = stage.nelbo
    store = ImageStore(data, stage.dataset)
    store.verify("test")
    test = store.images("test")
    count = len(test) if config.images is None else config.images
    if count > len(test):
        raise LSGMError(f"evaluate.images: expected at most the {len(test)} test images of {data}, found {count}")
    lsgm, backbone = checkpoint.load(model, device), checkpoint.load(vae, device)
    if lsgm.prior is None or backbone.prior is not None:
        raise LSGMError(f"expected an LSGM in {model} and a VAE with the prior N(0, I) in {vae}; are they swapped?")
    image, bits = lsgm.image, lsgm.vae_config.x_bits
    header = {
        "format": FORMAT,
        "stage": stage.model_dump(),
        "model": sha256(model / "model.safetensors"),
        "vae": sha256(vae / "model.safetensors"),
        "data": store.hashes("test"),
        "parts": parts,
        "part": part,
        "images": count,
        "dimensions": lsgm.dimensions,
    }

    # A random subset: the order of the set is not random (the first MNIST test images are the easier ones).
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(test))[:count])
    generator = torch.Generator().manual_seed(config.seed)
    binarized = None
    if image.binary:  # all at once: an image is the same whatever part and chunk it is in
        binarized = preprocess(torch.from_numpy(np.array(test[chosen])), generator, image.padded_size)

    def seen(chunk: Tensor) -> Tensor:
        if binarized is not None:
            return binarized[chunk]
        return preprocess(torch.from_numpy(np.array(test[chosen[chunk.numpy()]])), None, image.padded_size, False, bits)

    compared = {"vae": (backbone, None, config.estimator), "lsgm": (lsgm, lsgm.prior, config.estimator)}
    compared |= {f"lsgm_{estimator}": (lsgm, lsgm.prior, estimator) for estimator in config.extra_estimators}
    compared["lsgm_with_normal_prior"] = (lsgm, None, config.estimator)  # its own encoder and decoder
    settings = config.model_dump(include={"tol", "time_eps", "probe", "probes", "steps"})
    chunks = torch.arange(count).split(config.batch)
    jobs = [(index, key) for index in range(part, len(chunks), parts) for key in compared]

    def measure(index: int, key: str) -> dict[str, Any]:
        network, prior, estimator = compared[key]
        network.prior = prior
        try:
            return _measure(network, seen(chunks[index]), chunks[index], config.seed, config.iw_samples,
                            estimator=estimator, **settings)  # fmt: skip
        except SolverError as error:
            if config.on_failure == "error":
                raise
            log.info(f"NELBO: images {chunks[index][0]} to {chunks[index][-1]} have none ({key}): {error}")
        unknown = [math.nan] * len(chunks[index])
        line: dict[str, Any] = dict.fromkeys(("nelbo", "reconstruction", "kl", "iw_bound"), unknown)
        return line | {"nfe": math.nan, "seconds": 0.0}

    return _Plan(header, jobs, measure)


def read_parts(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, SetNELBO]]:
    """The header and the NELBOs of a model, by prior, from all the parts that :func:`make_part` wrote.

    Raises:
        LSGMError: a file cannot be read, is of something else than the first one, or a part is missing.
    """
    headers: dict[int, dict[str, Any]] = {}
    lines: list[Line] = []
    for path in paths:
        first, found = read_part(path)
        part = first.pop("part")
        first.pop("sha256", None)
        if headers and first != next(iter(headers.values())):
            raise LSGMError(f"{path}: is of another model, or made with other settings, than the other parts are")
        if part in headers:
            raise LSGMError(f"{path}: is part {part} of the NELBO, which another file is too; give each once")
        headers[part] = first
        lines += found
    parts, model = first["parts"], first["stage"]["model"]
    if missing := sorted(set(range(parts)) - headers.keys()):
        raise LSGMError(f"NELBO of {model}: of {parts} parts {missing} are missing; make them with `lsgm nelbo`")
    lines.sort(key=lambda line: line.chunk)
    return first, {key: _assembled(key, lines, first, paths) for key in priors(first)}


def priors(header: dict[str, Any]) -> list[str]:
    """Those that are compared: of the VAE, of the LSGM by each estimator, and the LSGM's VAE under N(0, I)."""
    further = header["stage"]["nelbo"].get("extra_estimators", [])
    return ["vae", "lsgm", *(f"lsgm_{estimator}" for estimator in further), "lsgm_with_normal_prior"]


def _assembled(key: str, lines: Sequence[Line], header: dict[str, Any], paths: Sequence[Path]) -> SetNELBO:
    """The NELBOs of all images under the prior ``key``; raises :class:`LSGMError` if there are fewer."""
    own = [line for line in lines if line.prior == key]
    values = {
        name: torch.tensor([value for line in own for value in getattr(line, name)], dtype=torch.float64)
        for name in ("nelbo", "reconstruction", "kl", "iw_bound")
    }
    if len(values["nelbo"]) != header["images"]:
        raise LSGMError(
            f"NELBO of {header['stage']['model']}: {len(values['nelbo'])} of {header['images']} images ({key}) in "
            f"{', '.join(map(str, paths))}; delete these files and run the workflow, or `lsgm nelbo`, again"
        )
    iw_samples = int(header["stage"]["nelbo"]["iw_samples"])
    return SetNELBO(
        values["nelbo"],
        values["reconstruction"],
        values["kl"],
        values["iw_bound"] if iw_samples > 1 else None,
        iw_samples,
        math.log(2) * header["dimensions"],
        sum(line.nfe for line in own) / len(own),
        sum(line.seconds for line in own),
    )


def _measure(model: LSGM, x: Tensor, numbers: Tensor, seed: int, iw_samples: int, **settings: Any) -> dict[str, Any]:
    """The NELBOs of images ``x`` [B, C, H, W] in [0, 1], which have these ``numbers`` [B]; lists of B."""
    start = time.perf_counter()
    streams = model.per_sample_noise(seed, numbers.tolist())
    x = x.to(model.device)
    terms = [model.nelbo_terms(x, streams, **settings) for _ in range(iw_samples)]
    each = torch.stack([torch.stack([t.nelbo, t.reconstruction, t.kl]).double().cpu() for t in terms])
    nelbo, reconstruction, kl = each.mean(dim=0).tolist()
    return {
        "nfe": sum(t.nfe for t in terms) / iw_samples,
        "seconds": time.perf_counter() - start,
        "nelbo": nelbo,
        "reconstruction": reconstruction,
        "kl": kl,
        "iw_bound": importance_weighted(each[:, 0]).tolist(),
    }
