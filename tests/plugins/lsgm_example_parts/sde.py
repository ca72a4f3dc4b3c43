"""A variance-preserving SDE of constant rate, a subclass of ours."""

from __future__ import annotations

from typing import Literal

from lsgm.config import DiffusionConfig
from lsgm.config.bounds import Positive
from lsgm.sde import VPSDE


class ConstantConfig(DiffusionConfig):
    """Its keys under `sde`."""

    implementation = "lsgm_example_parts.sde:Constant"
    variance_preserving = True

    name: Literal["constant"] = "constant"
    rate: Positive = 8.0


class Constant(VPSDE):
    """beta(t) = rate: m_t^2 = e^(-rate t)."""

    def __init__(self, *, rate: float) -> None:
        super().__init__(beta_start=rate, beta_end=rate)
