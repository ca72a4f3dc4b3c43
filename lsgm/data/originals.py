"""Detect whether the original files of a dataset are those from which its store was made.

They count as the same if the names, sizes and times of all files are. If only times differ, as after a copy, the
contents are compared.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lsgm.config.stages import PrepareStage
from lsgm.data.walk import walk
from lsgm.errors import LSGMError
from lsgm.files import read_json, sha256, write_json

SOURCE = "source.json"  # file in a store that records where its images came from

logger = logging.getLogger("lsgm")


@dataclass(frozen=True)
class Originals:
    """The files of a dataset, including those in subfolders, without hidden files.

    Names are relative to the dataset's folder, so moving the whole folder changes nothing.
    """

    files: dict[bytes, os.stat_result]
    root: Path

    @classmethod
    def at(cls, path: str | Path, store: Path) -> Originals | None:
        """The files at ``path``, except those in the folder ``store``; None if there are none."""
        root = Path(path).expanduser()
        if not (root.is_dir() or root.is_file()):  # a pipe or a device has no end
            return None
        inside, ours = root.resolve(), store.resolve()
        own = os.fsencode(f"{ours.relative_to(inside)}/") if ours.is_relative_to(inside) else b"/"
        files = {}
        with suppress(OSError):  # missing or unreadable
            for file in walk(root):
                name = os.fsencode(file.relative_to(root))
                if not name.startswith(own):
                    files[name] = file.stat()
        return cls(dict(sorted(files.items())), root) if files else None

    @property
    def sizes(self) -> str:
        """A hash of all names and sizes."""
        return _hash(b"%s\0%d" % (name, facts.st_size) for name, facts in self.files.items())

    @property
    def times(self) -> str:
        """A hash of all names, sizes and times."""
        lines = (b"%s\0%d\0%d" % (name, facts.st_size, facts.st_mtime_ns) for name, facts in self.files.items())
        return _hash(lines)

    def contents(self) -> str:
        """A hash of all names and contents; reads every file."""
        size = sum(facts.st_size for facts in self.files.values())
        logger.info("%s: hashing %d original files (%.1f MB) to detect changes", self.root, len(self.files), size / 1e6)
        return _hash(b"%s\0%s" % (name, sha256(self.root / os.fsdecode(name)).encode()) for name in self.files)

    def describe(self) -> dict[str, str]:
        """The hashes that a store keeps of its originals."""
        return {"sizes": self.sizes, "times": self.times, "contents": self.contents()}


def plan(stage: PrepareStage, store: Path, seen: Path) -> PrepareStage:
    """Complete the job ``stage``, which makes ``store``, with a hash of its originals: a change makes it another job.

    If the originals are missing (an empty folder is taken for an unmounted disk) but a store with the same settings
    exists, that store is kept: the returned job is the one that made it.

    Args:
        seen: file that remembers which times were found to belong to the same contents.
    Raises:
        LSGMError: the originals are missing, and there is no such store.
    """
    path = stage.source.path
    if path is None:
        return stage
    source, found = read_source(store), Originals.at(path, store)
    made_of, made_by = source.get("originals") or {}, source.get("stage") or {}
    known = bool(made_of and made_by) and (store / "manifest.json").exists()
    if found is None:
        if not known or made_by.get("source") != stage.source.model_dump(mode="json"):
            raise LSGMError(
                f"datasets.{stage.dataset}.path = {path}: does not exist, or holds no file (~ is expanded, "
                "variables such as $HOME are not)"
            )
        return stage.model_copy(update={key: made_by.get(key) for key in ("code", "originals")})
    originals = found.times
    if known:
        times = str(made_of.get("times"))
        same = found.times in (times, _read(seen).get(times))
        if not same and found.sizes == made_of.get("sizes") and found.contents() == made_of.get("contents"):
            write_json(seen, {times: found.times})
            same = True
        originals = (made_by.get("originals") or times) if same else found.times
    return stage.model_copy(update={"originals": originals})


def read_source(store: Path) -> dict[str, Any]:
    """Where the images in a store came from: `kind`, `origin`, `stage` (the job's configuration) and `originals`.

    Empty for a store that an earlier version wrote.
    """
    return _read(store / SOURCE)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except LSGMError:  # missing or damaged: the originals are then unknown and are read again
        return {}
    return found if isinstance(found, dict) else {}


def _hash(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line + b"\n")
    return digest.hexdigest()
