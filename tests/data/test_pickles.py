"""Batches as every version of Python and NumPy pickles them; nothing in a pickle is executed."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lsgm.data.pickles import ALLOWED, PickledBatches, load_batch
from lsgm.errors import LSGMError

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
WIDE = np.concatenate([IMAGES, IMAGES], axis=1)


def read(path: Path, batch: Any, protocol: int = 4) -> tuple[np.ndarray, list[int]]:
    for name in ("one", "two"):
        (path / name).write_bytes(batch if isinstance(batch, bytes) else pickle.dumps(batch, protocol=protocol))
    with ExitStack() as stack:
        arrays = PickledBatches({"train": ("one",), "test": ("two",)}, size=32, labels=True).open(path, stack).arrays
        return arrays["train_images"][0:9].reshape(-1, 3072), arrays["train_labels"][0:9].tolist()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "images",
    [IMAGES, IMAGES.copy(order="F"), WIDE[:, :3072], IMAGES[::-1], np.frombuffer(IMAGES, np.uint8).reshape(4, -1)],
    ids=["C", "Fortran", "not contiguous", "reversed", "another's"],
)  # fmt: skip
def test_images_of_any_protocol_and_layout(tmp_path: Path, images: np.ndarray, protocol: int) -> None:
    found, labels = read(tmp_path, {"data": images, "labels": [1, 2, 3, 4]}, protocol)
    assert np.array_equal(found, images) and labels == [1, 2, 3, 4]


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "labels",
    [
        [0, 7, 254, 255],
        (0, 7, 254, 255),
        [np.int64(0), np.uint8(7), np.int16(254), np.dtype(">i4").type(255)],
        *(np.array([0, 7, 254, 255], kind) for kind in ("u1", "<i2", ">i2", "<i4", ">i4", ">u4", "<i8", ">i8", ">u8")),
    ],
    ids=lambda labels: str(labels.dtype.str if isinstance(labels, np.ndarray) else type(labels).__name__),
)
def test_labels_of_any_kind(tmp_path: Path, labels: Any, protocol: int) -> None:
    assert read(tmp_path, {"data": IMAGES, "labels": labels}, protocol)[1] == [0, 7, 254, 255]


def test_names_of_numpy_before_version_2(tmp_path: Path) -> None:
    for protocol in (2, 5):
        batch = pickle.dumps({"data": IMAGES, "labels": [np.int64(5)] * 4}, protocol=protocol)
        old = batch.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        old = old.replace(b"numpy._core.numeric", b"numpy.core.numeric")
        if protocol == 5:  # a name there is preceded by its length, and all by that of the frame
            for length in (0x16, 0x13):
                old = old.replace(b"\x8c%cnumpy.core" % length, b"\x8c%cnumpy.core" % (length - 1))
            old = old[:2] + old[11:]
        found, labels = read(tmp_path, old)
        assert np.array_equal(found, IMAGES) and labels == [5] * 4


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([1, 2, 3, -1], "found -1"),
        ([1, 2, 3, 256], "found 256"),
        (np.array([1, 2, 3, 300]), "found 300"),
        ([1, 2, 3, 10**5000], "found a value of type int"),
        ([1, 2, 3, True], "found True"),
        ([1, 2, 3, 4.0], "found 4.0"),
        (np.array([1.0, 2, 3, np.nan]), "found 1.0"),
        ([1, 2, 3, None], "found a value of type NoneType"),
        ([1, 2, 3, "cat\x1b"], r"found 'cat.*x1b'"),
        ([1, 2, 3, [4]], "found a value of type list"),
        (np.ones((4, 1), int), "found a value of type list"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: Any, found: str) -> None:
    with pytest.raises(LSGMError, match=f"one: expected labels that are integers from 0 to 255, {found}"):
        read(tmp_path, {"data": IMAGES, "labels": labels})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "holds list, expected a dictionary"),
        ({}, "expected `data` as uint8 .N, 3072., found NoneType"),
        ({"data": IMAGES.tolist(), "labels": [1] * 4}, "expected `data` .*found list"),
        ({"data": IMAGES.astype(int), "labels": [1] * 4}, r"expected `data` .*found int64 .4, 3072."),
        ({"data": IMAGES[:0], "labels": []}, r"expected `data` .*found uint8 .0, 3072."),
        ({"data": IMAGES, "labels": [1] * 3}, "expected one label for each of its 4 images"),
        ({"data": IMAGES, "labels": 4}, "expected one label for each of its 4 images"),
        ({"data": IMAGES, "labels": np.array(4)}, "expected one label for each of its 4 images"),
        ({"data": IMAGES, "labels": [1] * 4, b"\xff": 1, 5: 6, None: 7}, None),
        (b"", "cannot be read as a batch"),
        (b"<html>", "cannot be read as a batch"),
        (pickle.dumps({"data": IMAGES, "labels": [1] * 4})[:-9], "cannot be read as a batch"),
    ],
)
def test_what_is_no_batch(tmp_path: Path, batch: Any, message: str | None) -> None:
    if message is None:  # other keys do not matter
        assert read(tmp_path, batch)[1] == [1] * 4
    else:
        with pytest.raises(LSGMError, match=f"one: {message}"):
            read(tmp_path, batch)


class Calls:
    """A pickle of this calls ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "function", [os.system, os.remove, eval, exec, getattr, __import__, subprocess.Popen, np.load, np.frombuffer, open]
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_is_executed(tmp_path: Path, function: Any, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    batch = {"data": IMAGES, "labels": [1] * 4, "more": Calls(function, "touch executed")}
    with pytest.raises(LSGMError, match=r"one: cannot be read as a batch .*it asks for [\w.]+, which no batch"):
        read(tmp_path, batch, protocol)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_what_is_allowed_cannot_be_changed_by_a_pickle(name: tuple[str, str]) -> None:
    """BUILD sets attributes of an object, also of a function."""
    forged = b"c%s\n%s\n(}(X\x0c\x00\x00\x00__defaults__N" % (name[0].encode(), name[1].encode())
    forged += b"X\x08\x00\x00\x00__doc__1X\x01\x00\x00\x00xutb."
    before = vars(ALLOWED[name]).copy()
    with pytest.raises(LSGMError, match="batch: "):
        load_batch(forged, "batch", 32)
    assert vars(ALLOWED[name]) == before


@pytest.mark.parametrize("encoding", ["zip", "rot13", "idna", "utf-8"])
def test_only_the_encoding_of_bytes_is_allowed(encoding: str) -> None:
    forged = b"c_codecs\nencode\n(Vabc\nV%s\ntR." % encoding.encode()
    with pytest.raises(LSGMError, match="batch: cannot be read as a batch of images .it asks for the encoding"):
        load_batch(forged, "batch", 32)


@pytest.mark.parametrize(
    ("what", "forged"),
    [
        ("tuples as a key", b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"K\x01s."),
        ("tuples in a set", b"\x80\x04\x8f(" + b")" + b"\x85" * 1_000_000 + b"\x90."),
        ("lists", b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b"."),
        ("a memo of 34 GB", b"\x80\x02}r\xff\xff\xff\x7f."),
        ("a memo of 34 GB by text", b"}p2147483647\n."),
        ("more bytes than there are", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f."),
        ("an integer of a million digits", b"I" + b"9" * 1_000_000 + b"\n."),
        ("an array larger than the memory", b"cnumpy._core.numeric\n_frombuffer\n(C\x01x"
         b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1tR(I9999999999\nI9999999999\ntX\x01\x00\x00\x00CtR."),
    ],
)  # fmt: skip
def test_hostile_pickles_end_in_one_line(what: str, forged: bytes, tmp_path: Path) -> None:
    """In a process of its own, of limited memory: some of these kill an interpreter that just loads them."""
    (tmp_path / "forged").write_bytes(forged)
    code = (
        "import resource, sys; from lsgm.data.pickles import load_batch; from lsgm.errors import LSGMError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try: load_batch(open(sys.argv[1], 'rb').read(), 'batch', 32)\n"
        "except LSGMError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "forged")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("batch: ") and len(done.stdout.splitlines()) == 1 and len(done.stdout) < 300
