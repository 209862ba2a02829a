"""Noise that is not white noise of one level: stronger in some octaves, colours and places.

Cameras leave such noise: demosaicing and compression take its finest octave, filters that
overlap make chroma stronger than luma, and light makes it stronger in some tones than in others.
For n ~ N(0, S) with a known covariance S, E[x | y] = y + S grad log p(y), so a network needs to
know S. This module describes S to it, as `Told`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

OCTAVES = 4
"""Octave j holds wavelengths of 2^(j+1) to 2^(j+2) pixels, the last one all that are longer."""

AXES = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]) / torch.tensor([[3.0], [2], [6]]).sqrt()
"""Rows: luma and two axes of chroma, at right angles and of length 1: white stays white."""

TONE_WINDOW = 5  # pixels over which a tone is looked at
_FADED = 3.0  # most by which the logarithm of an octave's level is said to differ


class Told(NamedTuple):
    """What a network hears of noise, for pictures (B, C, H, W) in [0, 1].

    sigma: (B,), standard deviation of a pixel's noise, mean square over places and channels.
    spectrum: (B, 2, OCTAVES), of luma and of chroma, the logarithm of the level that white noise
    of equal strength in that octave would have, over sigma; 0 for white noise.
    relief: (B, 1, H, W), the standard deviation in each place over sigma; 1 for white noise.
    """

    sigma: Tensor
    spectrum: Tensor
    relief: Tensor


def octave_of(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The octave of each frequency of `torch.fft.fft2`, (H, W), as a number whose integers are
    the centres of octaves, from -1/2, single pixels, upwards; the mean has infinity."""
    f = [torch.fft.fftfreq(n, device=device).abs() for n in (height, width)]
    return -torch.maximum(f[0][:, None], f[1][None]).log2() - 1.5


def said(relative: Tensor) -> Tensor:
    """The spectrum of `Told` for levels over sigma."""
    return relative.clamp_min(1e-6).log().clamp(-_FADED, _FADED)


def local_tone(y: Tensor) -> Tensor:
    """The tone around each pixel of pictures (B, C, H, W): (B, 1, H, W)."""
    mean = y.mean(1, keepdim=True)
    return avg_pool2d(mean, TONE_WINDOW, 1, TONE_WINDOW // 2, count_include_pad=False)


def curve(tones: Tensor, knots: Tensor) -> Tensor:
    """Piecewise linear functions through knots (B, K), evenly spaced over [0, 1], of tones
    (B, 1, H, W), like them; constant beyond the ends."""
    count = knots.shape[1]
    place = tones.clamp(0, 1) * (count - 1)
    left = place.long().clamp_max(count - 2)
    flat = left.flatten(1)
    start, end = (knots.gather(1, flat + k).view_as(tones) for k in (0, 1))
    return torch.lerp(start, end, place - left)
