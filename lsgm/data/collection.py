"""Collections of images of any size in folders, zip archives, LMDB databases and TFRecord files."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from contextlib import ExitStack
from pathlib import Path

from lsgm.data import tfrecord
from lsgm.data.archives import is_zip, open_zip, read_file, zip_members, zip_reader
from lsgm.data.databases import open_lmdb
from lsgm.data.decode import MAX_BYTES, SUFFIXES, is_image
from lsgm.data.formats import Collection, next_larger
from lsgm.data.walk import kind_of, printable, told, walk
from lsgm.errors import LSGMError

logger = logging.getLogger("lsgm")

THREADS = 4  # decoding threads; the rule that prepares a dataset requests as many


def open_collection(path: Path, size: int, channels: int, stack: ExitStack, beside: str | None = None) -> Collection:
    """The images at ``path``. If there are several resolutions: those of ``size``, or of the next larger one.

    One log line counts the other files that are skipped, except hidden files and the file called ``beside``.
    Raises :class:`LSGMError`.
    """
    left_out: Counter[str] = Counter()
    if path.is_dir():
        found = _in_folder(path, size, channels, stack, beside, left_out)
    elif not path.exists():
        raise LSGMError(f"{path}: does not exist")
    else:
        found = _in_file(path, size, channels, stack, left_out)
    if left_out:
        logger.info("%s: %d images; left out: %s", printable(found.where), len(found.names), told(left_out))
    return found


def _in_folder(
    path: Path, size: int, channels: int, stack: ExitStack, beside: str | None, left_out: Counter[str]
) -> Collection:
    files = [file for file in walk(path, left_out) if file.name != beside]
    databases = [file for file in files if file.name == "data.mdb"]
    archives = [file for file in files if file.suffix.lower() == ".zip"]
    used: list[Path]
    if (path / "data.mdb") in databases:
        used = [path / "data.mdb"]
        found = open_lmdb(path, size, channels, THREADS, stack, left_out)
    elif used := [file for file in files if ".tfrecord" in file.name]:
        found = _tfrecords(path, used, size, left_out)
    elif used := [file for file in files if is_image(file.name)]:
        names = [file.relative_to(path).as_posix() for file in used]
        found = Collection(str(path), names, lambda name: read_file(path / name, MAX_BYTES))
    elif len(archives) == 1:
        used = archives
        found = _in_zip(archives[0], stack, left_out)
    elif len(databases) == 1:
        used = databases
        found = open_lmdb(databases[0].parent, size, channels, THREADS, stack, left_out)
    else:
        left_out.update(kind_of(file.name) for file in files)
        raise _no_images(path, f"; found {told(left_out)}" if left_out else "")
    left_out.update(kind_of(file.name) for file in set(files).difference(used))
    return found


def _in_file(path: Path, size: int, channels: int, stack: ExitStack, left_out: Counter[str]) -> Collection:
    if ".tfrecord" in path.name:
        return _tfrecords(path, [path], size, left_out)
    if not path.is_file():
        raise LSGMError(f"{path}: is neither a folder nor a file")
    if path.suffix.lower() in (".mdb", ".lmdb"):
        return open_lmdb(path, size, channels, THREADS, stack, left_out)
    if path.suffix.lower() == ".zip" or is_zip(path):
        return _in_zip(path, stack, left_out)
    raise _no_images(path)


def _no_images(path: Path, found: str = "") -> LSGMError:
    return LSGMError(
        f"{path}: has no images; expected a folder or zip with files {', '.join(SUFFIXES)}, an LMDB (a folder with "
        f"data.mdb) or TFRecord files{found}"
    )


def _in_zip(path: Path, stack: ExitStack, left_out: Counter[str]) -> Collection:
    archive = open_zip(path, stack)
    members = zip_members(archive, path, left_out)
    readers = {info.filename: zip_reader(archive, info, path, MAX_BYTES) for info in members if is_image(info.filename)}
    if not readers:
        raise LSGMError(f"{path}: has no images; expected files {', '.join(SUFFIXES)}")
    left_out.update(kind_of(info.filename) for info in members if info.filename not in readers)
    return Collection(str(path), list(readers), lambda name: readers[name]())


def _tfrecords(path: Path, files: list[Path], size: int, left_out: Counter[str]) -> Collection:
    """Records in their order. If there are files for several resolutions: ``size``, or the next larger one."""
    sizes: dict[int, list[tuple[Path, int, int]]] = defaultdict(list)
    for file in files:
        if records := tfrecord.offsets(file, MAX_BYTES):
            side = tfrecord.read_image(file, *records[0]).shape[0]
            sizes[side] += [(file, *place) for place in records]
        else:
            left_out["empty TFRecord files"] += 1
    if not sizes:
        raise LSGMError(f"{path}: holds no records; get the file again")
    chosen = next_larger(sizes, size, str(path))
    left_out.update({f"of {side} pixels": len(records) for side, records in sizes.items() if side != chosen})
    by_name = {f"record {number}": place for number, place in enumerate(sizes[chosen])}
    return Collection(str(path), list(by_name), lambda name: tfrecord.read_image(*by_name[name]))
