"""Datasets of images of any size: how they are split, and how each image is cropped and resized."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsgm.data.collection import THREADS, open_collection
from lsgm.data.decode import decode, eight_bits, from_pixels
from lsgm.data.formats import Collection, Contents, Rows
from lsgm.data.walk import children, printable, walk
from lsgm.errors import LSGMError
from lsgm.files import read_text

logger = logging.getLogger("lsgm")

PARTS = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


@dataclass(frozen=True)
class Images:
    """How the images of a dataset are found, cropped and split.

    The center crop of side ``crop`` (None: the largest square) is resized to ``size`` and stored. Resizing is bilinear
    with antialiasing, as in torchvision.

    The splits are those of the ``partition`` file, if there is one. With a ``seed``, the fraction ``test`` is drawn at
    random. Otherwise the splits are the folders (zips, LMDBs) called train, valid(ation) and test; without such folders
    the last ``test`` images, in natural order of their names, are the test set.
    """

    size: int
    channels: int = 3
    crop: int | None = None
    test: int | float | None = None  # number or fraction of images; None: there must be folders for the splits
    seed: int | None = None
    partition: str | None = None  # file next to the images with lines `name split`; 0 train, 1 valid, 2 test
    within: str = ""  # if a folder holds several datasets: the one with this in its name

    def open(self, path: Path, stack: ExitStack) -> Contents:
        parts = self._parts(path, stack)
        splits: dict[str, tuple[Collection, Sequence[str]]]
        if self.partition is not None:
            splits = self._partitioned(parts[""], path)
        elif "" not in parts:
            splits = {split: (part, sorted(part.names, key=_natural)) for split, part in parts.items()}
            if "test" not in splits:
                splits["test"] = splits.pop("valid")
        else:
            splits = self._drawn(parts[""])
        square = f"the central {self.crop} x {self.crop}" if self.crop else "the largest central square"
        facts: dict[str, Any] = {
            "preprocessing": f"{square}, resized to {self.size} x {self.size} (bilinear) where it differs",
            "names_sha256": {split: _digest(names) for split, (_, names) in splits.items()},
        }
        arrays: dict[str, Rows] = {
            f"{split}_images": Decoded(self, part, names) for split, (part, names) in splits.items()
        }
        return Contents(arrays, facts)

    def fit(self, image: Image.Image, name: str) -> NDArray[np.uint8]:
        """The image as it is stored, [C, size, size]; transparency is composited onto white."""
        image = eight_bits(image, self.channels, name)
        width, height = image.size
        if not width or not height:
            raise LSGMError(f"{name}: is empty: {width} x {height} pixels")
        side = self.crop or min(width, height)
        if side > min(width, height):
            raise LSGMError(f"{name}: has {width} x {height} pixels, too few for a crop of side {side}")
        left, top = (width - side) // 2, (height - side) // 2
        # Not resize(box=...), which also uses pixels outside of the square.
        image = image.crop((left, top, left + side, top + side))
        if side != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

    def _parts(self, path: Path, stack: ExitStack) -> dict[str, Collection]:
        """The collections at ``path``, keyed by split; the key is "" if there is only one collection."""
        divided = self.seed is None and self.partition is None
        entries = children(path) if self.partition is None and path.is_dir() else []
        found: dict[str, list[Path]] = defaultdict(list)
        for child in entries:
            words = [word for word in re.split("[^a-z]+", child.name.lower()) if word in PARTS]
            if len(words) == 1 and self.within in child.name and (child.is_dir() or child.suffix.lower() == ".zip"):
                found[PARTS[words[0]]].append(child)
        whole = "train" in found and bool(found.keys() & {"valid", "test"})
        if whole and not divided:
            names = ", ".join(printable(place.name) for places in found.values() for place in places)
            logger.info(
                "%s: %s are merged and a test set is drawn at random; `split: null` keeps them as they are", path, names
            )
        elif whole:
            for split, places in found.items():
                if len(places) > 1:
                    names = " and ".join(place.name for place in places)
                    raise LSGMError(
                        f"{path}: {names} could both be the {split} images; keep only one of them in the folder"
                    )
            return {split: self._collection(places[0], stack) for split, places in found.items()}
        if self.test is None and self.partition is None:
            what = f"{self.within}_train_lmdb and {self.within}_val_lmdb" if self.within else "train and test"
            raise LSGMError(f"{path}: expected a folder that contains {what}")
        return {"": self._collection(path, stack)}

    def _collection(self, path: Path, stack: ExitStack) -> Collection:
        return open_collection(path, self.size, self.channels, stack, self.partition)

    def _partitioned(self, part: Collection, path: Path) -> dict[str, tuple[Collection, Sequence[str]]]:
        assert self.partition is not None
        folder = path if path.is_dir() else path.parent
        files = [file for file in walk(folder) if file.name == self.partition]
        if not files:
            raise LSGMError(f"{folder}: has no {self.partition}, the file that assigns images to the splits")
        lines = [line.split() for line in read_text(files[0]).removeprefix("\ufeff").splitlines() if line.strip()]
        wrong = [line for line in lines if len(line) != 2 or line[1] not in ("0", "1", "2")]
        if wrong or not lines:
            expected = "lines `name number` with the numbers 0 (train), 1 (valid), 2 (test)"
            found = f"'{printable(' '.join(wrong[0])[:80])}'" if wrong else "none"
            raise LSGMError(f"{files[0]}: expected {expected}, found {found}")
        twice = [name for name, count in Counter(name for name, _ in lines).items() if count > 1]
        if twice:
            raise LSGMError(f"{files[0]}: names {printable(twice[0])} twice; each image belongs to one split")
        known: dict[str, str] = {}
        for name in part.names:
            if (other := known.setdefault(PurePosixPath(name).name, name)) != name:
                both = f"{printable(other)} and {printable(name)}"
                raise LSGMError(f"{part.where}: has both {both}; keep only the aligned images there")
        missing = [name for name, _ in lines if name not in known]
        if missing:
            first = f"{printable(missing[0])} ({len(missing)} of {len(lines)} images are missing)"
            raise LSGMError(f"{part.where}: has no {first}")
        splits: dict[str, tuple[Collection, Sequence[str]]] = {
            split: (part, [known[name] for name, of in lines if of == number])
            for split, number in (("train", "0"), ("valid", "1"), ("test", "2"))
        }
        if empty := [split for split, (_, names) in splits.items() if not names]:
            raise LSGMError(f"{files[0]}: names no image of the split {empty[0]}")
        return splits

    def _drawn(self, part: Collection) -> dict[str, tuple[Collection, Sequence[str]]]:
        assert self.test is not None
        names = sorted(part.names, key=_natural)
        count = self.test if isinstance(self.test, int) else max(1, round(self.test * len(names)))
        if count >= len(names):
            raise LSGMError(f"{part.where}: has {len(names)} images, too few for a test set of {count}")
        order = np.arange(len(names))
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(len(names))
        chosen = np.sort(order[:-count]), np.sort(order[-count:])
        return {split: (part, [names[i] for i in of]) for split, of in zip(("train", "test"), chosen, strict=True)}


class Decoded:
    """Images of a split, [N, C, size, size], decoded on access."""

    def __init__(self, images: Images, part: Collection, names: Sequence[str]) -> None:
        self._images, self._part, self._names = images, part, names
        self.shape = (len(names), images.channels, images.size, images.size)

    def __getitem__(self, rows: slice, /) -> NDArray[np.uint8]:
        names = self._names[rows]
        decoded = np.empty((len(names), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(THREADS) as pool:
            for row, image in zip(decoded, pool.map(self._decode, names), strict=True):
                row[...] = image
        return decoded

    def _decode(self, name: str) -> NDArray[np.uint8]:
        where = printable(f"{self._part.where}/{name}")
        data = self._part.read(name)
        image = decode(data, where) if isinstance(data, bytes) else from_pixels(data)
        return self._images.fit(image, where)


def _natural(name: str) -> str:
    """A key that sorts 9.png before 10.png."""
    return re.sub(r"\d+", lambda number: number[0].zfill(12), name)


def _digest(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()
