"""Pickled batches of images: CIFAR-10's python version and the downsampled ImageNet. Nothing in them is executed."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgm.data.archives import Reader
from lsgm.data.formats import Contents, Rows, find
from lsgm.data.walk import printable
from lsgm.errors import LSGMError

MAX_BYTES = 1 << 30  # limit per file; those of ImageNet have 400 MB


class _Dtype:
    """NumPy's pickled dtype, restricted to numbers of either byte order."""

    def __init__(self, kind: str | bytes, *_: object) -> None:
        kind = kind.decode() if isinstance(kind, bytes) else kind
        if re.fullmatch(r"[<>=|]?[uif][1248]", kind) is None:
            raise pickle.UnpicklingError(f"it holds an array of {kind!r}; a batch of images holds only numbers")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in (">", b">"):
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    """An array that is built from its bytes alone."""

    array = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array(data, kind, shape, "F" if fortran else "C")


def _array(data: bytes, kind: _Dtype, shape: tuple[int, ...], order: str) -> NDArray[Any]:
    return np.frombuffer(data, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _from_buffer(data: bytes, kind: _Dtype, shape: tuple[int, ...], order: str, axes: Any = None) -> _Array:
    made = _Array()
    made.array = _array(data, kind, shape, order)
    if axes is not None:
        made.array = made.array.transpose(axes)
    return made


def _scalar(kind: _Dtype, data: bytes) -> int | float:
    (value,) = np.frombuffer(data, kind.dtype).tolist()
    return value


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}, which no batch of images needs")
    return text.encode("latin1")


# The names that the pickle of a batch may use, with safe replacements. NumPy's own functions also accept objects, and
# with them pointers.
ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
    **{
        (f"numpy.{core}.{module}", name): function  # core: before NumPy 2
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", lambda *_: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Loads only arrays, strings, numbers and containers of these; any other name in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of images needs")
        function = ALLOWED[module, name]
        return lambda *args: function(*args)  # a new function: a pickle can set attributes of the objects it gets


def _check_opcodes(data: bytes) -> None:
    """Raise UnpicklingError for a pickle that would crash the interpreter, which does not check for this itself."""
    tuples = calls = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        # Hashing nested tuples overflows the stack; a batch has tuples only as arguments of calls.
        tuples += opcode.name.startswith("TUPLE")
        calls += opcode.name in ("REDUCE", "BUILD")
        if tuples > 4 * calls + 1000:
            raise pickle.UnpicklingError("it holds more tuples than a batch of images needs")
        # The memo is an array as long as its highest index.
        if opcode.name.endswith("PUT") and int(argument or 0) > count + 1000:
            raise pickle.UnpicklingError(f"it refers to object {argument}, which does not exist")


def load_batch(data: bytes, name: str, size: int) -> tuple[NDArray[np.uint8], list[Any]]:
    """Images [N, 3, size, size] and labels of one batch; raises :class:`LSGMError` with ``name``."""
    try:
        _check_opcodes(data)
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()  # pickles of Python 2 have bytes as keys
    except Exception as error:  # damaged pickles raise exceptions of all kinds
        raise LSGMError(
            f"{name}: cannot be read as a batch of images ({printable(str(error))}); get the file again"
        ) from None
    if not isinstance(batch, dict):
        raise LSGMError(f"{name}: holds {type(batch).__name__}, expected a dictionary with data and labels")
    images, labels = (batch.get(key, batch.get(key.encode())) for key in ("data", "labels"))
    images, labels = (value.array if isinstance(value, _Array) else value for value in (images, labels))
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 2
        or images.shape[1] != 3 * size * size
        or not len(images)
    ):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise LSGMError(f"{name}: expected `data` as uint8 [N, {3 * size * size}], found {found}")
    if isinstance(labels, np.ndarray):
        labels = labels.tolist()
    if not isinstance(labels, (list, tuple)) or len(labels) != len(images):
        raise LSGMError(f"{name}: expected one label for each of its {len(images)} images")
    return images.reshape(-1, 3, size, size), list(labels)


def label_bytes(labels: list[Any], name: str) -> NDArray[np.uint8]:
    """Labels of a batch as bytes [N]; raises :class:`LSGMError` with ``name`` unless all are integers from 0 to 255."""
    for label in labels:
        if type(label) is not int or not 0 <= label <= 255:
            shown = isinstance(label, (int, float, str, bytes)) and not (type(label) is int and label.bit_length() > 64)
            found = printable(repr(label))[:80] if shown else f"a value of type {type(label).__name__}"
            raise LSGMError(f"{name}: expected labels that are integers from 0 to 255, found {found}")
    return np.array(labels, dtype=np.uint8)


@dataclass(frozen=True)
class PickledBatches:
    """Files that each hold a dictionary with `data`, bytes [N, 3 size size], and `labels`."""

    files: Mapping[str, tuple[str, ...]]  # of each split
    size: int
    labels: bool = False  # whether to keep the labels, which must fit into bytes

    def open(self, path: Path, stack: ExitStack) -> Contents:
        found = find(path, [name for names in self.files.values() for name in names], stack, MAX_BYTES)
        arrays: dict[str, Rows] = {}
        hashes: dict[str, str] = {}
        for split, names in self.files.items():
            parts, labels = [], list[NDArray[np.uint8]]()
            for name in names:
                where, read = found[name]
                content = read()
                images, of_these = load_batch(content, where, self.size)
                hashes[name] = hashlib.sha256(content).hexdigest()
                parts.append((len(images), _loader(read, where, self.size)))
                if self.labels:
                    labels.append(label_bytes(of_these, where))
            arrays[f"{split}_images"] = Joined(parts, (3, self.size, self.size))
            if self.labels:
                arrays[f"{split}_labels"] = np.concatenate(labels)
        return Contents(arrays, {"sha256": hashes})


def _loader(read: Reader, where: str, size: int) -> Callable[[], NDArray[np.uint8]]:
    return lambda: load_batch(read(), where, size)[0]


class Joined:
    """The images of several files, of which one at a time is in memory."""

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
                    self._held = None  # release the previous file first
                    self._held = number, load()
                pieces.append(self._held[1][a:b])
            start += count
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), np.uint8)
