"""Batches of images that are drawn already, a file each: several jobs share them, and they survive interruptions."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lsgm.errors import LSGMError
from lsgm.files import atomic, lock
from lsgm.progress import log

LOCK = "lock"
KEY = re.compile("[0-9a-f]{16}")


@dataclass
class Chunk:
    """One batch: its images, uint8 [B, C, H, W], and what they took; none where the solver failed."""

    images: NDArray[np.uint8]
    nfe: float
    seconds: float
    failed: str = ""


class Chunks:
    """The folder ROOT/KEY with a file for each chunk.

    Args:
        root: folder that jobs of any settings may share.
        identity: all that the images depend on; the key is a hash of it, so those of other settings are never mixed in.
        sizes: images in each chunk.
        image_shape: (C, H, W).
    """

    def __init__(self, root: Path, identity: str, sizes: list[int], image_shape: tuple[int, int, int]) -> None:
        self.root = root
        self.folder = root / hashlib.sha256(identity.encode()).hexdigest()[:16]
        self.sizes, self.image_shape = sizes, image_shape

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Those of the chunks that are not there, or damaged."""
        return [number for number in numbers if self.read(number) is None]

    def failed(self) -> bool:
        """Whether the solver failed in one of them; of the others only the headers are read."""
        return any(self._says_failed(number) and self.read(number) is not None for number in range(len(self.sizes)))

    def read(self, number: int) -> Chunk | None:
        """A chunk as it was written; None if it is not there, or (with a line in the log) damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                images, facts = file.get_tensor("images"), file.metadata()
            good = facts["sha256"] == hashlib.sha256(images.tobytes()).hexdigest()
            found = Chunk(images, float(facts["nfe"]), float(facts["seconds"]), facts["failed"])
            good &= images.dtype == np.uint8
            good &= images.shape == ((0 if found.failed else self.sizes[number]), *self.image_shape)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            good = False
        if not good:
            log.info(f"{path}: damaged; its images are drawn again")
            return None
        return found

    def write(self, number: int, chunk: Chunk) -> None:
        """Put a chunk on the disk, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {
            "nfe": repr(chunk.nfe),
            "seconds": repr(chunk.seconds),
            "failed": chunk.failed,
            "sha256": hashlib.sha256(chunk.images.tobytes()).hexdigest(),
        }
        with atomic(self._path(number)) as part:
            part.write_bytes(save({"images": chunk.images}, facts))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from removing the chunks; several can hold them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def remove(self) -> None:
        """Remove the chunks, and those of other settings in the same root, except where a process holds them."""
        if self.root.is_dir():
            for folder in self.root.iterdir():
                if folder.is_dir() and KEY.fullmatch(folder.name):
                    with (folder / LOCK).open("a") as file, suppress(LSGMError):
                        lock(file, "another process draws these images")
                        shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # something else is in it
                self.root.rmdir()

    def _says_failed(self, number: int) -> bool:
        with suppress(SafetensorError, OSError), safe_open(self._path(number), framework="numpy") as file:
            return bool((file.metadata() or {}).get("failed"))
        return False

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.safetensors"
