"""Whether the original files of a dataset are the same as before, told without reading them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from lsgm.data.walk import walk

SOURCE = "source.json"  # in a store: where its images came from, `originals` among it


def identity(path: str | Path, ours: Collection[Path] = ()) -> str | None:
    """A hash of the names, sizes and times of the files at ``path``; None where there are none.

    The files are those of the set: in subfolders too, hidden ones left out. Names are relative to ``path``: a set that
    was moved as it is stays the same. What lies in the folders ``ours`` does not count.
    """
    root = Path(path).expanduser()
    digest, found = hashlib.sha256(), False
    for file in sorted(walk(root)) if root.is_dir() else [root]:
        try:
            facts = file.stat()
        except OSError:  # away, or gone since the folder was listed
            continue
        if not any(folder in file.parents for folder in ours):
            name = os.fsencode(file.relative_to(root))
            digest.update(b"%s\0%d\0%d\n" % (name, facts.st_size, facts.st_mtime_ns))
            found = True
    return digest.hexdigest() if found else None


def identity_or_recorded(path: str | Path | None, store: Path) -> str | None:
    """:func:`identity` of the originals at ``path``; where they are away, that of those that ``store`` was made from."""
    if path is None:
        return None
    return identity(path, [store]) or _recorded(store)


def _recorded(store: Path) -> str | None:
    try:
        found = json.loads((store / SOURCE).read_text())["originals"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None
