"""The committed schema of params.yaml."""

from __future__ import annotations

from pathlib import Path

from lsgm.params import json_schema

SCHEMA = Path(__file__).parents[2] / "workflow" / "schemas" / "params.schema.json"


def test_is_the_one_that_the_code_generates() -> None:
    assert SCHEMA.read_text() == json_schema(), f"run: python -m lsgm.params > {SCHEMA.name}"
