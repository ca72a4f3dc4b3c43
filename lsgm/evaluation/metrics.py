"""metrics.json of a model as the tables read it; null stands for NaN there, as JSON has none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from lsgm.config import ConfigError, Section
from lsgm.config.bounds import Name
from lsgm.config.mistakes import parse
from lsgm.errors import LSGMError
from lsgm.files import read_json

WAY_OUT = "write the file again with `lsgm evaluate`"


def _number(value: Any) -> Any:
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_number)]
Optional = Annotated[float | None, BeforeValidator(_number)]  # None: the key is missing
Measured = dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], Number]


class Part(Section):
    """A part of metrics.json; keys that the tables do not need may be there."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=True)


class NELBO(Part):
    nelbo: Number
    stderr: Number
    bpd: Number = math.nan
    reconstruction: Number
    kl: Number
    iw_samples: int = 1
    iw_bound: Optional = None  # importance-weighted, of iw_samples encoder samples
    iw_stderr: Optional = None


class Gain(Part):
    nelbo: Number
    stderr: Number


class NELBOs(Part):
    """Keys that are not here are `lsgm_<estimator>`, of further estimators."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^lsgm_[a-z0-9_]+$")], NELBO]

    unit: str
    images: int
    settings: dict[str, Any] | None = None
    vae: NELBO
    lsgm_with_normal_prior: NELBO
    lsgm: NELBO
    gain: Gain


class Fidelity(Part):
    extractor: str
    images: int
    vae: Measured  # `fid` or `frechet_<extractor>`, and what else was measured, by name
    lsgm: Measured
    floor_images: int
    floor: Measured


class Sampling(Part):
    images: Annotated[int, Field(ge=0)]
    nfe: Number
    seconds: Number
    device: str | None = None
    failed: str | None = None  # why it was given up

    @property
    def seconds_per_1000(self) -> float:
        """NaN without images."""
        return 1000 * self.seconds / self.images if self.images else math.nan


class Samplings(Part):
    vae: Sampling
    lsgm: Sampling


class Training(Part):
    seconds: Number
    seconds_before: Number = 0.0  # of end-to-end trainings that this one started from
    skipped: int = 0  # steps that were left out, as not finite or exploding
    restarts: int = 0  # times it went back to an earlier state
    diverged_at: int | None = None  # the step, for good; the model is that of the last good state
    device: str | None = None


class Trainings(Part):
    vae: Training
    lsgm: Training

    @property
    def total(self) -> float:
        """Seconds that the LSGM takes from nothing."""
        return self.vae.seconds + self.lsgm.seconds_before + self.lsgm.seconds


class Metrics(Part):
    """What `lsgm evaluate` writes to metrics.json, as far as the tables need it."""

    model: Name
    dataset: Name
    device: str
    date: str
    nelbo: NELBOs
    fidelity: Fidelity | None
    sampling: Samplings
    training: Trainings


def read_metrics(path: Path) -> Metrics:
    """Read and check the metrics.json of one model; raises :class:`LSGMError` that names the file and the key."""
    try:
        return parse(Metrics, read_json(path, WAY_OUT), path)
    except ConfigError as error:
        raise LSGMError(f"{str(error).splitlines()[0]}; {WAY_OUT}") from None
