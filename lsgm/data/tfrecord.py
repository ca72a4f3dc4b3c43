"""TFRecord files of images, as the ones that CelebA-HQ and FFHQ are passed around in; TensorFlow is not needed.

A record is `length (8 bytes), its checksum (4), payload, its checksum (4)`; the payload a `tf.train.Example` with
`shape` (three integers) and `data` (the bytes of the image, channels first or last as the shape says).
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lsgm.data.decode import START, format_of
from lsgm.errors import LSGMError

LANE = 64  # bytes that the checksum takes one by one


def offsets(path: Path, limit: int) -> list[tuple[int, int]]:
    """Start and length of each record's payload.

    Raises :class:`LSGMError` for a file of another kind, one cut short, or a record of more than ``limit`` bytes.
    """
    found = []
    end = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while at < end:
            header = file.read(12)
            length, checksum = struct.unpack("<QI", header) if len(header) == 12 else (0, -1)
            if checksum != masked_crc32c(header[:8]):
                raise LSGMError(f"{path}: is no TFRecord file, or damaged at byte {at}; get the file again")
            found.append((at + 12, length))
            at += length + 16
            if at > end:
                raise LSGMError(f"{path}: is cut short: {end} bytes, its last record ends at {at}; get the file again")
            if length > limit:
                raise LSGMError(f"{path}: a record of {length} bytes holds no image that can be read")
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
            raise ValueError(f"shape {shape} of {len(data)} bytes{f', a file of the format {kind}' if kind else ''}")
    except (ValueError, KeyError, StopIteration, IndexError, TypeError) as error:
        raise LSGMError(
            f"{path}: the record at byte {offset} holds no image (`shape`, `data`) of bytes ({error!r})"
        ) from None
    image = np.frombuffer(data, np.uint8).reshape(shape)
    return image.transpose(1, 2, 0) if shape[0] in (1, 3) else image


def fields(message: memoryview | bytes) -> Iterator[tuple[int, memoryview]]:
    """Number and content of each length-delimited field of a protocol buffer message; varints are given encoded."""
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
    """The checksum of the TFRecord format."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), over lanes of the data at once: a loop over its bytes would take minutes for a dataset.

    The CRC of the joined a, b is that of a, carried over as many zero bytes as b has, xor that of b.
    """
    lanes = 1 << (len(data) // LANE).bit_length()
    width = -(-len(data) // lanes)
    # Zeros in front change nothing, if the register starts at zero; its true start is xored into the first four bytes.
    padded = np.zeros(lanes * width + 4, np.uint8)
    padded[lanes * width - len(data) : lanes * width] = np.frombuffer(data, np.uint8)
    padded[lanes * width - len(data) :][:4] ^= 0xFF
    columns = padded[: lanes * width].reshape(lanes, width).T
    crc = np.zeros(lanes, np.uint32)
    table = _table()
    for column in np.ascontiguousarray(columns):
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    shift = _zeros(width)
    while len(crc) > 1:
        crc = _carried(shift, crc[::2]) ^ crc[1::2]
        shift = _carried(shift, shift)
    rest = int(crc[0])
    if len(data) < 4:  # what of the register's start reached beyond the data
        rest ^= 0xFFFFFFFF >> 8 * len(data)
    return rest ^ 0xFFFFFFFF


@functools.cache
def _table() -> NDArray[np.uint32]:
    crc = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        crc = np.where(crc & 1, np.uint32(0x82F63B78), np.uint32(0)) ^ (crc >> 1)
    return crc


def _carried(shift: NDArray[np.uint32], crc: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Each of ``crc`` after the zero bytes of ``shift``; the register is linear in its four bytes."""
    return shift[0][crc & 0xFF] ^ shift[1][crc >> 8 & 0xFF] ^ shift[2][crc >> 16 & 0xFF] ^ shift[3][crc >> 24]


@functools.cache
def _zeros(width: int) -> NDArray[np.uint32]:
    """What ``width`` zero bytes make of each value of each byte of the register, [4, 256]."""
    crc = np.arange(256, dtype=np.uint32) << (8 * np.arange(4, dtype=np.uint32)[:, None])
    table = _table()
    for _ in range(width):
        crc = table[crc & 0xFF] ^ (crc >> 8)
    return crc
