"""How strong the noise of a picture is: told, or measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cdnctl import images
from cdnctl.errors import ImageError
from cdnctl.images import Image
from cdnctl.restore.measuring import measure, sampled
from cdnctl.restore.noise import Noise
from cdnctl.restore.samples import is_gray

AUTO, WHITE, CAMERA = KINDS = ("auto", "white", "camera")
"""What is known of noise: nothing; that it is white and of one level; that it is not."""
Kind = str | Noise

_SURELY = 0.8  # confidence from which a picture is believed more than a profile
_ALIKE = 2.0  # factor within which two levels may be measurements of the same noise

MEASURABLE = 64  # shorter side of a picture from which its noise is told apart from texture


@dataclass(frozen=True)
class Level:
    """How strong the noise of a picture is: told, or measured."""

    sigma: float  # of white noise, as the network is told it, in [0, 1] pixel units
    noise: Noise | None = None  # what was measured: a change is held to it
    doubt: str = ""  # of what was told, in a sentence


def estimate_sigma(pixels: np.ndarray, alpha: np.ndarray | None = None) -> float:
    """Standard deviation of the noise in pixels (H, W, C), in [0, 1] pixel units, by
    scikit-image's wavelet estimator (Donoho and Johnstone 1994), averaged over channels.

    Any dtype, see `images.to_unit`. Large pictures are judged by a sample of them, and not by
    what alpha (H, W) hides. 0 for pictures too small or too flat to tell; at most 1, which
    patterns of single pixels exceed.
    """
    from skimage.restoration import estimate_sigma as estimate

    pixels = images.to_unit(_sample(pixels))
    if alpha is not None:
        pixels[_sample(alpha) == 0] = 0  # the estimator leaves out coefficients that are zero
    if min(pixels.shape[:2]) < 4:
        return 0.0
    with images.quiet:  # flat pictures: the mean of nothing
        sigma = float(estimate(pixels, channel_axis=-1, average_sigmas=True))
    return min(sigma, 1.0) if math.isfinite(sigma) else 0.0


def noise_level(
    picture: Image | np.ndarray,
    alpha: np.ndarray | None = None,
    sigma: float | None = None,
    kind: Kind = AUTO,
) -> Level:
    """The noise of a picture: as told by ``sigma``, or measured, see `measuring.measure`.

    picture: an Image, or samples (H, W, C) of any dtype. What alpha (H, W), or that of the
    Image, hides has no say. Pictures too small for that, or with too little in them that is not
    clipped, are judged by `estimate_sigma`. kind: what is known of the noise, see `KINDS`, or a
    profile, which stands for measuring; ImageError if it does not go with the picture.
    """
    if sigma is not None:
        return Level(sigma)
    samples, alpha = (
        (picture.samples, picture.alpha) if isinstance(picture, Image) else (picture, alpha)
    )
    if isinstance(kind, Noise):
        return _by_profile(samples, kind)
    if min(samples.shape[:2]) >= MEASURABLE:
        part = sampled(samples[:, :, :1] if is_gray(samples) else samples)
        hidden = None if alpha is None else sampled(alpha)
        noise = measure(images.to_unit(part), hidden, camera=kind == CAMERA)
        if kind == WHITE:
            noise = replace(noise.whitened, confidence=noise.confidence)
        if noise.told > 0 and samples.dtype.kind == "u" and _few_values(samples, noise.told):
            noise = replace(noise, confidence=0.0)
        if noise.measured:
            return Level(noise.safe, noise)
    sigma = estimate_sigma(samples, alpha)
    inks = samples.dtype.kind == "u" and _few_values(samples, sigma)
    return Level(0.0 if inks else sigma)


def _by_profile(samples: np.ndarray, profile: Noise) -> Level:
    gray = is_gray(samples)
    if gray != (len(profile.levels) == 1):
        one, other = ("gray", "colour") if gray else ("colour", "gray")
        raise ImageError(
            f"this picture is {one}, but the noise profile is of {other} pictures: make one with "
            f"cdnctl noise FOLDER --save, of {one} pictures"
        )
    pixels = images.to_unit(sampled(samples))
    noise = profile.within(pixels.mean(2))
    return Level(noise.safe, noise, _doubt(noise, pixels[:, :, :1] if gray else pixels))


def _doubt(noise: Noise, pixels: np.ndarray) -> str:
    """Whether a picture that surely shows its noise shows other noise than a profile says."""
    if min(pixels.shape[:2]) < MEASURABLE:
        return ""
    seen = measure(pixels, camera=True)
    if seen.confidence < _SURELY or 1 / _ALIKE <= noise.sigma / max(seen.sigma, 1e-9) <= _ALIKE:
        return ""
    said, found = (f"{images.PEAK * n.sigma:.2g}" for n in (noise, seen))
    return (
        f"the profile says noise of {said} where the picture seems to have {found}: it may be of "
        "another camera, or another setting"
    )


def _few_values(samples: np.ndarray, sigma: float) -> bool:
    """Whether samples have fewer values than noise of sigma would spread over: a picture of a few
    inks, dithered or striped."""
    width = 2 * sigma * float(np.iinfo(samples.dtype).max)
    parts = sampled(samples)
    return max(len(np.unique(parts[..., c])) for c in range(parts.shape[2])) < width


def _sample(pixels: np.ndarray, side: int = 256, count: int = 8) -> np.ndarray:
    """At most count x count evenly spaced squares of a picture, (H, W, ...), as a mosaic.

    Each starts at even rows and columns, so that wavelets of two pixels see the same pairs.
    """
    for axis in (0, 1):
        size = pixels.shape[axis]
        if size > side * count:
            starts = np.linspace(0, size - side, count).astype(int) // 2 * 2
            index = (starts[:, None] + np.arange(side)).ravel()
            pixels = np.take(pixels, index, axis)
    return pixels
