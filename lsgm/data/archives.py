"""Files in folders, zip and tar archives, read into memory within a limit; nothing is extracted to the disk."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from lsgm.data.walk import hidden, printable, walk
from lsgm.errors import LSGMError

Reader = Callable[[], bytes]

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
STEP = 4096  # bytes read at a time: bzip2 and lzma unpack all that they are given, up to a hundred megabytes of these
TAR_HEADERS = (b"L", b"K", b"x", b"g", b"X")  # long names and other notes about members
MAX_TAR_HEADER = 1 << 20  # bytes


def open_members(path: Path, stack: ExitStack, limit: int) -> dict[str, Reader]:
    """The regular files of a folder or archive: their names inside it, and how to read each, up to ``limit`` bytes.

    Hidden ones are left out. Of a name that a tar archive holds twice the last counts, as for tar itself.
    Raises :class:`LSGMError`, as do the readers.
    """
    if path.is_dir():
        return {file.relative_to(path).as_posix(): _file_reader(file, limit) for file in walk(path)}
    if not path.is_file():
        raise LSGMError(f"{path}: is neither a folder nor a file")
    if is_zip(path):
        archive = open_zip(path, stack)
        return {info.filename: zip_reader(archive, info, path, limit) for info in zip_members(archive, path)}
    tar = _open_tar(path, stack)
    try:
        members = [member for member in tar.getmembers() if member.isreg() and not hidden(member.name)]
    except Exception as error:  # damaged archives end in all kinds of them
        raise _damaged(path, error) from None
    return {member.name: _tar_reader(tar, member, path, limit) for member in members}


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a file; raises :class:`LSGMError` if it is no regular file of up to ``limit`` bytes."""
    try:
        if not path.is_file():
            raise LSGMError(f"{printable(str(path))}: is no regular file")
        with path.open("rb") as file:
            content = file.read(min(path.stat().st_size, limit) + 1)
    except OSError as error:
        raise LSGMError(f"{printable(str(path))}: cannot be read ({error.strerror})") from None
    if len(content) > limit:
        raise _too_long(str(path), limit)
    return content


def is_zip(path: Path) -> bool:
    """Whether a file is a zip archive, or was one before it was damaged."""
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\3\4" or zipfile.is_zipfile(path)


def open_zip(path: Path, stack: ExitStack) -> zipfile.ZipFile:
    """The zip archive at ``path``; raises :class:`LSGMError` if it is damaged or incomplete."""
    try:
        return stack.enter_context(zipfile.ZipFile(path))
    except Exception as error:  # damaged archives end in all kinds of them
        raise _damaged(path, error) from None


def zip_members(archive: zipfile.ZipFile, path: Path, left_out: Counter[str] | None = None) -> list[zipfile.ZipInfo]:
    """The regular files of a zip archive in its order, without hidden ones; links are counted in ``left_out``.

    Raises :class:`LSGMError` where a name stands for two files: which one is meant cannot be told.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.is_dir() or hidden(info.filename):
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            if left_out is not None:
                left_out["links"] += 1
            continue
        if info.filename in members:
            name = printable(info.filename)
            raise LSGMError(f"{path}: holds two files called {name}; pack it again with one of them, or with two names")
        members[info.filename] = info
    return list(members.values())


def zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, limit: int) -> Reader:
    return _reader(lambda: archive.open(info), info.file_size, f"{path}/{info.filename}", limit)


def _tar_reader(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path, limit: int) -> Reader:
    return _reader(lambda: tar.extractfile(member), member.size, f"{path}/{member.name}", limit)


def _file_reader(file: Path, limit: int) -> Reader:
    return lambda: read_file(file, limit)


def _reader(open_member: Callable[[], IO[bytes] | None], size: int, where: str, limit: int) -> Reader:
    def read() -> bytes:
        try:
            file = open_member()
            assert file is not None  # tarfile gives None for what is no regular file: those are left out
            with file:
                return _bounded(file, size, where, limit)
        except LSGMError:
            raise
        except Exception as error:  # RuntimeError: an encrypted member
            raise LSGMError(f"{printable(where)}: cannot be read ({error}); get the archive again") from None

    return read


def _bounded(file: IO[bytes], size: int, where: str, limit: int) -> bytes:
    """The rest of ``file``, which says of itself that it has ``size`` bytes: no more than ``limit`` are unpacked."""
    content = bytearray()
    while size <= limit and len(content) <= limit and (chunk := file.read(STEP)):
        content += chunk
    if max(size, len(content)) > limit:
        raise _too_long(where, limit)
    return bytes(content)


def _too_long(where: str, limit: int) -> LSGMError:
    return LSGMError(f"{printable(where)}: holds more than {limit} bytes, which no file of its kind does; get it again")


class _Member(tarfile.TarInfo):
    """A member whose name and notes, which tarfile reads into memory, are no longer than they may be."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.type in TAR_HEADERS and member.size > MAX_TAR_HEADER:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member


def _open_tar(path: Path, stack: ExitStack) -> tarfile.TarFile:
    try:
        return stack.enter_context(tarfile.open(path, tarinfo=_Member))
    except tarfile.ReadError:
        if path.name.lower().endswith(ARCHIVES):
            raise LSGMError(
                f"{path}: is neither a folder nor a zip or tar archive, or a damaged or incomplete one; get it again"
            ) from None
        raise LSGMError(f"{path}: is neither a folder nor a zip or tar archive") from None
    except Exception as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> LSGMError:
    return LSGMError(f"{path}: is a damaged or incomplete archive ({error}); get it again")
