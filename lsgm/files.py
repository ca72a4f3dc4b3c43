"""Atomic writes, and reading of text and JSON files with one-line errors."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lsgm.errors import LSGMError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on failure.

    The temporary file is locked while its process is alive. Temporary files of killed processes in the same folder are
    removed. An OSError without a file name, such as that of a full disk, gets the name ``path``.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    handle = _create_locked(part)
    try:
        with named(path):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Add the file name ``path`` to any OSError without one, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def write_all(file: IO[bytes], content: bytes, path: str | Path) -> None:
    """Write all of ``content`` to an unbuffered file, whose writes may be partial, and sync it to disk.

    Raises OSError with the file name ``path``.
    """
    with named(path):
        while content:
            content = content[file.write(content) :]
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically. An OSError names whichever file cannot be read or written."""
    content = source.read_bytes()
    with atomic(target) as part:
        part.write_bytes(content)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of :func:`atomic` in ``folder`` whose processes have ended."""
    for part in folder.glob(".*.part"):
        if re.fullmatch(r"\..+\.\d+\.part", part.name) and part.is_file():
            # If the lock cannot be acquired, its process is alive or the file system has no locks: keep the file.
            with suppress(OSError), part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def _create_locked(part: Path) -> int:
    while True:
        handle = os.open(part, os.O_CREAT | os.O_WRONLY, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            return handle
        if os.fstat(handle).st_nlink:  # otherwise another process removed it as abandoned before it was locked
            return handle
        os.close(handle)


def lock(file: IO[Any], busy: str) -> None:
    """Lock an open file until it is closed; raises :class:`LSGMError` (``busy``) if another process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LSGMError(busy) from None
    except OSError:  # a file system without locks
        pass


def read_text(path: str | Path, way_out: str = "") -> str:
    """Read a UTF-8 text file; raises :class:`LSGMError` that names the file and ends with ``way_out``."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        reason = f"is not a UTF-8 text file (byte {error.start} is 0x{error.object[error.start]:02x})"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    raise LSGMError(f"{path}: {reason}{f'; {way_out}' if way_out else ''}")


def read_json(path: str | Path, way_out: str = "") -> Any:
    """Read a JSON file; raises :class:`LSGMError` that names the file and ends with ``way_out``."""
    return parse_json(read_text(path, way_out), path, way_out)


def parse_json(text: str, where: str | Path, way_out: str = "") -> Any:
    """Parse JSON text; raises :class:`LSGMError` that begins with ``where`` and ends with ``way_out``."""
    try:
        return json.loads(text, object_pairs_hook=_without_doubles)
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise LSGMError(f"{where}: is not valid JSON ({reason}){f'; {way_out}' if way_out else ''}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return found


def to_json(value: Any, indent: int | None = None) -> str:
    """``value`` as strict JSON, in which NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented strict JSON, atomically."""
    with atomic(path) as part:
        part.write_text(to_json(value, indent=2) + "\n")


def seal(content: dict[str, Any], key: str = "sha256") -> dict[str, Any]:
    """Add a hash to ``content`` under ``key``: the sha256 of the canonical strict JSON of all other keys."""
    rest = {name: value for name, value in content.items() if name != key}
    canonical = json.dumps(json.loads(to_json(rest)), sort_keys=True)
    return {**rest, key: hashlib.sha256(canonical.encode()).hexdigest()}


def is_sealed(content: dict[str, Any], key: str = "sha256") -> bool:
    """Whether ``content`` has the correct hash under ``key``."""
    try:
        return key in content and seal(content, key)[key] == content[key]
    except RecursionError:
        return False


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
