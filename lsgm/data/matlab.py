"""Images as the columns of matrices in a MATLAB file: the OMNIGLOT of the IWAE's authors (arXiv 1509.00519)."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgm.data.formats import Contents, Rows, find
from lsgm.errors import LSGMError


@dataclass(frozen=True)
class MatFile:
    """One .mat file with a matrix [pixels, N] for each split: square grey images, intensities from 0 to 1."""

    name: str
    variables: Mapping[str, str]  # the matrix of each split

    def open(self, path: Path, stack: ExitStack) -> Contents:
        try:
            from scipy.io import loadmat
        except ImportError:
            raise LSGMError(f"{self.name}: reading it needs scipy: pip install scipy") from None
        where, read = find(path, [self.name], stack)[self.name]
        content = read()
        try:
            matrices: dict[str, Any] = loadmat(io.BytesIO(content), variable_names=list(self.variables.values()))
        except Exception as error:  # damaged files end in all kinds of them
            raise LSGMError(f"{where}: cannot be read as a MATLAB file ({error}); get the file again") from None
        arrays: dict[str, Rows] = {}
        for split, variable in self.variables.items():
            if variable not in matrices:
                raise LSGMError(f"{where}: has no matrix {variable!r}; expected the file of the IWAE's authors")
            arrays[f"{split}_images"] = _images(np.asarray(matrices[variable]), f"{where}: {variable}")
        return Contents(arrays, {"sha256": {self.name: hashlib.sha256(content).hexdigest()}})


def _images(matrix: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """[pixels, N] in [0, 1] -> bytes [N, 1, side, side]."""
    side = math.isqrt(len(matrix))
    if matrix.ndim != 2 or side * side != len(matrix):
        raise LSGMError(f"{what}: expected a matrix [pixels of a square, images], found the shape {matrix.shape}")
    if not (np.isfinite(matrix).all() and matrix.min() >= 0 and matrix.max() <= 1):
        raise LSGMError(f"{what}: expected intensities from 0 to 1, found {matrix.min():g} to {matrix.max():g}")
    # MATLAB counts down the columns first: without the last transposition the letters lie on their side.
    images = matrix.T.reshape(-1, 1, side, side).swapaxes(2, 3)
    return np.ascontiguousarray(np.rint(255 * images).astype(np.uint8))
