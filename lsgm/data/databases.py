"""Images in LMDB databases: which entries are images, and which resolution they have."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgm.data import decode
from lsgm.data.formats import Collection, next_larger
from lsgm.errors import LSGMError

# LMDB maps its file into memory and trusts it: a truncated or damaged file kills the process that reads it.
READ_ALL = """
import sys
sys.path[:] = filter(None, sys.path)  # not from the working directory
import lmdb
with lmdb.open(sys.argv[1], subdir=False, readonly=True, lock=False, readahead=False) as database:
    with database.begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            found = transaction.get(key) or b""
            bytes(value[:1]), bytes(value[-1:]), bytes(found[-1:])
"""
ENCODED, RAW = 1, 2  # flags of an entry: starts like an image file; is as long as an image's pixels


def open_lmdb(
    path: Path, size: int, channels: int, threads: int, stack: ExitStack, left_out: Counter[str]
) -> Collection:
    """The images in the database ``path``, encoded or bytes [size, size, channels], for reading from ``threads``.

    If there are several resolutions (keys `128-00000` and `256-00000`): those of ``size``, or of the next larger one.
    Other entries, such as labels and lengths, are counted in ``left_out``: those that neither start like an image nor
    have a key like those of the images. Raises :class:`LSGMError`.
    """
    database = _open(path, threads, stack)
    import lmdb

    def read(name: str) -> bytes:
        try:
            with database.begin(buffers=True) as transaction:
                value = transaction.get(name.encode("latin-1"), b"")
                if len(value) > decode.MAX_BYTES:
                    raise LSGMError(f"{path}: an entry of {len(value)} bytes is too large for an image")
                return bytes(value)
        except lmdb.Error as error:
            raise _damaged(path, error) from None

    def read_pixels(name: str) -> NDArray[np.uint8]:
        return np.frombuffer(read(name), np.uint8).reshape(size, size, channels)

    keys: list[str] = []
    flags = bytearray()
    try:
        with database.begin(buffers=True) as transaction:
            for key, value in transaction.cursor():
                keys.append(bytes(key).decode("latin-1"))
                is_encoded = decode.format_of(bytes(value[: decode.START])) is not None
                flags.append(ENCODED * is_encoded | RAW * (len(value) == size * size * channels))
    except lmdb.Error as error:
        raise _damaged(path, error) from None
    # By chance, some of many raw images start like an encoded file.
    kind = RAW if flags.count(RAW) > flags.count(ENCODED) + flags.count(ENCODED | RAW) else ENCODED
    patterns = {_pattern(key) for key, flag in zip(keys, flags, strict=True) if flag & kind}
    names = []
    for key, flag in zip(keys, flags, strict=True):
        if flag & kind or decode.is_image(key) or _pattern(key) in patterns:  # a damaged image must not go unnoticed
            names.append(key)
        else:
            left_out[_pattern(key)] += 1
    if not names:
        raise LSGMError(
            f"{path}: has no images among its {len(keys)} entries; expected encoded ones, or bytes [{size}, {size}, "
            f"{channels}]"
        )
    if kind == RAW:
        return Collection(str(path), names, read_pixels)
    return Collection(str(path), _of_resolution(path, names, read, size, left_out), read)


def _open(path: Path, threads: int, stack: ExitStack) -> Any:
    try:
        import lmdb
    except ImportError:
        raise LSGMError(
            f"{path}: is an LMDB database, and the package that reads it is not installed: pip install lmdb"
        ) from None
    file = path / "data.mdb" if path.is_dir() else path
    try:
        database = lmdb.open(
            str(file), subdir=False, readonly=True, lock=False, readahead=False, max_readers=threads + 1
        )
        stack.callback(database.close)
        page = database.stat()["psize"]
        end = (database.info()["last_pgno"] + 1) * page
    except lmdb.Error as error:
        raise _damaged(path, error) from None
    done = subprocess.run([sys.executable, "-c", READ_ALL, str(file)], stderr=subprocess.PIPE)
    found = file.stat().st_size
    if done.returncode or (found < end and found % page):
        if found < end:  # not an error by itself: a complete database may lack its last pages if they are unused
            raise LSGMError(f"{path}: is cut short: {found} bytes, its last page ends at {end}; get it again")
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise _damaged(path, said[-1] if said else f"signal {-done.returncode}")
    return database


def _damaged(path: Path, error: object) -> LSGMError:
    return LSGMError(f"{path}: cannot be read as an LMDB database ({error}); get it again")


def _pattern(key: str) -> str:
    """A key with its numbers and hashes replaced by #: `image-000000001` -> `image-#`."""
    return re.sub(r"[0-9a-f]{16,}|\d+", "#", key)


def _of_resolution(
    path: Path, names: list[str], read: Callable[[str], bytes], size: int, left_out: Counter[str]
) -> list[str]:
    """The names for ``size`` or the next larger size, if keys begin with the image size; otherwise all names."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for name in names:
        if match := re.fullmatch(r"(\d{1,5})[-_/]\d+", name):
            by_size[int(match[1])].append(name)
    if not by_size or any(of not in decode.size_of(read(named[0])) for of, named in by_size.items()):
        return names
    chosen = next_larger(by_size, size, str(path))
    left_out.update({f"of {of} pixels": len(named) for of, named in by_size.items() if of != chosen})
    return by_size[chosen]
