"""Folders of images as people have them."""

from __future__ import annotations

import io
import logging
import os
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from lsgm.config import ImageConfig
from lsgm.data.images import Images
from lsgm.data.prepare import build
from lsgm.data.registry import Dataset
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError


def image(level: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def numbered(*levels: int, folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{level}.png": image(level) for level in levels}


def read(path: Path, images: Images | None = None) -> dict[str, list[int]]:
    """The gray levels of each split."""
    with ExitStack() as stack:
        arrays = (images or Images(8, test=1)).open(path, stack).arrays
        return {name.split("_")[0]: [round(i.mean()) for i in rows[0:99]] for name, rows in arrays.items()}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "lsgm")
    return caplog


def test_one_line_says_what_is_left_out(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    files = numbered(1, 2) | {"a/3.ppm": image(3, "PPM"), "a/4.TGA": image(4, "TGA"), "5.qoi": image(5, "QOI")}
    others = {"notes.txt": b"", "a/labels.csv": b"", "b.CSV": b"", "Makefile": b"", "6.eps": b"", "old.zip": b""}
    hidden = {".ipynb_checkpoints/1.png": image(99), ".DS_Store": b"", "a/Thumbs.db": b"", "desktop.ini": b""}
    path = write(tmp_path / "in", files | others | hidden)
    for i in range(5):
        (path / f"gone{i}.png").symlink_to(tmp_path / "nowhere.png")
    assert read(path) == {"train": [1, 2, 5, 3], "test": [4]}
    told = "5 dangling links, 2 .csv, 1 .eps, 1 .txt, 1 .zip, 1 without suffix"
    assert log.messages == [f"{path}: 5 images; left out: {told}"]
    log.clear()
    assert read(write(tmp_path / "clean", numbered(1, 2) | hidden)) == {"train": [1], "test": [2]}
    assert log.messages == []


def test_linked_folders_and_files(tmp_path: Path) -> None:
    path = write(tmp_path / "in", numbered(1, 2, folder="a/"))
    (path / "b").symlink_to(write(tmp_path / "elsewhere", numbered(3, 4)))
    (path / "a" / "back").symlink_to(path)
    (path / "9.png").symlink_to(tmp_path / "elsewhere" / "4.png")
    assert read(path) == {"train": [4, 1, 2, 3], "test": [4]}
    splits = write(tmp_path / "splits", numbered(9, folder=".test/"))
    (splits / "train").symlink_to(path / "a")
    (splits / "test").symlink_to(tmp_path / "elsewhere")
    assert read(splits, Images(8)) == {"train": [1, 2], "test": [3, 4]}


def test_hidden_folders_are_no_splits(tmp_path: Path) -> None:
    files = numbered(1, 2, folder="train/") | numbered(3, folder="test/")
    hidden = numbered(8, folder=".train/") | numbered(9, folder=".ipynb_checkpoints/test/") | {"._test.zip": b""}
    assert read(write(tmp_path, files | hidden), Images(8)) == {"train": [1, 2], "test": [3]}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """In a store, whose manifest is JSON, and in messages."""
    name = os.fsdecode(b"caf\xe9 1.png")
    path = write(tmp_path / "in", numbered(5, 6) | {name: image(7)})
    dataset = Dataset("mine", ImageConfig(channels=3, size=8, padded_size=8, binary=False), "", Images(8, test=1))
    build(dataset, tmp_path / "out", path)
    store = ImageStore(tmp_path / "out")
    assert [round(i.mean()) for i in store.images("train")] == [5, 6] and store.images("test").mean() == 7
    (tmp_path / "out" / "manifest.json").read_text(encoding="ascii")
    (path / name).write_bytes(b"<html>")
    with pytest.raises(LSGMError, match=r"caf\\xe9 1.png: is not a readable image") as caught:
        read(path)
    str(caught.value).encode("utf-8")


def test_postscript_is_opened_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lmdb = pytest.importorskip("lmdb", reason="the package lmdb is not installed")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    entries = numbered(1, 2) | {"3.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for name, content in entries.items():
            transaction.put(name.encode(), content)
    for path in (write(tmp_path / "folder", entries), tmp_path / "a.zip", tmp_path / "lmdb"):
        with pytest.raises(LSGMError, match=f"^{path}/3.png: is not a readable image") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_several_archives_or_other_files_alone(tmp_path: Path) -> None:
    write(tmp_path, {"a.zip": b"", "b.zip": b"", "notes.txt": b""})
    with pytest.raises(LSGMError, match=r"has no images; expected .*; found 2 \.zip, 1 \.txt$"):
        read(tmp_path)


# -- the partition file of CelebA

CELEBA = Images(8, partition="list_eval_partition.txt")
LINES = b"1.png 0\n2.png 1\n3.png 2\n"


@pytest.mark.parametrize(
    "content",
    [LINES, LINES.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + LINES, b"\n" + LINES.replace(b" ", b"\t") + b"\n\n"],
)
def test_a_partition(tmp_path: Path, content: bytes, log: pytest.LogCaptureFixture) -> None:
    files = numbered(1, 2, 3, folder="img/") | {"Eval/list_eval_partition.txt": content}
    write(tmp_path, files | {".old/list_eval_partition.txt": b"1.png 2\n", "._list_eval_partition.txt": b"\0\5\x16\7"})
    assert read(tmp_path, CELEBA) == {"train": [1], "valid": [2], "test": [3]}
    assert log.messages == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1.png 0\n\xff\xfe", "is not a UTF-8 text file"),
        (b"", "expected lines `name number` .*, found none"),
        (b"1.png 0\n2.png 3\n", "expected lines `name number` .*, found '2.png 3'"),
        (b"1.png 0\n2.png\n", "expected .*found '2.png'"),
        (b"1.png 0\n2.png 1 2\n", "expected .*found '2.png 1 2'"),
        (b"1.png 0\n\x1b[2J 1 2\n", r"expected .*found '\\x1b\[2J 1 2'"),
        (b"[" * 5000, "expected .*found '" + r"\[" * 80 + "'"),
        (LINES + b"1.png 2\n", "names 1.png twice"),
        (b"1.png 0\n2.png 1\n", "names no image of the split test"),
    ],
)
def test_what_is_no_partition(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, numbered(1, 2, 3) | {"list_eval_partition.txt": content})
    with pytest.raises(LSGMError, match=f"list_eval_partition.txt: {message}") as caught:
        read(tmp_path, CELEBA)
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_the_partition(tmp_path: Path) -> None:
    write(tmp_path, numbered(1, 2, 3) | {"list_eval_partition.txt/x": b""})
    with pytest.raises(LSGMError, match="has no list_eval_partition.txt"):
        read(tmp_path, CELEBA)
