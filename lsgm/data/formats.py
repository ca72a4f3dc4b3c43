"""What the readers of original files have in common: what they give, how they find files in folders and archives."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lsgm.errors import LSGMError

Reader = Callable[[], bytes]

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError)


class Rows(Protocol):
    """Images or labels of a split, read when they are asked for: bytes, [N, C, H, W] or [N]."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]: ...


@dataclass
class Contents:
    """What was found in a dataset's original files."""

    arrays: dict[str, Rows]  # by `{split}_{kind}`, the kind images or labels
    facts: dict[str, Any] = field(default_factory=dict)  # for the manifest: hashes of the files, preprocessing


class Format(Protocol):
    """How the originals of a dataset are read."""

    def open(self, path: Path, stack: ExitStack) -> Contents:
        """What is in the folder or file ``path``; what must stay open is left to ``stack``.

        Raises :class:`LSGMError`, as does reading the rows.
        """
        ...


def find(path: Path, names: Iterable[str], stack: ExitStack) -> dict[str, tuple[str, Reader]]:
    """The files ``names`` in the folder or archive (zip, tar, tar.gz) ``path``: where each is, and how to read it.

    The files may lie at any depth, raw or gzipped, with '-' or '.' before "idx"; where a folder lacks them, in an
    archive in it. Of several copies the least deep is taken, and a raw one before a gzipped one. Nothing is extracted
    to the disk. Raises :class:`LSGMError`.
    """
    names = list(names)
    if names == [path.name] and path.is_file():
        return {path.name: (str(path), _checked(path.read_bytes, str(path)))}
    members = open_members(path, stack)
    found: dict[str, str] = {}
    for member in sorted(members, key=lambda name: (name.count("/"), name.endswith(".gz"), name)):
        found.setdefault(_plain_name(member), member)
    missing = [name for name in names if name not in found]
    if not missing:
        return {name: (where := f"{path}/{found[name]}", _checked(members[found[name]], where)) for name in names}
    without = [f"{path}: has no file {', '.join(missing)} (nor .gz), at any depth"]
    if path.is_dir():
        for archive in sorted(file for file in path.iterdir() if file.name.endswith(ARCHIVES)):
            try:
                return find(archive, names, stack)
            except LSGMError as error:
                without.append(str(error))
    raise LSGMError("; ".join(without))


def open_members(path: Path, stack: ExitStack) -> dict[str, Reader]:
    """The regular files of a folder or archive: their names inside it, and how to read each."""
    if path.is_dir():
        return {f.relative_to(path).as_posix(): f.read_bytes for f in path.rglob("*") if f.is_file()}
    if not path.is_file():
        raise LSGMError(f"{path}: is neither a folder nor a file")
    try:
        if zipfile.is_zipfile(path):
            zipped = stack.enter_context(zipfile.ZipFile(path))
            return {i.filename: _reader(zipped.open, i) for i in zipped.infolist() if not i.is_dir()}
        if tarfile.is_tarfile(path):
            tar = stack.enter_context(tarfile.open(path))  # noqa: SIM115  (the stack closes it)
            return {m.name: _reader(tar.extractfile, m) for m in tar.getmembers() if m.isreg()}
    except (OSError, EOFError, *ARCHIVE_ERRORS) as error:
        raise LSGMError(f"{path}: cannot be read as an archive ({error})") from None
    raise LSGMError(f"{path}: is neither a folder nor a zip or tar archive")


def _plain_name(member: str) -> str:
    """`a/b/train-images.idx3-ubyte.gz` -> `train-images-idx3-ubyte`."""
    return PurePosixPath(member).name.removesuffix(".gz").replace(".idx", "-idx")


def _reader(open_member: Callable[[Any], IO[bytes] | None], member: Any) -> Reader:
    def read() -> bytes:
        file = open_member(member)
        assert file is not None  # tarfile gives None for what is no regular file: those are left out above
        with file:
            return file.read()

    return read


def _checked(read: Reader, name: str) -> Reader:
    """``read``, with its errors as :class:`LSGMError`."""

    def checked() -> bytes:
        try:
            return read()
        except (OSError, EOFError, RuntimeError, *ARCHIVE_ERRORS) as error:  # RuntimeError: an encrypted zip member
            raise LSGMError(f"{name}: cannot be read ({error})") from None

    return checked
