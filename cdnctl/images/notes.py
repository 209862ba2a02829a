"""A line in a file on what was done to its picture, where the format has a place for it."""

from __future__ import annotations

import struct
from dataclasses import replace

from cdnctl.images.image import Metadata
from cdnctl.images.pillow import JPEG_SEGMENT

DESCRIPTION, SOFTWARE = 270, 305  # tags of EXIF and TIFF
_ASCII = 2  # type of a tag
_ENTRY = 12  # bytes


def with_note(metadata: Metadata, text: str, suffix: str) -> Metadata:
    """Metadata that also say ``text``, for a file with this suffix.

    PNG has chunks of text, of which it gets one more. Elsewhere the note goes where a file names
    its software, or else where it describes itself: nothing that is there is replaced, and a file
    with both, or without a place for either (BMP), is left as it is. Behind an earlier note, one
    that begins with the same word, it is added.
    """
    note = text.encode("ascii", "backslashreplace")
    if suffix == ".png":
        return replace(metadata, png=(*metadata.png, (b"tEXt", b"Software\0" + note)))
    if suffix == ".bmp":
        return metadata
    exif = metadata.exif or _EMPTY
    try:
        for tag in (SOFTWARE, DESCRIPTION):
            before = text_of(exif, tag)
            if before.split(b" ")[0] == note.split(b" ")[0]:
                note = before + b"; " + note
            elif before:
                continue
            longer = _with_text(exif, tag, note)
            if suffix in (".jpg", ".jpeg") and len(longer) > JPEG_SEGMENT:
                break  # the whole block would be left out for it
            return replace(metadata, exif=longer)
    except (KeyError, struct.error):  # damaged directories that Pillow lets pass
        pass
    return metadata


def text_of(exif: bytes, tag: int) -> bytes:
    """The text of a tag in the first directory of an EXIF block; empty if it has none.

    struct.error or KeyError for a damaged block.
    """
    order = _order(exif)
    entries, _ = _directory(exif, order)
    for entry in entries:
        found, kind, count, value = struct.unpack(order + "HHI4s", entry)
        if found == tag:
            if kind != _ASCII:
                return b"?"  # whatever it is, it is there
            (at,) = struct.unpack(order + "I", value)
            content = value[:count] if count <= 4 else exif[at : at + count]
            return content.rstrip(b"\0 ")
    return b""


def _with_text(exif: bytes, tag: int, text: bytes) -> bytes:
    """An EXIF block with a text in its first directory.

    The directory is written anew behind all that was there, so that what points into the block,
    makers' own notes too, goes on to point to the same.
    """
    order = _order(exif)
    entries, following = _directory(exif, order)
    entries = [e for e in entries if struct.unpack(order + "H", e[:2]) != (tag,)]
    exif += b"\0" * (len(exif) % 2)
    place = len(exif)
    content = text + b"\0"
    behind = place + 2 + _ENTRY * (len(entries) + 1) + 4
    value = content.ljust(4, b"\0") if len(content) <= 4 else struct.pack(order + "I", behind)
    entries.append(struct.pack(order + "HHI4s", tag, _ASCII, len(content), value))
    entries.sort(key=lambda entry: struct.unpack(order + "H", entry[:2]))
    count = struct.pack(order + "H", len(entries))
    start = struct.pack(order + "I", place)
    moved = exif[:4] + start + exif[8:] + count + b"".join(entries) + following
    return moved + (b"" if len(content) <= 4 else content)


def _order(exif: bytes) -> str:
    return {b"II": "<", b"MM": ">"}[exif[:2]]


def _directory(exif: bytes, order: str) -> tuple[list[bytes], bytes]:
    """The entries of the first directory, and its pointer to the next one."""
    (start,) = struct.unpack_from(order + "I", exif, 4)
    (count,) = struct.unpack_from(order + "H", exif, start)
    end = start + 2 + _ENTRY * count
    entries = [exif[at : at + _ENTRY] for at in range(start + 2, end, _ENTRY)]
    if end > len(exif):
        raise struct.error("the directory is cut short")
    return entries, exif[end : end + 4].ljust(4, b"\0")


_EMPTY = struct.pack("<2sHIHI", b"II", 42, 8, 0, 0)  # an EXIF block without an entry
