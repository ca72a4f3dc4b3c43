"""The array store: a dataset as plain .npy files of bytes beside a manifest.

{split}_images.npy   uint8 [N, C, H, W]
{split}_labels.npy   uint8 [N], where the dataset has them
manifest.json        written last: a folder with a manifest is whole
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsgm.config import ImageConfig, parse
from lsgm.errors import LSGMError
from lsgm.files import sha256

MANIFEST = "manifest.json"
VERSION = 2


class ImageStore:
    """A dataset on disk, opened for reading; nothing is loaded until it is used.

    Opening checks that every file has the size and shape of the manifest; :meth:`verify` also reads and hashes
    them. Both raise :class:`LSGMError` that names the file, opening also where the store does not hold the dataset
    ``expected``.

    Attributes:
        name: of the dataset.
        image: how a model sees its images: size, padding, binarisation.
        splits: the number of images in each: train, test, for some datasets also valid.
    """

    def __init__(self, path: str | Path, expected: str | None = None) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text())
            version = self.manifest["version"]
            if version != VERSION:
                raise self._fault(MANIFEST, f"has version {version}, this program reads version {VERSION}")
            self.name: str = self.manifest["dataset"]
            self.image = parse(ImageConfig, self.manifest["image"], self.path / MANIFEST)
            self.splits: dict[str, int] = dict(self.manifest["splits"])
            self._arrays = {name: self._open(name, facts) for name, facts in self.manifest["files"].items()}
            if expected not in (None, self.name):
                raise LSGMError(f"{self.path}: holds the dataset {self.name}, expected {expected}")
        except OSError as error:
            raise self._fault(MANIFEST, f"cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._fault(MANIFEST, f"is damaged ({type(error).__name__}: {error})") from None

    def images(self, split: str) -> NDArray[np.uint8]:
        """Images of ``split``: uint8 [N, C, H, W] in 0..255, mapped read-only from the disk."""
        return self._array(split, "images")

    def labels(self, split: str) -> NDArray[np.uint8]:
        """Labels of ``split``: uint8 [N], mapped read-only from the disk."""
        return self._array(split, "labels")

    def hashes(self, split: str) -> dict[str, str]:
        """What the images of ``split`` are, by content: sha256 of each of their files, by its name."""
        return {
            name: facts["sha256"]
            for name, facts in self.manifest["files"].items()
            if name.startswith(f"{split}_images")
        }

    def verify(self) -> None:
        """Hash every file against the manifest; raises :class:`LSGMError` for the first that differs."""
        for name, facts in self.manifest["files"].items():
            if (digest := sha256(self.path / name)) != facts["sha256"]:
                raise self._fault(name, f"has changed: sha256 {digest}, expected {facts['sha256']}")

    def _array(self, split: str, kind: str) -> NDArray[np.uint8]:
        if split not in self.splits:
            raise LSGMError(f"{self.path}: has no split {split!r}; the splits are {', '.join(self.splits)}")
        return self._arrays[f"{split}_{kind}.npy"]

    def _open(self, name: str, facts: dict[str, Any]) -> NDArray[np.uint8]:
        try:
            size = (self.path / name).stat().st_size
            if size != facts["bytes"]:
                raise self._fault(name, f"has {size} bytes, expected {facts['bytes']}")
            array: NDArray[np.uint8] = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise self._fault(name, f"cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise self._fault(name, f"is no .npy file ({error})") from None
        if list(array.shape) != facts["shape"] or str(array.dtype) != facts["dtype"]:
            raise self._fault(
                name, f"holds {array.dtype} {list(array.shape)}, expected {facts['dtype']} {facts['shape']}"
            )
        return array

    def _fault(self, name: str, what: str) -> LSGMError:
        return LSGMError(f"{self.path / name}: {what}; make the data again with `lsgm prepare`")
