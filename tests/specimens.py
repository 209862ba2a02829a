"""Pictures that tests make, and small files of every kind, written by other libraries."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms
import tifffile

from cdnctl import images
from cdnctl.images import Image, Metadata

ICC = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
IPTC = b"\x1c\x02\x00\x00\x02\0\4" + b"\x1c\x02\x78\x00\x07caption"


def exif_block(orientation: int = 1) -> bytes:
    exif = PIL.Image.Exif()
    exif[271] = "Maker"
    exif[274] = orientation
    exif[306] = "2021:03:04 05:06:07"
    exif[34665] = {36867: "2021:03:04 05:06:07", 37500: b"maker's note"}
    exif[34853] = {1: "N"}
    return exif.tobytes()


def noise(height: int, width: int, channels: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Random samples (H, W, C) over the full range; a third of alpha, if any, is 0."""
    rng = np.random.default_rng(seed)
    shape = (height, width, channels)
    if np.dtype(dtype).kind == "f":
        samples = rng.random(shape).astype(dtype)
    else:
        samples = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    if channels in (2, 4):
        samples[rng.random((height, width)) < 1 / 3, -1] = 0
    return samples


def picture(samples: np.ndarray, **metadata: Any) -> Image:
    """Make an `Image` of samples (H, W, C) by way of a TIFF file that tifffile wrote."""
    channels = samples.shape[2]
    out = io.BytesIO()
    tifffile.imwrite(
        out,
        samples if channels > 1 else samples[:, :, 0],
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        metadata=None,
    )
    image = images.read(io.BytesIO(out.getvalue()))
    return replace(image, metadata=Metadata(**metadata))


def pillow_bytes(samples: np.ndarray, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(samples.squeeze(2) if samples.shape[2] == 1 else samples).save(
        out, kind, **options
    )
    return out.getvalue()


def read_bytes(data: bytes) -> Image:
    return images.read(io.BytesIO(data))


def png16(samples: np.ndarray, *, key: tuple[int, ...] | None = None) -> bytes:
    """Write a 16-bit PNG the plain way, unfiltered: an independent check of the reader."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").tobytes()
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if key:
        chunks.append((b"tRNS", struct.pack(f">{len(key)}H", *key)))
    chunks += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def adam7(samples: np.ndarray, lose: int = 0) -> bytes:
    """Write an interlaced 8-bit RGB PNG, its pixel data ``lose`` bytes short."""
    height, width, _ = samples.shape
    raw = b""
    for x, y, dx, dy in [
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]:  # fmt: skip
        for row in samples[y::dy, x::dx]:
            raw += b"\0" + row.tobytes() if row.size else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    packed = zlib.compress(raw[: len(raw) - lose])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    )


def sun_raster(samples: np.ndarray) -> bytes:
    """Write a Sun raster file: rows of blue, green, red (or of gray) of even lengths."""
    height, width, channels = samples.shape
    rows = b"".join(row[:, ::-1].tobytes() + bytes(width * channels % 2) for row in samples)
    header = (0x59A66A95, width, height, 8 * channels, len(rows), 1, 0, 0)
    return struct.pack(">8I", *header) + rows


def animated(kind: str) -> bytes:
    frames = [PIL.Image.fromarray(noise(5, 5, 3, "uint8", seed)) for seed in range(3)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


def assert_same(left: Image, right: Image) -> None:
    assert left.dtype == right.dtype
    assert np.array_equal(left.pixels, right.pixels)
    for a, b in ((left.alpha, right.alpha), (left.hidden, right.hidden)):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and np.array_equal(a, b))


KINDS = ["png", "png16", "tiff", "tiff-lzw", "jpeg", "webp", "webp-lossy"]
KINDS += ["bmp", "gif", "ppm", "avif", "qoi", "jp2", "sgi", "ras"]
# Of the same formats what else there is of codings, layouts and colours; and what needs extras.
MORE_KINDS = ["png-palette", "png-bits", "png-adam7", "pgm16", "pbm", "tga", "jpeg-cmyk"]
MORE_KINDS += ["jpeg-progressive", "webp-gray", "gif-key", "bmp-palette", "tiff-zstd", "tiff-jpeg"]
MORE_KINDS += ["tiff-tiles", "tiff-float", "tiff-planar", "tiff-fax", "tiff-big", "heic"]


@cache
def specimens() -> dict[str, bytes]:
    """Return one small file of each kind, with metadata where the format has it."""
    meta = {"icc": ICC, "exif": exif_block(6)[6:], "xmp": b"<x/>", "dpi": (96.0, 96.0)}
    rgb, rgba = noise(24, 17, 3, "uint8"), noise(24, 17, 4, "uint16")
    lzw = io.BytesIO()
    tifffile.imwrite(lzw, rgba, photometric="rgb", compression="lzw", predictor=True)
    return {
        "png": images.encode(picture(rgb, **meta), ".png"),
        "png16": images.encode(picture(rgba, **meta), ".png"),
        "tiff": images.encode(picture(rgba, **meta), ".tif"),
        "tiff-lzw": lzw.getvalue(),
        "jpeg": images.encode(picture(rgb, **meta), ".jpg"),
        "webp": images.encode(picture(noise(24, 17, 4, "uint8"), **meta), ".webp"),
        "webp-lossy": pillow_bytes(rgb, "WEBP"),
        "bmp": pillow_bytes(rgb, "BMP"),
        "gif": pillow_bytes(rgb, "GIF"),
        "ppm": pillow_bytes(rgb, "PPM"),
        "avif": pillow_bytes(rgb[:8, :8], "AVIF"),
        "qoi": pillow_bytes(rgb, "QOI"),
        "jp2": pillow_bytes(rgb, "JPEG2000"),
        "sgi": pillow_bytes(rgb, "SGI"),
        "ras": sun_raster(rgb),
    }


@cache
def more_specimens() -> dict[str, bytes]:
    """Return one small file of each further kind."""
    rgb, gray = noise(24, 17, 3, "uint8"), noise(24, 17, 1, "uint8")
    deep, floats = noise(24, 17, 3, "uint16"), noise(24, 17, 3, "float32")

    def saved(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
        out = io.BytesIO()
        picture.save(out, kind, **options)
        return out.getvalue()

    def tiff(samples: np.ndarray, **options: Any) -> bytes:
        out = io.BytesIO()
        big = options.pop("bigtiff", False)
        tifffile.imwrite(out, samples, photometric="rgb", bigtiff=big, metadata=None, **options)
        return out.getvalue()

    colours = PIL.Image.fromarray(rgb)
    palette, bits = colours.quantize(16), PIL.Image.fromarray(gray[:, :, 0] > 127)
    files = {
        "png-palette": saved(palette, "PNG", transparency=bytes(range(16))),
        "png-bits": saved(bits, "PNG"),
        "png-adam7": adam7(rgb),
        "pgm16": b"P5 17 24 65535\n" + deep[:, :, 0].astype(">u2").tobytes(),
        "pbm": saved(bits, "PPM"),
        "tga": saved(PIL.Image.fromarray(noise(24, 17, 4, "uint8")), "TGA", compression="tga_rle"),
        "jpeg-cmyk": saved(colours.convert("CMYK"), "JPEG", icc_profile=ICC),
        "jpeg-progressive": saved(colours, "JPEG", progressive=True, exif=exif_block(3)),
        "webp-gray": pillow_bytes(gray, "WEBP", lossless=True),
        "gif-key": saved(palette, "GIF", transparency=3, interlace=True),
        "bmp-palette": saved(palette, "BMP"),
        "tiff-zstd": tiff(deep, compression="zstd", predictor=True),
        "tiff-jpeg": tiff(np.tile(rgb, (2, 2, 1)), compression="jpeg"),
        "tiff-tiles": tiff(deep, tile=(16, 16), compression="packbits"),
        "tiff-float": tiff(floats, compression="zlib", predictor=True, byteorder=">"),
        "tiff-planar": tiff(np.moveaxis(deep, -1, 0), planarconfig="separate"),
        "tiff-fax": saved(bits, "TIFF", compression="group4"),
        "tiff-big": tiff(deep, bigtiff=True),
    }
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        files["heic"] = saved(colours.resize((16, 16)), "HEIF", exif=exif_block(8))
    return files


def mutations(data: bytes, count: int, seed: int) -> list[bytes]:
    """Return damaged copies: some bytes changed, half of them in the first 200; a few cut.

    Of a third, a part is repeated, left out, moved, or made a number that has a meaning.
    """
    rng = np.random.default_rng(seed)
    copies = []
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(rng.integers(1, 5)):
            end = min(200, len(copy)) if rng.random() < 0.5 else len(copy)
            copy[rng.integers(0, end)] = rng.integers(0, 256)
        if rng.random() < 1 / 3:
            at, length = rng.integers(0, len(copy)), rng.choice([1, 2, 4, 8, 12, 100])
            to = min(200, len(copy)) if rng.random() < 0.5 else len(copy)
            place = rng.integers(0, to)
            numbers = [bytes(length), b"\xff" * length, b"\x7f" + b"\xff" * (length - 1)]
            numbers += [number[::-1] for number in (numbers[2], b"\0" * (length - 1) + b"\1")]
            part = bytes(copy[at : at + length])
            copy[place : place + rng.choice([0, length])] = [b"", part, *numbers][rng.integers(7)]
        if rng.random() < 0.2:
            del copy[rng.integers(1, len(copy)) :]
        if copy[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.7:
            copy = mended_png(bytes(copy))
        copies.append(bytes(copy))
    return copies


def mended_png(data: bytes) -> bytearray:
    """Make the checksums right again, so that damage gets past them."""
    out, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        out[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))[: len(data) - end]
        at = end + 4
    return out
