"""numpy's .npy: one picture, or a stack of them, of which a page is in memory at a time."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from cdnctl.errors import ImageError
from cdnctl.images.build import check_frames, check_size, make_image
from cdnctl.images.image import Image, Metadata

SIGNATURE = b"\x93NUMPY"
_DTYPES = ("uint8", "uint16", "uint32", "float16", "float32", "float64")
DTYPES = {".npy": _DTYPES}


def laid_out(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """An array's shape as that of its pages, () for a single picture, and of a page (H, W, C).

    Colour is a last axis of 3. ImageError for what is no pictures.

    >>> laid_out((5, 20, 30)), laid_out((20, 30, 3))
    (((5,), (20, 30, 1)), ((), (20, 30, 3)))
    """
    if len(shape) > 2 and shape[-1] in (1, 3):
        outer, page = shape[:-3], (shape[-3], shape[-2], shape[-1])
    elif len(shape) > 1 and (len(shape) == 2 or shape[-1] not in (2, 4)):
        outer, page = shape[:-2], (shape[-2], shape[-1], 1)
    else:
        raise ImageError(
            f"its shape is {shape}, but pictures are (height, width) or (height, width, 3), and "
            "stacks of them have axes in front: transpose it, or take a part"
        )
    if 0 in shape:
        raise ImageError(f"its shape is {shape}: it holds nothing")
    return outer, page


def check_kind(dtype: np.dtype[Any]) -> None:
    """ImageError for what are no numbers of pixels."""
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ImageError(f"its samples are {dtype}; convert them to uint16 or float32")


def decode(data: bytes, max_pixels: int) -> Image:
    """Decode an array of one picture. Whole numbers with a sign that are not negative are taken
    without it: what is white in them has to be told."""
    file = io.BytesIO(data)
    shape, _, dtype = _header(file)
    check_kind(dtype)
    outer, (height, width, _) = laid_out(shape)
    check_frames(math.prod(outer))
    check_size(width, height, max_pixels)
    if dtype.itemsize * math.prod(shape) > len(data):
        raise ImageError("the file is cut short; copy or export it again")
    file.seek(0)
    samples, notes = np.load(file, allow_pickle=False), []
    samples = samples.astype(dtype.newbyteorder("="), copy=False).reshape(laid_out(shape)[1])
    if dtype.name not in _DTYPES:
        low, high = int(samples.min()), int(samples.max())
        if low < 0:
            raise ImageError(
                f"its samples are {dtype.name} and reach down to {low}: give --pages all and "
                f"--range {low}:{high}, or convert them to floats"
            )
        wanted = next((n for n in ("uint8", "uint16", "uint32") if n == f"u{dtype.name}"), "uint32")
        if high > np.iinfo(wanted).max:
            raise ImageError(f"its samples reach {high}, beyond 32 bits; convert them to floats")
        notes.append(f"{dtype.name} samples stored as {wanted}")
        samples = samples.astype(wanted)
    return make_image(samples, metadata=Metadata(), notes=notes, suffix=".npy")


def encode(samples: np.ndarray) -> bytes:
    """Encode samples (H, W, C): (H, W) if they are gray."""
    if samples.shape[2] in (2, 4):
        raise ImageError(".npy files cannot store transparency; choose .png")
    out = io.BytesIO()
    np.save(out, samples[:, :, 0] if samples.shape[2] == 1 else samples)
    return out.getvalue()


def open_array(path: Path) -> np.ndarray:
    """The array of a file, mapped into memory: only what is looked at is read."""
    with path.open("rb") as file:
        shape, _, dtype = _header(file)
    check_kind(dtype)
    laid_out(shape)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def write_pages(
    file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype[Any], pages: Iterable[np.ndarray]
) -> None:
    """Write an array of a shape, page by page as they come."""
    # Not by mapping the file: where the disk is full that ends the process.
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)
    for page in pages:
        file.write(np.ascontiguousarray(page, dtype).tobytes())


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the first axis is the innermost, and dtype."""
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    return read(file)
