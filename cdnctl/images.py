"""Pictures: from a file to float pixels and back, with everything else in the file kept.

::

    bytes ──decode──▶ Image: samples in the file's dtype + alpha, EXIF, ICC profile, …
    samples ──to_unit──▶ float32 pixels in [0, 1] ──from_unit──▶ samples
    Image ──encode──▶ bytes ──write──▶ file

Depth is what the file's header says, never a guess from the values. A picture stays in its own
dtype, which for most is a quarter of the memory of floats; `to_unit` and `from_unit` also take
parts of it. Pixels are clipped and rounded in `from_unit` only.

**Colour under alpha 0** cannot be seen, and is often black. A filter that mixes neighbours
would draw it into the visible edge as a dark fringe. So `read` gives such pixels the colour of
the nearest visible pixel, and keeps the file's own colour in `Image.hidden`; `write` puts it
back. Unchanged pixels thus come out as they went in, and changed ones have no fringe.

Who decodes what: Pillow, as long as it keeps every bit. Pillow cuts 16-bit colour PNG to 8 bits,
so those are read in two passes (see `_png16`) and written by imagecodecs. It does not know
float, 16-bit colour or LZW-packed 16-bit TIFF either, so TIFF pixels are read by tifffile.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import math
import os
import re
import secrets
import shutil
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import tifffile

from cdnctl import files
from cdnctl.errors import ImageError, OutputExistsError, SetupError

PEAK = 255
"""Of the scale on which people state noise levels; [0, 1] everywhere behind the border."""

MEGAPIXEL = 1_000_000

MAX_PIXELS = 250 * MEGAPIXEL
"""Pictures with more pixels than this are refused before they are decoded, if nothing else is
said: they are hours of work for a CPU, which a file of a few kilobytes may ask for."""

QUALITY = 95
"""Quality of lossy files, on the usual scale up to 100; colour is not subsampled."""

# Deflate packs 1032 bytes, so 8256 pixels of one bit, into one byte; LZW and zstd some more.
_MAX_PIXELS_PER_BYTE = 20_000

_PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "AVIF", "QOI")
_FORMAT_SUFFIXES = {
    "PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "HEIF": ".heic",
}  # fmt: skip
_HEIC_SUFFIXES = frozenset({".heic", ".heif"})
_RAW_SUFFIXES = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"})

_TIFF_DTYPES = ("uint8", "uint16", "uint32", "float16", "float32", "float64")
_SUFFIX_DTYPES = {
    ".png": ("uint8", "uint16"),
    ".tif": _TIFF_DTYPES,
    ".tiff": _TIFF_DTYPES,
    ".jpg": ("uint8",),
    ".jpeg": ("uint8",),
    ".webp": ("uint8",),
    ".bmp": ("uint8",),
    ".heic": ("uint8",),
    ".heif": ("uint8",),
}

WRITE_SUFFIXES = frozenset(_SUFFIX_DTYPES)
"""Suffixes, in lower case and with the dot, that `encode` and `write` know."""

READ_SUFFIXES = (
    WRITE_SUFFIXES | _RAW_SUFFIXES | {".gif", ".pgm", ".pbm", ".ppm", ".avif", ".qoi", ".tga"}
)
"""Suffixes of files that are taken for pictures when a folder is searched."""

_ORIENTATION, _ICC, _XMP, _EXIF_IFD, _GPS_IFD, _INTEROP_IFD = 274, 34675, 700, 34665, 34853, 40965
_IPTC = 33723
# Tags of a TIFF page that describe the picture, not its layout: description, maker, model,
# software, date, artist, host, rating, copyright, and Windows' title to subject.
_TEXT_TAGS = (270, 271, 272, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096))
# PNG chunks that are copied as they are: text, date and colour description.
_PNG_CHUNKS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"tIME", b"gAMA", b"cHRM", b"sRGB", b"cICP"})
# None, three of fax, LZW, JPEG, deflate (two numbers), PackBits, LZMA, zstd, WebP. imagecodecs
# has more, which few programs write; its PNG and JPEG XR decoders print, or release too much,
# on damaged data.
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32946, 32773, 34925, 50000, 50001)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP_KEYWORD = b"XML:com.adobe.xmp"
_XMP_ORIENTATION = re.compile(rb"""(tiff:Orientation\s*(?:=\s*["']|>)\s*)[1-8]""")
_IPTC_RESOURCE = 0x0404  # of those that Photoshop puts into JPEG files
_EXIF_PREFIX = b"Exif\0\0"
_JPEG_SEGMENT = 65_000  # bytes: what is sure to fit into one JPEG segment

PIL.Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, by what the caller allows

# Both log oddities of a file; what matters comes out as an ImageError.
for _library in ("tifffile", "PIL"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)


class _Quiet:
    """Context without warnings. Unlike `warnings.catch_warnings`, threads may share it: the
    first that enters turns them off, the last that leaves turns them on again."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._context = warnings.catch_warnings()
                self._context.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *details: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._context.__exit__(None, None, None)


quiet = _Quiet()
"""The one such context of the process."""


@dataclass(frozen=True)
class Metadata:
    """What a file says about its picture. All of it is optional."""

    icc: bytes | None = None
    """ICC profile of the colours."""
    exif: bytes | None = None
    """EXIF block (a TIFF structure, no ``Exif`` prefix), its orientation set to 1."""
    xmp: bytes | None = None
    """XMP packet, its orientation as that of ``exif``."""
    iptc: bytes | None = None
    """IPTC record (captions, keywords, credits of the press), for JPEG and TIFF."""
    dpi: tuple[float, float] | None = None
    """Pixels per inch, horizontal and vertical."""
    png: tuple[tuple[bytes, bytes], ...] = ()
    """Type and data of PNG chunks with text, date and colour space: PNG to PNG only."""


@dataclass(frozen=True)
class Image:
    """A picture and all that its file says about it."""

    samples: np.ndarray
    """(H, W, C), C = 1 (grayscale) or 3 (RGB), upright, of dtype uint8, uint16, uint32, float16,
    float32 or float64. Floats are as the file has them, and may lie outside of [0, 1]."""
    alpha: np.ndarray | None = None
    """(H, W) in ``dtype``, not multiplied into the pixels."""
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = ()
    """What reading changed or found odd, one plain sentence each."""
    hidden: np.ndarray | None = None
    """(K, C) in ``dtype``: the file's colours of the K pixels whose alpha is 0, row by row.
    None where alpha is nowhere 0, or everywhere."""
    lossless: bool = True
    """Whether the file that was read had been coded without loss; WebP is written likewise."""
    suffix: str = ".png"
    """Of the format of the file that was read; .png where that cannot be written."""

    def __repr__(self) -> str:
        low, high = (f"{bound(self.samples):g}" for bound in (np.min, np.max))
        parts = [f"{self.samples.dtype} {self.samples.shape}", f"{low}..{high}"]
        parts += ["alpha"] if self.alpha is not None else []
        held = {name: getattr(self.metadata, name) for name in ("icc", "exif", "xmp", "iptc")}
        parts += [f"{name} of {len(data)} bytes" for name, data in held.items() if data]
        return f"Image({', '.join(parts + list(self.notes))})"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the samples."""
        return self.samples.dtype

    @property
    def pixels(self) -> np.ndarray:
        """float32 (H, W, C), whole numbers scaled to [0, 1]: a copy, made anew each time."""
        return to_unit(self.samples)

    @staticmethod
    def of(pixels: np.ndarray, dtype: Any = np.uint8) -> Image:
        """A picture of float pixels (H, W, C), without alpha or metadata."""
        return Image(from_unit(pixels, np.dtype(dtype)))

    def with_samples(self, samples: np.ndarray) -> Image:
        """Return this picture with other samples of the same shape and dtype."""
        old = self.samples
        if (samples.shape, samples.dtype) != (old.shape, old.dtype):
            raise ValueError(
                f"samples are {samples.dtype} {samples.shape}, not {old.dtype} {old.shape}"
            )
        return replace(self, samples=samples)


def is_image_path(path: Path) -> bool:
    """Tell by the suffix alone whether a file may be a picture that `read` knows."""
    return path.suffix.lower() in READ_SUFFIXES


# ---------------------------------------------------------------------------------- reading


def read(source: Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image:
    """Read one picture from a path or from an open binary file: `load` and `decode`."""
    if isinstance(source, (str, Path)):
        return decode(load(Path(source)), os.fspath(source), max_pixels)
    return decode(source.read(), "standard input", max_pixels)


def load(path: Path) -> bytes:
    """Read the bytes of a file.

    Raises:
        ImageError: when it cannot be read.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return path.read_bytes()
        # Reading a pipe or a device may take for ever.
        reason = "it is not a regular file; name one, or give - and pipe the picture in"
    except FileNotFoundError:
        reason = "there is no such file; check the path"
    except IsADirectoryError:
        reason = "it is a folder; name the pictures in it, or the folder with a recursive option"
    except PermissionError:
        reason = "permission denied; make the file readable first"
    except MemoryError:
        reason = "there is not enough memory for it"
    except OSError as error:
        reason = error.strerror or str(error)
    raise ImageError(f"cannot read {str(path)!r}: {reason}")


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode the content of a file.

    The format is told by the content; the suffix of the name only helps with camera raw and
    TGA, which have no signature of their own. Pictures of more than ``max_pixels``, by their
    header, are refused before memory is set aside for them.

    Raises:
        ImageError: for whatever keeps the file from being decoded in full.
    """
    try:
        # The decoders warn about oddities that are either harmless or an error anyway.
        with quiet:
            return _decode(data, Path(name).suffix.lower(), max_pixels)
    except ImageError as error:
        reason = _brief(error)
    except PIL.UnidentifiedImageError:
        reason = "not a picture in a format known here; convert it to PNG or TIFF first"
    except MemoryError:
        reason = "there is not enough memory for it"
    except Exception as error:  # decoders fail in every way there is; none may get out
        reason = f"the file is damaged or cut short ({_brief(error)})"
    raise ImageError(f"cannot read {name!r}: {reason}")


def _brief(error: Exception) -> str:
    """Return what an error says on one line of bearable length; decoders quote what they like."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def _decode(data: bytes, suffix: str, max_pixels: int) -> Image:
    """Turn the bytes of a file into an `Image`. ``suffix`` tells camera raw from TIFF."""
    if not data:
        raise ImageError("the file is empty; copy or export it again")
    if suffix in _RAW_SUFFIXES:
        return _decode_raw(data, max_pixels)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _decode_tiff(data, max_pixels)
    return _decode_pillow(data, suffix, max_pixels)


def count_pixels(path: Path) -> int:
    """Pixels of a picture by its header, without decoding it: to plan with.

    Where the header does not tell at once, the number of bytes stands for it, and 0 for what
    cannot be read.
    """
    size = stored_size(path)
    if size is not None:
        return math.prod(size)
    try:
        status = path.stat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def stored_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a picture by its header, without decoding it and before it is turned
    upright; None where the header does not tell at once."""
    try:
        if not path.is_file():  # reading a pipe may take for ever
            return None
        with quiet, path.open("rb") as file:
            head = file.read(30)
            if head.startswith(_PNG_SIGNATURE):  # without Pillow, which takes ten times as long
                width, height = struct.unpack(">II", head[16:24])
                return width, height
            if size := _webp_size(head):
                return size
            file.seek(0)
            with PIL.Image.open(file, formats=(*_PILLOW_FORMATS, "TIFF", "TGA")) as picture:
                return picture.size
    except Exception:  # Pillow's parsers fail in many ways, of which reading tells
        return None


def _build(
    samples: np.ndarray,
    *,
    orientation: int = 1,
    metadata: Metadata,
    notes: list[str],
    lossless: bool = True,
    suffix: str = ".png",
) -> Image:
    """Make an `Image` of samples (H, W) or (H, W, 1 to 4) in the file's dtype."""
    samples = samples[:, :, None] if samples.ndim == 2 else samples
    samples = _upright(samples, orientation)
    if orientation != 1 and metadata.xmp:  # some programs look there
        metadata = replace(metadata, xmp=_XMP_ORIENTATION.sub(rb"\g<1>1", metadata.xmp))
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        raise ImageError("it has samples that are not finite numbers (NaN or infinity); mend it")
    channels = samples.shape[2]
    alpha = np.ascontiguousarray(samples[:, :, -1]) if channels in (2, 4) else None
    colour = samples if alpha is None else samples[:, :, :-1]
    hidden = None
    if alpha is not None:
        invisible = alpha == 0
        if invisible.any() and not invisible.all():
            hidden = colour[invisible]
            colour = colour.copy()
            colour[invisible] = colour[_nearest(invisible)]
    colour = np.ascontiguousarray(colour)
    return Image(colour, alpha, metadata, tuple(notes), hidden, lossless, suffix)


def to_unit(samples: np.ndarray) -> np.ndarray:
    """Scale samples of any dtype to float32, whole numbers to [0, 1]; always a fresh array."""
    if samples.dtype.kind == "f":
        return np.array(samples, np.float32)
    if samples.dtype.itemsize > 2:
        return (samples / np.iinfo(samples.dtype).max).astype(np.float32)
    return samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max)


def _nearest(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each True pixel of the (H, W) mask, row and column of the nearest False one."""
    # Slow to import and seldom needed.
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(mask, return_distances=False, return_indices=True)
    return rows[mask], columns[mask]


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8, to samples (H, W, C)."""
    if orientation >= 5:
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return np.ascontiguousarray(samples)


def _check_size(width: int, height: int, max_pixels: int, data: bytes | None = None) -> None:
    """Refuse a size that a header claims, before memory is set aside for it.

    Args:
        width: Pixels.
        height: Pixels.
        max_pixels: Of the whole picture.
        data: The file, where its coding cannot pack any number of pixels into a few bytes.
    """
    if width < 1 or height < 1:
        raise ImageError("it has no pixels")
    if data is not None and width * height > _MAX_PIXELS_PER_BYTE * len(data):
        raise ImageError(
            f"it claims {width} x {height} pixels, which {len(data)} bytes cannot hold; "
            "the file is damaged"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"it has {width} x {height} pixels, more than the limit of "
            f"{max_pixels / MEGAPIXEL:g} megapixels; cut it into tiles, or raise the limit: "
            f"denoise, classify and explain take --max-megapixels "
            f"{math.ceil(width * height / MEGAPIXEL)}"
        )


def _check_frames(frames: int) -> None:
    if frames != 1:
        raise ImageError(
            f"it holds {frames} frames or pages, and only single pictures are denoised; "
            "save each one as a file of its own"
        )


def _decode_pillow(data: bytes, suffix: str, max_pixels: int) -> Image:
    """Decode everything but TIFF and camera raw."""
    formats = _PILLOW_FORMATS + (("TGA",) if suffix == ".tga" else ())
    if _is_heif(data):
        _heif_plugin()
        formats = ("HEIF",)
    # Opening a WebP file already sets memory aside for the size that its header claims.
    if size := _webp_size(data):
        _check_size(*size, max_pixels)
    PIL.Image.init()  # loads the less common formats; nothing the second time
    with PIL.Image.open(io.BytesIO(data), formats=formats) as picture:
        packs_any = picture.format in ("WEBP", "AVIF", "HEIF")
        _check_size(*picture.size, max_pixels, None if packs_any else data)
        notes: list[str] = []
        if picture.format == "MPO":
            notes.append("only the main picture of a multi-picture JPEG was read")
        else:
            _check_frames(getattr(picture, "n_frames", 1))
        if picture.format == "PNG":
            _check_png_rows(data)
        bits = _bits(picture, data)
        if picture.format == "PNG" and bits == 16 and picture.mode != "I;16":
            samples = _png16(picture, data)
        elif bits > 8 and picture.mode not in ("I", "I;16", "F"):
            raise ImageError(
                f"its {bits} bits a sample would be cut to 8; convert it to a 16-bit PNG first"
            )
        else:
            samples = _pillow_samples(picture, notes)
        info = picture.info
        orientation, exif = _reset_orientation(info.get("exif"), notes)
        profile = info.get("icc_profile") or None
        metadata = Metadata(
            icc=None if picture.mode == "CMYK" else profile,
            exif=exif,
            xmp=_as_bytes(info.get("xmp")),
            iptc=_as_bytes(info.get("photoshop", {}).get(_IPTC_RESOURCE)),
            dpi=_checked_dpi(info.get("dpi")),
            png=_png_extras(data) if picture.format == "PNG" else (),
        )
        lossy = picture.format in ("JPEG", "MPO", "AVIF", "HEIF") or (
            picture.format == "WEBP" and b"VP8L" not in _riff_chunks(data)
        )
    return _build(
        samples,
        orientation=orientation,
        metadata=metadata,
        notes=notes,
        lossless=not lossy,
        suffix=_FORMAT_SUFFIXES.get(picture.format or "", ".png"),
    )


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height by the first chunk of a WebP file; None for other files."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
        return 1 + width, 1 + height
    if data[12:16] == b"VP8L":  # 14 bits each, behind a byte of signature
        bits = int.from_bytes(data[21:25], "little")
        return 1 + bits % 2**14, 1 + (bits >> 14) % 2**14
    # 14 bits each, and two of scale, behind a frame tag and a start code of three bytes.
    width, height = (int.from_bytes(data[i : i + 2], "little") for i in (26, 28))
    return width % 2**14, height % 2**14


def _bits(picture: PIL.Image.Image, data: bytes) -> int:
    """Return the bits of a sample in the file, where Pillow may hand out fewer."""
    if picture.format == "PNG":
        return data[24]  # the header chunk always comes first
    if picture.format == "AVIF":
        at = data.find(b"pixi")  # box: name, version and flags (4), channels (1), bits of each
        return data[at + 9] if at >= 0 else 8
    if picture.format == "HEIF":
        return int(picture.info.get("bit_depth", 8))
    if picture.format == "PPM":
        args = picture.tile[0].args  # type: ignore[attr-defined]
        return 16 if isinstance(args, tuple) and args[-1] > 255 else 8
    return 8


def _pillow_samples(picture: PIL.Image.Image, notes: list[str]) -> np.ndarray:
    """Decode an open Pillow picture to samples (H, W) or (H, W, C), with any change noted."""
    picture.load()  # here, and not in convert, so that `mode` and `info` are final
    mode = picture.mode
    if mode == "I" and picture.format == "PPM":  # Pillow's scaling of PGM is to 65535
        return np.asarray(picture).astype(np.uint16)
    if mode in ("I;16", "I;16L", "I;16B"):
        if "transparency" in picture.info:
            notes.append("the transparent gray level was left as it is")
        return np.asarray(picture).astype(np.uint16)
    if mode == "F":
        return np.asarray(picture, np.float32)
    if mode in ("P", "PA"):
        transparent = mode == "PA" or "transparency" in picture.info
        notes.append("palette image converted to RGB")
        return np.asarray(picture.convert("RGBA" if transparent else "RGB"))
    if mode == "1":
        notes.append("1-bit samples stored as uint8")
        return np.asarray(picture.convert("L"))
    if mode == "CMYK":
        notes.append("CMYK converted to RGB")
        return np.asarray(_cmyk_to_rgb(picture, picture.info.get("icc_profile")))
    if mode in ("L", "RGB") and "transparency" in picture.info:
        notes.append("the transparent colour was turned into an alpha channel")
        return np.asarray(picture.convert("LA" if mode == "L" else "RGBA"))
    if mode in ("L", "LA", "RGB", "RGBA"):
        return np.asarray(picture)
    if mode in ("YCbCr", "RGBX"):
        notes.append(f"{mode} converted to RGB")
        return np.asarray(picture.convert("RGB"))
    raise ImageError(f"its colour mode {mode} is not known here; convert it to RGB first")


def _cmyk_to_rgb(picture: PIL.Image.Image, icc: bytes | None) -> PIL.Image.Image:
    """Convert to sRGB by the picture's own ICC profile, plainly where it has no usable one."""
    try:
        profile = PIL.ImageCms.ImageCmsProfile(io.BytesIO(icc or b""))
        srgb = PIL.ImageCms.createProfile("sRGB")
        converted = PIL.ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB")
        if converted is not None:
            return converted
    except (OSError, PIL.ImageCms.PyCMSError):
        pass
    return picture.convert("RGB")


def _check_png_rows(data: bytes) -> None:
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
    for kind, content in _png_chunks(data):
        while kind == b"IDAT" and content and missing > 0 and not inflate.eof:
            missing -= len(inflate.decompress(content, 2**20))
            content = inflate.unconsumed_tail
    if missing > 0:
        raise ImageError("the file is cut short; copy or export it again")


def _png16(picture: PIL.Image.Image, data: bytes) -> np.ndarray:
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


def _decode_tiff(data: bytes, max_pixels: int) -> Image:
    """Decode a TIFF file of one page."""
    tags = _tiff_tags(data)
    notes: list[str] = []
    orientation = tags.get(_ORIENTATION, 1)
    orientation = orientation if orientation in range(1, 9) else 1
    metadata = _tiff_metadata(tags)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if 50706 in tags:  # DNGVersion: the first page is a preview of a camera raw file
            return _decode_raw(data, max_pixels)
        _check_frames(_tiff_frames(file))
        page = file.pages.first
        # Fax coding packs any number of white pixels into a bit; such pages are small, though.
        packed = None if page.bitspersample == 1 else data
        _check_size(page.imagewidth, page.imagelength, max_pixels, packed)
        _check_size(page.tilewidth or 1, page.tilelength or 1, max_pixels, packed)
        _check_segments(page, len(data))
        samples = _tiff_samples(page, notes)
        if page.photometric == 5:
            notes.append("CMYK converted to RGB")
            cmyk = PIL.Image.fromarray(samples, "CMYK")
            samples = np.asarray(_cmyk_to_rgb(cmyk, metadata.icc))
            metadata = replace(metadata, icc=None)
    return _build(samples, orientation=orientation, metadata=metadata, notes=notes, suffix=".tif")


def _tiff_tags(data: bytes) -> PIL.Image.Exif:
    """Return the tags of the first page."""
    tags, start = PIL.Image.Exif(), None
    if data[:4] == b"MM\0+":  # big-endian BigTIFF, which Pillow does not know
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            for tag in file.pages.first.tags:
                if tag.code in (282, 283):  # resolutions are fractions
                    tags[tag.code] = Fraction(*tag.value)
                elif tag.code not in (_EXIF_IFD, _GPS_IFD):
                    tags[tag.code] = tag.value
        return tags
    if data[:4] == b"II+\0":  # BigTIFF, which Pillow does not find out by itself
        tags.bigtiff, tags.endian = True, "<"
        (start,) = struct.unpack("<Q", data[8:16])
    tags.load_from_fp(io.BytesIO(data), start)
    return tags


def _tiff_frames(file: tifffile.TiffFile) -> int:
    """Count the full-size pages; thumbnails and pyramid levels are no pictures of their own."""
    # By index, as the length ends where a damaged chain of pages runs in a circle; iteration
    # would go on for ever.
    pages = [file.pages[index].aspage() for index in range(len(file.pages))]
    frames = sum(not page.is_reduced for page in pages)
    if file.is_imagej:  # writes large stacks as one page with the other frames behind it
        frames = max(frames, int((file.imagej_metadata or {}).get("images", 1)))
    return frames


def _check_segments(page: tifffile.TiffPage, size: int) -> None:
    """Refuse a page with strips or tiles that are not in a file of ``size`` bytes.

    Both tifffile and Pillow fill them with zeros, without a word.
    """
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    missing = len(segments) < math.prod(page.chunked)
    if missing or any(count < 1 or offset + count > size for offset, count in segments):
        raise ImageError("the file is cut short; copy or export it again")


def _tiff_samples(page: tifffile.TiffPage, notes: list[str]) -> np.ndarray:
    """Decode a page to samples (H, W, C): gray or RGB, perhaps with alpha, or 8-bit CMYK."""
    kind, bits, channels = page.photometric, page.bitspersample, page.samplesperpixel
    if kind == 6 and page.compression == 7:  # the JPEG decoder has turned YCbCr to RGB
        kind = 2
    if page.compression not in _TIFF_COMPRESSIONS:
        raise ImageError(f"its compression {page.compression!r} is not known here; use deflate")
    base = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4}.get(kind)
    if base is None or (kind in (3, 5) and bits not in (8, 16)):
        raise ImageError("its colour space is not known here; convert it to RGB first")
    if channels not in (base, base + (kind < 3)) or page.imagedepth != 1:
        raise ImageError(f"it has {channels} channels; pictures have 1 or 3, and perhaps alpha")
    samples = page.asarray()
    if samples.dtype == bool:
        samples = samples.astype(np.uint8)
    if samples.dtype.name not in _TIFF_DTYPES:
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


def _tiff_metadata(tags: PIL.Image.Exif) -> Metadata:
    exif = _describing_tags(tags)
    dpi = None
    if tags.get(296, 2) in (2, 3):  # unit of resolution: inch or centimetre
        scale = 2.54 if tags.get(296) == 3 else 1.0
        with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            dpi = (float(tags[282]) * scale, float(tags[283]) * scale)
    return Metadata(
        icc=_as_bytes(tags.get(_ICC)),
        exif=exif.tobytes()[len(_EXIF_PREFIX) :] if len(exif) else None,
        xmp=_as_bytes(tags.get(_XMP)),
        iptc=_as_bytes(tags.get(_IPTC)),
        dpi=_checked_dpi(dpi),
    )


def _decode_raw(data: bytes, max_pixels: int) -> Image:
    """Develop a camera raw file to 16-bit sRGB with the camera's white balance."""
    try:
        import rawpy
    except ImportError:
        raise ImageError(
            'camera raw needs an extra package; run: pip install "cdnctl[raw]"'
        ) from None
    with rawpy.imread(io.BytesIO(data)) as raw:
        _check_size(raw.sizes.width, raw.sizes.height, max_pixels)
        samples = raw.postprocess(use_camera_wb=True, output_bps=16)  # turned upright, too
    notes = ["camera raw developed to 16-bit sRGB"]
    return _build(samples, metadata=Metadata(), notes=notes)


def _is_heif(data: bytes) -> bool:
    brands = data[8 : int.from_bytes(data[:4], "big")][:64]
    return data[4:8] == b"ftyp" and b"hei" in brands and b"avif" not in brands


def _heif_plugin() -> None:
    """Teach Pillow HEIC."""
    try:
        import pillow_heif
    except ImportError:
        raise ImageError('HEIC needs an extra package; run: pip install "cdnctl[heic]"') from None
    pillow_heif.register_heif_opener()


# --------------------------------------------------------------------------------- metadata


def _as_bytes(value: object) -> bytes | None:
    """Return a tag's value if it is bytes (or text, as some readers have it), else None."""
    if isinstance(value, tuple) and value:
        value = value[0]
    if isinstance(value, str):
        value = value.encode()
    return value if isinstance(value, bytes) and value else None


def _checked_dpi(dpi: Any) -> tuple[float, float] | None:
    """Return a resolution as two floats, or None if it makes no sense."""
    try:
        x, y = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 0.01 < x < 1e6 and 0.01 < y < 1e6 else None


def _reset_orientation(exif: bytes | None, notes: list[str]) -> tuple[int, bytes | None]:
    """Return the orientation (1 to 8) and the EXIF block with orientation 1, no thumbnail.

    The block is patched, not rebuilt, so that makers' own notes, which point into it, stay
    valid. The thumbnail would show the picture as it was, and turned wrongly; it is unlinked.
    """
    if not exif:
        return 1, None
    exif = exif.removeprefix(_EXIF_PREFIX)
    patched = bytearray(exif)
    orientation = 1
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _ORIENTATION and kind == 3:
                orientation = value if 1 <= value <= 8 else 1
                struct.pack_into(order + "H", patched, entry + 8, 1)
        end = start + 2 + 12 * count
        if end + 4 <= len(exif):
            struct.pack_into("I", patched, end, 0)
        _exif_tags(bytes(patched)).tobytes()
    except Exception:  # Pillow's parser fails in many ways
        notes.append("damaged EXIF data left out")
        return orientation, None
    return orientation, bytes(patched)


def _exif_tags(exif: bytes | None) -> PIL.Image.Exif:
    tags = PIL.Image.Exif()
    tags.load(exif or b"")
    return tags


def _describing_tags(tags: PIL.Image.Exif) -> PIL.Image.Exif:
    """Copy the tags that describe the picture, and none that describe a file's layout."""
    copy = PIL.Image.Exif()
    for tag in _TEXT_TAGS:
        if tag in tags:
            copy[tag] = tags[tag]
    for tag in (_EXIF_IFD, _GPS_IFD):
        entries = dict(tags.get_ifd(tag))
        if _INTEROP_IFD in entries:
            entries[_INTEROP_IFD] = dict(tags.get_ifd(_INTEROP_IFD))
        if entries:
            copy[tag] = entries
    return copy


def _riff_chunks(data: bytes) -> set[bytes]:
    """Return the names of the chunks of a WebP file."""
    names, at = set(), 12
    while at + 8 <= len(data):
        names.add(data[at : at + 4])
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return names


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and data of each chunk of a PNG file."""
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def _png_extras(data: bytes) -> tuple[tuple[bytes, bytes], ...]:
    return tuple(
        (kind, content)
        for kind, content in _png_chunks(data)
        if kind in _PNG_CHUNKS and not content.startswith(_XMP_KEYWORD)
    )


# ---------------------------------------------------------------------------------- writing


def conversions(image: Image, suffix: str) -> tuple[str, ...]:
    """Return what a file with this suffix cannot hold of a picture, one plain sentence each.

    Raises:
        ImageError: when the suffix is not one of `WRITE_SUFFIXES`, or the format has no alpha
            and the picture has.
    """
    if suffix not in _SUFFIX_DTYPES:
        raise ImageError(
            f"'{suffix}' is not a suffix that can be written; "
            f"choose one of {' '.join(sorted(WRITE_SUFFIXES))}"
        )
    if image.alpha is not None and suffix in (".jpg", ".jpeg", ".bmp"):
        raise ImageError(f"{suffix} files cannot store transparency; choose .png")
    meta, notes = image.metadata, []
    dtype = _target_dtype(image, suffix)
    if dtype != image.dtype:
        notes.append(f"{image.dtype.name} samples stored as {dtype.name}")
    lost = []
    if suffix in (".webp", ".heic", ".heif"):
        lost = ["dpi"] if meta.dpi and not meta.exif else []
        lost += ["icc"] if not _takes_profile(suffix, meta) else []
    elif suffix == ".bmp":
        lost = [name for name in ("icc", "exif", "xmp") if getattr(meta, name)]
    elif suffix in (".jpg", ".jpeg"):
        blocks = ("exif", "xmp", "iptc")
        lost = [name for name in blocks if len(getattr(meta, name) or b"") > _JPEG_SEGMENT]
    if meta.iptc and suffix not in (".jpg", ".jpeg", ".tif", ".tiff"):
        lost.append("iptc")
    if lost:
        notes.append(f"{', '.join(name.upper() for name in lost)} data left out")
    return tuple(notes)


def encode(image: Image, suffix: str) -> bytes:
    """Return the bytes of a file of the format that the suffix (``.png``) stands for.

    Pixels go into the picture's own dtype, or the nearest one the format has; floating point
    pixels are not clipped.

    Raises:
        ImageError: when the format cannot hold the picture; see also `conversions`.
    """
    conversions(image, suffix)
    if image.dtype.kind == "f" and not np.isfinite(image.samples).all():
        raise ImageError("the pixels to write are not all finite numbers")
    samples = _samples(image, _target_dtype(image, suffix))
    try:
        with quiet:
            if suffix == ".png":
                return _encode_png(samples, image.metadata)
            if suffix in (".tif", ".tiff"):
                return _encode_tiff(samples, image.metadata)
            return _encode_pillow(samples, image, suffix)
    except ImageError:
        raise
    except Exception as error:  # sizes that a format cannot hold, and the like
        raise ImageError(
            f"{suffix} cannot hold this picture ({_brief(error)}); choose .tif"
        ) from error


def write(
    image: Image, path: Path, *, strip_metadata: bool = False, overwrite: bool = True
) -> tuple[str, ...]:
    """Write a picture in the format of the path's suffix; return its `conversions`.

    The file appears under its name only when it is complete: it is written beside it first,
    and whatever goes wrong, a keyboard interrupt included, leaves no part of it behind.
    `encode` and `save` in one.

    Args:
        image: The picture.
        path: Where to.
        strip_metadata: Write pixels and alpha only: no EXIF, no XMP, no text, no resolution
            and no colour profile.
        overwrite: Replace an existing file, which keeps its permissions.

    Raises:
        ImageError: when the picture cannot be written there.
    """
    if strip_metadata:
        image = replace(image, metadata=Metadata())
    suffix = path.suffix.lower()
    try:
        data = encode(image, suffix)
    except ImageError as error:
        raise ImageError(f"cannot write {str(path)!r}: {error}") from None
    save(data, path, overwrite=overwrite)
    return conversions(image, suffix)


def temporary_name() -> str:
    """Return a new name for a file that is being written."""
    return f".cdnctl-{secrets.token_hex(8)}.tmp"


def remove_temporary(path: Path, temporary: str) -> None:
    """Remove what a killed `save` to a path under a temporary name has left, if anything."""
    if re.fullmatch(r"\.cdnctl-[0-9a-f]{16}\.tmp", temporary):  # and never anything else
        with contextlib.suppress(OSError):
            os.unlink(Path(os.path.realpath(path)).with_name(temporary))


def save(data: bytes, path: Path, temporary: str | None = None, *, overwrite: bool = True) -> None:
    """Write the bytes of a file, all or nothing.

    Args:
        data: All of them.
        path: Where to.
        temporary: The `temporary_name` beside it until it is complete; by default a new one.
        overwrite: Replace an existing file, which keeps its permissions. Otherwise one of
            several writers of a name gets it, however close they are.

    Raises:
        OutputExistsError: when there is a file that must not be replaced.
        ImageError: when it cannot be written there.
        SetupError: when the disk is full.
    """
    # Through a symbolic link, so that the link stays and its target is replaced.
    target = Path(os.path.realpath(path))
    part = target.with_name(temporary or temporary_name())
    try:
        if target.exists() and not target.is_file():
            raise ImageError(
                f"cannot write {str(path)!r}: it is not a regular file; choose another name"
            )
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the name with half a file
            if overwrite and target.exists():
                shutil.copymode(target, part)
            files.give_name(part, target, overwrite)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return
    except (FileNotFoundError, NotADirectoryError):
        reason = f"there is no folder {str(path.parent)!r}; create it first"
    except FileExistsError:
        raise OutputExistsError(path) from None
    except PermissionError:
        reason = "permission denied; choose a folder that you may write to"
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(
                f"cannot write {str(path)!r}: the disk is full; make room, then run again"
            ) from None
        reason = f"{error}; choose another place"
    raise ImageError(f"cannot write {str(path)!r}: {reason}")


def _target_dtype(image: Image, suffix: str) -> np.dtype[Any]:
    """Return the picture's dtype if the format has it, else the deepest one of the format."""
    names = _SUFFIX_DTYPES[suffix]
    return image.dtype if image.dtype.name in names else np.dtype(names[-1])


def from_unit(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Turn float pixels into samples of a dtype: the inverse of `to_unit`.

    For whole numbers, values in [0, 1] are scaled and rounded, and values outside are clipped.
    """
    if dtype.kind == "f":
        return values.astype(dtype)
    full = np.iinfo(dtype).max
    # float32 has 24 bits: enough to hit each of 16, not each of 32.
    wide = np.float64 if dtype.itemsize > 2 else np.float32
    whole: np.ndarray = np.rint(np.clip(values, 0, 1) * wide(full)).astype(dtype)
    return whole


def _samples(image: Image, dtype: np.dtype[Any]) -> np.ndarray:
    """Return colours and alpha as samples (H, W, 1 to 4) of a dtype."""

    def cast(values: np.ndarray) -> np.ndarray:
        return values if values.dtype == dtype else from_unit(to_unit(values), dtype)

    samples = cast(image.samples)
    if image.alpha is None:
        return np.ascontiguousarray(samples)
    if image.hidden is not None:
        samples = samples.copy()
        samples[image.alpha == 0] = cast(image.hidden)
    return np.dstack([samples, cast(image.alpha)])


def _encode_png(samples: np.ndarray, meta: Metadata) -> bytes:
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
    out = [_PNG_SIGNATURE]
    # The encoder wants the usual strides even of axes of length 1, where numpy allows any.
    samples = samples.ravel().reshape(samples.shape)
    # By itself it sets aside too little for narrow noise: each row takes a byte more.
    room = samples.nbytes + len(samples)
    data = imagecodecs.png_encode(samples, level=6, out=room + room // 256 + 8192)
    for kind, content in _png_chunks(bytes(data)):
        for part in [(kind, content), *(extras + list(meta.png) if kind == b"IHDR" else ())]:
            checksum = zlib.crc32(part[1], zlib.crc32(part[0]))
            out += [struct.pack(">I", len(part[1])), *part, struct.pack(">I", checksum)]
    return b"".join(out)


def _encode_tiff(samples: np.ndarray, meta: Metadata) -> bytes:
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

    tags = _describing_tags(_exif_tags(meta.exif))
    tags.endian = "<"
    colours = channels - (channels in (2, 4))
    layout: dict[int, Any] = {
        256: width,
        257: height,
        258: (bits,) * channels,
        259: 8,  # compression: deflate
        262: 2 if colours == 3 else 1,  # photometric: RGB or black is zero
        273: tuple(offsets),  # Pillow adds the size of what is in front
        _ORIENTATION: 1,
        277: channels,
        278: rows,
        279: tuple(counts),
        284: 1,  # channels side by side
        317: 2 if whole else 1,  # predictor: horizontal differences or none
        339: (1 if whole else 3,) * channels,  # sample format: unsigned or float
        338: 2 if channels > colours else None,  # extra sample: straight alpha
        _ICC: meta.icc,
        _XMP: meta.xmp,
        _IPTC: meta.iptc,
        282: meta.dpi and meta.dpi[0],
        283: meta.dpi and meta.dpi[1],
        296: 2 if meta.dpi else None,  # unit: inch
    }
    for tag, value in layout.items():
        if value is not None:
            tags[tag] = value
    front = tags.tobytes().removeprefix(_EXIF_PREFIX)
    if len(front) + sum(counts) >= 2**32:
        raise ImageError("TIFF files end at 4 GiB; cut the picture into parts")
    return b"".join([front, *strips])


def _takes_profile(suffix: str, meta: Metadata) -> bool:
    """Whether a format has room for the ICC profile; WebP, which is RGB only, not for gray's."""
    return not (suffix == ".webp" and (meta.icc or b"")[16:20] == b"GRAY")


def _photoshop_segment(iptc: bytes) -> bytes:
    """The JPEG segment APP13 with an IPTC record, an empty name and nothing else."""
    resource = struct.pack(">4sHHI", b"8BIM", _IPTC_RESOURCE, 0, len(iptc)) + iptc
    content = b"Photoshop 3.0\0" + resource + bytes(len(iptc) % 2)
    return b"\xff\xed" + struct.pack(">H", 2 + len(content)) + content


def _encode_pillow(samples: np.ndarray, image: Image, suffix: str) -> bytes:
    """Encode uint8 samples as JPEG, WebP, BMP or HEIC."""
    meta = image.metadata
    picture = PIL.Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)
    options: dict[str, Any] = {}
    if meta.icc and _takes_profile(suffix, meta):
        options["icc_profile"] = meta.icc
    limit = _JPEG_SEGMENT if suffix in (".jpg", ".jpeg") else 2**32
    if meta.exif and len(meta.exif) <= limit:
        options["exif"] = _EXIF_PREFIX + meta.exif
    if meta.xmp and len(meta.xmp) <= limit:
        options["xmp"] = meta.xmp
    if meta.dpi:
        options["dpi"] = tuple(min(max(dpi, 1), 65535) for dpi in meta.dpi)
    if suffix in _HEIC_SUFFIXES:
        _heif_plugin()
        kind = "HEIF"
        options |= {"quality": QUALITY, "chroma": 444}
    elif suffix == ".webp":
        kind = "WEBP"
        # exact: keep the colour under alpha 0
        options |= {"quality": QUALITY, "lossless": image.lossless, "exact": True}
    elif suffix == ".bmp":
        kind = "BMP"
        options = {"dpi": options["dpi"]} if meta.dpi else {}
    else:
        kind = "JPEG"
        options |= {"quality": QUALITY, "subsampling": "4:4:4"}
        if meta.iptc and len(meta.iptc) <= _JPEG_SEGMENT:
            options["extra"] = _photoshop_segment(meta.iptc)
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()
