"""A picture in memory: samples in the file's dtype, and all that the file says beside them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


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
    comment: bytes | None = None
    """Comment of a JPEG or GIF file, for JPEG."""
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


def to_unit(samples: np.ndarray) -> np.ndarray:
    """Scale samples of any dtype to float32, whole numbers to [0, 1]; always a fresh array."""
    if samples.dtype.kind == "f":
        return np.array(samples, np.float32)
    if samples.dtype.itemsize > 2:
        return (samples / np.iinfo(samples.dtype).max).astype(np.float32)
    return samples.astype(np.float32) / np.float32(np.iinfo(samples.dtype).max)


def from_unit(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Turn float pixels into samples of a dtype: the inverse of `to_unit`.

    For whole numbers, values in [0, 1] are scaled and rounded, and values outside are clipped.

    >>> from_unit(np.array([-0.1, 0.2, 0.5, 1.3]), np.dtype(np.uint8)).tolist()
    [0, 51, 128, 255]
    """
    if dtype.kind == "f":
        return values.astype(dtype)
    full = np.iinfo(dtype).max
    # float32 has 24 bits: enough to hit each of 16, not each of 32.
    wide = np.float64 if dtype.itemsize > 2 else np.float32
    whole: np.ndarray = np.rint(np.clip(values, 0, 1) * wide(full)).astype(dtype)
    return whole
