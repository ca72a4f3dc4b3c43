"""Decode images: supported file formats, EXIF orientation, conversion to 8-bit RGB or grayscale."""

from __future__ import annotations

import io
import re
import struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from lsgm.errors import LSGMError


class Encoding(NamedTuple):
    """A file format: its suffixes, and the pattern with which its files start (None: no signature)."""

    suffixes: tuple[str, ...]
    start: bytes | None  # a regular expression


# Keyed by Pillow's names. Pillow's other formats start external programs (EPS, WMF) or do not hold photographs.
FORMATS = {
    "JPEG": Encoding((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), rb"\xff\xd8\xff"),
    "PNG": Encoding((".png", ".apng"), rb"\x89PNG\r\n\x1a\n"),
    "WEBP": Encoding((".webp",), rb"RIFF.{4}WEBP"),
    "BMP": Encoding((".bmp",), rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0"),
    "DIB": Encoding((".dib",), rb"\x0c\0\0\0.{4}\x01\0|[\x28\x34\x38\x40\x6c\x7c]\0\0\0.{8}\x01\0"),
    "GIF": Encoding((".gif",), rb"GIF8[79]a"),
    "TIFF": Encoding((".tif", ".tiff"), rb"II[*+]\0|MM\0[*+]|MM\*\0|II\0\*"),
    "PPM": Encoding((".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), rb"P[1-6Ff]\s[\s\d#]"),
    "JPEG2000": Encoding(
        (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), rb"\xff\x4f\xff\x51|\0{3}\x0cjP  \r\n\x87\n"
    ),
    "AVIF": Encoding((".avif",), rb".{4}ftyp(avif|avis|mif1|msf1)"),
    "QOI": Encoding((".qoi",), rb"qoif"),
    "SGI": Encoding((".sgi", ".rgb", ".rgba", ".bw"), rb"\x01\xda[\0\x01][\x01\x02]\0[\x01-\x03]"),
    "PCX": Encoding((".pcx",), rb"\n[\0\x02\x03\x05][\0\x01][\x01\x02\x04\x08]"),
    "ICO": Encoding((".ico",), rb"\0\0\x01\0[^\0]\0"),
    "TGA": Encoding((".tga", ".icb", ".vda", ".vst"), None),
}
SUFFIXES = tuple(suffix for encoding in FORMATS.values() for suffix in encoding.suffixes)
START = 32  # bytes that identify a format
# Pillow refuses images with more pixels than fit into this many bytes at three bytes per pixel.
MAX_BYTES = 1 << 29

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return name.lower().endswith(SUFFIXES)


def format_of(start: bytes, name: str = "") -> str | None:
    """The format of a file that starts with the bytes ``start``; None if it is not one of :data:`FORMATS`.

    Formats without a signature are identified by the suffix of ``name``.
    """
    for kind, encoding in FORMATS.items():
        if encoding.start is not None and re.match(encoding.start, start, re.DOTALL):
            return kind
    return next((kind for kind, of in FORMATS.items() if of.start is None and name.lower().endswith(of.suffixes)), None)


def decode(data: bytes, name: str) -> Image.Image:
    """The first frame of an encoded image, turned upright, in any of Pillow's modes.

    Raises :class:`LSGMError` with ``name``.
    """
    kind = format_of(data[:START], name)
    if data.startswith(b"version https://git-lfs"):
        raise LSGMError(f"{name}: is a Git LFS pointer, not the image itself; get it with `git lfs pull`")
    if kind is None:
        raise LSGMError(f"{name}: is not a readable image (it starts with {data[:8]!r}); get it again")
    Image.init()
    if kind not in Image.OPEN:
        raise LSGMError(
            f"{name}: has the format {kind}, which this version of Pillow cannot read: pip install --upgrade pillow"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        image.load()
    except UnidentifiedImageError:
        raise LSGMError(f"{name}: is a damaged image ({kind}); get it again") from None
    except Image.DecompressionBombError:
        raise LSGMError(f"{name}: has more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels; make it smaller") from None
    except Exception as error:  # damaged images raise exceptions of all kinds
        raise LSGMError(f"{name}: is a damaged image ({error}); get it again") from None
    turn = UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def size_of(data: bytes) -> tuple[int, int]:
    """The width and height in the header of an encoded image; (0, 0) if it is damaged."""
    kind = format_of(data[:START])
    try:
        return Image.open(io.BytesIO(data), formats=[kind]).size if kind else (0, 0)
    except Exception:  # damaged images raise exceptions of all kinds
        return 0, 0


def _orientation(image: Image.Image) -> int:
    """The orientation from EXIF (or XMP) metadata, 1 if there is none. Other metadata may be damaged."""
    exif = image.info.get("exif")
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is None:
        try:
            found = image.getexif().get(ORIENTATION)
        except Exception:  # damaged EXIF raises exceptions of all kinds
            return 1
    return found if isinstance(found, int) else 1


def _exif_orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF block, whose first directory has entries `tag, type, count, value or offset`."""
    tiff = exif.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return None
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHI4s", tiff, at)
            if tag == ORIENTATION and kind in (1, 3, 4):  # a byte, two or four
                return int(struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], value)[0])
    except struct.error:  # cut short
        pass
    return None


def eight_bits(image: Image.Image, channels: int, name: str) -> Image.Image:
    """``image`` as RGB or (one channel) grayscale, composited onto white. Raises :class:`LSGMError`."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise LSGMError(f"{name}: has {image.mode} pixels of 32 bits; expected 8 or 16 bits; convert it")
    try:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB" if channels == 3 else "L")
    except ValueError as error:
        raise LSGMError(f"{name}: has {image.mode} pixels ({error}); expected color or grayscale; convert it") from None


def from_pixels(pixels: NDArray[Any]) -> Image.Image:
    """An image from bytes [H, W, C]."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
