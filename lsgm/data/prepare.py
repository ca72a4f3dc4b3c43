"""Writing a dataset's store: shard by shard into one file for each array, resumable after an interruption.

A shard is a range of a .npy file, a few hundred images. It is the unit that is in memory at a time, that is written and
hashed, and that an interruption loses. Each array is one file, not one file per shard, so that NumPy can map it into
memory. Until a store is complete, it is kept in a hidden folder next to its final place:

.{name}.part/journal.jsonl   the settings and originals, then one line for each shard that is on disk
.{name}.part/*.npy
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from lsgm.config.stages import PrepareStage
from lsgm.data import registry
from lsgm.data.formats import Rows
from lsgm.data.originals import SOURCE, Originals, read_source
from lsgm.data.registry import Dataset
from lsgm.data.sources import Acquired, acquire
from lsgm.data.store import MANIFEST, VERSION, ImageStore
from lsgm.errors import LSGMError
from lsgm.files import lock, named, seal, write_all, write_json
from lsgm.progress import Progress

logger = logging.getLogger("lsgm")

JOURNAL = "journal.jsonl"
SHARD_BYTES = 1 << 26


def prepare(stage: PrepareStage, out: str | Path) -> dict[str, Any]:
    """Get the dataset named by ``stage`` and write its store to the folder ``out``; returns the manifest."""
    if stage.originals is not None and read_source(Path(out)).get("stage") == stage.model_dump(mode="json"):
        store = ImageStore(out)
        store.verify()
        os.utime(store.path / MANIFEST)
        logger.info("%s: is already made of these originals", out)
        return store.manifest
    dataset = registry.dataset(stage.dataset, stage.source)
    return build(dataset, out, path=stage.source.path, stage=stage)


def build(
    dataset: Dataset,
    out: str | Path,
    path: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    stage: PrepareStage | None = None,
) -> dict[str, Any]:
    """Get ``dataset`` (from ``path`` only, if given) and write its store to the folder ``out``.

    An existing store in ``out`` stays unchanged until the new one is complete. It is then replaced file by file, with
    no manifest in the meantime. If an earlier call was interrupted, the shards that it wrote from the same originals
    are verified and kept. The same content gives byte-identical arrays and manifests; its origin is recorded in a
    separate file. Returns the manifest; raises :class:`LSGMError`.
    """
    out = Path(out)
    part = out.with_name(f".{out.name}.part")
    # Before anything is read: if a file changes in the meantime, the next plan notices.
    originals = Originals.at(path, out) if path is not None else None
    described = originals.describe() if originals is not None else None
    try:
        with acquire(dataset, path) as acquired, ExitStack() as stack:
            manifest = seal(_write(dataset, acquired, described, part, shard_bytes, stack))
            out.mkdir(exist_ok=True)
            (out / MANIFEST).unlink(missing_ok=True)
            for name in manifest["files"]:
                os.replace(part / name, out / name)
            source = {"kind": acquired.kind, "origin": acquired.origin, "originals": described}
            write_json(out / SOURCE, {**source, "stage": stage and stage.model_dump(mode="json")})
            write_json(out / MANIFEST, manifest)
            shutil.rmtree(part)
    except OSError as error:
        raise LSGMError(
            f"{error.filename or out}: cannot be read or written ({error.strerror})"
            + (f"; what is in {part} is kept, the same command resumes from there" if part.exists() else "")
        ) from None
    counts = ", ".join(f"{count} {split}" for split, count in manifest["splits"].items())
    logger.info("%s: %s images in %s (source: %s %s)", dataset.name, counts, out, acquired.kind, acquired.origin)
    return manifest


def _write(
    dataset: Dataset,
    acquired: Acquired,
    originals: dict[str, str] | None,
    part: Path,
    shard_bytes: int,
    stack: ExitStack,
) -> dict[str, Any]:
    arrays = acquired.contents.arrays
    what = {
        "dataset": dataset.name,
        "image": dataset.image.model_dump(),
        "shapes": {content: list(rows.shape) for content, rows in arrays.items()},
        "shard_bytes": shard_bytes,
        "originals": originals and originals["times"],
        **acquired.contents.facts,
    }
    journal = Journal(part, what, stack)
    manifest: dict[str, Any] = {
        "version": VERSION,
        "dataset": dataset.name,
        "image": dataset.image.model_dump(),
        "splits": {},
        "files": {},
        "source": acquired.contents.facts,
        "licence": dataset.licence,
    }
    for content, rows in arrays.items():
        split, kind = content.split("_")
        name = f"{content}.npy"
        if kind == "images" and tuple(rows.shape[1:]) != dataset.image_shape:
            raise LSGMError(
                f"{dataset.name}: found images of shape {list(rows.shape[1:])}, expected {list(dataset.image_shape)}"
            )
        write_array(part / name, rows, journal, shard_bytes)
        manifest["splits"].setdefault(split, rows.shape[0])
        manifest["files"][name] = {
            "shape": list(rows.shape),
            "dtype": "uint8",
            "bytes": (part / name).stat().st_size,
            "sha256": verify_array(part / name, rows.shape, journal, shard_bytes),
        }
    return manifest


class Journal:
    """The shards on disk with their hashes; shards of other originals or settings are discarded."""

    def __init__(self, part: Path, what: dict[str, Any], stack: ExitStack) -> None:
        part.mkdir(parents=True, exist_ok=True)
        self.path = part / JOURNAL
        self._file: IO[bytes] = stack.enter_context(self.path.open("ab+", buffering=0))
        lock(self._file, f"{part}: another process is preparing this dataset; wait for it, or stop it")
        self._file.seek(0)
        lines = self._file.read().splitlines()
        self.shards: dict[tuple[str, int], str] = {}
        if lines[:1] == [json.dumps(what).encode()]:
            for line in lines[1:]:
                try:
                    file, first, sha256 = json.loads(line)
                except ValueError:  # the last line is incomplete after a crash
                    break
                self.shards[file, first] = sha256
            logger.info("%s: resuming, %d shards are done", part, len(self.shards))
        self._file.truncate(0)
        self._append(what)
        for (file, first), sha256 in self.shards.items():
            self._append([file, first, sha256])

    def add(self, file: str, first: int, sha256: str) -> None:
        """Record that the shard of ``file`` that begins with row ``first`` is on disk."""
        self.shards[file, first] = sha256
        self._append([file, first, sha256])

    def _append(self, entry: Any) -> None:
        write_all(self._file, json.dumps(entry).encode() + b"\n", self.path)


def write_array(path: Path, rows: Rows, journal: Journal, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``rows`` as a .npy file, skipping shards that ``journal`` lists and whose bytes are unchanged."""
    with named(path), path.open("r+b" if path.exists() else "w+b") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(rows.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        start, step, row_bytes = file.tell(), _rows_per_shard(rows.shape, shard_bytes), math.prod(rows.shape[1:])
        file.truncate(start + rows.shape[0] * row_bytes)
        with Progress(path.stem, rows.shape[0], "img") as bar:
            for first in range(0, rows.shape[0], step):
                last = min(first + step, rows.shape[0])
                known = journal.shards.get((path.name, first))
                file.seek(start + first * row_bytes)
                if known is None or hashlib.sha256(file.read((last - first) * row_bytes)).hexdigest() != known:
                    # Not through a memory map: a full disk would kill the process instead of raising an error.
                    data = np.ascontiguousarray(rows[first:last])
                    assert data.dtype == np.uint8 and data.shape == (last - first, *rows.shape[1:])
                    file.seek(start + first * row_bytes)
                    file.write(data.data)
                    file.flush()
                    os.fsync(file.fileno())
                    journal.add(path.name, first, hashlib.sha256(data.data).hexdigest())
                bar.to(last)


def verify_array(path: Path, shape: tuple[int, ...], journal: Journal, shard_bytes: int = SHARD_BYTES) -> str:
    """Read the file back, compare its shards with what was written, and return its sha256."""
    step, row_bytes = _rows_per_shard(shape, shard_bytes), math.prod(shape[1:])
    whole = hashlib.sha256()
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        start = file.tell()
        file.seek(0)
        whole.update(file.read(start))
        for first in range(0, shape[0], step):
            data = file.read(min(step, shape[0] - first) * row_bytes)
            if hashlib.sha256(data).hexdigest() != journal.shards[path.name, first]:
                raise LSGMError(f"{path}: rows from {first} on differ from what was written; check the disk")
            whole.update(data)
    return whole.hexdigest()


def _rows_per_shard(shape: tuple[int, ...], shard_bytes: int) -> int:
    return max(1, shard_bytes // math.prod(shape[1:]))
