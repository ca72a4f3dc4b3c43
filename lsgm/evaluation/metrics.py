"""The schema of metrics.json, which `lsgm evaluate` writes and the tables read.

NELBOs are in nats per image, or in bits per dimension where the key says `bpd`. Keys with a default may be missing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from lsgm.config import ConfigError
from lsgm.config.bounds import Name
from lsgm.config.mistakes import parse
from lsgm.errors import LSGMError
from lsgm.evaluation.records import Measured, Number, OptionalNumber, Record
from lsgm.evaluation.samples import Sampling
from lsgm.files import read_json

WAY_OUT = "write the file again with `lsgm evaluate`"


class NELBO(Record):
    """The NELBO under one prior: means over the test images, their standard errors, and the cost of computing them."""

    nelbo: Number
    stderr: Number
    bpd: Number = math.nan
    bpd_stderr: Number = math.nan
    reconstruction: Number
    kl: Number
    nfe: Number = math.nan  # evaluations of the score network per batch and encoder sample
    seconds: Number = math.nan
    iw_samples: int = 1
    iw_bound: OptionalNumber = None  # importance-weighted bound with iw_samples encoder samples
    iw_stderr: OptionalNumber = None
    iw_bpd: OptionalNumber = None
    iw_bpd_stderr: OptionalNumber = None
    check_images: int | None = None  # images whose log p(z0) was estimated a second time as a check
    solver_error: OptionalNumber = None  # mean difference from a finer ODE solve with the same probes
    solver_rms: OptionalNumber = None  # root mean square of the same differences
    estimate_std: OptionalNumber = None  # standard deviation of an image's estimate over random draws


class Gain(Record):
    """How far the LSGM's NELBO is below the VAE's: mean of the paired differences, and its standard error."""

    nelbo: Number
    stderr: Number


class NELBOs(Record):
    """The NELBO under each prior. Extra keys are named `lsgm_<estimator>`, one for each of `extra_estimators`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^lsgm_[a-z0-9_]+$")], NELBO]

    unit: str
    images: int
    settings: dict[str, Any] | None = None  # those settings of the stage `nelbo` that affect the results
    vae: NELBO
    lsgm: NELBO
    lsgm_with_normal_prior: NELBO
    gain: Gain

    @model_serializer(mode="wrap")
    def _extra_estimators_follow_the_first(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        last = {key: content.pop(key) for key in ("lsgm_with_normal_prior", "gain")}
        return content | last


class Fidelity(Record):
    """How close samples are to the training images, measured on the features of ``extractor``.

    ``vae`` and ``lsgm`` hold the metrics by name (:func:`lsgm.evaluation.fidelity.metrics`); they are empty if sampling
    failed. ``real_vs_real`` (`floor` in older files) is the distance between two disjoint sets of real images.
    """

    extractor: str
    images: int  # samples of each model
    real_images: int | None = None
    lsgm: Measured
    kept_images: int | None = None  # number of samples, and of real images, for KID, precision and recall
    vae: Measured
    real_vs_real_images: int = Field(validation_alias=AliasChoices("real_vs_real_images", "floor_images"))
    real_vs_real: Measured = Field(validation_alias=AliasChoices("real_vs_real", "floor"))
    reference: dict[str, dict[str, Any]] | None = None  # extractor -> hashes of the inputs of its statistics


class Samplings(Record):
    vae: Sampling
    lsgm: Sampling


class Training(Record):
    """Facts about a training. Any other keys that a training reports are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    steps: int | None = None
    images_per_second: OptionalNumber = None
    seconds: Number
    skipped: int = 0  # skipped steps: non-finite loss or gradient, or exploding gradient
    restarts: int = 0  # how often training went back to an earlier checkpoint
    processes: int | None = None
    diverged_at: int | None = None  # the step at which training finally diverged; the model is the last good one
    seconds_before: Number = 0.0  # duration of the end-to-end trainings that this one started from
    parameters: int | None = None
    device: str | None = None
    date: str | None = None


class Trainings(Record):
    vae: Training
    lsgm: Training

    @property
    def total(self) -> float:
        """Seconds to train the LSGM from scratch, including its VAE."""
        return self.vae.seconds + self.lsgm.seconds_before + self.lsgm.seconds


class Metrics(Record):
    """The metrics.json of one model: its LSGM and the VAE that the LSGM started from."""

    model: Name
    dataset: Name
    device: str
    date: str
    nelbo: NELBOs
    fidelity: Fidelity | None  # None: evaluated without an extractor
    sampling: Samplings
    training: Trainings
    code: dict[str, str | None] = Field({})  # stage -> fingerprint of its code


def read_metrics(path: Path) -> Metrics:
    """Read and validate the metrics.json of one model; raises :class:`LSGMError` that names the file and the key."""
    try:
        return parse(Metrics, read_json(path, WAY_OUT), path)
    except ConfigError as error:
        raise LSGMError(f"{str(error).splitlines()[0]}; {WAY_OUT}") from None
