"""What docs/method.md says of the code is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
NAMES = sorted(set(re.findall(r"`(lsgm[\w.]*:[\w.]+)`", PAGE)))


def test_it_maps_every_algorithm() -> None:
    assert len(NAMES) > 35
    for algorithm in (1, 2, 3):
        assert f"appendix G.6, algorithm {algorithm} " in PAGE


@pytest.mark.parametrize("name", NAMES)
def test_a_name_exists_and_is_documented(name: str) -> None:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    assert found.__doc__, name
