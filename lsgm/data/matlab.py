"""Images as the columns of matrices in a MATLAB file: the OMNIGLOT of the IWAE's authors (arXiv 1509.00519)."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgm.data.formats import Contents, Rows, find
from lsgm.data.walk import printable
from lsgm.errors import LSGMError

MAX_BYTES = 1 << 30  # limit for the file and for each matrix in it; the authors' file has 200 MB
COMPRESSED = 15  # element type in a MATLAB file
# SciPy runs in a process of its own: a damaged file may kill it.
READER = """
import sys
sys.path[:] = filter(None, sys.path)  # not from the working directory
import io, json, math
import numpy as np
from scipy.io import loadmat, whosmat
from scipy.sparse import issparse

limit, *variables = sys.argv[1:]
content = io.BytesIO(sys.stdin.buffer.read())
numbers = ["double", "single", "logical", "sparse", "int8", "int16", "int32", "int64"]
numbers += ["uint8", "uint16", "uint32", "uint64"]
kinds, matrices = {}, {}
for name, shape, kind in whosmat(content):
    kinds[name] = f"{kind} of shape {list(shape)}"
    if name in variables and kind in numbers and math.prod(shape) <= int(limit):
        matrix = loadmat(content, variable_names=[name])[name]
        matrices[name] = matrix.toarray() if issparse(matrix) else matrix
output = io.BytesIO()
np.savez(output, **matrices)
sys.stdout.buffer.write(json.dumps(kinds).encode() + b"\\n" + output.getbuffer())
"""
EXPECTED = "expected a matrix [pixels of a square image, images] of real numbers from 0 to 1"


@dataclass(frozen=True)
class MatFile:
    """One .mat file with a matrix [pixels, N] per split: square grayscale images, intensities from 0 to 1."""

    name: str
    variables: Mapping[str, str]  # split -> name of its matrix

    def open(self, path: Path, stack: ExitStack) -> Contents:
        if importlib.util.find_spec("scipy") is None:
            raise LSGMError(f"{self.name}: reading it needs SciPy: pip install scipy")
        where, read = find(path, [self.name], stack, MAX_BYTES)[self.name]
        content = read()
        kinds, matrices = _read(content, list(self.variables.values()), where)
        arrays: dict[str, Rows] = {}
        for split, variable in self.variables.items():
            if variable not in kinds:
                raise LSGMError(f"{where}: has no matrix {variable!r}; expected the file by the authors of the IWAE")
            if variable not in matrices:
                raise LSGMError(f"{where}: {variable}: {EXPECTED}, found a {kinds[variable]}")
            arrays[f"{split}_images"] = _images(matrices[variable], f"{where}: {variable}")
        return Contents(arrays, {"sha256": {self.name: hashlib.sha256(content).hexdigest()}})


def _read(content: bytes, variables: list[str], where: str) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """The kind of each variable in the file, and those of ``variables`` that are matrices of numbers."""
    if content[512:520] == b"\x89HDF\r\n\x1a\n":
        raise LSGMError(f"{where}: is a MATLAB 7.3 file (HDF5); in MATLAB, save it with the option -v7")
    try:
        _check_unpacked(content)
        command = [sys.executable, "-c", READER, str(MAX_BYTES // 8), *variables]
        done = subprocess.run(command, input=content, capture_output=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise ValueError(said[-1] if said else f"signal {-done.returncode}")
        output = io.BytesIO(done.stdout)
        kinds = json.loads(output.readline())
        return kinds, dict(np.load(output, allow_pickle=False))
    except (ValueError, zlib.error) as error:
        raise LSGMError(
            f"{where}: cannot be read as a MATLAB file ({printable(str(error))}); get the file again"
        ) from None


def _check_unpacked(content: bytes) -> None:
    """Raise ValueError if compressed matrices would fill the memory: they may unpack to more than they declare."""
    if content[126:128] not in (b"IM", b"MI"):  # version 4 has no compression
        return
    order = "<" if content[126:128] == b"IM" else ">"
    at = 128
    while at + 8 <= len(content):
        kind, length = struct.unpack_from(f"{order}II", content, at)
        at += 8
        if kind == COMPRESSED:
            unzip, packed, unpacked = zlib.decompressobj(), content[at : at + length], 0
            while chunk := unzip.decompress(packed, 1 << 24):
                packed, unpacked = unzip.unconsumed_tail, unpacked + len(chunk)
                if unpacked > MAX_BYTES:
                    raise ValueError(f"a matrix of more than {MAX_BYTES} bytes")
        at += length


def _images(matrix: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """[pixels, N] in [0, 1] -> bytes [N, 1, side, side]."""
    side = math.isqrt(len(matrix))
    if matrix.ndim != 2 or side * side != len(matrix) or not matrix.size:
        raise LSGMError(f"{what}: {EXPECTED}, found the shape {matrix.shape}")
    if matrix.dtype.kind not in "buif":
        raise LSGMError(f"{what}: {EXPECTED}, found one of {matrix.dtype}")
    if not (np.isfinite(matrix).all() and matrix.min() >= 0 and matrix.max() <= 1):
        raise LSGMError(
            f"{what}: expected intensities from 0 to 1, found {float(matrix.min()):g} to {float(matrix.max()):g}"
        )
    if matrix.dtype.kind != "f":
        matrix = matrix.astype(np.float64)
    # MATLAB stores columns first: without the swap of the axes the letters would be transposed.
    images = matrix.T.reshape(-1, 1, side, side).swapaxes(2, 3)
    return np.ascontiguousarray(np.rint(255 * images).astype(np.uint8))
