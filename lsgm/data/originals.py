"""Whether the original files of a dataset are the same as those that its store was made from.

They are where names, sizes and times of all files are. Where only times differ, as after a copy, the contents decide.
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

from lsgm.data.walk import walk
from lsgm.errors import LSGMError
from lsgm.files import read_json, sha256, write_json

SOURCE = "source.json"  # in a store: where its images came from

logger = logging.getLogger("lsgm")


@dataclass(frozen=True)
class Originals:
    """The files of a set: in subfolders too, hidden ones left out.

    Names are relative to the set's folder, so a set that was moved as it is stays the same.
    """

    files: dict[bytes, os.stat_result]
    root: Path

    @classmethod
    def at(cls, path: str | Path, store: Path) -> Originals | None:
        """The files at ``path``, without what lies in the folder ``store``; None where there are none."""
        root = Path(path).expanduser()
        inside, ours = root.resolve(), store.resolve()
        own = os.fsencode(f"{ours.relative_to(inside)}/") if ours.is_relative_to(inside) else b"/"
        files = {}
        with suppress(OSError):  # away, or not to be read
            for file in walk(root):
                name = os.fsencode(file.relative_to(root))
                if not name.startswith(own):
                    files[name] = file.stat()
        return cls(dict(sorted(files.items())), root) if files else None

    @property
    def sizes(self) -> str:
        """A hash of names and sizes."""
        return _hash(b"%s\0%d" % (name, facts.st_size) for name, facts in self.files.items())

    @property
    def times(self) -> str:
        """A hash of names, sizes and times."""
        lines = (b"%s\0%d\0%d" % (name, facts.st_size, facts.st_mtime_ns) for name, facts in self.files.items())
        return _hash(lines)

    def contents(self) -> str:
        """A hash of names and contents; reads everything."""
        size = sum(facts.st_size for facts in self.files.values())
        logger.info(
            "%s: reading %d original files (%.1f MB) to know them again", self.root, len(self.files), size / 1e6
        )
        return _hash(b"%s\0%s" % (name, sha256(self.root / os.fsdecode(name)).encode()) for name in self.files)

    def describe(self) -> dict[str, str]:
        """What a store keeps of its originals."""
        return {"sizes": self.sizes, "times": self.times, "contents": self.contents()}


def identity(path: str | Path | None, store: Path, seen: Path) -> str | None:
    """What to call the originals at ``path`` in the job that makes ``store``: another name for other originals.

    Where they are away (a folder without a file is a disk that is not mounted), they are taken for those that the
    store was made from: it stays as it is.

    Args:
        seen: a file that remembers which times were found to belong to the same contents.
    """
    if path is None:
        return None
    source, found = read_source(store), Originals.at(path, store)
    made_of, made_by = source.get("originals"), source.get("stage")
    if not isinstance(made_of, dict) or not isinstance(made_by, dict):
        return found.times if found is not None else None
    known, times = made_by.get("originals") or made_of.get("times"), str(made_of.get("times"))
    if found is None or found.times in (times, _read(seen).get(times)):
        return known
    if found.sizes == made_of.get("sizes") and found.contents() == made_of.get("contents"):
        write_json(seen, {times: found.times})
        return known
    return found.times


def read_source(store: Path) -> dict[str, Any]:
    """Where the images in a store came from: `kind`, `origin`, `stage` (the job's configuration) and `originals`.

    Empty for a store of an earlier version.
    """
    return _read(store / SOURCE)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except LSGMError:  # missing, or damaged: the originals are then unknown, and read again
        return {}
    return found if isinstance(found, dict) else {}


def _hash(lines: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line + b"\n")
    return digest.hexdigest()
