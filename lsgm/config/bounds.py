"""Types for the numbers in a configuration. All are finite, with bounds that no real machine exceeds."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

EXPONENT = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+")
SMALLEST = 1e-12  # time or variance; anything smaller is lost in float32
MAX_SEED = 2**63 - 1
NAME_MAX = 200  # characters; file names, at most 255 bytes long, consist of a name and a suffix


def _number(value: Any) -> Any:
    """Reject booleans (YAML reads `yes`, `no`, `on` and `off` as such) and accept `1e5`, which YAML reads as text."""
    if isinstance(value, bool):
        raise PydanticCustomError("no_number", "Input should be a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise PydanticCustomError("no_number", "Input should be a finite number")
    if isinstance(value, str) and len(value) < 100 and EXPONENT.fullmatch(value):
        return float(value)
    return value


def _seed(value: int) -> int:
    if not 0 <= value <= MAX_SEED:
        raise PydanticCustomError("seed", f"Input should be 0 to {MAX_SEED}")
    return value


Number = BeforeValidator(_number)
_finite: Any = Field(allow_inf_nan=False)

Seed = Annotated[int, Number, AfterValidator(_seed), Field(json_schema_extra={"minimum": 0, "maximum": MAX_SEED})]
Count = Annotated[int, Number, Field(ge=1, le=10**9)]  # images, steps, batches
Few = Annotated[int, Number, Field(ge=1, le=10**4)]  # things that each cost a forward pass, a process or a file
Batch = Annotated[int, Number, Field(ge=1, le=10**6)]  # images
Pixels = Annotated[int, Number, Field(ge=1, le=2**14)]  # height and width
Channels = Annotated[int, Number, Field(ge=1, le=2**16)]
Multiple = Annotated[int, Number, Field(ge=1, le=2**10)]  # multiples of the base number of channels
Layers = Annotated[int, Number, Field(ge=1, le=1000)]  # cells, blocks or groups in one part of a network

Finite = Annotated[float, Number, Field(ge=-1e9, le=1e9), _finite]
Positive = Annotated[float, Number, Field(gt=0, le=1e9), _finite]
NonNegative = Annotated[float, Number, Field(ge=0, le=1e9), _finite]
Fraction = Annotated[float, Number, Field(ge=0, le=1), _finite]
Share = Annotated[float, Number, Field(gt=0, le=1), _finite]
BelowOne = Annotated[float, Number, Field(ge=0, lt=1), _finite]
Epochs = Annotated[float, Number, Field(gt=0, le=1e6), _finite]
Tolerance = Annotated[float, Number, Field(ge=1e-12, le=1), _finite]
TimeEps = Annotated[float, Number, Field(ge=SMALLEST, lt=1), _finite]

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=NAME_MAX)]
