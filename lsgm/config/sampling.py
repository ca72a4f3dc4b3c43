"""Sampling: by which solver, and how many images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lsgm import nfe
from lsgm.config.bounds import Batch, Count, NonNegative, Positive, Seed, TimeEps, Tolerance
from lsgm.config.section import ON_FAILURE, OnFailure, Part, Renamed

RK45_TOL, ADAPTIVE_SDE_TOL = 1e-5, 0.02

# Solvers that are special cases of others, by the names that their authors gave them.
SPECIAL_CASES: dict[str, dict[str, Any]] = {
    "ddim": {"solver": "ab", "form": "data", "order": 1},
    "dpmpp_2m": {"solver": "ab", "form": "data", "order": 2},
    "deis": {"solver": "ab", "form": "noise", "order": 3},
    "edm": {"solver": "heun", "form": "noise", "grid": "edm", "denoise": True},
}
DEFAULT_GRIDS = {"drift": "t", "velocity": "phi", "noise": "edm", "data": "log_snr"}


class SamplerConfig(Part):
    """The solver that turns noise into latents. For one of your own, subclass :class:`SampleConfig`.

    ``resolved()`` fills in what null stands for, and replaces a special case (`ddim`, `dpmpp_2m`, `deis`, `edm`) by the
    settings that it consists of.
    """

    solver: Literal[
        "ab", "ddim", "dpmpp_2m", "deis", "edm", "euler", "heun", "rk4", "rk45", "ancestral", "adaptive_sde"
    ] = Field(
        "ab",
        description="ab: Adams-Bashforth, one evaluation per step (ddim, dpmpp_2m and deis are special cases); euler, "
        "heun, rk4: Runge-Kutta (edm is heun in the noise form); rk45: Runge-Kutta with adaptive steps; ancestral: the "
        "discretized diffusion; adaptive_sde: the reverse SDE with adaptive steps",
    )
    form: Literal["velocity", "noise", "data", "drift"] | None = Field(
        None,
        description="form of the probability-flow ODE that ab, euler, heun and rk4 integrate: velocity (only the "
        "mismatch with N(0, I)), noise, data (ab only, exponential) or drift; null: velocity for ab, drift for the "
        "others",
    )
    order: Literal[1, 2, 3] | None = Field(None, description="order of ab; null: 2")
    grid: Literal["t", "phi", "log_snr", "edm"] | None = Field(
        None,
        description="what the steps of ab, euler, heun and rk4 are equal in: t, the angle phi, the log-SNR, or the "
        "seventh root of the noise level (edm); null: phi for the form velocity, t for drift, log_snr for data, edm "
        "for noise",
    )
    steps: Count | None = Field(
        None,
        description="evaluations of the score network, for every solver but rk45 and adaptive_sde; null: "
        f"{nfe.SAMPLING}, and {nfe.ANCESTRAL} for ancestral",
    )
    corrector: bool = Field(
        False, description="ab in the data form: correct each step with the next evaluation (UniPC), at no cost"
    )
    tau: Annotated[NonNegative, Field(le=10)] = Field(
        0.0, description="ab in the data form: amount of noise added on the way; 0: the ODE, 1: the reverse SDE"
    )
    denoise: bool | None = Field(
        None,
        description="let the last evaluation predict z0 from the latents at time_eps; null: only for edm and "
        "adaptive_sde",
    )
    tol: Tolerance | None = Field(
        None,
        description=f"tolerance of rk45, absolute and relative (null: {RK45_TOL:g}), or of adaptive_sde, relative "
        f"(null: {ADAPTIVE_SDE_TOL})",
    )
    atol: Annotated[Positive, Field(le=1)] = Field(0.01, description="absolute tolerance of adaptive_sde")
    time_eps: TimeEps | None = Field(
        None, description="time at which sampling ends; null: the smallest time that the prior was trained at"
    )
    variance: Literal["fixed_large", "fixed_small"] = Field(
        "fixed_large", description="variance of the steps of ancestral sampling: beta, or that of the true posterior"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if reason := self.misfit():
            raise ValueError(reason)
        return self

    def misfit(self) -> str | None:
        """Why these settings do not fit together, and which do."""
        case = SPECIAL_CASES.get(self.solver, {})
        for key in ("form", "order", "grid", "denoise"):
            given = getattr(self, key)
            if key in case and given not in (None, case[key]):
                return f"{_listed({key: given})} is not {self.solver}, which is {_listed(case)}; leave {key} out"
        solver, form = case.get("solver", self.solver), case.get("form", self.form)
        if solver != "ab" and self.order is not None:
            return f"order: {self.order} needs solver: ab, not {self.solver}, whose order is fixed"
        if solver not in ("ab", *nfe.PER_STEP):
            for key in ("form", "grid"):
                if (given := getattr(self, key)) is not None:
                    which = "ab" if given == "data" else "ab, euler, heun or rk4"
                    return f"{key}: {given} needs solver: {which}, not {self.solver}"
        if solver in nfe.PER_STEP and form == "data":
            return f"form: data needs solver: ab; {self.solver} takes form: velocity, noise or drift"
        for key, given in (("corrector", self.corrector), ("tau", self.tau)):
            if given and (solver, form) != ("ab", "data"):
                return f"{_listed({key: given})} needs solver: ab with form: data"
        if self.corrector and self.tau:
            return f"corrector: true and tau: {self.tau:g} exclude each other; set tau: 0 or corrector: false"
        if self.denoise and solver == "ancestral":
            return "denoise: true does not apply to ancestral, whose last step ends at t = 0; leave it out"
        return self._wrong_steps(str(solver))

    def _wrong_steps(self, solver: str) -> str | None:
        if self.steps is None or solver not in ("ab", *nfe.PER_STEP):
            return None
        each, last = nfe.PER_STEP.get(solver, 1), int(self._denoises())
        if self.steps > last and (self.steps - last) % each == 0:
            return None
        near = max(1, (self.steps - last) // each)
        return (
            f"steps: {self.steps} evaluations do not make whole steps of {self.solver}, which takes {each} for each"
            f"{' and 1 at the end' if last else ''}; set steps: {near * each + last} or {(near + 1) * each + last}"
        )

    def _denoises(self) -> bool:
        return bool(self.solver in ("edm", "adaptive_sde") if self.denoise is None else self.denoise)

    @property
    def label(self) -> str:
        """What tables call it: the solver, with its order and form where it has several."""
        found = self if self.solver in SPECIAL_CASES else self.resolved()
        return f"{found.solver}{found.order or ''}{f' ({found.form})' if found.form else ''}"

    @property
    def implementation(self) -> str:
        solver = SPECIAL_CASES.get(self.solver, {}).get("solver", self.solver)
        family = {"ab": "multistep", **dict.fromkeys(nfe.PER_STEP, "runge_kutta")}.get(solver, solver)
        return f"lsgm.solvers.sampling:{family}_sample"

    def resolved(self) -> Self:
        """With the values that null stands for, but that of `time_eps`, which is the model's."""
        case = SPECIAL_CASES.get(self.solver, {})
        solver = case.get("solver", self.solver)
        update: dict[str, Any] = {"denoise": self._denoises(), **case}
        if solver in ("ab", *nfe.PER_STEP):
            form = case.get("form", self.form) or ("velocity" if solver == "ab" else "drift")
            update |= {"form": form, "grid": self.grid or case.get("grid", DEFAULT_GRIDS[form])}
        if solver == "ab":
            update["order"] = case.get("order", self.order) or 2
        if self.tol is None:
            update["tol"] = ADAPTIVE_SDE_TOL if solver == "adaptive_sde" else RK45_TOL
        if self.steps is None and solver not in ("rk45", "adaptive_sde"):
            last, each = int(update["denoise"]), nfe.PER_STEP.get(solver, 1)
            update["steps"] = (
                nfe.ANCESTRAL if solver == "ancestral" else -(-(nfe.SAMPLING - last) // each) * each + last
            )
        return self.model_copy(update=update)


class SampleConfig(SamplerConfig):
    """How images are sampled. For a solver of your own, subclass it and give it a `solver` of its own.

    The implementation is a function (prior, noise [B, C, H, W], draw, settings) -> :class:`lsgm.solvers.Solution`,
    where ``settings`` has the keys below.
    """

    renamed: ClassVar[Mapping[str, Renamed]] = {
        "variances": Renamed("variance", {"beta": "fixed_large", "posterior": "fixed_small"}),
        "give_up": Renamed("on_failure", {"fail": "error"}),
    }

    count: Count = Field(description="number of images")
    temperature: Annotated[NonNegative, Field(le=1000)] = Field(
        1.0, description="factor by which all noise is multiplied; 0: every image is the same"
    )
    vae_batch_statistics: bool = Field(
        False,
        description="the decoder's batch norm uses the statistics of the batch, as the paper's 256-pixel models do",
    )
    compile: bool = Field(False, description="compile the score network; worth it for tens of thousands of images")
    on_failure: OnFailure = Field("error", description=f"what happens if the solver fails. {ON_FAILURE}")
    batch: Batch = 128
    seed: Seed = 1


def _listed(settings: Mapping[str, Any]) -> str:
    """Settings as YAML has them, on one line."""
    return ", ".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()
    )
