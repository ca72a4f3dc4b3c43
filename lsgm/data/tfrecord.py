"""TFRecord files of images, the format in which CelebA-HQ and FFHQ are distributed; read without TensorFlow.

A record is `length (8 bytes), its checksum (4), payload, its checksum (4)`. The payload is a `tf.train.Example` with
`shape` (three integers) and `data` (the image's bytes, channels first or last, as given by the shape).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lsgm.data.decode import START, format_of
from lsgm.errors import LSGMError


def offsets(path: Path, limit: int) -> list[tuple[int, int]]:
    """The start and length of each record's payload, in bytes.

    Raises :class:`LSGMError` if the file is not a TFRecord file, is truncated, or has a record above ``limit`` bytes.
    """
    found = []
    end = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < end:
            header = file.read(12)
            length, checksum = struct.unpack("<QI", header) if len(header) == 12 else (0, -1)
            if checksum != masked_crc32c(header[:8]):
                raise LSGMError(f"{path}: is not a TFRecord file, or is damaged at byte {at}; get the file again")
            found.append((at + 12, length))
            at += length + 16
            if at > end:
                raise LSGMError(f"{path}: is cut short: {end} bytes, its last record ends at {at}; get the file again")
            if length > limit:
                raise LSGMError(f"{path}: a record of {length} bytes is too large for an image")
            file.seek(at)
    return found


def read_image(path: Path, offset: int, length: int) -> NDArray[np.uint8]:
    """The image [H, W, C] of the record at ``offset``; raises :class:`LSGMError` if its checksum is wrong."""
    with path.open("rb") as file:
        file.seek(offset)
        payload, checksum = file.read(length), file.read(4)
    if checksum != struct.pack("<I", masked_crc32c(payload)):
        raise LSGMError(f"{path}: the record at byte {offset} is damaged; get the file again")
    try:
        # Example { features: 1 { feature: 1 { key: 1, value: 2 } ... } }
        (features,) = (value for key, value in fields(payload) if key == 1)
        entries = (dict(fields(entry)) for key, entry in fields(features) if key == 1)
        feature = {bytes(entry[1]).decode(): entry[2] for entry in entries}
        shape = tuple(_integers(feature["shape"]))
        data = next(value for _, value in fields(dict(fields(feature["data"]))[1]))  # Feature { bytes_list: 1 { 1 } }
        if len(shape) != 3 or not {shape[0], shape[2]} & {1, 3} or math.prod(shape) != len(data) or not data:
            kind = format_of(bytes(data[:START]))
            raise ValueError(f"shape {shape} of {len(data)} bytes{f', an encoded {kind} file' if kind else ''}")
    except (ValueError, KeyError, StopIteration, IndexError, TypeError) as error:
        raise LSGMError(
            f"{path}: the record at byte {offset} holds no image (`shape` and `data` as bytes): {error!r}"
        ) from None
    image = np.frombuffer(data, np.uint8).reshape(shape)
    return image.transpose(1, 2, 0) if shape[0] in (1, 3) else image


def fields(message: memoryview | bytes) -> Iterator[tuple[int, memoryview]]:
    """The number and content of each field of a protocol buffer message; varints are yielded encoded."""
    view, at = memoryview(message), 0
    while at < len(view):
        tag, at = _varint(view, at)
        start = at
        value, at = _varint(view, at)
        if tag & 7 == 2:
            start, at = at, at + value
        elif tag & 7 != 0:
            raise ValueError(f"wire type {tag & 7}")
        if at > len(view):
            raise ValueError("cut short")
        yield tag >> 3, view[start:at]


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = view[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("an integer of more than 64 bits")


def _integers(feature: memoryview) -> Iterator[int]:
    """The values of an int64 feature: Feature { int64_list: 3 { value: 1, packed or not } }."""
    for _, values in fields(dict(fields(feature))[3]):
        at = 0
        while at < len(values):
            value, at = _varint(values, at)
            yield value


def masked_crc32c(data: bytes) -> int:
    """The checksum of the TFRecord format: a CRC-32C, rotated and shifted."""
    import google_crc32c  # only TFRecord files need it

    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
