"""What the samples of a picture mean: black and white, their step, whether they are gray."""

from __future__ import annotations

import numpy as np

from cdnctl import images
from cdnctl.errors import ImageError
from cdnctl.images import Image


def on_unit_scale(image: Image, scale: tuple[float, float] | None, name: str) -> Image:
    """The picture of that name with float samples from black at 0 to white at 1.

    scale: what is black and white. ImageError if it is given for samples that are no floats or
    do not go with it, or is not for floats that are mostly beyond white.
    """
    floats = image.dtype.kind == "f"
    low, high = float(image.samples.min()), float(image.samples.max())
    if scale is None:
        if floats and np.count_nonzero(image.samples > 1) > image.samples.size // 2:
            raise ImageError(
                f"{name!r}: most float samples are above 1, which is white, and reach {high:.6g}: "
                "say what is black and white, such as --range 0:255"
            )
        return image
    if not floats:
        raise ImageError(
            f"{name!r}: --range is for float samples, but these are {image.dtype.name}, whose "
            "range is known"
        )
    black, white = scale
    if high - low < 0.02 * (white - black):
        raise ImageError(
            f"{name!r}: its samples go from {low:.6g} to {high:.6g}, next to nothing of the range "
            f"from {black:g} to {white:g}: give another --range, or none for 0:1"
        )
    return image.with_samples(((image.samples - black) / (white - black)).astype(image.dtype))


def on_own_scale(image: Image, scale: tuple[float, float] | None) -> Image:
    """The inverse of `on_unit_scale`, for a picture made from its result."""
    if scale is None:
        return image
    black, white = scale
    samples = image.samples * (white - black) + black
    return image.with_samples(samples.astype(image.dtype))


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
