"""What the samples of a picture mean: black and white, their step, whether they are gray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cdnctl import images
from cdnctl.errors import ImageError
from cdnctl.images import Image

FILLED = 0.1  # share of its range below which it is asked whether a picture can hold so much


@dataclass(frozen=True)
class Percentiles:
    """Black and white of a picture as percentiles of its samples."""

    low: float
    high: float
    each: bool = False  # of each page of a stack, not of the stack


Range = tuple[float, float] | Percentiles


def black_and_white(image: Image, scale: Range | None, name: str) -> tuple[float, float] | None:
    """What is black and white in the picture of that name; percentiles are taken of what alpha
    does not hide. ImageError if they are one value."""
    if not isinstance(scale, Percentiles):
        return scale
    samples = image.samples if image.alpha is None else image.samples[image.alpha > 0]
    black, white = np.percentile(samples, [scale.low, scale.high]) if samples.size else (0, 0)
    if not black < white:
        raise ImageError(
            f"{name!r}: percentiles {scale.low:g} and {scale.high:g} of its samples are both "
            f"{black:g}: say what is black and white, such as --range 0:4095"
        )
    return float(black), float(white)


def on_unit_scale(image: Image, scale: Range | None, name: str) -> Image:
    """The picture of that name from black at 0 to white at 1, as floats if ``scale`` says what
    that is. ImageError if it does not go with the samples, or none is given for floats that are
    mostly beyond white."""
    floats = image.dtype.kind == "f"
    low, high = float(image.samples.min()), float(image.samples.max())
    if scale is None:
        if floats and np.count_nonzero(image.samples > 1) > image.samples.size // 2:
            raise ImageError(
                f"{name!r}: most float samples are above 1, which is white, and reach {high:.6g}: "
                "say what is black and white, such as --range 0:255"
            )
        return _questioned(image, low, high)
    ends = black_and_white(image, scale, name)
    assert ends is not None
    black, white = ends
    if high - low < 0.02 * (white - black):
        raise ImageError(
            f"{name!r}: its samples go from {low:.6g} to {high:.6g}, next to nothing of the range "
            f"from {black:g} to {white:g}: give another --range, or none"
        )
    return scaled(image, ends)


def scaled(image: Image, ends: tuple[float, float]) -> Image:
    """The picture, as floats, from black at 0 to white at 1, whatever its samples are."""
    black, white = ends
    floats = image.dtype.kind == "f"
    # float32 has room for 16 bits, not for 32.
    wide = np.float64 if image.dtype.itemsize > 2 else np.float32
    dtype = image.dtype if floats else np.dtype(wide)
    samples = ((image.samples.astype(np.float64) - black) / (white - black)).astype(dtype)
    return replace(image, samples=samples)


def _questioned(image: Image, low: float, high: float) -> Image:
    """A picture with a note, if it fills so little of its range that this may be another."""
    whole = image.dtype.kind == "u"
    full = float(np.iinfo(image.dtype).max) if whole else 1.0
    # What 8 bits hold is no count of anything.
    if full == images.PEAK or high <= low or high - low >= FILLED * full:
        return image
    likely = 2 ** int(high).bit_length() - 1 if whole else high
    note = (
        f"its samples go from {low:.6g} to {high:.6g} of {full:g}: if they can reach no more, say "
        f"so, such as --range 0:{likely:.6g}"
    )
    return replace(image, notes=(*image.notes, note))


def on_own_scale(image: Image, ends: tuple[float, float] | None, dtype: np.dtype[Any]) -> Image:
    """The inverse of `on_unit_scale`, for a picture made from its result. ends: see
    `black_and_white`.
    dtype: what it had; whole numbers are rounded, and clipped to what it holds."""
    if ends is None:
        return image
    black, white = ends
    samples = image.samples.astype(np.float64) * (white - black) + black
    if dtype.kind == "u":
        samples = np.rint(np.clip(samples, 0, np.iinfo(dtype).max))
    return replace(image, samples=samples.astype(dtype))


def finer(image: Image) -> Image:
    """A picture of 8 bits in 16; others as they are."""
    if image.dtype != np.uint8:
        return image
    parts = {name: getattr(image, name) for name in ("samples", "alpha", "hidden")}
    return replace(
        image, **{name: v.astype(np.uint16) * 257 for name, v in parts.items() if v is not None}
    )


def is_gray(pixels: np.ndarray) -> bool:
    """Whether the channels of (H, W, C) are equal up to 1/255: WebP and JPEG round as much."""
    white = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    # In blocks: for most pictures the first one settles it, and no picture is copied whole.
    blocks = (pixels[row : row + 64] for row in range(0, len(pixels), 64))
    return all((np.ptp(b, axis=2) <= 1.01 * white / images.PEAK).all() for b in blocks)


def is_bilevel(samples: np.ndarray) -> bool:
    """Whether all samples, if whole numbers, are black or white: such a picture shows no noise."""
    if samples.dtype.kind != "u":
        return False
    white = np.iinfo(samples.dtype).max
    blocks = (samples[row : row + 64] for row in range(0, len(samples), 64))
    return all(((b == 0) | (b == white)).all() for b in blocks)


def sample_step(dtype: np.dtype) -> float:
    """The distance of two values that a sample can have, in [0, 1] pixel units."""
    return 1 / float(np.iinfo(dtype).max) if dtype.kind == "u" else 0.0
