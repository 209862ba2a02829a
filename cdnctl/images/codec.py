"""From a file to an `Image` and back: which format is whose, and what each cannot hold."""

from __future__ import annotations

import errno
import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from cdnctl import files
from cdnctl.errors import ImageError, OutputExistsError, SetupError
from cdnctl.images import npy, pillow, png, raw, tiff
from cdnctl.images.build import MAX_PIXELS, brief
from cdnctl.images.image import Image, Metadata, from_unit, to_unit
from cdnctl.images.quiet import quiet

_DTYPES = png.DTYPES | tiff.DTYPES | npy.DTYPES | pillow.DTYPES

WRITE_SUFFIXES = frozenset(_DTYPES)
"""Suffixes, in lower case and with the dot, that `encode` and `write` know."""

READ_SUFFIXES = WRITE_SUFFIXES | raw.SUFFIXES | pillow.READ_ONLY
"""Suffixes of files that are taken for pictures when a folder is searched."""


LOSSY_SUFFIXES = frozenset(pillow.LOSSY)
"""Of these, the ones of formats that have a quality."""


def is_image_path(path: Path) -> bool:
    """Tell by the suffix alone whether a file may be a picture that `read` knows."""
    return path.suffix.lower() in READ_SUFFIXES


def read(source: Path | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image:
    """Read one picture from a path or from an open binary file: `read_bytes` and `decode`."""
    if isinstance(source, (str, Path)):
        return decode(read_bytes(Path(source)), os.fspath(source), max_pixels)
    return decode(source.read(), "standard input", max_pixels)


def read_bytes(path: Path) -> bytes:
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

    The content decides the format; the suffix of the name only helps with camera raw and TGA,
    which have no signature of their own. Pictures of more than ``max_pixels``, by their
    header, are refused before memory is set aside for them.

    Raises:
        ImageError: for whatever keeps the file from being decoded in full.
    """
    try:
        # The decoders warn about oddities that are either harmless or an error anyway.
        with quiet:
            return _decode(data, Path(name).suffix.lower(), max_pixels)
    except ImageError as error:
        reason = brief(error)
    except PIL.UnidentifiedImageError:
        reason = "not a picture in a format known here; convert it to PNG or TIFF first"
    except MemoryError:
        reason = "there is not enough memory for it"
    except Exception as error:  # decoders fail in every way there is; none may get out
        reason = f"the file is damaged or cut short ({brief(error)})"
    raise ImageError(f"cannot read {name!r}: {reason}")


def _decode(data: bytes, suffix: str, max_pixels: int) -> Image:
    """Turn the bytes of a file into an `Image`. ``suffix`` tells camera raw from TIFF."""
    if not data:
        raise ImageError("the file is empty; copy or export it again")
    if suffix in raw.SUFFIXES:
        return raw.decode(data, max_pixels)
    if data[:4] in tiff.SIGNATURES:
        return tiff.decode(data, max_pixels)
    if data.startswith(npy.SIGNATURE):
        return npy.decode(data, max_pixels)
    return pillow.decode(data, suffix, max_pixels)


def count_pixels(path: Path) -> int:
    """Pixels of a picture by its header, without decoding it: to plan with.

    The number of bytes where the header does not say it at once; 0 for a file that cannot be
    read.
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
            if head.startswith(png.SIGNATURE):  # without Pillow, which takes ten times as long
                width, height = struct.unpack(">II", head[16:24])
                return width, height
            if size := pillow.webp_size(head):
                return size
            file.seek(0)
            with PIL.Image.open(file, formats=(*pillow.FORMATS, "TIFF", "TGA")) as picture:
                return picture.size
    except Exception:  # Pillow's parsers fail in many ways, of which reading tells
        return None


def conversions(image: Image, suffix: str) -> tuple[str, ...]:
    """Return what a file with this suffix cannot hold of a picture, one plain sentence each.

    Raises:
        ImageError: when the suffix is not one of `WRITE_SUFFIXES`, or the format has no alpha
            and the picture has.
    """
    if suffix not in _DTYPES:
        raise ImageError(
            f"'{suffix}' is not a suffix that can be written; "
            f"choose one of {' '.join(sorted(WRITE_SUFFIXES))}"
        )
    if image.alpha is not None and suffix in (".jpg", ".jpeg", ".bmp", ".npy"):
        raise ImageError(f"{suffix} files cannot store transparency; choose .png")
    meta, notes = image.metadata, []
    dtype = stored_dtype(image, suffix)
    if dtype != image.dtype:
        notes.append(f"{image.dtype.name} samples stored as {dtype.name}")
    lost: list[str] = []
    if suffix in (".webp", ".heic", ".heif"):
        lost = ["dpi"] if meta.dpi and not meta.exif else []
        lost += ["icc"] if not pillow.takes_profile(suffix, meta) else []
    elif suffix in (".bmp", ".npy"):
        lost = [name for name in ("icc", "exif", "xmp") if getattr(meta, name)]
        lost += ["dpi"] if suffix == ".npy" and meta.dpi else []
    elif suffix in (".jpg", ".jpeg"):
        blocks = ("exif", "xmp", "iptc", "comment")
        lost = [name for name in blocks if len(getattr(meta, name) or b"") > pillow.JPEG_SEGMENT]
    if meta.iptc and suffix not in (".jpg", ".jpeg", ".tif", ".tiff"):
        lost.append("iptc")
    words = ["text"] if suffix != ".png" and any(kind in png.TEXT for kind, _ in meta.png) else []
    if meta.comment and suffix not in (".jpg", ".jpeg"):
        words.append("comment")
    if lost or words:
        names = [name if name == "comment" else name.upper() for name in lost] + words
        notes.append(f"{', '.join(names)} data left out")
    return tuple(notes)


def encode(image: Image, suffix: str, quality: int | None = None) -> bytes:
    """Return the bytes of a file of the format that the suffix (``.png``) stands for.

    Pixels go into the picture's own dtype, or the nearest one the format has; floating point
    pixels are not clipped. quality: of lossy formats, 1 to 100; None: `QUALITY`, and no loss in
    WebP for pictures that came without.

    Raises:
        ImageError: when the format cannot hold the picture; see also `conversions`.
    """
    conversions(image, suffix)
    if image.dtype.kind == "f" and not np.isfinite(image.samples).all():
        raise ImageError("the pixels to write are not all finite numbers")
    samples = _samples(image, stored_dtype(image, suffix))
    try:
        with quiet:
            if suffix == ".png":
                return png.encode(samples, image.metadata)
            if suffix in (".tif", ".tiff"):
                return tiff.encode(samples, image.metadata)
            if suffix == ".npy":
                return npy.encode(samples)
            return pillow.encode(samples, image, suffix, quality)
    except ImageError:
        raise
    except Exception as error:  # sizes that a format cannot hold, and the like
        raise ImageError(
            f"{suffix} cannot hold this picture ({brief(error)}); choose .tif"
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
    with saving(path, temporary, overwrite=overwrite) as file:
        file.write(data)


@contextmanager
def saving(
    path: Path, temporary: str | None = None, *, overwrite: bool = True
) -> Iterator[BufferedRandom]:
    """`save` for what does not fit into memory: an open file, complete when the context ends."""
    try:
        with files.completed(path, overwrite, temporary=temporary, make_folders=False) as file:
            yield file
        return
    except files.NotRegularError as error:
        reason = f"{error.strerror}; choose another name"
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


def holds(suffix: str, dtype: np.dtype[Any]) -> bool:
    """Whether files with one of `WRITE_SUFFIXES` can have samples of a dtype."""
    return dtype.name in _DTYPES[suffix]


def stored_dtype(image: Image, suffix: str) -> np.dtype[Any]:
    """Return the picture's dtype if the format has it, else the deepest one of the format."""
    names = _DTYPES[suffix]
    return image.dtype if image.dtype.name in names else np.dtype(names[-1])


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
