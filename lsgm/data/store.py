"""The array store: a dataset as plain .npy files of bytes with a manifest.

{split}_images.npy   uint8 [N, C, H, W]
{split}_labels.npy   uint8 [N], if the dataset has labels
manifest.json        written last: a folder with a manifest is complete
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError, model_validator

from lsgm.config import ImageConfig, Section
from lsgm.config.bounds import Name
from lsgm.errors import LSGMError
from lsgm.files import is_sealed, read_json
from lsgm.progress import Progress

MANIFEST = "manifest.json"
VERSION = 2
WAY_OUT = "delete the folder, then restore it (`dvc checkout`) or prepare it again (`lsgm prepare`)"
BUFFER = 1 << 22  # bytes
SILENT = 1 << 30  # bytes; hashing this much takes about a second and shows no progress bar

SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1)]


class _FileFacts(Section):
    shape: Annotated[list[Size], Field(min_length=1)]
    dtype: Literal["uint8"]
    bytes: Size
    sha256: SHA256


class _Manifest(Section):
    """The keys of manifest.json that opening a store needs. Older manifests have no hash of their own."""

    model_config = ConfigDict(extra="ignore", strict=True)

    version: Literal[2]
    dataset: Name
    image: ImageConfig
    splits: dict[Name, Size]
    files: dict[str, _FileFacts]
    sha256: SHA256 | None = None

    @model_validator(mode="after")
    def _files_are_those_of_the_splits(self) -> _Manifest:
        image = self.image
        if image.padded_size < image.size:
            raise ValueError(f"image.padded_size: {image.padded_size} is less than image.size, {image.size}")
        for split in self.splits:
            if f"{split}_images.npy" not in self.files:
                raise ValueError(f"files: {split}_images.npy is missing")
        for name, facts in self.files.items():
            split, _, kind = name.rpartition("_")
            if split not in self.splits or kind not in ("images.npy", "labels.npy"):
                raise ValueError(f"files: {name!r} is not a file of the splits {', '.join(self.splits)}")
            shape = [image.channels, image.size, image.size] if kind == "images.npy" else []
            if facts.shape != [self.splits[split], *shape]:
                raise ValueError(f"files.{name}.shape: {facts.shape} is not {[self.splits[split], *shape]}")
        return self


class ImageStore:
    """A dataset on disk, opened for reading; nothing is loaded until it is used.

    Opening checks the manifest and the size and shape of every file; :meth:`verify` also reads and hashes the files.
    Both raise :class:`LSGMError` that names the file; opening also raises it if the store does not hold the dataset
    ``expected``.

    Attributes:
        name: name of the dataset.
        image: how a model sees the images: size, padding, binarization.
        splits: number of images per split: train, test, for some datasets also valid.
    """

    def __init__(self, path: str | Path, expected: str | None = None) -> None:
        self.path = Path(path)
        self.manifest = self._read_manifest()
        self.name: str = self.manifest["dataset"]
        self.image = ImageConfig.model_validate(self.manifest["image"])
        self.splits: dict[str, int] = dict(self.manifest["splits"])
        self._arrays = {name: self._open(name, facts) for name, facts in self.manifest["files"].items()}
        if expected not in (None, self.name):
            raise LSGMError(f"{self.path}: holds the dataset {self.name}, expected {expected}")

    def images(self, split: str) -> NDArray[np.uint8]:
        """Images of ``split``: uint8 [N, C, H, W] in 0..255, mapped read-only from the disk."""
        return self._array(split, "images")

    def labels(self, split: str) -> NDArray[np.uint8]:
        """Labels of ``split``: uint8 [N], mapped read-only from the disk."""
        return self._array(split, "labels")

    def hashes(self, split: str) -> dict[str, str]:
        """The sha256 of each file with images of ``split``, keyed by file name."""
        return {
            name: facts["sha256"]
            for name, facts in self.manifest["files"].items()
            if name.startswith(f"{split}_images")
        }

    def verify(self, *splits: str) -> None:
        """Check the hashes of the files of ``splits`` (default: all files) against the manifest.

        Every job does this once for the splits that it uses, before it computes a number. It takes as long as reading
        the files once: 0.1 s for MNIST, a few minutes for 100 GB, before training runs that take days. Comparing times
        and sizes would be faster, but would miss damage that changes neither, such as a flipped bit. Files are read one
        after the other, because the image files hold nearly all of the bytes and disks are fastest that way.

        Raises:
            LSGMError: for the first file that differs or cannot be read.
        """
        for split in splits:
            self._array(split, "images")
        files = {n: f for n, f in self.manifest["files"].items() if not splits or n.rpartition("_")[0] in splits}
        total, done = sum(facts["bytes"] for facts in files.values()), 0
        buffer = memoryview(bytearray(BUFFER))
        with Progress(f"{self.name}: checking {', '.join(splits or self.splits)}", total // 10**6, "MB") as bar:
            for name, facts in files.items():
                digest = hashlib.sha256()
                try:
                    with (self.path / name).open("rb", buffering=0) as file:
                        while size := file.readinto(buffer):
                            digest.update(buffer[:size])
                            done += size
                            if total > SILENT:
                                bar.to(done // 10**6)
                except OSError as error:
                    raise self._fault(name, f"cannot be read ({error.strerror})") from None
                if (found := digest.hexdigest()) != facts["sha256"]:
                    raise self._fault(name, f"has changed: sha256 {found}, expected {facts['sha256']}")

    def _read_manifest(self) -> dict[str, Any]:
        manifest = read_json(self.path / MANIFEST, WAY_OUT)
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise self._fault(MANIFEST, f"has version {version}, this program reads version {VERSION}")
        if isinstance(manifest, dict) and "sha256" in manifest and not is_sealed(manifest):
            raise self._fault(MANIFEST, "has changed: its sha256 does not match its content")
        try:
            _Manifest.model_validate(manifest)
        except ValidationError as error:
            first = error.errors()[0]
            where = [".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")]
            raise self._fault(MANIFEST, f"is damaged ({': '.join(filter(None, where))})") from None
        return dict(manifest)

    def _array(self, split: str, kind: str) -> NDArray[np.uint8]:
        if split not in self.splits:
            raise LSGMError(f"{self.path}: has no split {split!r}; the splits are {', '.join(self.splits)}")
        if f"{split}_{kind}.npy" not in self._arrays:
            raise LSGMError(f"{self.path}: has no {kind} of the split {split!r}")
        return self._arrays[f"{split}_{kind}.npy"]

    def _open(self, name: str, facts: dict[str, Any]) -> NDArray[np.uint8]:
        try:
            size = (self.path / name).stat().st_size
            if size != facts["bytes"]:
                raise self._fault(name, f"has {size} bytes, expected {facts['bytes']}")
            array: NDArray[np.uint8] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise self._fault(name, f"cannot be read ({error.strerror})") from None
        except Exception as error:  # NumPy's reader raises exceptions of many kinds on a damaged header
            if isinstance(error, LSGMError):
                raise
            raise self._fault(name, f"is not a .npy file ({error})") from None
        if list(array.shape) != facts["shape"] or str(array.dtype) != facts["dtype"]:
            raise self._fault(
                name, f"holds {array.dtype} {list(array.shape)}, expected {facts['dtype']} {facts['shape']}"
            )
        return array

    def _fault(self, name: str, what: str) -> LSGMError:
        return LSGMError(f"{self.path / name}: {what}; {WAY_OUT}")
