"""The interface of dataset formats, and how they find files in folders and archives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lsgm.data.archives import ARCHIVES, Reader, open_members, read_file
from lsgm.data.walk import children, printable
from lsgm.errors import LSGMError


class Rows(Protocol):
    """Images or labels of a split, read on access: bytes, [N, C, H, W] or [N]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]: ...


@dataclass
class Contents:
    """The contents of a dataset's original files."""

    arrays: dict[str, Rows]  # keyed by `{split}_{kind}`, where kind is images or labels
    facts: dict[str, Any] = field(default_factory=dict)  # for the manifest: hashes of the files, preprocessing


@dataclass
class Collection:
    """Images at their original place: their names, in the order in which they are stored, and how to read one.

    ``read`` returns an encoded image, or bytes [H, W, C].
    """

    where: str
    names: Sequence[str]
    read: Callable[[str], bytes | NDArray[np.uint8]]


class Format(Protocol):
    """A reader of a dataset's original files."""

    def open(self, path: Path, stack: ExitStack) -> Contents:
        """Open the folder or file ``path``; ``stack`` closes whatever must stay open.

        Raises :class:`LSGMError`, as does reading the rows.
        """
        ...


def find(path: Path, names: Iterable[str], stack: ExitStack, limit: int) -> dict[str, tuple[str, Reader]]:
    """Find the files ``names`` in the folder or archive (zip, tar, tar.gz) ``path``: where each is, and how to read it.

    The files may be at any depth, raw or gzipped, with '-' or '.' before "idx"; if a folder lacks them, they may be in
    an archive inside it. Among several copies, the one at the smallest depth is taken, and a raw one before a gzipped
    one. Nothing is extracted to disk, and files above ``limit`` bytes are not read. Raises :class:`LSGMError`, as do
    the readers.
    """
    names = list(names)
    if names == [path.name] and path.is_file():
        return {path.name: (str(path), lambda: read_file(path, limit))}
    members = open_members(path, stack, limit)
    found: dict[str, str] = {}
    for member in sorted(members, key=lambda name: (name.count("/"), name.endswith(".gz"), name)):
        found.setdefault(_plain_name(member), member)
    missing = [name for name in names if name not in found]
    if not missing:
        return {name: (printable(f"{path}/{found[name]}"), members[found[name]]) for name in names}
    without = [f"{path}: has no file {', '.join(missing)} (nor .gz), at any depth"]
    if path.is_dir():
        for archive in children(path):
            if archive.name.lower().endswith(ARCHIVES):
                try:
                    return find(archive, names, stack, limit)
                except LSGMError as error:
                    without.append(str(error))
    raise LSGMError("; ".join(without))


def next_larger(sizes: Iterable[int], size: int, where: str) -> int:
    """``size`` if it is among the available ``sizes``, otherwise the next larger one; raises :class:`LSGMError`."""
    sizes = sorted(sizes)
    chosen = next((of for of in sizes if of >= size), None)
    if chosen is None:
        raise LSGMError(f"{where}: expected images of at least {size} pixels, found sizes {', '.join(map(str, sizes))}")
    return chosen


def _plain_name(member: str) -> str:
    """`a/b/train-images.idx3-ubyte.gz` -> `train-images-idx3-ubyte`."""
    return PurePosixPath(member).name.removesuffix(".gz").replace(".idx", "-idx")
