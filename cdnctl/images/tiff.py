"""TIFF, by tifffile: Pillow does not know float, 16-bit colour or LZW-packed 16-bit TIFF."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import zlib
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import numpy as np
import PIL.Image
import tifffile

from cdnctl.errors import ImageError
from cdnctl.images import raw
from cdnctl.images.build import check_frames, check_size, cmyk_to_rgb, make_image
from cdnctl.images.image import Image, Metadata, from_unit
from cdnctl.images.metadata import (
    EXIF_IFD,
    EXIF_PREFIX,
    GPS_IFD,
    ICC,
    IPTC,
    ORIENTATION,
    XMP,
    as_bytes,
    checked_dpi,
    describing_tags,
    exif_tags,
)

_DTYPES = ("uint8", "uint16", "uint32", "float16", "float32", "float64")
DTYPES = {".tif": _DTYPES, ".tiff": _DTYPES}
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# None, three of fax, LZW, JPEG, deflate (two numbers), PackBits, LZMA, zstd, WebP. imagecodecs
# has more, which few programs write; its PNG and JPEG XR decoders print, or release too much,
# on damaged data.
_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32946, 32773, 34925, 50000, 50001)


def decode(data: bytes, max_pixels: int) -> Image:
    """Decode a TIFF file of one page."""
    tags = _tags(data)
    notes: list[str] = []
    orientation = tags.get(ORIENTATION, 1)
    orientation = orientation if orientation in range(1, 9) else 1
    metadata = _metadata(tags)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if 50706 in tags:  # DNGVersion: the first page is a preview of a camera raw file
            return raw.decode(data, max_pixels)
        check_frames(_count_frames(file))
        page = file.pages.first
        # Fax coding packs any number of white pixels into a bit; such pages are small, though.
        packed = None if page.bitspersample == 1 else data
        check_size(page.imagewidth, page.imagelength, max_pixels, packed)
        check_size(page.tilewidth or 1, page.tilelength or 1, max_pixels, packed)
        check_segments(page, len(data))
        samples = samples_of(page, notes)
        if page.photometric == 5:
            notes.append("CMYK converted to RGB")
            cmyk = PIL.Image.fromarray(samples, "CMYK")
            samples = np.asarray(cmyk_to_rgb(cmyk, metadata.icc))
            metadata = replace(metadata, icc=None)
    return make_image(
        samples, orientation=orientation, metadata=metadata, notes=notes, suffix=".tif"
    )


def _tags(data: bytes) -> PIL.Image.Exif:
    """Return the tags of the first page."""
    tags, start = PIL.Image.Exif(), None
    if data[:4] == b"MM\0+":  # big-endian BigTIFF, which Pillow does not know
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            for tag in file.pages.first.tags:
                if tag.code in (282, 283):  # resolutions are fractions
                    tags[tag.code] = Fraction(*tag.value)
                elif tag.code not in (EXIF_IFD, GPS_IFD):
                    tags[tag.code] = tag.value
        return tags
    if data[:4] == b"II+\0":  # BigTIFF, which Pillow does not find out by itself
        tags.bigtiff, tags.endian = True, "<"
        (start,) = struct.unpack("<Q", data[8:16])
    tags.load_from_fp(io.BytesIO(data), start)
    return tags


def _count_frames(file: tifffile.TiffFile) -> int:
    """Count the full-size pages; thumbnails and pyramid levels are no pictures of their own."""
    # By index, as the length ends where a damaged chain of pages runs in a circle; iteration
    # would go on for ever.
    pages = [file.pages[index].aspage() for index in range(len(file.pages))]
    frames = sum(not page.is_reduced for page in pages)
    if file.is_imagej:  # writes large stacks as one page with the other frames behind it
        frames = max(frames, int((file.imagej_metadata or {}).get("images", 1)))
    return frames


def check_segments(page: tifffile.TiffPage, size: int) -> None:
    """Refuse a page with strips or tiles that are not in a file of ``size`` bytes.

    Both tifffile and Pillow fill them with zeros, without a word.
    """
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    missing = len(segments) < math.prod(page.chunked)
    if missing or any(count < 1 or offset + count > size for offset, count in segments):
        raise ImageError("the file is cut short; copy or export it again")


def check_coding(page: tifffile.TiffPage) -> None:
    """Refuse compressions that are not known here."""
    if page.compression not in _COMPRESSIONS:
        raise ImageError(f"its compression {page.compression!r} is not known here; use deflate")


def samples_of(page: tifffile.TiffPage, notes: list[str]) -> np.ndarray:
    """Decode a page to samples (H, W, C): gray or RGB, perhaps with alpha, or 8-bit CMYK."""
    kind, bits, channels = page.photometric, page.bitspersample, page.samplesperpixel
    if kind == 6 and page.compression == 7:  # the JPEG decoder has turned YCbCr to RGB
        kind = 2
    check_coding(page)
    base = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}.get(kind)
    if base is None or (kind in (3, 5) and bits not in (8, 16)):
        raise ImageError("its colour space is not known here; convert it to RGB first")
    if channels not in (base, base + (kind < 3)) or page.imagedepth != 1:
        raise ImageError(f"it has {channels} channels; pictures have 1 or 3, and perhaps alpha")
    samples = page.asarray()
    if samples.dtype == bool:
        samples = samples.astype(np.uint8)
    if samples.dtype.name not in _DTYPES:
        raise ImageError(f"its samples are {samples.dtype.name}; convert them to uint16 or float32")
    if page.planarconfig == 2 and channels > 1:
        samples = np.moveaxis(samples, 0, -1)
    samples = samples.reshape(page.imagelength, page.imagewidth, channels)
    samples = samples.astype(samples.dtype.newbyteorder("="))
    if kind == 3:
        if page.colormap is None:
            raise ImageError("its palette is missing; the file is damaged")
        notes.append("palette image converted to RGB")
        return (page.colormap[:, samples[:, :, 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
    if kind == 5:
        return (samples >> (bits - 8)).astype(np.uint8)
    whole = samples.dtype.kind == "u"
    full = np.iinfo(samples.dtype).max if whole else 1.0
    if whole and bits < samples.dtype.itemsize * 8:
        notes.append(f"{bits}-bit samples stored as {samples.dtype.name}")
        samples = from_unit(samples / (2**bits - 1), samples.dtype)
    if kind == 0:  # 0 is white
        samples[:, :, :1] = full - samples[:, :, :1]
    if channels > base and 1 in page.extrasamples:  # colours multiplied by alpha
        notes.append("premultiplied alpha converted to straight alpha")
        alpha = samples[:, :, -1:].astype(np.float64)
        straight = samples[:, :, :-1] / np.where(alpha == 0, np.inf, alpha)
        samples[:, :, :-1] = from_unit(straight, samples.dtype) if whole else straight
    return samples


def _metadata(tags: PIL.Image.Exif) -> Metadata:
    exif = describing_tags(tags)
    dpi = None
    if tags.get(296, 2) in (2, 3):  # unit of resolution: inch or centimetre
        scale = 2.54 if tags.get(296) == 3 else 1.0
        with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            dpi = (float(tags[282]) * scale, float(tags[283]) * scale)
    return Metadata(
        icc=as_bytes(tags.get(ICC)),
        exif=exif.tobytes()[len(EXIF_PREFIX) :] if len(exif) else None,
        xmp=as_bytes(tags.get(XMP)),
        iptc=as_bytes(tags.get(IPTC)),
        dpi=checked_dpi(dpi),
    )


def encode(samples: np.ndarray, meta: Metadata) -> bytes:
    """Encode samples of any dtype as one deflated page.

    tifffile cannot write an EXIF directory. An EXIF block is itself a small TIFF file without
    pixels, though, so Pillow serialises one with the tags that describe the strips of pixels
    among the others, and the strips follow it.
    """
    height, width, channels = samples.shape
    bits, whole = samples.dtype.itemsize * 8, samples.dtype.kind == "u"
    if whole:  # horizontal differences deflate better
        samples = np.diff(samples, axis=1, prepend=samples.dtype.type(0))
    samples = samples.astype(samples.dtype.newbyteorder("<"), copy=False)
    rows = max(1, 2**18 // (width * channels * samples.dtype.itemsize))
    strips = [zlib.compress(samples[at : at + rows].tobytes()) for at in range(0, height, rows)]
    counts = [len(strip) for strip in strips]
    *offsets, _ = accumulate(counts, initial=0)

    tags = describing_tags(exif_tags(meta.exif))
    tags.endian = "<"
    colours = channels - (channels in (2, 4))
    layout: dict[int, Any] = {
        256: width,
        257: height,
        258: (bits,) * channels,
        259: 8,  # compression: deflate
        262: 2 if colours == 3 else 1,  # photometric: RGB or black is zero
        273: tuple(offsets),  # Pillow adds the size of what is in front
        ORIENTATION: 1,
        277: channels,
        278: rows,
        279: tuple(counts),
        284: 1,  # channels side by side
        317: 2 if whole else 1,  # predictor: horizontal differences or none
        339: (1 if whole else 3,) * channels,  # sample format: unsigned or float
        338: 2 if channels > colours else None,  # extra sample: straight alpha
        ICC: meta.icc,
        XMP: meta.xmp,
        IPTC: meta.iptc,
        282: meta.dpi and meta.dpi[0],
        283: meta.dpi and meta.dpi[1],
        296: 2 if meta.dpi else None,  # unit: inch
    }
    for tag, value in layout.items():
        if value is not None:
            tags[tag] = value
    front = tags.tobytes().removeprefix(EXIF_PREFIX)
    if len(front) + sum(counts) >= 2**32:
        raise ImageError("TIFF files end at 4 GiB; cut the picture into parts")
    return b"".join([front, *strips])
