"""The numbers that a configuration may hold. All are finite, and bounded by what a machine could ever do."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

EXPONENT = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+")
SMALLEST = 1e-12  # time or variance; below, float32 has none left
MAX_SEED = 2**63 - 1
NAME_MAX = 200  # characters; file names of up to 255 bytes are made of a name and a suffix


def _number(value: Any) -> Any:
    """No boolean is a number (YAML reads `yes`, `no`, `on` and `off` as such); `1e5`, which YAML reads as text, is."""
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
Count = Annotated[int, Number, Field(ge=1, le=10**9)]  # of images, steps, batches
Few = Annotated[int, Number, Field(ge=1, le=10**4)]  # of what costs a pass, a process or a file each
Batch = Annotated[int, Number, Field(ge=1, le=10**6)]  # images
Pixels = Annotated[int, Number, Field(ge=1, le=2**14)]  # height and width
Channels = Annotated[int, Number, Field(ge=1, le=2**16)]
Multiple = Annotated[int, Number, Field(ge=1, le=2**10)]  # of channels
Layers = Annotated[int, Number, Field(ge=1, le=1000)]  # of cells, blocks and groups in a part of a network

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
