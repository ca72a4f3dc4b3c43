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


CLASSES = ("u1", "i2", "u2", "i4", "f4", "f8", ">f8", ">i2")  # those of version 4 too


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (CLASSES, {"format": "4"}),
        ((*CLASSES, "b1", "i1", "i8", "u8"), {}),
        ((*CLASSES, "b1", "i1", "i8", "u8"), {"do_compression": True}),
    ],
    ids=["4", "5", "compressed"],
)
def test_every_class_of_numbers(tmp_path: Path, kinds: tuple[str, ...], options: dict[str, Any]) -> None:
    matrices: dict[str, Any] = {f"m{i}": BINARY.astype(kind) for i, kind in enumerate(kinds)}
    matrices["sparse"] = csc_matrix(BINARY.astype(float))
    savemat(tmp_path / "chardata.mat", matrices, **options)
    with ExitStack() as stack:
        arrays = MatFile("chardata.mat", {name: name for name in matrices}).open(tmp_path, stack).arrays
    assert len(arrays) == len(kinds) + 1
    for rows in arrays.values():
        assert np.array_equal(rows[0:99], EXPECTED)


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
    ],
)
def test_other_matrices(data: np.ndarray, message: str) -> None:
    with pytest.raises(LSGMError, match=f"^data: expected (.*, )?{message}") as caught:
        matlab._images(data, "data")
    assert "\n" not in str(caught.value)


def test_other_kinds_of_variables(tmp_path: Path) -> None:
    others = {"text": "a text", "cell": np.array([[BINARY, 1]], dtype=object), "fields": {"images": BINARY}}
    savemat(tmp_path / "chardata.mat", others | {"complex": BINARY * 1j})
    for name, found in (("text", "a char of"), ("cell", "a cell of"), ("fields", "a struct of"), ("complex", "one of")):
        with ExitStack() as stack, pytest.raises(LSGMError, match=f"mat: {name}: expected a matrix .*found {found}"):
            MatFile("chardata.mat", {"train": name}).open(tmp_path, stack)


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "chardata.mat"
    file.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(384) + b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(LSGMError, match="chardata.mat: is a MATLAB 7.3 file"):
        read(tmp_path)
    content = (write(tmp_path, BINARY) / "chardata.mat").read_bytes()
    killing = content[:136] + b"\0" * 32 + content[168:]  # SciPy ends in a segmentation fault, or in an error
    for damaged in (b"<html>", content[:-150], content[:130] + b"\xff" * 40, killing):
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
    with pytest.raises(LSGMError, match="data: expected a matrix .*found a uint8 of shape .16, 10000.$"):
        read(write(tmp_path, np.zeros((16, 10_000), np.uint8)))


def test_nothing_is_imported_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, BINARY))
    for name in ("scipy", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    assert np.array_equal(read(tmp_path), EXPECTED)
