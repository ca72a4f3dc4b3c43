"""The JSON schema of ``params.yaml``, which editors show and check as one types."""

from __future__ import annotations

import copy
import json
from typing import Any

from lsgm.params.params import Params

# Sections of a model that extends another one need not hold the keys that they must hold elsewhere.
PARTIAL = "Partial"


def json_schema() -> str:
    """The schema as text (kept in ``workflow/schemas``; `python -m lsgm.params` prints it)."""
    schema = _with_keywords(Params.model_json_schema())
    sections = schema["$defs"]
    sections |= {f"{PARTIAL}{name}": _partial(section) for name, section in copy.deepcopy(sections).items()}
    partial = sections[f"{PARTIAL}ModelConfig"]
    partial["required"] = ["extends"]
    schema["properties"]["models"]["additionalProperties"] = {
        "if": {"required": ["extends"]},
        "then": {"$ref": f"#/$defs/{PARTIAL}ModelConfig"},
        "else": {"$ref": "#/$defs/ModelConfig"},
    }
    return json.dumps(schema, indent=2) + "\n"


def _partial(node: Any) -> Any:
    """A section without required keys, whose sections have none either; null takes a section away."""
    if isinstance(node, dict):
        found = {
            key: _partial(value) for key, value in node.items() if not (key == "required" and isinstance(value, list))
        }
        if isinstance(node.get("$ref"), str):
            found["$ref"] = node["$ref"].replace("#/$defs/", f"#/$defs/{PARTIAL}")
        return found
    return [_partial(item) for item in node] if isinstance(node, list) else node


def _with_keywords(node: Any) -> Any:
    """A schema in which bounds have their names in JSON Schema: pydantic leaves its own where a validator is around."""
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    names |= {"multiple_of": "multipleOf"}
    if isinstance(node, dict):
        bounded = node.get("type") in ("integer", "number")
        return {names.get(key, key) if bounded else key: _with_keywords(value) for key, value in node.items()}
    return [_with_keywords(item) for item in node] if isinstance(node, list) else node
