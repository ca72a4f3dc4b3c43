"""Pickled batches of images: CIFAR-10's python version and the downsampled ImageNet. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgm.data.formats import Contents, Reader, Rows, find
from lsgm.errors import LSGMError

# All that a pickled array needs, under its names in NumPy 1 and 2.
ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _Unpickler(pickle.Unpickler):
    """Arrays, strings, numbers and containers of these; any other name in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs")
        # An array is made from its bytes alone: NumPy's own constructors also take objects, and with them pointers.
        if name == "_reconstruct":
            return lambda *_: np.empty(0, np.uint8)
        if name == "ndarray":
            return None
        if name == "dtype":
            return _plain_dtype
        return super().find_class(module, name)


def _plain_dtype(kind: str, *_: object) -> np.dtype[Any]:
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if re.fullmatch(r"[<>=|]?[uif][1248]", kind) is None:
        raise pickle.UnpicklingError(f"it holds an array of {kind!r}; those of a batch of images hold numbers")
    return np.dtype(kind)


def load_batch(data: bytes, name: str, size: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Images [N, 3, size, size] and labels of one batch; raises :class:`LSGMError` with ``name``."""
    try:
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()  # those of Python 2 have their keys in bytes
    except Exception as error:  # damaged pickles end in all kinds of them
        raise LSGMError(f"{name}: cannot be read as a batch of images ({error}); get the file again") from None
    if not isinstance(batch, dict):
        raise LSGMError(f"{name}: holds {type(batch).__name__}, expected a dictionary with data and labels")
    batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    images, labels = batch.get("data"), batch.get("labels")
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 2
        or images.shape[1] != 3 * size * size
    ):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise LSGMError(f"{name}: expected `data` as uint8 [N, {3 * size * size}], found {found}")
    if not isinstance(labels, (list, np.ndarray)) or len(labels) != len(images):
        raise LSGMError(f"{name}: expected one label for each of its {len(images)} images")
    return images.reshape(-1, 3, size, size), list(labels)


@dataclass(frozen=True)
class PickledBatches:
    """Files that each hold a dictionary with `data`, bytes [N, 3 size size], and `labels`."""

    files: Mapping[str, tuple[str, ...]]  # of each split
    size: int
    labels: bool = False  # keep them: bytes, so not those of a thousand classes

    def open(self, path: Path, stack: ExitStack) -> Contents:
        found = find(path, [name for names in self.files.values() for name in names], stack)
        arrays: dict[str, Rows] = {}
        hashes: dict[str, str] = {}
        for split, names in self.files.items():
            parts, labels = [], []
            for name in names:
                where, read = found[name]
                content = read()
                images, of_these = load_batch(content, where, self.size)
                hashes[name] = hashlib.sha256(content).hexdigest()
                parts.append((len(images), _loader(read, where, self.size)))
                labels += of_these
            arrays[f"{split}_images"] = Joined(parts, (3, self.size, self.size))
            if self.labels:
                arrays[f"{split}_labels"] = np.array(labels, dtype=np.uint8)
        return Contents(arrays, {"sha256": hashes})


def _loader(read: Reader, where: str, size: int) -> Callable[[], NDArray[np.uint8]]:
    return lambda: load_batch(read(), where, size)[0]


class Joined:
    """The images of several files, one of which is in memory at a time."""

    def __init__(self, parts: list[tuple[int, Callable[[], NDArray[np.uint8]]]], image_shape: tuple[int, ...]) -> None:
        self._parts = parts
        self._held: tuple[int, NDArray[np.uint8]] | None = None
        self.shape = (sum(count for count, _ in parts), *image_shape)

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]:
        first, last, _ = rows.indices(self.shape[0])
        pieces, start = [], 0
        for number, (count, load) in enumerate(self._parts):
            a, b = max(first - start, 0), min(last - start, count)
            if a < b:
                if self._held is None or self._held[0] != number:
                    self._held = None  # the one before is let go first
                    self._held = number, load()
                pieces.append(self._held[1][a:b])
            start += count
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), np.uint8)
