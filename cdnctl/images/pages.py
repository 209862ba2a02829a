"""Files of many pictures, a page in memory at a time: what all kinds have in common, and numpy's
arrays. `stacks` opens and writes them.

Samples of whole numbers that an `Image` has no dtype for, those with a sign and of 64 bits, are
read as floats of the same values; they come back as what they were.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from cdnctl.images import npy
from cdnctl.images.build import check_size, make_image
from cdnctl.images.image import Image, Metadata


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
