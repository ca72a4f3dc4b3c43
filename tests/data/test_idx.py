"""The IDX parser on files made here byte by byte."""

from __future__ import annotations

import gzip
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from lsgm.data import idx
from lsgm.errors import LSGMError

GOOD = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])


def test_values_and_shape() -> None:
    array = idx.parse(GOOD, "file")
    assert array.dtype == np.uint8
    assert array.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("data", [GOOD, gzip.compress(GOOD)], ids=["raw", "gzip"])
def test_raw_and_gzip_unpack_to_the_same(data: bytes) -> None:
    assert idx.unpack(data, "file") == GOOD


def test_unpacking_stops_above_the_limit() -> None:
    assert len(idx.unpack(gzip.compress(bytes(100_000)), "file", limit=10)) == 11


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (bytes([0, 0, 8, 0]), "not an IDX file"),
        (bytes([0, 0, 8, 200]), "not an IDX file"),
        (bytes([0, 0, 13]) + GOOD[3:], "IDX type 0x0d"),
        (GOOD[:7], "inside its header"),
        (GOOD[:-1], "cut short"),
        (GOOD + b"x", "more than the 18 bytes"),
        (bytes([0, 0, 8, 4]) + b"\xff" * 16, "cut short: 20 bytes, but its header .4294967295, 4294967295"),
        (bytes([0, 0, 8, 3]) + bytes(4) + b"\xff" * 8, "is empty: its header gives the dimensions .0, 4294967295"),
        (bytes([0, 0, 8, 1]) + bytes(4), "is empty"),
    ],
)
def test_faulty_content_is_named(content: bytes, message: str) -> None:
    with pytest.raises(LSGMError, match=f"^some/file: .*{message}"):
        idx.parse(content, "some/file")


def test_damaged_gzip_is_named() -> None:
    packed = gzip.compress(bytes(range(256)) * 10)
    with pytest.raises(LSGMError, match="^some/file: is cut short"):
        idx.unpack(packed[:-20], "some/file")
    with pytest.raises(LSGMError, match="^some/file: is a damaged gzip file"):
        idx.unpack(packed[:-8] + bytes(8), "some/file")


def test_a_member_that_would_fill_the_memory_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = idx.IDXFile("a-idx2-ubyte", "train", "images", (2, 3), "0" * 64)
    with (tmp_path / file.name).open("wb") as content:
        content.truncate(1 << 40)  # takes no room on the disk
    with ExitStack() as stack, pytest.raises(LSGMError, match="a-idx2-ubyte: holds more than 65554 bytes"):
        idx.IDXFiles((file,)).open(tmp_path, stack)
    (tmp_path / file.name).write_bytes(gzip.compress(bytes(10 << 20)))
    with ExitStack() as stack, pytest.raises(LSGMError, match="a-idx2-ubyte: is not an IDX file"):
        idx.IDXFiles((file,)).open(tmp_path, stack)
