"""Encoded images: every format and mode, photos that are held askew, damaged and hostile files."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lsgm.data.decode import FORMATS, SUFFIXES, UPRIGHT, decode, format_of, is_image
from lsgm.data.images import Images
from lsgm.errors import LSGMError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RNG = np.random.default_rng(0)
PIXELS = np.kron(RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))  # [32, 48, 3]
LOSSLESS = ("PNG", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "QOI", "SGI", "PCX", "TGA")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: bytes, name: str = "file.png") -> np.ndarray:
    return np.asarray(decode(data, name).convert("RGB"))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_whatever_its_suffix(kind: str) -> None:
    if kind == "AVIF":
        pytest.importorskip("PIL.AvifImagePlugin", reason="this Pillow is older than AVIF")
    options = {"sizes": [(48, 32)]} if kind == "ICO" else {}
    data = encoded(Image.fromarray(PIXELS), kind, **options)
    name = "x.TGA" if kind == "TGA" else "x.png"  # TGA has no signature: it goes by its suffix
    assert format_of(data, name) == kind
    found = rgb(data, name)
    assert found.shape == PIXELS.shape
    assert np.abs(found.astype(int) - PIXELS).mean() <= (0 if kind in LOSSLESS else 20)


def test_suffixes() -> None:
    for name in ("a.JPG", "a.jpe", "a.jfif", "a.apng", "a.gif", "a.Tiff", "a.pgm", "a.pnm", "a.j2k", "a.jpx", "a.tga"):
        assert is_image(name)
    for name in ("a.eps", "a.ps", "a.pdf", "a.wmf", "a.emf", "a.fpx", "a.mpg", "a.h5", "a.txt", "png", "a.png~"):
        assert not is_image(name)
    assert len(set(SUFFIXES)) == len(SUFFIXES)


def test_the_first_picture_of_several_is_taken() -> None:
    first, second = (Image.new("RGB", (8, 8), (level, level, level)) for level in (10, 200))
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(first, kind, save_all=True, append_images=[second])
        assert np.abs(rgb(data).astype(int) - 10).max() <= 2, kind


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"\xc5\xd0\xd3\xc6" + bytes(60),  # EPS with a preview
        b"\xd7\xcd\xc6\x9a" + bytes(60),  # WMF
        b"\x01\0\0\0" + bytes(36) + b" EMF" + bytes(60),
        b"\x89HDF\r\n\x1a\n" + bytes(60),
        b"%PDF-1.4\n",
        b"<html>",
        b"",
    ],
)
def test_other_files_are_refused_and_start_no_program(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    for name in ("a.png", "a.tga"):
        with pytest.raises(LSGMError, match=r"^a\.(png: is not a readable image .it starts with b|tga: is)") as caught:
            decode(data, name)
        assert "\n" not in str(caught.value)


# -- orientation


def askew(orientation: int) -> Image.Image:
    """PIXELS as a camera stores it that was held in this way: the inverse of what puts it upright."""
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turn = inverse.get(orientation, UPRIGHT.get(orientation))
    image = Image.fromarray(PIXELS)
    return image if turn is None else image.transpose(turn)


def exif(orientation: int, order: str = "<", kind: int = 3, before: bytes = b"", after: bytes = b"") -> bytes:
    """A block of EXIF; ``before`` and ``after`` are entries of twelve bytes beside the orientation."""
    value = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind], orientation).ljust(4, b"\0")
    entries = before + struct.pack(f"{order}HHI", 0x112, kind, 1) + value + after
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries) // 12)
    return b"Exif\0\0" + head + entries + bytes(4)


def with_exif(jpeg: bytes, block: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_is_put_upright(kind: str, orientation: int) -> None:
    note = Image.Exif()
    note[0x112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    found = rgb(encoded(askew(orientation), kind, exif=note, **options))
    assert found.shape == PIXELS.shape
    assert np.abs(found.astype(int) - PIXELS).mean() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    "block",
    [
        # A resolution of -1/0, which Pillow writes again in vain.
        exif(6, after=struct.pack("<HHII", 0x11A, 10, 1, 38) + bytes(4) + struct.pack("<ii", -1, 0)),
        exif(6, ">"),
        exif(6, kind=1),
        exif(6, kind=4),
        exif(6, before=struct.pack("<HHII", 0x10F, 2, 1000, 1 << 30)),  # a maker's name that is not there
        exif(6, after=struct.pack("<HHII", 0x8769, 4, 1, 1 << 31)),  # further notes that are not there
        exif(6, before=struct.pack("<HHII", 0x10F, 99, 1, 0))[:-4],  # an unknown type, and no end
        b"Exif\0\0" + exif(6),
    ],
)
def test_only_the_orientation_of_exif_matters(block: bytes) -> None:
    found = rgb(with_exif(encoded(askew(6), "JPEG", quality=95, subsampling=0), block), "photo.jpg")
    assert found.shape == PIXELS.shape and np.abs(found.astype(int) - PIXELS).mean() <= 3


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0junk" + bytes(30),
        b"Exif\0\0II*\0" + struct.pack("<I", 1 << 31),
        b"Exif\0\0II*\0" + struct.pack("<IH", 8, 65535),
        exif(0),
        exif(9),
        exif(6)[:20],
    ],
)
def test_exif_without_a_readable_orientation_counts_as_none(block: bytes) -> None:
    found = rgb(with_exif(encoded(Image.fromarray(PIXELS), "JPEG", quality=95, subsampling=0), block), "photo.jpg")
    assert found.shape == PIXELS.shape and np.abs(found.astype(int) - PIXELS).mean() <= 3


# -- modes and sizes


def fit(image: Image.Image | bytes, channels: int = 3, size: int = 8) -> np.ndarray:
    image = decode(image, "x.png") if isinstance(image, bytes) else image
    return Images(size, channels=channels, test=1).fit(image, "x.png")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_modes(mode: str) -> None:
    gray = Image.new("L", (8, 8), 255).convert("RGB").convert(mode)
    assert fit(gray).shape == (3, 8, 8) and fit(gray, 1).shape == (1, 8, 8)
    assert fit(gray).min() >= 254


def test_transparent_colors_of_a_palette_lie_on_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    assert fit(encoded(image, "PNG"))[:, 0, 0].tolist() == [200, 0, 0]
    assert fit(encoded(image, "PNG", transparency=1))[:, 0, 0].tolist() == [255, 255, 255]
    assert fit(encoded(image, "PNG", transparency=bytes([255, 51])))[:, 0, 0].tolist() == [244, 204, 204]


def png(width: int, height: int, depth: int = 8, color: int = 2, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_one_pixel_and_sixteen_bits() -> None:
    assert (fit(encoded(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG")) == 9).all()
    assert (fit(png(2, 2, 16, 0, b"\0\x80\x80\x80\x80" * 2), 1) == 128).all()
    assert (fit(png(2, 2, 16, 2, b"\0" + b"\x80\x80" * 6 + b"\0" + b"\x80\x80" * 6)) == 128).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(0, 0), "is a damaged image"),
        (b"P6\n0 0\n255\n", "is a damaged image"),
        (png(60000, 60000), "has more than 178956970 pixels; make it smaller"),
        (b"P5\n2 2\n65535\n" + bytes(8), "has I pixels of 32 bits"),
        (b"Pf\n2 2\n-1.0\n" + bytes(16), "has F pixels of 32 bits"),
    ],
)
def test_what_has_no_pixels_that_can_be_stored(data: bytes, message: str) -> None:
    with pytest.raises(LSGMError, match=f"^x.png: {message}"):
        fit(data)


def test_an_image_without_pixels() -> None:
    with pytest.raises(LSGMError, match="^x.png: is empty: 0 x 5 pixels"):
        fit(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images_end_in_an_image_or_in_one_line(kind: str) -> None:
    if kind == "AVIF":
        pytest.importorskip("PIL.AvifImagePlugin", reason="this Pillow is older than AVIF")
    random.seed(0)
    data = encoded(Image.fromarray(PIXELS), kind)
    refused = 0
    for attempt in range(60):
        damaged = bytearray(data[: random.randrange(len(data))] if attempt % 2 else data)
        for _ in range(3 * (1 - attempt % 2)):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        try:
            assert fit(decode(bytes(damaged), f"x.{kind.lower()}")).shape == (3, 8, 8)
        except LSGMError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused >= 20


def test_an_image_of_another_folder_is_named_in_print(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2J.png").write_bytes(b"<html>")
    (tmp_path / "b.png").write_bytes(encoded(Image.fromarray(PIXELS), "PNG"))
    with ExitStack() as stack, pytest.raises(LSGMError, match=r"/a\\x1b\[2J.png: is not a readable image"):
        contents = Images(8, test=1).open(tmp_path, stack)
        [rows[0:2] for rows in contents.arrays.values()]
