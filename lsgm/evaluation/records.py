"""Building blocks of the JSON files of an evaluation. JSON has no NaN, so NaN is stored as null."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from lsgm.config import Section


def _number(value: Any) -> Any:
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_number)]
OptionalNumber = Annotated[float | None, BeforeValidator(_number)]  # None: the key is missing
Measured = dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], Number]  # metric -> value


class Record(Section):
    """A section of a JSON file. Unknown keys, for example from another version, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=True, populate_by_name=True)

    def written(self) -> dict[str, Any]:
        """The section as written to JSON: only the keys that were set, in the order of the fields."""
        return self.model_dump(exclude_unset=True)
