"""What a training needs to resume exactly where it stopped: written atomically, the last two kept, checked when read.

A state file is a torch file of tensors and plain values (nothing in it is executed). A small file with the same stem
holds its SHA-256. Random generators need no state, because a step's random numbers depend only on (seed, step).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lsgm.errors import LSGMError
from lsgm.files import atomic, remove_abandoned, sha256
from lsgm.progress import log

KEPT = 2


class States:
    """The state files of one training.

    Args:
        folder: folder of the state files, created when the first one is written.
        identity: settings and inputs of the training; a state with another identity is rejected.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = dict(_flat(identity))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after ``step`` steps; remove all but the last two, and those of later steps.

        Raises:
            LSGMError: the state cannot be written. Existing states are kept.
        """
        buffer = io.BytesIO()
        torch.save({"step": step, "identity": self.identity, "state": state}, buffer)
        content = buffer.getbuffer()
        path = self._path(step)
        try:
            with atomic(path.with_suffix(".sha256")) as part:  # first: a state always has its checksum
                part.write_text(hashlib.sha256(content).hexdigest() + "\n")
            with atomic(path) as part, open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if not path.exists():
                path.with_suffix(".sha256").unlink(missing_ok=True)
            raise LSGMError(
                f"{path}: the state of the training cannot be written ({error.strerror}); make room or name another "
                "folder, and start the job again: it resumes from the last state"
            ) from None
        steps = self._steps()
        self._forget([old for old in steps if old > step] + [old for old in steps if old <= step][:-KEPT])

    def load(self, below: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """The step count and state in the newest intact file, with fewer than ``below`` steps; None if there is none.

        Looking up a part that the state lacks raises :class:`LSGMError`.

        Raises:
            LSGMError: the state belongs to another training, or no state is intact.
        """
        steps = [step for step in self._steps() if below is None or step < below]
        for step in reversed(steps):
            path = self._path(step)
            try:
                found = _read(path, step)
            except Exception as error:  # torch's reader raises exceptions of many kinds on damaged files
                log.info(f"{path}: damaged ({' '.join(str(error).split())[:200]}); trying the previous state")
                continue
            identity = found["identity"]
            if identity != self.identity:
                keys = self.identity.keys() | identity.keys()
                differing = sorted(key for key in keys if self.identity.get(key) != identity.get(key))
                raise LSGMError(
                    f"{path}: is of a training with other settings ({', '.join(map(str, differing))}); put them back "
                    f"to resume, or remove {self.folder} to start over"
                )
            return step, _Tree(found["state"], path)
        if steps and below is None:
            raise LSGMError(f"{self.folder}: no state in it is whole; restore one, or remove the folder to start over")
        return None

    def clear(self) -> None:
        """Remove all states, after training is done."""
        self._forget(self._steps())
        with suppress(OSError):  # missing, or it contains other files
            self.folder.rmdir()

    def _forget(self, steps: list[int]) -> None:
        for step in steps:
            self._path(step).unlink(missing_ok=True)
        # of these states, or of one that was never written because its process was killed
        for checksum in self.folder.glob("step-*.sha256"):
            if not checksum.with_suffix(".pt").exists():
                checksum.unlink(missing_ok=True)
        remove_abandoned(self.folder)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:09}.pt"

    def _steps(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        found = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)


class _Tree(dict[str, Any]):
    """A state from a file; looking up a missing part raises an error of one line."""

    def __init__(self, tree: dict[str, Any], path: Path, where: str = "") -> None:
        super().__init__(tree)
        self.path, self.where = path, where
        for key in ("parts", "optimizers"):
            if isinstance(tree.get(key), dict):
                self[key] = _Tree(tree[key], path, f"{where}{key}.")

    def __missing__(self, key: str) -> Any:
        raise LSGMError(
            f"{self.path}: has no {self.where}{key}, it is of another version of the program; remove "
            f"{self.path.parent} to start over"
        )


def _read(path: Path, step: int) -> dict[str, Any]:
    """The contents of the state file of ``step``; raises an exception of any kind if the file is damaged."""
    if sha256(path) != path.with_suffix(".sha256").read_text(encoding="utf-8").strip():
        raise ValueError("its checksum differs")
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not (isinstance(found, dict) and found.get("step") == step):
        raise ValueError(f"it is not a state of step {step}")
    if not (isinstance(found.get("identity"), dict) and isinstance(found.get("state"), dict)):
        raise ValueError("it has no identity or no state")
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted key, text) pairs."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)
