"""TIFF stacks by tifffile: plain pages, ImageJ's and OME's, with their axes and metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile

from cdnctl.errors import ImageError
from cdnctl.images import tiff
from cdnctl.images.build import MAX_PIXELS, check_frames, check_size, make_image
from cdnctl.images.image import Image, Metadata
from cdnctl.images.metadata import ICC, IPTC, ORIENTATION, XMP
from cdnctl.images.pages import Pages, as_floats, dtype_of, joined

_PLAIN_BITS = (8, 16, 32, 64)
# Compressions that lose nothing and are written as they were read: none, LZW, deflate (two
# numbers), PackBits, LZMA, zstd. All others become deflate.
_KEPT = (1, 5, 8, 32946, 32773, 34925, 50000)
# What is copied of a page besides its description: maker, model, page's name and place, software,
# date, artist, host, page's number, rating, copyright, and Micro-Manager's account of it.
_TAGS = (271, 272, 285, 286, 287, 297, 305, 306, 315, 316, 18246, 18249, 33432, 51123)
_PROFILES = (ICC, XMP, IPTC)
_IMAGEJ_LAYOUT = ("ImageJ", "images", "channels", "slices", "frames", "hyperstack", "shape", "axes")
_OF_CHANNELS = ("mode", "LUTs", "Ranges")


class TiffPages(Pages):
    """The full-size pages of a TIFF file, in the order of the file."""

    def __init__(self, path: Path, max_pixels: int = MAX_PIXELS):
        self.file = tifffile.TiffFile(path)
        try:
            self._index(max_pixels)
        except BaseException:
            self.file.close()
            raise

    def _index(self, max_pixels: int) -> None:
        found = [self.file.pages[i].aspage() for i in range(len(self.file.pages))]
        self.pages = [page for page in found if not page.is_reduced]
        if not self.pages:
            raise ImageError("it holds no page of full size")
        first = self.pages[0]
        self.dtype = np.dtype(first.dtype or np.uint8).newbyteorder("=")
        for page in self.pages:
            check_size(page.imagewidth, page.imagelength, max_pixels)
            check_size(page.tilewidth or 1, page.tilelength or 1, max_pixels)
        self.axes, self.shape = "I" * (len(self.pages) > 1), (len(self.pages),)
        self.shape = self.shape if len(self.pages) > 1 else ()
        self._start: int | None = None  # of pages that lie behind the first, which alone is listed
        series = self.file.series
        if any(one.is_multifile for one in series):
            raise ImageError("parts of it are in other files; save it as one file")
        if len(series) != 1:
            return
        axes, page_axes = series[0].axes, first.axes
        if not axes.endswith(("YX", "YXS", "SYX")):
            raise ImageError(
                f"its axes are {axes}, but pages are planes of Y and X: save it with those last"
            )
        outer = len(axes) - len(page_axes)
        shape = series[0].shape[:outer]
        if outer < 1 or axes[outer:] != page_axes:
            return
        if math.prod(shape) == len(self.pages):
            if [page.offset for page in self.pages] == [p and p.offset for p in series[0].pages]:
                self.axes, self.shape = axes[:outer], shape
        elif len(self.pages) == 1 and series[0].dataoffset is not None and first.compression == 1:
            self.axes, self.shape, self._start = axes[:outer], shape, series[0].dataoffset
            if self._start + math.prod(series[0].shape) * self.dtype.itemsize > path_size(
                self.file
            ):
                raise ImageError("the file is cut short; copy or export it again")
        else:
            check_frames(math.prod(shape))

    @property
    def truncated(self) -> bool:
        """Whether the file lists the first page only."""
        return self._start is not None

    def page(self, index: int) -> tifffile.TiffPage:
        """What the file says of a page."""
        return self.pages[0 if self.truncated else index]

    def read(self, index: int) -> Image:
        """See `Pages`. White is not turned to black where the file has white at 0."""
        page, notes = self.page(index), list[str]()
        if self._start is None:
            samples = _samples(page, notes, path_size(self.file), self.file.is_imagej)
        else:
            stored = self.dtype.newbyteorder(self.file.byteorder)
            size = math.prod(page.shape) * stored.itemsize
            self.file.filehandle.seek(self._start + index * size)
            samples = np.frombuffer(self.file.filehandle.read(size), stored).reshape(page.shape)
            samples = np.moveaxis(samples, 0, -1) if page.axes == "SYX" else samples
            samples = samples.astype(self.dtype)
        tag = page.tags.get(ORIENTATION)
        orientation = tag.value if tag is not None and tag.value in range(1, 9) else 1
        # Of the metadata, `write_tiff` takes what is wanted from the page itself.
        return make_image(
            as_floats(samples),
            orientation=orientation,
            metadata=Metadata(),
            notes=notes,
            suffix=".tif",
        )

    def close(self) -> None:
        """See `Pages`."""
        self.file.close()


def path_size(file: tifffile.TiffFile) -> int:
    """Bytes of an open file."""
    return file.filehandle.size


def is_plain(page: tifffile.TiffPage, imagej: bool) -> bool:
    """Whether the samples of a page are gray as they are in the file: counts, not to be turned."""
    # Of ImageJ's palettes, which colour counts, the counts are meant.
    gray = page.photometric in (0, 1) or (imagej and page.photometric == 3)
    return gray and page.bitspersample in _PLAIN_BITS and page.samplesperpixel == 1


def _samples(page: tifffile.TiffPage, notes: list[str], size: int, imagej: bool) -> np.ndarray:
    tiff.check_segments(page, size)
    if not is_plain(page, imagej):
        return tiff.samples_of(page, notes)
    tiff.check_coding(page)
    samples = page.asarray().reshape(page.imagelength, page.imagewidth, 1)
    return samples.astype(samples.dtype.newbyteorder("="), copy=False)


def write_tiff(
    file: BinaryIO, pages: TiffPages, chosen: Sequence[int], images: Iterator[Image], strip: bool
) -> tuple[str, ...]:
    """Write pictures made of chosen pages as a file of the same kind, page by page."""
    source = pages.file
    if source.is_imagej:
        return _write_imagej(file, pages, chosen, images, strip)
    if pages.truncated:  # such files are tifffile's own
        shape = pages.shape if len(chosen) == pages.count else (len(chosen),)
        write_array(file, shape, pages.dtype, images, pages.axes if shape == pages.shape else "")
        return ()
    whole, notes = len(chosen) == pages.count, list[str]()
    size = sum(math.prod(pages.page(i).shape) * pages.dtype.itemsize for i in chosen)
    large = source.is_bigtiff or size > 2**32 - 2**25
    description = None if strip else _description(pages, whole, notes)
    if len(source.series) > 0 and len(source.series[0].levels) > 1:
        notes.append("smaller copies of the pages left out")
    with tifffile.TiffWriter(file, bigtiff=large, byteorder=source.byteorder) as writer:
        for order, (index, image) in enumerate(zip(chosen, images, strict=True)):
            page = pages.page(index)
            # The first page of OME and of tifffile speaks of all of them.
            text = description if order == 0 else _text(page, 270)
            writer.write(
                **_layout(pages, page, image),
                description=None if strip or text is None else text.encode(),
                software=False,
                datetime=None,
                extratags=[] if strip else _extra(page),
                resolution=None if strip else _resolution(page),
                resolutionunit=None if strip else _unit(page),
                subfiletype=page.subfiletype,
                metadata=None,
                contiguous=False,
            )
    return tuple(notes)


def _layout(pages: TiffPages, page: tifffile.TiffPage, image: Image) -> dict[str, Any]:
    """Samples as `tifffile.TiffWriter.write` takes them, and how they lie in the file."""
    plain = is_plain(page, pages.file.is_imagej)
    stored = np.dtype(page.dtype or np.uint8).newbyteorder("=")
    samples = joined(image, dtype_of(stored, image))
    channels = samples.shape[2]
    apart = page.planarconfig == 2 and channels > 1
    data = np.moveaxis(samples, -1, 0) if apart else samples
    kept = page.compression in _KEPT
    # 2: differences of neighbours; 3: of the bytes of floats.
    predictor = page.predictor if kept else 1
    return {
        "data": samples[:, :, 0] if channels == 1 else data,
        "photometric": "miniswhite"
        if plain and page.photometric == 0
        else "rgb"
        if channels > 2
        else "minisblack",
        "planarconfig": ("separate" if apart else "contig") if channels > 1 else None,
        "extrasamples": ["unassalpha"] if channels in (2, 4) else None,
        "compression": (None if page.compression == 1 else page.compression) if kept else 8,
        "predictor": predictor if predictor in (2, 3) and samples.dtype == stored else None,
    }


def _description(pages: TiffPages, whole: bool, notes: list[str]) -> str | None:
    """What the first page says of all."""
    text, source = _text(pages.pages[0], 270), pages.file
    if text is None or not (source.is_ome or source.is_shaped):
        return text
    if not whole:
        if source.is_ome:
            notes.append("OME metadata, which is of all pages, left out")
        return None
    if source.is_ome:
        # They tie the text to a file by its name and identity, which this one is not.
        text = re.sub(r"<((?:\w+:)?UUID)\b[^>]*?(?:/>|>.*?</\1>)", "", text, flags=re.DOTALL)
        text = re.sub(r'(<(?:\w+:)?OME\b[^>]*?)\sUUID="[^"]*"', r"\1", text)
    return text


def _text(page: tifffile.TiffPage, code: int) -> str | None:
    tag = page.tags.get(code)
    if tag is None or not isinstance(tag.value, str | bytes):
        return None
    return tag.value if isinstance(tag.value, str) else tag.value.decode("utf-8", "replace")


def _extra(page: tifffile.TiffPage) -> list[tuple[int, int, int, Any, bool]]:
    """Tags of a page to be copied, as tifffile takes them."""
    found = []
    for code in (*_TAGS, *_PROFILES):
        tag = page.tags.get(code)
        if tag is None:
            continue
        value = tag.value.encode() if isinstance(tag.value, str) else tag.value
        # 2 is text, of whose end tifffile takes care; Micro-Manager's is read as a dict.
        if isinstance(value, dict):
            continue
        found.append((code, int(tag.dtype), tag.count, value, False))
    return found


def _resolution(page: tifffile.TiffPage) -> tuple[Any, Any] | None:
    x, y = page.tags.get(282), page.tags.get(283)
    return None if x is None or y is None else (x.value, y.value)


def _unit(page: tifffile.TiffPage) -> int | None:
    tag = page.tags.get(296)
    return None if tag is None or _resolution(page) is None else int(tag.value)


def write_array(
    file: BinaryIO,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    images: Iterator[Image],
    axes: str = "",
) -> None:
    """Write pages of one shape that come with no metadata, as tifffile keeps arrays."""
    first = next(images)
    dtype = dtype_of(dtype, first)
    height, width, channels = first.samples.shape
    page = (height, width) if channels == 1 else (height, width, channels)

    def arrays() -> Iterator[np.ndarray]:
        yield joined(first, dtype).reshape(page)
        for image in images:
            yield joined(image, dtype).reshape(page)

    size = math.prod((*shape, *page)) * dtype.itemsize
    metadata = {"axes": axes + "YX" + "S" * (channels > 1)} if axes else {}
    with tifffile.TiffWriter(file, bigtiff=size > 2**32 - 2**25) as writer:
        writer.write(
            arrays(),
            shape=(*shape, *page),
            dtype=dtype,
            photometric="rgb" if channels == 3 else "minisblack",
            metadata=metadata,
            software=False,
        )


def _write_imagej(
    file: BinaryIO, pages: TiffPages, chosen: Sequence[int], images: Iterator[Image], strip: bool
) -> tuple[str, ...]:
    """Write an ImageJ stack. It lists its pages in its description, and they lie in one piece."""
    known, notes = dict(pages.file.imagej_metadata or {}), []
    axes, shape = pages.axes, pages.shape
    if len(chosen) < pages.count:
        long = [letter for letter, size in zip(axes, shape, strict=True) if size > 1]
        axes, shape = (long[0] if len(long) == 1 else "T"), (len(chosen),)
        if len(long) > 1:
            notes.append("the pages, of several axes, lie along T")
        labels = known.get("Labels")
        if isinstance(labels, list) and len(labels) == pages.count:
            known["Labels"] = [labels[i] for i in chosen]
    gone = _IMAGEJ_LAYOUT + (() if "C" in axes else _OF_CHANNELS if "C" in pages.axes else ())
    metadata = {} if strip else {k: v for k, v in known.items() if k not in gone}
    page = pages.pages[0]
    if page.photometric == 3:
        notes.append("colour table left out")
    if page.compression != 1:
        notes.append("written without compression")
    first = next(images)
    dtype = dtype_of(pages.dtype, first)
    height, width, channels = first.samples.shape
    size = (height, width) if channels == 1 else (height, width, channels)
    if axes and set(axes) <= set("TZC"):
        metadata["axes"] = axes + ("YX" if channels == 1 else "YXS")

    def arrays() -> Iterator[np.ndarray]:
        yield joined(first, dtype).reshape(size)
        for image in images:
            yield joined(image, dtype).reshape(size)

    with tifffile.TiffWriter(file, imagej=True, byteorder=pages.file.byteorder) as writer:
        writer.write(
            arrays(),
            shape=(*shape, *size),
            dtype=dtype,
            photometric="rgb" if channels == 3 else None,
            resolution=None if strip else _resolution(page),
            resolutionunit=None if strip else _unit(page),
            metadata=metadata,
        )
    return tuple(notes)
