"""Images as the columns of matrices in a MATLAB file: the OMNIGLOT of the IWAE's authors (arXiv 1509.00519)."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgm.data.formats import Contents, Rows, find
from lsgm.errors import LSGMError

MAX_BYTES = 1 << 30  # of the file and of each matrix in it: the authors' have 200 MB
COMPRESSED = 15  # type of an element in a MATLAB file
# What SciPy calls the classes of matrices that may hold intensities.
NUMBERS = {
    "double", "single", "logical", "sparse",
    "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
}  # fmt: skip
EXPECTED = "expected a matrix [pixels of a square, images] of real numbers from 0 to 1"


@dataclass(frozen=True)
class MatFile:
    """One .mat file with a matrix [pixels, N] for each split: square grey images, intensities from 0 to 1."""

    name: str
    variables: Mapping[str, str]  # the matrix of each split

    def open(self, path: Path, stack: ExitStack) -> Contents:
        try:
            from scipy.io import loadmat, whosmat
            from scipy.sparse import issparse
        except ImportError:
            raise LSGMError(f"{self.name}: reading it needs scipy: pip install scipy") from None
        where, read = find(path, [self.name], stack, MAX_BYTES)[self.name]
        content = read()
        arrays: dict[str, Rows] = {}
        try:
            _check_unpacked(content)
            kinds = {name: (shape, kind) for name, shape, kind in whosmat(io.BytesIO(content))}
        except NotImplementedError:
            raise LSGMError(
                f"{where}: is a file of MATLAB 7.3 (HDF5); in MATLAB, save it with the option -v7"
            ) from None
        except Exception as error:  # damaged files end in all kinds of them
            raise _damaged(where, error) from None
        for split, variable in self.variables.items():
            if variable not in kinds:
                raise LSGMError(f"{where}: has no matrix {variable!r}; expected the file of the IWAE's authors")
            shape, kind = kinds[variable]
            if kind not in NUMBERS or math.prod(shape) > MAX_BYTES // 8:
                raise LSGMError(f"{where}: {variable}: {EXPECTED}, found a {kind} of shape {tuple(shape)}")
            try:
                matrix = loadmat(io.BytesIO(content), variable_names=[variable])[variable]
                matrix = matrix.toarray() if issparse(matrix) else np.asarray(matrix)
            except Exception as error:
                raise _damaged(where, error) from None
            arrays[f"{split}_images"] = _images(matrix, f"{where}: {variable}")
        return Contents(arrays, {"sha256": {self.name: hashlib.sha256(content).hexdigest()}})


def _damaged(where: str, error: Exception) -> LSGMError:
    return LSGMError(f"{where}: cannot be read as a MATLAB file ({error}); get the file again")


def _check_unpacked(content: bytes) -> None:
    """Raise ValueError if compressed matrices would fill the memory: they may unpack to far more than they say."""
    if content[126:128] not in (b"IM", b"MI"):  # version 4, which is not compressed
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
    # MATLAB counts down the columns first: without the last transposition the letters lie on their side.
    images = matrix.T.reshape(-1, 1, side, side).swapaxes(2, 3)
    return np.ascontiguousarray(np.rint(255 * images).astype(np.uint8))
