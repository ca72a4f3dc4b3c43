"""Read files in folders, zip and tar archives into memory, up to a size limit. Nothing is extracted to disk."""

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
STEP = 4096  # bytes read at a time; bzip2 and lzma may unpack even this little to a hundred megabytes
TAR_HEADERS = (b"L", b"K", b"x", b"g", b"X")  # long names and other metadata of members
MAX_TAR_HEADER = 1 << 20  # bytes


def open_members(path: Path, stack: ExitStack, limit: int) -> dict[str, Reader]:
    """Map the names of the regular files in a folder or archive to functions that read up to ``limit`` bytes of each.

    Hidden files are skipped. If a tar archive holds a name twice, the last file counts, as in tar itself.
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
    except Exception as error:  # damaged archives raise exceptions of all kinds
        raise _damaged(path, error) from None
    return {member.name: _tar_reader(tar, member, path, limit) for member in members}


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a file; raises :class:`LSGMError` if it is not a regular file or exceeds ``limit`` bytes."""
    try:
        if not path.is_file():
            raise LSGMError(f"{printable(str(path))}: is not a regular file")
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
    except Exception as error:  # damaged archives raise exceptions of all kinds
        raise _damaged(path, error) from None


def zip_members(archive: zipfile.ZipFile, path: Path, left_out: Counter[str] | None = None) -> list[zipfile.ZipInfo]:
    """The regular files of a zip archive in their order, except hidden ones; links are counted in ``left_out``.

    Raises :class:`LSGMError` if two files have the same name, because it is unclear which one is meant.
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
            raise LSGMError(
                f"{path}: holds two files called {name}; pack it again with only one of them, or under two names"
            )
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
            assert (
                file is not None
            )  # tarfile returns None only for members that are not regular files, which are skipped
            with file:
                return _bounded(file, size, where, limit)
        except LSGMError:
            raise
        except Exception as error:  # RuntimeError: an encrypted member
            raise LSGMError(f"{printable(where)}: cannot be read ({error}); get the archive again") from None

    return read


def _bounded(file: IO[bytes], size: int, where: str, limit: int) -> bytes:
    """The rest of ``file``, whose header declares ``size`` bytes; stops unpacking after ``limit`` bytes."""
    content = bytearray()
    while size <= limit and len(content) <= limit and (chunk := file.read(STEP)):
        content += chunk
    if max(size, len(content)) > limit:
        raise _too_long(where, limit)
    return bytes(content)


def _too_long(where: str, limit: int) -> LSGMError:
    return LSGMError(
        f"{printable(where)}: holds more than {limit} bytes, too many for a file of this kind; get it again"
    )


class _Member(tarfile.TarInfo):
    """A member whose name and metadata, which tarfile reads into memory, have a bounded length."""

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
