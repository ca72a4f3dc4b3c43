"""The forward diffusions (LSGM, section 2 and appendix B)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lsgm.config.bounds import SMALLEST, BelowOne, NonNegative, Positive
from lsgm.config.section import ConfigError, Part

GEOMETRIC_SIGMA2_MAX = 0.999  # sigma^2 at t = 1 of the geometric VPSDE


class DiffusionConfig(Part):
    """Settings that all forward diffusions share. To add an SDE, subclass this and give `name` a new value.

    The implementation is a :class:`lsgm.sde.SDE`, constructed with the keys of the subclass.
    """

    not_passed = frozenset({"name", "time_eps"})
    variance_preserving: ClassVar[bool] = False  # m_t^2 + sigma_t^2 = 1, which the discretized diffusion needs

    name: str
    time_eps: BelowOne = Field(0.01, description="smallest training time: t is drawn from [time_eps, 1]")

    def resolved(self) -> Self:
        """A copy in which every null is replaced by the value it stands for."""
        return self


class SDEConfig(DiffusionConfig):
    """The SDEs of the paper. Each ignores the keys that it does not use, so that `name` alone switches between them."""

    name: Literal["vpsde", "geometric_vpsde", "sub_vpsde", "vesde"] = "vpsde"
    beta_start: NonNegative = Field(0.1, description="vpsde and sub_vpsde: beta at t = 0")
    beta_end: Annotated[Positive, Field(ge=1e-6)] = Field(20.0, description="vpsde and sub_vpsde: beta at t = 1")
    sigma2_min: Annotated[Positive, Field(ge=SMALLEST)] = Field(
        3e-5, description="geometric_vpsde and vesde: first value of the geometric progression of variances"
    )
    sigma2_max: Positive | None = Field(
        None,
        description="variance at t = 1. geometric_vpsde: null means 0.999; vesde: null means the largest squared "
        "distance between two encodings, measured when training starts",
    )
    sigma2_0: BelowOne | None = Field(
        None,
        description="variance at t = 0; null: 0, or sigma2_min for geometric_vpsde. vesde ignores it and uses "
        "sigma2_min",
    )

    @model_validator(mode="after")
    def _can_be_used(self) -> SDEConfig:
        geometric = self.name in ("geometric_vpsde", "vesde")
        starts_at = self.sigma2_0 if self.sigma2_0 is not None and self.name != "vesde" else float(geometric)
        if max(self.time_eps, starts_at) < SMALLEST:
            raise ValueError("the weights diverge at t = 0: time_eps or sigma2_0 must be above 0")
        if geometric and self.sigma2_max is not None and self.sigma2_max <= self.sigma2_min:
            raise ValueError(f"sigma2_max must be above sigma2_min = {self.sigma2_min}, not {self.sigma2_max}")
        end = self.sigma2_max if self.sigma2_max is not None else GEOMETRIC_SIGMA2_MAX
        end += 0 if self.sigma2_0 is None else self.sigma2_0 - self.sigma2_min
        if self.name == "geometric_vpsde" and end >= 1:
            raise ValueError(f"the geometric VPSDE's variance at t = 1 must be below 1, not {end:.3g}")
        if self.name in ("vpsde", "sub_vpsde") and self.beta_end < self.beta_start:
            raise ValueError(f"beta_end must not be below beta_start = {self.beta_start}, not {self.beta_end}")
        return self

    @property
    def variance_preserving(self) -> bool:  # type: ignore[override]
        return self.name in ("vpsde", "geometric_vpsde")

    @property
    def implementation(self) -> str:
        classes = {"vpsde": "VPSDE", "sub_vpsde": "SubVPSDE", "geometric_vpsde": "GeometricVPSDE", "vesde": "VESDE"}
        return f"lsgm.sde:{classes[self.name]}"

    def resolved(self) -> Self:
        """A copy with every null replaced, except a VESDE's sigma2_max, which is measured when training starts."""
        update = {}
        if self.name == "geometric_vpsde":
            update = {"sigma2_max": self.sigma2_max or GEOMETRIC_SIGMA2_MAX}
            update["sigma2_0"] = self.sigma2_min if self.sigma2_0 is None else self.sigma2_0
        elif self.name != "vesde":
            update = {"sigma2_0": self.sigma2_0 or 0.0}
        return self.model_copy(update=update)

    def arguments(self) -> dict[str, Any]:
        keys = {
            "vpsde": {"beta_start", "beta_end", "sigma2_0"},
            "sub_vpsde": {"beta_start", "beta_end", "sigma2_0"},
            "geometric_vpsde": {"sigma2_min", "sigma2_max", "sigma2_0"},
            "vesde": {"sigma2_min", "sigma2_max"},
        }
        found = self.resolved().model_dump(include=keys[self.name])
        if found.get("sigma2_max", 1.0) is None:
            raise ConfigError("sde.sigma2_max: the VESDE needs a value; training measures it on the encodings")
        return found
