"""Evaluation: NELBO on test images, fidelity of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lsgm.config.bounds import Batch, Count, Few, Seed, TimeEps, Tolerance
from lsgm.config.section import ON_FAILURE, OnFailure, Renamed, Section, one_of
from lsgm.registry import EXTRACTORS

Estimator = Literal["ode", "discretized"]
_ESTIMATORS = {"discretised": "discretized"}


class NELBOConfig(Section):
    """The NELBO of test images."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "estimator": Renamed("estimator", _ESTIMATORS),
        "further_estimators": Renamed("extra_estimators", _ESTIMATORS),
        "give_up": Renamed("on_failure", {"fail": "error"}),
    }

    images: Count | None = Field(
        description="number of test images whose NELBO is computed, chosen at random; null: all of them"
    )
    estimator: Estimator = Field(
        "ode",
        description="how log p(z0) is estimated: by the probability-flow ODE, or bounded by the discretized diffusion",
    )
    extra_estimators: list[Estimator] = Field([], description="estimators reported beside `estimator`")
    tol: Tolerance = Field(1e-5, description="absolute and relative tolerance of the ODE's solver")
    time_eps: TimeEps = Field(1e-5, description="time at which the ODE starts")
    probe: Literal["gaussian", "rademacher", "exact"] = Field(
        "rademacher", description="Hutchinson probes of the ODE's trace; exact: a backward pass per latent dimension"
    )
    probes: Few = Field(1, description="number of probes per image")
    steps: Count = Field(1000, description="number of steps of the discretized diffusion")
    iw_samples: Few = Field(
        1,
        description="encoder samples per image; above 1 the importance-weighted bound is reported too (noise of the "
        "probes makes it a little too low)",
    )
    on_failure: OnFailure = Field("error", description=f"what happens if the solver fails. {ON_FAILURE}")
    batch: Batch = 128
    seed: Seed = 1

    @model_validator(mode="after")
    def _each_estimator_once(self) -> NELBOConfig:
        if len({self.estimator, *self.extra_estimators}) <= len(self.extra_estimators):
            raise ValueError(
                f"extra_estimators: {self.extra_estimators} with estimator: {self.estimator} names one twice"
            )
        return self


class EvaluateConfig(NELBOConfig):
    """NELBO on test images; FID (or the Fréchet distance of other features), KID, precision and recall of samples."""

    extractor: Annotated[str, one_of(EXTRACTORS)] | None = Field(
        description="network whose features are compared between samples and training images. inception: FID, as "
        "published (weights are downloaded); efficientnet_lite0: trained on ImageNet (weights come with a package); "
        "mnist_classifier: weights are in this repository; null: no comparison",
        json_schema_extra={"anyOf": [{"enum": [*EXTRACTORS.names()]}, {"type": "null"}]},
    )
    cross_check: bool = Field(
        False, description="also compute the FID with clean-fid, which has its own weights and resizing"
    )

    @model_validator(mode="after")
    def _the_cross_check_has_something_to_check(self) -> EvaluateConfig:
        if self.cross_check and self.extractor != "inception":
            raise ValueError(f"cross_check: compares two FIDs, which needs extractor: inception, not {self.extractor}")
        return self

    @property
    def extractors(self) -> list[str]:
        """The extractors for which the evaluation needs statistics of the training images."""
        found: list[str] = [self.extractor] if self.extractor is not None else []
        return found + ["clean_fid"] * self.cross_check
