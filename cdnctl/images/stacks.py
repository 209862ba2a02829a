"""Files of many pictures, a page in memory at a time: TIFF stacks, numpy arrays, animations.

::

    file ──open_pages──▶ Pages ──read──▶ Image, page by page ──write_pages──▶ file
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cdnctl.errors import ImageError
from cdnctl.images import npy
from cdnctl.images.build import MAX_PIXELS, brief
from cdnctl.images.frames import FramePages, write_frames
from cdnctl.images.image import Image
from cdnctl.images.pages import ArrayPages, Pages, dtype_of, joined
from cdnctl.images.quiet import quiet
from cdnctl.images.tiff_pages import TiffPages, write_array, write_tiff

TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FRAMES = (b"GIF8", b"\x89PNG", b"RIFF")  # first bytes of what may be animations


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
                return TiffPages(path, max_pixels)
            if head[:4] in FRAMES:
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
    if isinstance(pages, TiffPages):
        return write_tiff(file, pages, chosen, images, strip)
    write_array(file, outer, pages.dtype, images)
    return ()


def _again(first: Image, rest: Iterator[Image]) -> Iterator[Image]:
    yield first
    yield from rest
