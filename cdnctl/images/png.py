"""PNG: what Pillow does not read, and all that is written.

Pillow cuts 16-bit colour to 8 bits, so such files are read in two passes (see `deep_samples`) and
all are written by imagecodecs.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import imagecodecs
import numpy as np
import PIL.Image

from cdnctl.errors import ImageError
from cdnctl.images.image import Metadata

DTYPES = {".png": ("uint8", "uint16")}
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# PNG chunks that are copied as they are: text, date and colour description.
_COPIED = frozenset({b"tEXt", b"zTXt", b"iTXt", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"cICP"})
TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})  # of these, text
_XMP_KEYWORD = b"XML:com.adobe.xmp"


def check_rows(data: bytes) -> None:
    """Refuse a PNG file with fewer rows than its header says: Pillow leaves those black."""
    width, height, bits, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    # First column and row of each pass, and the steps from there to the next.
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)]
        passes += [(0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    missing = 0
    for x, y, step_x, step_y in passes:
        columns, rows = -((x - width) // step_x), -((y - height) // step_y)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * bits + 7) // 8)
    inflate = zlib.decompressobj()
    for kind, content in chunks(data):
        while kind == b"IDAT" and content and missing > 0 and not inflate.eof:
            missing -= len(inflate.decompress(content, 2**20))
            content = inflate.unconsumed_tail
    if missing > 0:
        raise ImageError("the file is cut short; copy or export it again")


def deep_samples(picture: PIL.Image.Image, data: bytes) -> np.ndarray:
    """Decode a 16-bit PNG with more than one channel to uint16 (H, W, C).

    Pillow's unpackers keep one byte of each sample: those for big-endian samples the high one
    and those for little-endian samples, given the same bytes, the low one. Gray with alpha has
    four bytes a pixel, so it is unpacked as if it were 8-bit RGBA.
    """

    samples: np.ndarray

    def unpack(rawmode: str) -> np.ndarray:
        with PIL.Image.open(io.BytesIO(data), formats=("PNG",)) as copy:
            copy.tile = [copy.tile[0]._replace(args=rawmode)]
            return np.asarray(copy, np.uint16)

    if picture.mode == "RGBA" and data[25] == 4:  # colour type: gray with alpha
        raw = unpack("RGBA")
        samples = raw[:, :, ::2] << 8 | raw[:, :, 1::2]
    else:
        samples = unpack(f"{picture.mode};16B") << 8 | unpack(f"{picture.mode};16L")
    key = picture.info.get("transparency")
    if key is not None:
        alpha = np.where((samples == np.asarray(key)).all(axis=2), 0, 65535).astype(np.uint16)
        samples = np.dstack([samples, alpha])
    picture.load()  # reads the chunks behind the pixels, which may hold EXIF and text
    return samples


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and data of each chunk of a PNG file."""
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def extras(data: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(
        (kind, content)
        for kind, content in chunks(data)
        if kind in _COPIED and not content.startswith(_XMP_KEYWORD)
    )


def encode(samples: np.ndarray, meta: Metadata) -> bytes:
    """Encode uint8 or uint16 samples; the chunks of the metadata go in before the pixels."""
    extras: list[tuple[bytes, bytes]] = []
    if meta.icc:
        extras.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(meta.icc)))
    if meta.dpi:
        # PNG counts pixels per metre.
        per_metre = [min(max(round(dpi / 0.0254), 1), 2**31 - 1) for dpi in meta.dpi]
        extras.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if meta.exif:
        extras.append((b"eXIf", meta.exif))
    if meta.xmp:
        extras.append((b"iTXt", _XMP_KEYWORD + bytes(5) + meta.xmp))
    out = [SIGNATURE]
    # The encoder wants the usual strides even of axes of length 1, where numpy allows any.
    samples = samples.ravel().reshape(samples.shape)
    # By itself it sets aside too little for narrow noise: each row takes a byte more.
    room = samples.nbytes + len(samples)
    data = imagecodecs.png_encode(samples, level=6, out=room + room // 256 + 8192)
    for kind, content in chunks(bytes(data)):
        for part in [(kind, content), *(extras + list(meta.png) if kind == b"IHDR" else ())]:
            checksum = zlib.crc32(part[1], zlib.crc32(part[0]))
            out += [struct.pack(">I", len(part[1])), *part, struct.pack(">I", checksum)]
    return b"".join(out)
