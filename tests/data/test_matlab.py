"""OMNIGLOT's matrices in every class that MATLAB and SciPy write."""

from __future__ import annotations

import struct
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat
from scipy.sparse import csc_matrix

from lsgm.data import matlab
from lsgm.data.matlab import MatFile
from lsgm.errors import LSGMError

BINARY = (np.random.default_rng(0).random((16, 5)) > 0.5).astype(np.uint8)
EXPECTED = 255 * BINARY.T.reshape(5, 1, 4, 4).swapaxes(2, 3)


def read(path: Path) -> np.ndarray:
    with ExitStack() as stack:
        arrays = MatFile("chardata.mat", {"train": "data", "test": "testdata"}).open(path, stack).arrays
        return arrays["train_images"][0:99]


def write(path: Path, data: Any, **options: Any) -> Path:
    savemat(path / "chardata.mat", {"data": data, "testdata": BINARY.astype(float), "target": np.eye(3)}, **options)
    return path


CLASSES = ("u1", "i2", "u2", "i4", "f4", "f8", ">f8", ">i2", "sparse")  # those of version 4 too
FURTHER = ("b1", "i1", "i8", "u8")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {"format": "4"}) for kind in CLASSES),
        *(
            (kind, {"do_compression": packed})
            for packed in (False, True)
            for kind in (*CLASSES, "b1", "i1", "i8", "u8")
        ),
    ],
)
def test_every_class_of_numbers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    data = csc_matrix(BINARY.astype(float)) if kind == "sparse" else BINARY.astype(kind)
    assert np.array_equal(read(write(tmp_path, data, **options)), EXPECTED)


def test_shades(tmp_path: Path) -> None:
    shades = np.linspace(0, 1, 80).reshape(16, 5)
    for kind in (np.float32, np.float64):
        expected = np.rint(255 * shades.astype(kind)).astype(np.uint8).T.reshape(5, 1, 4, 4).swapaxes(2, 3)
        assert np.array_equal(read(write(tmp_path, shades.astype(kind))), expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (255 * BINARY, "intensities from 0 to 1, found 0 to 255"),
        (-BINARY.astype("i1"), "intensities from 0 to 1, found -1 to 0"),
        (np.where(BINARY, np.nan, 0.5), "intensities from 0 to 1, found nan"),
        (BINARY.astype(complex) * 1j, "found one of complex"),
        (np.zeros((16, 0)), "found the shape .16, 0."),
        (np.zeros((0, 0)), "found the shape .0, 0."),
        (np.zeros((4, 4, 5)), "found the shape .4, 4, 5."),
        (np.zeros((15, 5)), "found the shape .15, 5."),
        ("a text", "found a char"),
        (np.array([[BINARY, 1]], dtype=object), "found a cell"),
        ({"images": BINARY}, "found a struct"),
    ],
)
def test_other_variables(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(LSGMError, match=f"chardata.mat: data: expected (.*, )?{message}") as caught:
        read(write(tmp_path, data))
    assert "\n" not in str(caught.value)


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "chardata.mat"
    file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(384) + b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(LSGMError, match="chardata.mat: is a file of MATLAB 7.3"):
        read(tmp_path)
    content = (write(tmp_path, BINARY) / "chardata.mat").read_bytes()
    for damaged in (b"", b"<html>", content[:100], content[:200], content[:-150], content[:130] + b"\xff" * 40):
        file.write_bytes(damaged)
        with pytest.raises(LSGMError, match="chardata.mat: (cannot be read as a MATLAB file|has no matrix)") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_matrix_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matlab, "MAX_BYTES", 1 << 20)
    content = (write(tmp_path, BINARY) / "chardata.mat").read_bytes()
    packed = zlib.compress(bytes(30 << 20))
    bomb = content[:128] + struct.pack("<II", 15, len(packed)) + packed
    (tmp_path / "chardata.mat").write_bytes(bomb)
    with pytest.raises(LSGMError, match="chardata.mat: cannot be read as a MATLAB file .a matrix of more than 1048576"):
        read(tmp_path)
    with pytest.raises(LSGMError, match="data: expected a matrix .*found a uint8 of shape .16, 10000."):
        read(write(tmp_path, np.zeros((16, 10_000), np.uint8)))
