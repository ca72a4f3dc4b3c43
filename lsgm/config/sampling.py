"""Sampling: how many images, by which solver."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from typing_extensions import Self

from lsgm.config.bounds import Batch, Count, Positive, Seed, TimeEps, Tolerance
from lsgm.config.section import ON_FAILURE, OnFailure, Part, Renamed

STEPS = 50  # of a solver of equal steps
ANCESTRAL_STEPS = 1000


class SampleConfig(Part):
    """How images are sampled. For a solver of your own, subclass it and give it a `solver` of its own.

    The implementation is a function (prior, noise [B, C, H, W], draw, settings) -> :class:`lsgm.solvers.Solution`,
    where ``settings`` has the keys below.
    """

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "variances": Renamed("variance", {"beta": "fixed_large", "posterior": "fixed_small"}),
        "give_up": Renamed("on_failure", {"fail": "error"}),
    }

    count: Count = Field(description="number of images")
    solver: Literal["rk45", "euler", "heun", "rk4", "ancestral"] = Field(
        "rk45",
        description="probability-flow ODE: rk45 (adaptive), euler, heun, rk4 (equal steps); ancestral: the discretized "
        "diffusion",
    )
    tol: Tolerance = Field(1e-5, description="absolute and relative tolerance of rk45")
    time_eps: TimeEps = Field(1e-5, description="time at which the ODE ends")
    steps: Count | None = Field(
        None, description="number of steps of the other solvers; null: 50, and 1000 for ancestral"
    )
    variance: Literal["fixed_large", "fixed_small"] = Field(
        "fixed_large", description="variance of the steps of ancestral sampling: beta, or that of the true posterior"
    )
    temperature: Annotated[Positive, Field(le=1000)] = Field(1.0, description="factor by which all noise is multiplied")
    vae_batch_statistics: bool = Field(
        False,
        description="the decoder's batch norm uses the statistics of the batch, as the paper's 256-pixel models do",
    )
    compile: bool = Field(False, description="compile the score network; worth it for tens of thousands of images")
    on_failure: OnFailure = Field("error", description=f"what happens if the solver fails. {ON_FAILURE}")
    batch: Batch = 128
    seed: Seed = 1

    @property
    def implementation(self) -> str:
        return {
            "rk45": "lsgm.solvers.probability_flow:rk45_sample",
            "ancestral": "lsgm.solvers.ancestral:ancestral_sample",
        }.get(self.solver, "lsgm.solvers.probability_flow:fixed_steps_sample")

    def resolved(self) -> Self:
        """With the number of steps that null stands for."""
        steps = ANCESTRAL_STEPS if self.solver == "ancestral" else STEPS
        return self.model_copy(update={"steps": steps}) if self.steps is None else self
