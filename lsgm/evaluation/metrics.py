"""metrics.json: the one definition of the file that `lsgm evaluate` writes and the tables read.

Numbers are in nats per image unless they are bits per dimension (`bpd`); keys with a default may be missing.
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
    """The NELBO under one prior: means over the test images, standard errors of these means, and what it cost."""

    nelbo: Number
    stderr: Number
    bpd: Number = math.nan
    bpd_stderr: Number = math.nan
    reconstruction: Number
    kl: Number
    nfe: Number = math.nan  # evaluations of the score network per batch and encoder sample
    seconds: Number = math.nan
    iw_samples: int = 1
    iw_bound: OptionalNumber = None  # importance-weighted bound of iw_samples encoder samples
    iw_stderr: OptionalNumber = None
    iw_bpd: OptionalNumber = None
    iw_bpd_stderr: OptionalNumber = None
    check_images: int | None = None  # images whose estimate of log p(z0) was checked by another one
    solver_error: OptionalNumber = None  # mean difference to a finer solve of the ODE with the same probes
    solver_rms: OptionalNumber = None  # and its root mean square
    estimate_std: OptionalNumber = None  # standard deviation of an image's estimate over its random draws


class Gain(Record):
    """By how much the LSGM's NELBO is below the VAE's: the mean of the paired differences and its standard error."""

    nelbo: Number
    stderr: Number


class NELBOs(Record):
    """NELBOs under each prior. The other keys are `lsgm_<estimator>`, one for each of `extra_estimators`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^lsgm_[a-z0-9_]+$")], NELBO]

    unit: str
    images: int
    settings: dict[str, Any] | None = None  # of the stage `nelbo`, as far as they change its numbers
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
    """How near samples are to the training images, in the features of ``extractor``.

    ``vae`` and ``lsgm`` hold the metrics by name (:func:`lsgm.evaluation.fidelity.metrics`), and nothing where sampling
    was given up. ``real_vs_real`` (`floor` in older files) is the distance between two disjoint sets of real images.
    """

    extractor: str
    images: int  # samples of each model
    real_images: int | None = None
    lsgm: Measured
    kept_images: int | None = None  # samples, and as many real images, for KID, precision and recall
    vae: Measured
    real_vs_real_images: int = Field(validation_alias=AliasChoices("real_vs_real_images", "floor_images"))
    real_vs_real: Measured = Field(validation_alias=AliasChoices("real_vs_real", "floor"))
    reference: dict[str, dict[str, Any]] | None = None  # extractor -> hashes of what it was computed from


class Samplings(Record):
    vae: Sampling
    lsgm: Sampling


class Training(Record):
    """Of the last training stage; other keys that a training reports are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    steps: int | None = None
    images_per_second: OptionalNumber = None
    seconds: Number
    skipped: int = 0  # steps that were left out because they were not finite or exploding
    restarts: int = 0  # times the training went back to an earlier state
    processes: int | None = None
    diverged_at: int | None = None  # the step at which it diverged for good; the model is the last good state
    seconds_before: Number = 0.0  # of end-to-end trainings that this one started from
    parameters: int | None = None
    device: str | None = None
    date: str | None = None


class Trainings(Record):
    vae: Training
    lsgm: Training

    @property
    def total(self) -> float:
        """Seconds that the LSGM takes from scratch, its VAE included."""
        return self.vae.seconds + self.lsgm.seconds_before + self.lsgm.seconds


class Metrics(Record):
    """metrics.json of one model: the LSGM beside the VAE that it began with."""

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
    """Read and check the metrics.json of one model; raises :class:`LSGMError` that names the file and the key."""
    try:
        return parse(Metrics, read_json(path, WAY_OUT), path)
    except ConfigError as error:
        raise LSGMError(f"{str(error).splitlines()[0]}; {WAY_OUT}") from None
