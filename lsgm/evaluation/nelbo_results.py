"""NELBOs of a set of images, read from the parts that `lsgm nelbo` wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsgm.errors import LSGMError
from lsgm.evaluation.parts import Line, read_part


@dataclass
class NELBOCheck:
    """How exact the estimates of log p(z0) are, by estimating those of a few images again; each [M], nats."""

    solver: Tensor  # the estimate minus one with a finer solver and the same draws; NaN where there is no solver
    noise: Tensor  # the estimate minus one with other draws (probes of the trace, or noise of a bound)

    def summary(self) -> dict[str, float | None]:
        """The solver's mean and root mean square error, and the standard deviation of an image's estimate."""
        solved = bool(self.solver.isfinite().any())
        return {
            "check_images": len(self.noise),
            "solver_error": self.solver.mean().item() if solved else None,
            "solver_rms": _rms(self.solver) if solved else None,
            "estimate_std": _rms(self.noise) / math.sqrt(2),
        }


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
    check: NELBOCheck | None = None

    def summary(self) -> dict[str, float | None]:
        """Means over the images in nats and, `bpd`, bits per dimension; standard errors of the bounds' means."""
        bit = self.nats_per_bit_per_dimension
        found: dict[str, float | None] = {
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
        if self.check is not None:
            found |= self.check.summary()
        return found


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values [N]; NaN of a single one."""
    if len(values) < 2:
        return math.nan
    return (values.std() / len(values) ** 0.5).item()


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
    settings = header["stage"]["nelbo"]
    extra = settings.get("extra_estimators", settings.get("further_estimators", []))  # its name until version 2
    return ["vae", "lsgm", *(f"lsgm_{estimator}" for estimator in extra), "lsgm_with_normal_prior"]


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
        _checked(own),
    )


def _checked(lines: Sequence[Line]) -> NELBOCheck | None:
    found = [line.check for line in lines if line.check is not None]
    if not found:
        return None
    solver, noise = ([value for check in found for value in getattr(check, name)] for name in ("solver", "noise"))
    return NELBOCheck(torch.tensor(solver, dtype=torch.float64), torch.tensor(noise, dtype=torch.float64))


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
