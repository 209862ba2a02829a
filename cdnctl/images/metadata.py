"""EXIF, XMP, resolution: what files say about their picture, in the forms they say it in."""

from __future__ import annotations

import re
import struct
from typing import Any

import PIL.Image

ORIENTATION, ICC, XMP, IPTC = 274, 34675, 700, 33723  # tags of TIFF and EXIF
EXIF_IFD, GPS_IFD, _INTEROP_IFD = 34665, 34853, 40965
# Tags of a TIFF page that describe the picture, not its layout: description, maker, model,
# software, date, artist, host, rating, copyright, and Windows' title to subject.
_TEXT_TAGS = (270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096))
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[1-8]""")
_SIZE, _PIXEL_DIMENSIONS = (256, 257), (40962, 40963)  # width and height: tags of EXIF
_OTHER_SIDE = {
    b"exif:PixelXDimension": b"exif:PixelYDimension",
    b"exif:PixelYDimension": b"exif:PixelXDimension",
    b"tiff:ImageWidth": b"tiff:ImageLength",
    b"tiff:ImageLength": b"tiff:ImageWidth",
}
_XMP_SIDES = re.compile(b"|".join(_OTHER_SIDE))
EXIF_PREFIX = b"Exif\0\0"


def as_bytes(value: object) -> bytes | None:
    """Return a tag's value if it is bytes (or text, as some readers have it), else None."""
    if isinstance(value, tuple) and value:
        value = value[0]
    if isinstance(value, str):
        value = value.encode()
    return value if isinstance(value, bytes) and value else None


def checked_dpi(dpi: Any) -> tuple[float, float] | None:
    """Return a resolution as two floats, or None if it makes no sense."""
    try:
        x, y = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0.01 < x < 1e6 and 0.01 < y < 1e6 else None


def reset_orientation(exif: bytes | None, notes: list[str]) -> tuple[int, bytes | None]:
    """Return the orientation (1 to 8) and the EXIF block with orientation 1, no thumbnail.

    The block is patched, not rebuilt, so that makers' own notes, which point into it, stay
    valid. The thumbnail would show the picture as it was, and turned wrongly; it is unlinked.
    """
    if not exif:
        return 1, None
    exif = exif.removeprefix(EXIF_PREFIX)
    patched = bytearray(exif)
    orientation = 1
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == ORIENTATION and kind == 3:
                orientation = value if 1 <= value <= 8 else 1
                struct.pack_into(order + "H", patched, entry + 8, 1)
        end = start + 2 + 12 * count
        if end + 4 <= len(exif):
            struct.pack_into("I", patched, end, 0)
        exif_tags(bytes(patched)).tobytes()
    except Exception:  # Pillow's parser fails in many ways
        notes.append("damaged EXIF data left out")
        return orientation, None
    return orientation, bytes(patched)


def upright_xmp(xmp: bytes) -> bytes:
    """Return an XMP packet with its orientation, if any, set to 1."""
    return _XMP_ORIENTATION.sub(rb"\g<1>1", xmp)


def turned_exif(exif: bytes) -> bytes:
    """Return an EXIF block with the width and the height that it tells exchanged."""
    patched = bytearray(exif)
    order = {b"II": "<", b"MM": ">"}[exif[:2]]

    def entries(pointer: int) -> dict[int, int]:
        """Where the entries of a directory are, by their tags."""
        (start,) = struct.unpack_from(order + "I", exif, pointer)
        (count,) = struct.unpack_from(order + "H", exif, start)
        places = range(start + 2, start + 2 + 12 * count, 12)
        return {struct.unpack_from(order + "H", exif, at)[0]: at for at in places}

    first = entries(4)
    inner = entries(first[EXIF_IFD] + 8) if EXIF_IFD in first else {}
    for found, (width, height) in ((first, _SIZE), (inner, _PIXEL_DIMENSIONS)):
        if width in found and height in found:
            # All but the tag: type, count and value.
            one, other = (slice(found[tag] + 2, found[tag] + 12) for tag in (width, height))
            patched[one], patched[other] = exif[other], exif[one]
    return bytes(patched)


def turned_xmp(xmp: bytes) -> bytes:
    """Return an XMP packet with the width and the height that it tells exchanged."""
    return _XMP_SIDES.sub(lambda name: _OTHER_SIDE[name[0]], xmp)


def exif_tags(exif: bytes | None) -> PIL.Image.Exif:
    tags = PIL.Image.Exif()
    tags.load(exif or b"")
    return tags


def describing_tags(tags: PIL.Image.Exif) -> PIL.Image.Exif:
    """Copy the tags that describe the picture, and none that describe a file's layout."""
    copy = PIL.Image.Exif()
    for tag in _TEXT_TAGS:
        if tag in tags:
            copy[tag] = tags[tag]
    for tag in (EXIF_IFD, GPS_IFD):
        entries = dict(tags.get_ifd(tag))
        if _INTEROP_IFD in entries:
            entries[_INTEROP_IFD] = dict(tags.get_ifd(_INTEROP_IFD))
        if entries:
            copy[tag] = entries
    return copy
