"""Images and batches in zip and tar archives: whole, cut, damaged and hostile ones."""

from __future__ import annotations

import gzip
import io
import logging
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsgm.data import archives, collection, pickles
from lsgm.data.images import Images
from lsgm.data.pickles import PickledBatches
from lsgm.errors import LSGMError

BATCH = pickle.dumps({"data": np.arange(6144, dtype=np.uint8).reshape(2, 3072), "labels": [1, 2]}, protocol=4)
BATCHES = {"one": BATCH, "two": BATCH}


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {f"{i}.png": png(10 * i) for i in range(4)}


def write_zip(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def levels(path: Path) -> list[int]:
    with ExitStack() as stack:
        arrays = Images(8, test=1).open(path, stack).arrays
        return [round(i.mean()) for split in ("train", "test") for i in arrays[f"{split}_images"][0:1000]]


def labels(path: Path) -> list[int]:
    with ExitStack() as stack:
        arrays = PickledBatches({"train": ("one",), "test": ("two",)}, size=32, labels=True).open(path, stack).arrays
        assert arrays["train_images"][0:9].shape == (2, 3, 32, 32)
        return [int(label) for split in ("train", "test") for label in arrays[f"{split}_labels"][0:9]]


def test_what_is_hidden_in_a_zip_is_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lsgm")
    hidden = ["__MACOSX/._0.png", ".ipynb_checkpoints/0.png", "a/.b/c/0.png", "a\\.b\\0.png", "@eaDir/0.png", ".0.png"]
    others = {"readme.txt": b"", "folder.png/": b"", "labels.csv": b"", "more.csv": b""}
    path = write_zip(tmp_path / "a.zip", IMAGES | dict.fromkeys(hidden, png(99)) | others)
    assert levels(path) == [0, 10, 20, 30]
    assert caplog.messages == [f"{path}: 4 images; left out: 2 .csv, 1 .txt"]


def test_hidden_archives_are_no_candidates(tmp_path: Path) -> None:
    write_zip(tmp_path / "images" / "A.ZIP", IMAGES)
    write_zip(tmp_path / "images" / ".b.zip", {"0.png": png(99)})
    write_zip(tmp_path / "images" / "__MACOSX" / "c.zip", {"0.png": png(99)})
    assert levels(tmp_path / "images") == [0, 10, 20, 30]
    write_tar(tmp_path / "batches" / ".a.tar", [("one", b"wrong"), ("two", b"wrong")])
    write_tar(tmp_path / "batches" / "b.TGZ", [(".old/one", b"wrong"), ("__MACOSX/two", b"wrong"),
                                               *((f"deep/{name}", BATCH) for name in BATCHES)])  # fmt: skip
    assert labels(tmp_path / "batches") == [1, 2, 1, 2]


def test_names_are_names_only(tmp_path: Path) -> None:
    """Absolute ones, `..` and others that would be harmful if anything were extracted."""
    path = write_zip(tmp_path / "a.zip", {"/etc/0.png": png(0), "../1.png": png(10), "café\n2.png": png(20)})
    assert sorted(levels(path)) == [0, 10, 20]
    assert [file.name for file in tmp_path.iterdir()] == ["a.zip"]


def test_a_name_that_stands_for_two_files(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for second in (png(0), png(99)):
        write_zip(path, IMAGES)
        with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
            archive.writestr("0.png", second)
        with pytest.raises(LSGMError, match=r"a\.zip: holds two files called 0\.png"):
            levels(path)
    again = write_tar(tmp_path / "a.tar", [("one", b"an older version"), *BATCHES.items()])
    assert labels(again) == [1, 2, 1, 2]  # as tar extracts it


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression(tmp_path: Path, method: int) -> None:
    assert levels(write_zip(tmp_path / "a.zip", IMAGES, method)) == [0, 10, 20, 30]
    assert labels(write_zip(tmp_path / "b.zip", BATCHES, method)) == [1, 2, 1, 2]


def edited(path: Path, offset: int, value: bytes) -> Path:
    """``value`` in the directory of a zip archive, at ``offset`` of each entry."""
    content = path.read_bytes()
    parts = content.split(b"PK\1\2")
    parts[1:] = [part[: offset - 4] + value + part[offset - 4 + len(value) :] for part in parts[1:]]
    path.write_bytes(b"PK\1\2".join(parts))
    return path


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, b"\1", "encrypted"),
        (10, b"\x63", "compression method is not supported"),
        (16, b"1234", "Bad CRC-32"),
    ],
)
def test_members_that_cannot_be_read(tmp_path: Path, offset: int, value: bytes, message: str) -> None:
    for read, files in ((levels, IMAGES), (labels, BATCHES)):
        path = edited(write_zip(tmp_path / "a.zip", files), offset, value)
        with pytest.raises(LSGMError, match=rf"a\.zip/{next(iter(files))}: cannot be read .*{message}"):
            read(path)


@pytest.mark.parametrize("read", [levels, labels])
@pytest.mark.parametrize("name", ["a.zip", "without_suffix"])
def test_a_cut_zip(tmp_path: Path, name: str, read: Callable[[Path], list[int]]) -> None:
    content = write_zip(tmp_path / name, IMAGES | BATCHES).read_bytes()
    for length in (4, 40, len(content) // 2, len(content) - 100, len(content) - 1):
        (tmp_path / name).write_bytes(content[:length])
        with pytest.raises(LSGMError, match=f"^{tmp_path}/{name}: is a damaged or incomplete archive"):
            read(tmp_path / name)
    if name == "a.zip":
        with pytest.raises(LSGMError, match="a.zip: is a damaged or incomplete archive"):
            read(tmp_path)


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_a_cut_tar(tmp_path: Path, name: str) -> None:
    content = write_tar(tmp_path / name, list(BATCHES.items())).read_bytes()
    for length in (0, 11, 300, len(content) // 3):
        (tmp_path / name).write_bytes(content[:length])
        for path in (tmp_path / name, tmp_path):
            with pytest.raises(LSGMError, match=f"{name}: is .*damaged or incomplete") as caught:
                labels(path)
            assert "\n" not in str(caught.value)


def test_links_in_a_zip_are_left_out(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", IMAGES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("5.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "0.png")
    assert levels(path) == [0, 10, 20, 30]


# -- what would unpack to more than the memory holds


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> int:
    """The limits of both kinds of files, so low that a small file goes beyond them."""
    limit = 1 << 20
    monkeypatch.setattr(collection, "MAX_BYTES", limit)
    monkeypatch.setattr(pickles, "MAX_BYTES", limit)
    return limit


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_would_fill_the_memory(tmp_path: Path, limited: int, method: int) -> None:
    for read, files in ((levels, IMAGES), (labels, BATCHES)):
        name = next(iter(files))
        path = write_zip(tmp_path / "a.zip", {**files, name: bytes(5 << 20)}, method)
        with pytest.raises(LSGMError, match=rf"a\.zip/{name}: holds more than {limited} bytes"):
            read(path)


def test_no_more_is_unpacked_than_allowed_whatever_the_header_says(tmp_path: Path, limited: int) -> None:
    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size is not None and 0 < size <= archives.STEP
            return super().read(size)

    file = Counted(bytes(5 << 20))
    with pytest.raises(LSGMError, match="x: holds more than"):
        archives._bounded(file, 10, "x", limited)
    assert file.tell() <= limited + archives.STEP


def test_a_tar_that_would_fill_the_memory(tmp_path: Path, limited: int) -> None:
    path = write_tar(tmp_path / "a.tar.gz", [("one", bytes(5 << 20)), ("two", BATCH)])
    with pytest.raises(LSGMError, match=f"a.tar.gz/one: holds more than {limited} bytes"):
        labels(path)
    for kind in (b"L", b"K", b"x", b"g"):  # names and notes, which tarfile reads at once
        header = tarfile.TarInfo("x")
        header.type, header.size = kind, 5 << 20
        path.write_bytes(gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(6 << 20), 1))
        with pytest.raises(LSGMError, match="a.tar.gz: is .*a damaged or incomplete"):
            labels(path)


def test_a_file_of_a_folder_that_would_fill_the_memory(tmp_path: Path, limited: int) -> None:
    for name, content in (IMAGES | BATCHES).items():
        (tmp_path / name).write_bytes(content)
    for name, read in (("7.png", levels), ("one", labels)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 40)  # takes no room on the disk
        with pytest.raises(LSGMError, match=f"{name}: holds more than {limited} bytes"):
            read(tmp_path)


def test_a_damaged_directory_ends_in_one_line(tmp_path: Path) -> None:
    content = write_zip(tmp_path / "a.zip", IMAGES).read_bytes()
    start = content.find(b"PK\1\2")
    for at in range(start, len(content), 3):
        (tmp_path / "a.zip").write_bytes(content[:at] + struct.pack("B", content[at] ^ 0xFF) + content[at + 1 :])
        try:
            assert set(levels(tmp_path / "a.zip")) <= {0, 10, 20, 30}
        except LSGMError as error:
            assert "\n" not in str(error)
