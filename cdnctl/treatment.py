"""Camera noise taken out by any denoiser of white noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from cdnctl.noise import Noise

Array = NDArray[np.floating[Any]]
Denoiser = Callable[[Array, float], Array]
"""A picture (H, W, C) and the level of white noise in it, to the picture without; [0, 1] units."""

_WINDOW = 17  # pixels: side of the squares whose correction is compared with the noise
_EXCESS = 1.25  # most that a correction may exceed the noise


def told(noise: Noise) -> float:
    """The level to tell the denoiser: less where it is not sure that it is noise."""
    return noise.confidence * noise.told


def treat(pixels: Array, noise: Noise, denoise: Denoiser) -> Array:
    """``pixels`` (H, W, C) without their noise, not clipped.

    The correction is held to what the noise can account for, everywhere: where the denoiser
    takes more, it takes texture. So the picture never changes by more than 1.25 times the
    standard deviation of its noise.
    """
    level = told(noise)
    if level == 0:
        return pixels
    correction = denoise(pixels, level) - pixels
    return pixels + limited(correction, pixels + correction, noise)


def limited(correction: Array, clean: Array, noise: Noise) -> Array:
    """A correction (H, W, C), made weaker where its mean square over a small square exceeds that
    of the noise at the tones of ``clean``."""
    allowed = _EXCESS * noise.confidence * noise.sigma * noise.curve(clean.mean(2))
    energy = uniform_filter(np.mean(correction**2, axis=2), _WINDOW, mode="reflect")
    energy_allowed = uniform_filter(allowed**2, _WINDOW, mode="reflect")
    share = np.sqrt(energy_allowed / np.maximum(energy, energy_allowed + 1e-12))
    return correction * share[:, :, None]
