"""Sets of encoded images: in folders, zip archives, LMDB databases and TFRecord files, of any size."""

from __future__ import annotations

import hashlib
import io
import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from lsgm.data import tfrecord
from lsgm.data.formats import ARCHIVE_ERRORS, Contents, Rows
from lsgm.errors import LSGMError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
THREADS = 4  # that decode; the rule that prepares a dataset asks for as many
PARTS = {"train": "train", "training": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


@dataclass
class Collection:
    """Images where they lie: their names, in the order that they are stored in, and how to get one.

    ``read`` gives an encoded image, or bytes [H, W, C].
    """

    where: str
    names: Sequence[str]
    read: Callable[[str], bytes | NDArray[np.uint8]]


@dataclass(frozen=True)
class Images:
    """How the images of a set are found, cut and divided.

    Stored is the centred square of side ``crop`` (None: the largest), resized to ``size`` if it has another one:
    bilinear, over all pixels that a new one covers, as torchvision resizes.

    The splits are what a ``partition`` file says; or with a ``seed`` the share ``test`` is drawn at random; else they
    are the folders (zips, LMDBs) called train, valid(ation) and test, or where there are none the last ``test`` images
    in the order of names and numbers are the test set.
    """

    size: int
    channels: int = 3
    crop: int | None = None
    test: int | float | None = None  # images, or a share; None: the set must have parts
    seed: int | None = None
    partition: str | None = None  # a file beside the images, with lines `name split`; 0 train, 1 valid, 2 test
    within: str = ""  # of several sets in a folder the one with this in its name

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
        """The image as it is stored, [C, size, size]; what is transparent lies on white."""
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise LSGMError(f"{name}: has {image.mode} pixels of 32 bits; expected 8 or 16 bits, convert it")
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("RGB" if self.channels == 3 else "L")
        width, height = image.size
        side = self.crop or min(width, height)
        if side > min(width, height):
            raise LSGMError(f"{name}: has {width} x {height} pixels, fewer than the square of {side} to be cut out")
        left, top = (width - side) // 2, (height - side) // 2
        # Not resize(box=...), which also looks at what is around the square.
        image = image.crop((left, top, left + side, top + side))
        if side != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(self.size, self.size, self.channels).transpose(2, 0, 1)

    def _parts(self, path: Path, stack: ExitStack) -> dict[str, Collection]:
        """The collections at ``path`` by their splits; one that is not divided has the name ""."""
        divided = self.seed is None and self.partition is None
        children = sorted(path.iterdir()) if divided and path.is_dir() else []
        found: dict[str, list[Path]] = defaultdict(list)
        for child in children:
            words = [word for word in re.split("[^a-z]+", child.name.lower()) if word in PARTS]
            if len(words) == 1 and self.within in child.name and (child.is_dir() or child.suffix == ".zip"):
                found[PARTS[words[0]]].append(child)
        if "train" in found and found.keys() & {"valid", "test"}:
            for split, places in found.items():
                if len(places) > 1:
                    names = " and ".join(place.name for place in places)
                    raise LSGMError(f"{path}: {names} could both be the {split} images; name a folder with one of them")
            return {split: self._collection(places[0], stack) for split, places in found.items()}
        if self.test is None and self.partition is None:
            what = f"{self.within}_train_lmdb and {self.within}_val_lmdb" if self.within else "train and test"
            raise LSGMError(f"{path}: expected a folder with the parts {what} in it")
        return {"": self._collection(path, stack)}

    def _collection(self, path: Path, stack: ExitStack) -> Collection:
        if path.is_dir():
            if (path / "data.mdb").exists():
                return _lmdb(path, self.size, stack)
            files = sorted(file for file in path.rglob("*") if file.is_file())
            if records := [file for file in files if ".tfrecord" in file.name]:
                return self._tfrecords(path, records)
            images = [file.relative_to(path).as_posix() for file in files if _is_image(file.name)]
            if images:
                return Collection(str(path), images, lambda name: (path / name).read_bytes())
            archives = [file for file in files if file.suffix == ".zip"]
            if len(archives) == 1:
                return _zip(archives[0], stack)
            databases = [file.parent for file in files if file.name == "data.mdb"]
            if len(databases) == 1:
                return _lmdb(databases[0], self.size, stack)
        elif ".tfrecord" in path.name:
            return self._tfrecords(path, [path])
        elif path.is_file() and zipfile.is_zipfile(path):
            return _zip(path, stack)
        elif not path.exists():
            raise LSGMError(f"{path}: does not exist")
        raise LSGMError(
            f"{path}: has no images; expected a folder or zip with files {', '.join(SUFFIXES)}, an LMDB (a folder with "
            "data.mdb) or TFRecord files"
        )

    def _tfrecords(self, path: Path, files: list[Path]) -> Collection:
        """Records in their order; of files for several resolutions those of ``size``, or of the next larger one."""
        sizes: dict[int, list[tuple[Path, list[tuple[int, int]]]]] = defaultdict(list)
        for file in files:
            if records := tfrecord.offsets(file):
                sizes[tfrecord.read_image(file, *records[0]).shape[0]].append((file, records))
        size = min((size for size in sizes if size >= self.size), default=None)
        if size is None:
            raise LSGMError(f"{path}: expected images of {self.size} pixels, found those of {sorted(sizes)}")
        places = [(file, *place) for file, of_file in sizes[size] for place in of_file]
        names = [f"record {number}" for number in range(len(places))]
        by_name = dict(zip(names, places, strict=True))
        return Collection(str(path), names, lambda name: tfrecord.read_image(*by_name[name]))

    def _partitioned(self, part: Collection, path: Path) -> dict[str, tuple[Collection, Sequence[str]]]:
        assert self.partition is not None
        folder = path if path.is_dir() else path.parent
        files = sorted(folder.rglob(self.partition))
        if not files:
            raise LSGMError(f"{folder}: has no {self.partition}, which says what is training, validation and test set")
        lines = [line.split() for line in files[0].read_text().splitlines() if line.strip()]
        if any(len(line) != 2 or line[1] not in ("0", "1", "2") for line in lines):
            raise LSGMError(f"{files[0]}: expected lines `name number` with the numbers 0 (train), 1 (valid), 2 (test)")
        known: dict[str, str] = {}
        for name in part.names:
            if (other := known.setdefault(PurePosixPath(name).name, name)) != name:
                raise LSGMError(f"{part.where}: has both {other} and {name}; keep the aligned images alone there")
        missing = [name for name, _ in lines if name not in known]
        if missing:
            raise LSGMError(f"{part.where}: has no {missing[0]} ({len(missing)} of {len(lines)} images are missing)")
        return {
            split: (part, [known[name] for name, of in lines if of == number])
            for split, number in (("train", "0"), ("valid", "1"), ("test", "2"))
        }

    def _drawn(self, part: Collection) -> dict[str, tuple[Collection, Sequence[str]]]:
        assert self.test is not None
        names = sorted(part.names, key=_natural)
        count = self.test if isinstance(self.test, int) else max(1, round(self.test * len(names)))
        if count >= len(names):
            raise LSGMError(f"{part.where}: has {len(names)} images, too few to take {count} for the test set")
        order = np.arange(len(names))
        if self.seed is not None:
            order = np.random.default_rng(self.seed).permutation(len(names))
        chosen = np.sort(order[:-count]), np.sort(order[-count:])
        return {split: (part, [names[i] for i in of]) for split, of in zip(("train", "test"), chosen, strict=True)}


class Decoded:
    """Images of a split, [N, C, size, size], decoded when they are asked for."""

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
        where = f"{self._part.where}/{name}"
        try:
            data = self._part.read(name)
            if isinstance(data, np.ndarray):
                return self._images.fit(Image.fromarray(data.squeeze()), where)
            try:
                return self._images.fit(Image.open(io.BytesIO(data)), where)
            except UnidentifiedImageError:
                if len(data) != math.prod(self.shape[1:]):
                    raise
                pixels = np.frombuffer(data, np.uint8).reshape(*self.shape[2:], -1)  # as some databases hold them
                return self._images.fit(Image.fromarray(pixels.squeeze()), where)
        except UnidentifiedImageError:
            raise LSGMError(f"{where}: is no image that can be read; get it again") from None
        except (
            Image.DecompressionBombError,
            OSError,
            EOFError,
            ValueError,
            SyntaxError,
            RuntimeError,
            *ARCHIVE_ERRORS,
        ) as error:
            raise LSGMError(f"{where}: is a damaged image ({error}); get it again") from None


def _zip(path: Path, stack: ExitStack) -> Collection:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (OSError, *ARCHIVE_ERRORS) as error:
        raise LSGMError(f"{path}: cannot be read as an archive ({error})") from None
    names = [name for name in archive.namelist() if _is_image(name)]
    if not names:
        raise LSGMError(f"{path}: has no images; expected files {', '.join(SUFFIXES)}")
    return Collection(str(path), names, archive.read)


def _lmdb(path: Path, size: int, stack: ExitStack) -> Collection:
    try:
        import lmdb
    except ImportError:
        raise LSGMError(
            f"{path}: is an LMDB database, and the package that reads those is not installed: pip install lmdb"
        ) from None
    try:
        database = lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=THREADS + 1)
        stack.callback(database.close)
        with database.begin() as transaction:
            keys = [key.decode("latin-1") for key in transaction.cursor().iternext(values=False) if key != b"length"]
    except lmdb.Error as error:
        raise LSGMError(f"{path}: cannot be read as an LMDB database ({error}); get it again") from None

    def read(name: str) -> bytes:
        with database.begin() as transaction:
            return bytes(transaction.get(name.encode("latin-1")) or b"")

    of_size = [key for key in keys if key.startswith(f"{size}-")]  # where one database holds several resolutions
    return Collection(str(path), of_size or keys, read)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not PurePosixPath(name).name.startswith(".") and "__MACOSX" not in name


def _natural(name: str) -> str:
    """A key that sorts 9.png before 10.png."""
    return re.sub(r"\d+", lambda number: number[0].zfill(12), name)


def _digest(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\n")
    return digest.hexdigest()
