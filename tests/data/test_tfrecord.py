"""Records that hold something else, and files beside them."""

from __future__ import annotations

import io
import logging
import struct
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lsgm.data import tfrecord
from lsgm.data.images import Images
from lsgm.data.tfrecord import masked_crc32c
from lsgm.errors import LSGMError


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def message(*fields: tuple[int, bytes]) -> bytes:
    return b"".join(varint(number << 3 | 2) + varint(len(content)) + content for number, content in fields)


def example(**features: bytes) -> bytes:
    """A serialized tf.train.Example with features that are serialized themselves."""
    return message((1, message(*((1, message((1, key.encode()), (2, entry))) for key, entry in features.items()))))


def data(content: bytes) -> bytes:
    return message((1, message((1, content))))


def shape(*dimensions: int) -> bytes:
    return message((3, message((1, b"".join(map(varint, dimensions))))))


def record(payload: bytes, length: int | None = None) -> bytes:
    head = struct.pack("<Q", len(payload) if length is None else length)
    return head + struct.pack("<I", masked_crc32c(head)) + payload + struct.pack("<I", masked_crc32c(payload))


def images(count: int) -> list[bytes]:
    return [record(example(data=data(bytes([10 * i]) * 192), shape=shape(3, 8, 8))) for i in range(count)]


def levels(path: Path) -> list[int]:
    with ExitStack() as stack:
        arrays = Images(8, test=1).open(path, stack).arrays
        return [round(i.mean()) for split in ("train", "test") for i in arrays[f"{split}_images"][0:99]]


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, kind)
    return buffer.getvalue()


ENDLESS = b"\x80" * 40


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (example(data=data(encoded("PNG")), shape=shape(3, 8, 8)), "an encoded PNG file"),
        (example(data=data(encoded("JPEG")), shape=shape(8, 8, 3)), "an encoded JPEG file"),
        (example(data=data(bytes(192))), "KeyError..shape"),
        (example(shape=shape(3, 8, 8)), "KeyError..data"),
        (example(data=data(b""), shape=shape(3, 0, 8)), "shape .3, 0, 8. of 0 bytes"),
        (example(data=data(bytes(192)), shape=shape(3, 2**64 - 1, 2**64 - 1)), "shape .3, 18446744073709551615"),
        (example(data=data(bytes(192)), shape=shape(3, 2**63, 8)), "of 192 bytes"),
        (example(data=data(bytes(192)), shape=message((3, message((1, ENDLESS))))), "more than 64 bits"),
        (example(data=data(bytes(192)), shape=message((3, message((1, ENDLESS[:3]))))), "IndexError"),
        (ENDLESS, "more than 64 bits"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "cut short"),
        (message((1, message((1, message((1, b"data\xff"), (2, b"")))))), "UnicodeDecodeError"),
        (b"\x0a" * 200, "ValueError"),
    ],
)
def test_records_of_something_else(tmp_path: Path, payload: bytes, text: str) -> None:
    (tmp_path / "a.tfrecords").write_bytes(record(payload) * 3)
    with pytest.raises(LSGMError, match=f"a.tfrecords: the record at byte 12 holds no image .*{text}") as caught:
        levels(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [2**64 - 1, 2**64 - 16, 2**63, 2**62, 1000])
def test_impossible_lengths(tmp_path: Path, length: int) -> None:
    (tmp_path / "a.tfrecords").write_bytes(b"".join(images(2)) + record(b"x", length))
    with pytest.raises(LSGMError, match=f"a.tfrecords: is cut short: .* its last record ends at .*{length % 10}"):
        levels(tmp_path)


def test_a_record_that_would_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "a.tfrecords").write_bytes(record(bytes(100)))
    with pytest.raises(LSGMError, match="a.tfrecords: a record of 100 bytes"):
        tfrecord.offsets(tmp_path / "a.tfrecords", 99)


def test_hidden_and_empty_files_beside_the_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lsgm")
    (tmp_path / "a.tfrecords").write_bytes(b"".join(images(4)))
    for name in (".a.tfrecords", "._a.tfrecords", ".tmp/b.tfrecords", "__MACOSX/a.tfrecords"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"".join(images(9)))
    (tmp_path / "b.tfrecords").write_bytes(b"")
    (tmp_path / "readme.md").write_bytes(b"")
    assert levels(tmp_path) == [0, 10, 20, 30]
    assert caplog.messages == [f"{tmp_path}: 4 images; left out: 1 .md, 1 empty TFRecord files"]
    (tmp_path / "a.tfrecords").write_bytes(b"")
    with pytest.raises(LSGMError, match="holds no records"):
        levels(tmp_path)


def test_pixels_may_begin_as_a_file_does(tmp_path: Path) -> None:
    pixels = np.zeros((3, 8, 8), np.uint8)
    pixels.reshape(-1)[:3] = [255, 216, 255]
    (tmp_path / "a.tfrecords").write_bytes(record(example(data=data(pixels.tobytes()), shape=shape(3, 8, 8))) * 2)
    assert levels(tmp_path) == [round(pixels.mean())] * 2
