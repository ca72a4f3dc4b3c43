"""placeholder"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def walk(path: Path) -> Iterator[Path]:
    for file in path.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file
