"""Evaluation: NELBO on test images, fidelity of samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lsgm import nfe
from lsgm.config.bounds import Batch, Count, Few, Number, Seed, TimeEps, Tolerance
from lsgm.config.section import ON_FAILURE, OnFailure, Renamed, Section, one_of
from lsgm.registry import EXTRACTORS

Estimator = Literal["ode", "bound", "discretized"]
_ESTIMATORS = {"discretised": "discretized"}


class EstimatorConfig(Section):
    """How log p(z0) is estimated under the score prior."""

    estimator: Estimator = Field(
        "ode",
        description="ode: the probability-flow ODE; bound: the variational bound in continuous time; discretized: that "
        "of the discretized diffusion",
    )
    solver: Literal["rk4", "heun", "ab", "rk45"] = Field(
        "rk4",
        description="solver of the ODE: rk4, heun or ab (equal steps in the angle phi), or rk45 (adaptive, the "
        "reference)",
    )
    steps: Count | None = Field(
        None,
        description="evaluations of the score network by `estimator`, for every solver but rk45; null: "
        + ", ".join(f"{steps} for {name}" for name, steps in nfe.ESTIMATOR.items()),
    )
    tol: Tolerance = Field(1e-5, description="absolute and relative tolerance of rk45")
    time_eps: TimeEps | None = Field(
        None,
        description="time at which the ODE or the bound starts; null: the smallest time that the prior was trained at",
    )
    probe: Literal["gaussian", "rademacher", "exact"] = Field(
        "rademacher", description="Hutchinson probes of the ODE's trace; exact: a backward pass per latent dimension"
    )
    probes: Few = Field(1, description="number of probes per image")

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        each = nfe.PER_STEP.get(self.solver, 1)
        if self.estimator == "ode" and self.solver != "rk45" and self.steps is not None and self.steps % each:
            below = max(1, self.steps // each) * each
            raise ValueError(
                f"steps: {self.steps} evaluations do not make whole steps of {self.solver}, which takes {each} for "
                f"each; set steps: {below} or {below + each}"
            )
        return self


class NELBOConfig(EstimatorConfig):
    """The NELBO of test images."""

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "estimator": Renamed("estimator", _ESTIMATORS),
        "further_estimators": Renamed("extra_estimators", _ESTIMATORS),
        "give_up": Renamed("on_failure", {"fail": "error"}),
    }

    images: Count | None = Field(
        description="number of test images whose NELBO is computed, chosen at random; null: all of them"
    )
    extra_estimators: list[Estimator] = Field(
        [], description="estimators reported beside `estimator`, with their own number of steps"
    )
    check_images: Annotated[int, Number, Field(ge=0, le=10**4)] = Field(
        16,
        description="images on which the errors of the ODE's solver and of its trace are estimated: with twice the "
        "steps, and with other probes; 0: none",
    )
    iw_samples: Few = Field(
        1,
        description="encoder samples per image; above 1 the importance-weighted bound is reported too (noise of the "
        "trace makes it a little too low: the noise is reported beside it)",
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
