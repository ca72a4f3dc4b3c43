"""``params.yaml`` as a whole: presets, grids, sharing, freezing, and the checks of the plan. No torch."""

from lsgm.params.params import Params, load_params
from lsgm.params.plan import COMPARISON
from lsgm.params.schema import json_schema

__all__ = ["COMPARISON", "Params", "json_schema", "load_params"]
