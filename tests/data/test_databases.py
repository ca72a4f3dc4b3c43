"""LMDB databases: which entries are images, several resolutions, cut and damaged files."""

from __future__ import annotations

import io
import logging
import random
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lsgm.data.images import Images
from lsgm.errors import LSGMError

lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")

RNG = np.random.default_rng(0)


def png(side: int = 8, kind: str = "PNG", level: int | None = None) -> bytes:
    buffer = io.BytesIO()
    pixels = RNG.integers(0, 256, (side, side, 3), dtype=np.uint8) if level is None else np.full((side, side, 3), level)
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, entries: dict[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 26, **options) as database, database.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key.encode(), value)
    return path


def read(path: Path, size: int = 8, channels: int = 3) -> np.ndarray:
    """All images at ``path``, the one test image last."""
    with ExitStack() as stack:
        arrays = Images(size, channels=channels, test=1).open(path, stack).arrays
        return np.concatenate([arrays[f"{split}_images"][0:1000] for split in ("train", "test")])


def levels(path: Path, size: int = 8) -> list[int]:
    return [round(image.mean()) for image in read(path, size)]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lsgm")
    return caplog


NUMBERED = {f"image-{i:09d}": png(level=10 * i) for i in range(4)}


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({f"label-{i:09d}": b"cat" for i in range(4)} | {"num-samples": b"4"}, "left out: 4 label-#, 1 num-samples"),
        ({"__keys__": b"\x80\x04" + bytes(50_000), "__len__": b"\x80\x04K\x04."}, "1 __keys__, 1 __len__"),
        ({"length": b"4", "num_samples": b"4", "meta/classes": b"{}"}, "1 length, 1 meta/classes, 1 num_samples"),
        ({f"{i}-text": bytes(8 * 8 * 3) for i in range(3)}, "left out: 3 #-text"),  # as long as a raw image
    ],
)
def test_what_is_no_image_is_left_out(
    tmp_path: Path, log: pytest.LogCaptureFixture, others: dict[str, bytes], told: str
) -> None:
    assert levels(write(tmp_path / "in", NUMBERED | others)) == [0, 10, 20, 30]
    assert [told in message for message in log.messages] == [True]


def test_a_damaged_image_is_not_left_out(tmp_path: Path) -> None:
    for value in (b"", b"<html>", NUMBERED["image-000000001"][:-30]):
        path = write(tmp_path / f"{len(value)}", {**NUMBERED, "image-000000001": value, "cover.jpg": png()})
        with pytest.raises(LSGMError, match="/image-000000001: is "):
            read(path)
    with pytest.raises(LSGMError, match="has no images among its 2 entries"):
        read(write(tmp_path / "text", {"a": b"1", "b": b"2"}))


def test_bytes_of_pixels(tmp_path: Path) -> None:
    """Also where one of them begins as a JPEG does, by chance."""
    images = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    images[2].reshape(-1)[:4] = [255, 216, 255, 224]
    path = write(tmp_path / "in", {f"{i}": image.tobytes() for i, image in enumerate(images)} | {"length": b"5"})
    assert np.array_equal(read(path), images.transpose(0, 3, 1, 2))
    gray = write(tmp_path / "gray", {f"{i}": image[..., 0].tobytes() for i, image in enumerate(images)})
    assert np.array_equal(read(gray, channels=1)[:, 0], images[..., 0])


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "WEBP", "GIF", "BMP"])
def test_images_of_any_format(tmp_path: Path, kind: str) -> None:
    assert np.allclose(
        levels(write(tmp_path / "in", {f"{i}": png(8, kind, 10 * i) for i in range(3)})), [0, 10, 20], atol=1
    )


RESOLUTIONS = {f"{size}-{i:05d}": png(size, level=size // 2 + i) for size in (16, 128, 256) for i in range(3)}


@pytest.mark.parametrize(("wanted", "taken"), [(8, 16), (16, 16), (64, 128), (128, 128), (200, 256)])
def test_of_several_resolutions_the_wanted_or_the_next_larger_one(
    tmp_path: Path, log: pytest.LogCaptureFixture, wanted: int, taken: int
) -> None:
    path = write(tmp_path / "in", RESOLUTIONS | {"length": b"3"})
    assert levels(path, wanted) == [taken // 2, taken // 2 + 1, taken // 2 + 2]
    others = [f"3 of {size} pixels" for size in (128, 16, 256) if size != taken]
    assert log.messages == [f"{path}: 3 images; left out: {', '.join(others)}, 1 length"]


def test_resolutions_that_are_too_small(tmp_path: Path) -> None:
    path = write(tmp_path / "in", RESOLUTIONS)
    with pytest.raises(LSGMError, match=f"^{path}: expected images of at least 512 pixels, found sizes 16, 128, 256$"):
        read(path, 512)
    numbers = {f"{person}-{i:05d}": png(16, level=person) for person in (3, 4) for i in range(2)}
    assert levels(write(tmp_path / "persons", numbers), 8) == [3, 3, 4, 4]  # numbers that are no resolutions


def test_databases_in_folders_and_files(tmp_path: Path) -> None:
    write(tmp_path / "set" / "deep" / "faces", NUMBERED)
    write(tmp_path / "set" / ".trash" / "faces", NUMBERED)
    write(tmp_path / "set" / "__MACOSX", NUMBERED)
    write(tmp_path / "file" / "faces.lmdb", NUMBERED, subdir=False)
    for path in (tmp_path / "set", tmp_path / "set/deep/faces", tmp_path / "set/deep/faces/data.mdb",
                 tmp_path / "file/faces.lmdb"):  # fmt: skip
        assert levels(path) == [0, 10, 20, 30]


READER = """
import sys
from contextlib import ExitStack
from pathlib import Path
from lsgm.data.images import Images
from lsgm.errors import LSGMError
for path in sys.argv[1:]:
    try:
        with ExitStack() as stack:
            for rows in Images(8, test=1).open(Path(path), stack).arrays.values():
                rows[0:1000]
        print("whole")
    except LSGMError as error:
        print(str(error).replace(path, "IN").replace(chr(10), "NEWLINE"))
"""


def outcomes(paths: list[Path]) -> list[str]:
    """What reading each of the databases says, in a process of its own: it could be killed."""
    command = [sys.executable, "-W", "ignore", "-c", READER, *map(str, paths)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths) and "NEWLINE" not in done.stdout
    return lines


def copies(folder: Path, contents: list[bytes]) -> list[Path]:
    paths = [folder / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.mkdir()
        (path / "data.mdb").write_bytes(content)
    return paths


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    """A database with values inside and outside of its leaves, several of these."""
    entries = {f"{i:09d}": png(8 if i % 2 else 64) for i in range(60)}
    return (write(tmp_path / "whole", entries) / "data.mdb").read_bytes()


def test_a_database_that_was_cut_is_refused(tmp_path: Path, whole: bytes) -> None:
    lengths = [0, 100, 4096, 4200, 8192, 8193, *range(12288, len(whole), 131072), len(whole) - 4096, len(whole) - 1]
    paths = copies(tmp_path, [*(whole[:length] for length in lengths), whole])
    *cut, complete = outcomes(paths)
    assert complete == "whole"
    for length, line in zip(lengths, cut, strict=True):
        assert line.startswith(
            f"IN: is cut short: {length} bytes, its last page ends at {len(whole)};"
            if length > 4200
            else "IN: cannot be read as an LMDB database"
        )


def test_a_damaged_database_ends_in_one_line(tmp_path: Path, whole: bytes) -> None:
    random.seed(0)
    zeros = [whole[:length] + bytes(len(whole) - length) for length in (20_000, 100_000, len(whole) - 5000)]
    trees = [at for at in range(0, len(whole), 4096) if whole[at + 10] in (1, 2)]  # pages of branches and leaves
    flipped = []
    for _ in range(7):
        content = bytearray(whole)
        for _ in range(4):
            content[random.choice(trees) + random.randrange(100)] ^= 1 << random.randrange(8)
        flipped.append(bytes(content))
    lines = outcomes(copies(tmp_path, zeros + flipped))
    assert all(line.startswith("IN") or line == "whole" for line in lines)
    assert (
        sum("damaged" in line or "cannot be read" in line or "is not a readable image" in line for line in lines) >= 5
    )


def test_a_whole_database_may_lack_its_last_pages(tmp_path: Path) -> None:
    """Pages that were asked for and freed within one transaction are never written."""
    path = write(tmp_path / "in", NUMBERED)
    with lmdb.open(str(path), map_size=1 << 26) as database:
        for entries in ({"a": 100_000, "b": 100_000}, {"a": None}, {"c": 200_000}):
            with database.begin(write=True) as transaction:
                for key, length in entries.items():
                    transaction.put(key.encode(), bytes(length)) if length else transaction.delete(key.encode())
                transaction.delete(b"c")
        end = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    assert (path / "data.mdb").stat().st_size < end
    assert levels(path) == [0, 10, 20, 30]


def test_many_entries_are_looked_at_quickly(tmp_path: Path) -> None:
    import time

    value = png()
    write(tmp_path / "in", {f"{kind}-{i:09d}": value if kind == "image" else b"1" for i in range(10_000)
                            for kind in ("image", "label")})  # fmt: skip
    start = time.perf_counter()
    with ExitStack() as stack:
        assert Images(8, test=1).open(tmp_path / "in", stack).arrays["train_images"].shape[0] == 9_999
    assert time.perf_counter() - start < 5  # a quarter of a second
