"""The IDX format: `0 0 type rank`, the dimensions as big-endian 32-bit integers, then the values in C order."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lsgm.data.formats import Contents, Rows, find
from lsgm.errors import LSGMError

UINT8 = 0x08
MAX_RANK = 4
GZIP_BYTES = 1 << 16  # a gzip file may exceed its content's size by this much


@dataclass(frozen=True)
class IDXFile:
    """One original file of a dataset in the IDX format."""

    name: str  # as published, without .gz
    split: str
    kind: Literal["images", "labels"]
    shape: tuple[int, ...]
    sha256: str  # of the unpacked file; raw, gzipped and npm copies are all checked against it

    @property
    def size(self) -> int:
        """The size of the unpacked file in bytes."""
        return 4 + 4 * len(self.shape) + math.prod(self.shape)


@dataclass(frozen=True)
class IDXFiles:
    """The format of MNIST: for each split, one file of grayscale images and one of labels."""

    files: tuple[IDXFile, ...]

    def open(self, path: Path, stack: ExitStack) -> Contents:
        """The arrays of all files; raises :class:`LSGMError` if one differs from the published file."""
        limit = max(file.size for file in self.files) + GZIP_BYTES
        found = find(path, [file.name for file in self.files], stack, limit)
        arrays: dict[str, Rows] = {}
        for file in self.files:
            where, read = found[file.name]
            array = file_array(file, read(), where)
            arrays[f"{file.split}_{file.kind}"] = array[:, None] if file.kind == "images" else array
        return Contents(arrays, {"sha256": {file.name: file.sha256 for file in self.files}})


def file_array(file: IDXFile, data: bytes, name: str) -> NDArray[np.uint8]:
    """The array in ``data``, which is ``file``, raw or gzipped; raises :class:`LSGMError` with ``name`` if not."""
    content = unpack(data, name, limit=file.size)
    array = parse(content, name)
    if array.shape != file.shape:
        raise LSGMError(f"{name}: has the shape {array.shape}, expected {file.shape}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise LSGMError(f"{name}: is not the published file: sha256 {digest}, expected {file.sha256} (unpacked)")
    return array


def unpack(data: bytes, name: str, limit: int | None = None) -> bytes:
    """The IDX bytes of a file that holds them raw or gzipped; ``data`` is the file, ``name`` what errors call it.

    At most ``limit + 1`` bytes are unpacked, so that a hostile file cannot fill the memory.
    Raises :class:`LSGMError` if the gzip stream is damaged or cut short.
    """
    if not data.startswith(b"\x1f\x8b"):
        return data
    try:
        with gzip.open(io.BytesIO(data)) as file:
            return file.read(-1 if limit is None else limit + 1)
    except EOFError:
        raise LSGMError(f"{name}: is cut short (the gzip stream has no end); get the file again") from None
    except (OSError, zlib.error) as error:
        raise LSGMError(f"{name}: is a damaged gzip file ({error}); get the file again") from None


def parse(content: bytes, name: str) -> NDArray[np.uint8]:
    """Array of the unpacked IDX bytes ``content``, read-only, in the shape that its header gives.

    Raises :class:`LSGMError` with ``name`` if ``content`` is not an IDX file of bytes, or not exactly as long as its
    header says.
    """
    if len(content) < 4 or content[:2] != b"\0\0" or not 1 <= content[3] <= MAX_RANK:
        raise LSGMError(
            f"{name}: is not an IDX file (it starts with {content[:8]!r}); expected the original MNIST format"
        )
    if content[2] != UINT8:
        raise LSGMError(f"{name}: holds IDX type 0x{content[2]:02x}, expected 0x{UINT8:02x} (unsigned bytes)")
    rank = content[3]
    start = 4 + 4 * rank
    if len(content) < start:
        raise LSGMError(f"{name}: is cut short inside its header ({len(content)} bytes); get the file again")
    shape = struct.unpack(f">{rank}I", content[4:start])
    if 0 in shape:
        raise LSGMError(f"{name}: is empty: its header gives the dimensions {shape}; get the file again")
    expected = start + math.prod(shape)
    if len(content) < expected:
        raise LSGMError(
            f"{name}: is cut short: {len(content)} bytes, but its header {shape} needs {expected}; get the file again"
        )
    if len(content) > expected:
        raise LSGMError(f"{name}: holds more than the {expected} bytes that its header {shape} needs; get it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
