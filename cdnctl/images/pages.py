"""Files of many pictures, a page in memory at a time: TIFF stacks, numpy arrays, animations.

::

    file ──open_pages──▶ Pages ──read──▶ Image, page by page ──write_pages──▶ file

Samples of whole numbers that an `Image` has no dtype for, those with a sign and of 64 bits, are
read as floats of the same values; they come back as what they were.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cdnctl.errors import ImageError
from cdnctl.images import npy
from cdnctl.images.build import MAX_PIXELS, brief, check_size, make_image
from cdnctl.images.image import Image, Metadata
from cdnctl.images.quiet import quiet

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FRAMES = (b"GIF8", b"\x89PNG", b"RIFF")  # first bytes of what may be animations


class Pages(ABC):
    """The pages of an open file. A context that closes it."""

    axes: str
    """A letter for each number of ``shape``: T time, Z depth, C channel; I, Q where unknown."""
    shape: tuple[int, ...]
    """How many pages lie along each axis; () for a single page."""
    dtype: np.dtype[Any]
    """Of the samples of the first page, in the file."""
    suffixes: tuple[str, ...] = (".tif", ".tiff", ".npy")
    """Of files that its pages can be written to; first of the same kind."""

    @property
    def count(self) -> int:
        """Of pages."""
        return math.prod(self.shape)

    @abstractmethod
    def read(self, index: int) -> Image:
        """A page. ImageError if it is damaged, or is no picture."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def channel(self, index: int) -> int:
        """In which channel a page lies, 0 without an axis C."""
        if "C" not in self.axes:
            return 0
        return int(np.unravel_index(index, self.shape)[self.axes.index("C")])

    def __enter__(self) -> Pages:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


class ArrayPages(Pages):
    """A numpy array: one picture, or a stack with any number of axes."""

    suffixes = (".npy", ".tif", ".tiff")

    def __init__(self, path: Path, max_pixels: int):
        self._array = npy.open_array(path)
        self.shape, self._page = npy.laid_out(self._array.shape)
        self.axes = "Q" * len(self.shape)
        self.dtype = self._array.dtype.newbyteorder("=")
        check_size(self._page[1], self._page[0], max_pixels)

    def read(self, index: int) -> Image:
        """See `Pages`."""
        where = np.unravel_index(index, self.shape) if self.shape else ()
        samples = np.array(self._array[tuple(where)], self.dtype).reshape(self._page)
        return make_image(as_floats(samples), metadata=Metadata(), notes=[], suffix=".npy")

    def close(self) -> None:
        """See `Pages`."""
        del self._array


def is_unknown(dtype: np.dtype[Any]) -> bool:
    """Whether it is of whole numbers that an `Image` has no dtype for."""
    return dtype.kind == "i" or dtype == np.uint64


def dtype_of(stored: np.dtype[Any], image: Image) -> np.dtype[Any]:
    """In which dtype a page is written that was read from samples of a dtype."""
    return stored if is_unknown(stored) else image.dtype


def as_floats(samples: np.ndarray) -> np.ndarray:
    """Whole numbers that an `Image` has no dtype for as floats, other samples as they are."""
    if is_unknown(samples.dtype):
        return samples.astype(np.float32 if samples.dtype.itemsize < 4 else np.float64)
    return samples


def joined(image: Image, dtype: np.dtype[Any]) -> np.ndarray:
    """Samples (H, W, 1 to 4) of a picture, with its alpha, in a dtype of the same unit: whole
    numbers are rounded, and clipped to what it holds."""

    def cast(values: np.ndarray) -> np.ndarray:
        if dtype.kind not in "iu" or values.dtype.kind != "f":
            return values.astype(dtype, copy=False)
        info = np.iinfo(dtype)
        whole = np.rint(values.astype(np.float64))
        # The largest of 64 bits is no float: what reaches it is set apart.
        result: np.ndarray = np.clip(whole, info.min, info.max // 2).astype(dtype)
        large = whole > info.max // 2
        top = np.nextafter(float(info.max) + 1, 0) if dtype.itemsize == 8 else float(info.max)
        result[large] = np.minimum(whole[large], top).astype(dtype)
        return result

    samples = cast(image.samples)
    if image.alpha is None:
        return samples
    if image.hidden is not None:
        samples = samples.copy()
        samples[image.alpha == 0] = cast(image.hidden)
    return np.dstack([samples, cast(image.alpha)])


def takes_pages(path: Path) -> bool:
    """Whether a file is of a kind that may hold pages, by its first bytes."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            head = file.read(6)
    except OSError:
        return False
    return head[:4] in (*TIFF_SIGNATURES, *FRAMES) or head == npy.SIGNATURE


def is_array(path: Path) -> bool:
    """Whether a file is of numpy's kind."""
    with path.open("rb") as file:
        return file.read(6) == npy.SIGNATURE


def open_pages(path: Path, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Pages:
    """Open a stack. ImageError if it is damaged, missing, or of no kind that holds stacks.

    name: for messages, if it is not that of the file.
    """
    try:
        with quiet:
            with path.open("rb") as file:
                head = file.read(6)
            if head == npy.SIGNATURE:
                return ArrayPages(path, max_pixels)
            if head[:4] in TIFF_SIGNATURES:
                from cdnctl.images.tiff_pages import TiffPages

                return TiffPages(path, max_pixels)
            if head[:4] in FRAMES:
                from cdnctl.images.frames import FramePages

                return FramePages(path, max_pixels)
        reason = "it is neither TIFF nor .npy nor an animation, and holds no pages"
    except ImageError as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or brief(error)
    except Exception as error:  # decoders fail in every way there is
        reason = f"the file is damaged or cut short ({brief(error)})"
    raise ImageError(f"cannot read {name or str(path)!r}: {reason}")


def read_page(pages: Pages, index: int, name: str) -> Image:
    """A page; ImageError, whatever keeps it from being read, with the file's name and the page's
    number, from 1."""
    try:
        with quiet:
            return pages.read(index)
    except ImageError as error:
        reason = str(error)
    except MemoryError:
        reason = "there is not enough memory for it"
    except Exception as error:  # as in `codec.decode`
        reason = f"the file is damaged or cut short ({brief(error)})"
    raise ImageError(f"{name!r}, page {index + 1} of {pages.count}: {reason}")


def write_pages(
    file: BinaryIO,
    suffix: str,
    pages: Pages,
    chosen: Sequence[int],
    images: Iterator[Image],
    strip: bool = False,
) -> tuple[str, ...]:
    """Write pictures that were made of the chosen pages, in their order, as one file.

    Axes are kept where all pages are chosen, or there is one axis. strip: no metadata.
    Returns what the file does not hold, a sentence each. ImageError if it cannot hold them.
    """
    whole = len(chosen) == pages.count
    outer = pages.shape if whole else (len(chosen),)
    from cdnctl.images.frames import FramePages, write_frames

    if isinstance(pages, FramePages):
        return write_frames(file, suffix, pages, chosen, images, strip)
    if suffix == ".npy":
        first = next(images)
        if first.alpha is not None:
            raise ImageError(".npy files cannot store transparency; choose .tif")
        dtype = dtype_of(pages.dtype, first)
        page = first.samples[:, :, 0].shape if first.samples.shape[2] == 1 else first.samples.shape

        def arrays() -> Iterator[np.ndarray]:
            for image in _again(first, images):
                if image.samples.shape != first.samples.shape or image.dtype != first.dtype:
                    raise ImageError("its pages are not alike; .npy files hold one shape and dtype")
                yield joined(image, dtype)

        npy.write_pages(file, (*outer, *page), dtype, arrays())
        return () if isinstance(pages, ArrayPages) else ("metadata left out",)
    from cdnctl.images.tiff_pages import TiffPages, write_array, write_tiff

    if isinstance(pages, TiffPages):
        return write_tiff(file, pages, chosen, images, strip)
    write_array(file, outer, pages.dtype, images)
    return ()


def _again(first: Image, rest: Iterator[Image]) -> Iterator[Image]:
    yield first
    yield from rest
