"""List the files of a dataset in a folder, without hidden files and files that other programs leave there.

Names that are not UTF-8 are kept as Python reads them, with surrogates.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path, PurePosixPath

# Files and folders that file managers, network drives, file systems and LMDB leave behind, in lower case.
LEFTOVERS = {
    "__macosx", "icon\r", "network trash folder", "temporary items",
    "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler",
    "system volume information", "@eadir", "@recycle", "#recycle", "#snapshot", "lost+found", "lock.mdb",
}  # fmt: skip
KINDS = 6  # number of kinds that a log line names


def hidden(name: str) -> bool:
    """Whether any part of ``name``, a path inside a set, is hidden or one of :data:`LEFTOVERS`."""
    parts = re.split(r"[/\\]", name)  # zip archives made on Windows may have backslashes
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in LEFTOVERS for part in parts)


def walk(path: Path, left_out: Counter[str] | None = None) -> list[Path]:
    """The files in the folder ``path`` at any depth, sorted, without hidden ones; for a file, the file itself.

    Links are followed. Each folder is read once, preferably under its own name rather than through a link, so that
    loops end and no image is taken twice; links to folders that contain ``path`` are not followed. Entries that cannot
    be read are counted in ``left_out`` by kind. Raises OSError if ``path`` itself cannot be read.
    """
    if not path.is_dir():
        return [path]
    left_out = Counter() if left_out is None else left_out
    files: list[Path] = []
    seen = {_identity(folder) for folder in path.resolve().parents}
    todo, links = [path], list[Path]()
    while todo or links:
        if not todo:  # links come after all real folders
            links.sort(reverse=True)
        folder = todo.pop() if todo else links.pop()
        try:
            identity = _identity(folder)
            if identity in seen:
                left_out["links to folders that were already read"] += 1
                continue
            seen.add(identity)
            entries = list(os.scandir(folder))
        except OSError:
            if folder == path:
                raise
            left_out["unreadable folders"] += 1
            continue
        for entry in entries:
            place = folder / entry.name
            if hidden(entry.name):
                continue
            kind = _kind(entry)
            if kind == "file":
                files.append(place)
            elif kind == "folder":
                (links if entry.is_symlink() else todo).append(place)
            else:
                left_out[kind] += 1
    return sorted(files)


def children(path: Path) -> list[Path]:
    """The entries directly in the folder ``path``, sorted, without hidden ones."""
    return sorted(child for child in path.iterdir() if not hidden(child.name))


def kind_of(name: str) -> str:
    """The kind under which a skipped file is counted: its suffix."""
    return PurePosixPath(name).suffix.lower() or "without suffix"


def told(left_out: Counter[str]) -> str:
    """The kinds with their counts, most frequent first: `12 .txt, 3 dangling links`."""
    kinds = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count} {printable(kind)}" for kind, count in kinds[:KINDS]]
    if rest := sum(count for _, count in kinds[KINDS:]):
        listed.append(f"{rest} of other kinds")
    return ", ".join(listed)


def printable(name: str) -> str:
    r"""``name`` for a message: bytes that are not UTF-8 and control characters are written as \x1b."""
    return "".join(c if c.isprintable() else _escaped(c) for c in name)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "special files" if os.path.exists(entry.path) else "dangling links"
    except OSError:  # a link to itself, or a folder that may be listed but not entered
        return "dangling links" if entry.is_symlink() else "unreadable files"
