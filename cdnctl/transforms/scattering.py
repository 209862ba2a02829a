"""Morlet wavelets, what is done with their phase, and scattering coefficients.

Filters live on a periodic grid and are kept as Fourier transforms, which are real: a Morlet
wavelet psi(-u) is the conjugate of psi(u). Axes are rows, then columns; an angle of 0 is a
wave along the rows' axis, as in kymatio (Andreux et al. 2020, arXiv 1812.11214), whose
constants these are.

The bank is no tight frame: the sum of squares of its transfer functions falls to a tenth
towards the diagonal. Energy is not preserved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from math import ceil, pi, sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

WIDTH, FREQUENCY = 0.8, 0.75 * pi  # of the finest wavelet: pixels, radians per pixel
EPS = 1e-8  # of a squared amplitude: the modulus is smooth below its root


class Bank(NamedTuple):
    """Transfer functions on a grid of H x W frequencies, ordered as by ``torch.fft.fft2``."""

    low: Tensor  # (H, W), real
    bands: Tensor  # (L, H, W), real or complex


def directions(angles: int) -> list[float]:
    """Angles in radians of a bank of L wavelets: they cover half a turn, which suffices for
    real pictures, as the wavelet turned by pi is the conjugate."""
    return [(int(angles - angles / 2 - 1) - k) * pi / angles for k in range(angles)]


def gabor(
    height: int, width: int, sigma: float, frequency: float, theta: float = 0.0, slant: float = 1.0
) -> NDArray[np.complex128]:
    """Gaussian of unit sum (but for sampling) times a plane wave, on a periodic grid: (H, W).

    sigma: pixels along the wave; across it the Gaussian is 1 / slant times as wide.
    frequency: radians per pixel. The origin is at [0, 0].
    """
    reach = 9 * sigma / min(slant, 1.0)  # exp(-81 / 2) is nothing in float64
    rows, columns = (
        np.arange(n)[:, None] + n * np.arange(-ceil(reach / n), ceil(reach / n) + 1)
        for n in (height, width)
    )
    r, c = rows[:, None, :, None], columns[None, :, None, :]
    along = np.cos(theta) * r + np.sin(theta) * c
    across = np.cos(theta) * c - np.sin(theta) * r
    wave = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2) + 1j * frequency * along)
    return wave.sum((2, 3)) * slant / (2 * pi * sigma**2)


def morlet(
    height: int, width: int, sigma: float, frequency: float, theta: float = 0.0, slant: float = 1.0
) -> NDArray[np.complex128]:
    """Gabor function less the multiple of its Gaussian that makes its sum zero: (H, W)."""
    wave = gabor(height, width, sigma, frequency, theta, slant)
    envelope = gabor(height, width, sigma, 0.0, theta, slant)
    return wave - wave.sum() / envelope.sum() * envelope


def transfer(filters: NDArray[np.complex128]) -> NDArray[np.float64]:
    """Fourier transform of filters with psi(-u) = conj psi(u): real, (..., H, W)."""
    spectrum: NDArray[np.float64] = np.fft.fft2(filters).real
    return spectrum


def low_pass(height: int, width: int, sigma: float) -> NDArray[np.float64]:
    """Transfer function of an isotropic Gaussian of ``sigma`` pixels: (H, W)."""
    return transfer(gabor(height, width, sigma, 0.0))


class Shape(NamedTuple):
    """A wave of ``gabor``, but for its angle."""

    sigma: float  # pixels, along the wave
    frequency: float  # radians per pixel
    slant: float


def octave(angles: int, scale: float = 0.0) -> Shape:
    """Wavelets of a bank of L angles, ``scale`` octaves above the finest."""
    return Shape(WIDTH * 2**scale, FREQUENCY / 2**scale, 4 / angles)


def second_half(angles: int) -> Shape:
    """Wavelets that are those half an octave above the finest once they have passed through
    half the blur of an octave: Gaussians multiply."""
    slant = 4 / angles
    return Shape(WIDTH * sqrt(1.5), pi / sqrt(2), sqrt(3 * slant**2 / (4 - slant**2)))


HALF_BLUR = WIDTH / sqrt(2)  # twice this one is the low-pass of an octave


def wavelets(height: int, width: int, angles: int, shape: Shape) -> NDArray[np.float64]:
    """Transfer functions of L Morlet wavelets of one shape: (L, H, W)."""
    sigma, frequency, slant = shape
    made = [morlet(height, width, sigma, frequency, t, slant) for t in directions(angles)]
    return transfer(np.stack(made))


def octave_filters(height: int, width: int, angles: int) -> list[Array]:
    """Low-pass and wavelets of one octave."""
    return [low_pass(height, width, WIDTH), wavelets(height, width, angles, octave(angles))]


def half_filters(height: int, width: int, angles: int) -> list[Array]:
    """The first half of an octave: the finest wavelets, and half the blur of an octave."""
    return [low_pass(height, width, HALF_BLUR), wavelets(height, width, angles, octave(angles))]


def second_half_filters(height: int, width: int, angles: int) -> list[Array]:
    """The second half of an octave, on the same grid as the first."""
    found = wavelets(height, width, angles, second_half(angles))
    return [low_pass(height, width, HALF_BLUR), found]


# Orthonormal functions on three points: a low-pass, a first and a second derivative.
_SMOOTH, _SLOPE, _CURVE = np.array(
    [(0.5, sqrt(0.5), 0.5), (-sqrt(0.5), 0.0, sqrt(0.5)), (0.5, -sqrt(0.5), 0.5)]
)
SPATIAL = np.stack(
    [
        np.outer(_SMOOTH, _SMOOTH),
        np.outer(_SLOPE, _SMOOTH),
        np.outer(_SMOOTH, _SLOPE),
        np.outer(_SLOPE, _SLOPE),
        (np.outer(_CURVE, _SMOOTH) - np.outer(_SMOOTH, _CURVE)) / sqrt(2),
    ]
)
"""Five orthonormal 3x3 filters, (5, 3, 3): a low-pass, two gradients and the two derivatives of
second order that turn into each other. Guth and Menard (2024) find such ones as eigenvectors of
the spatial covariance of trained kernels; these are their closed form, not their numbers."""


def spatial_filters(height: int, width: int, angles: int) -> list[Array]:
    """Transfer functions of ``SPATIAL``, the low-pass first; ``angles`` changes nothing."""
    grid = np.zeros((5, height, width))
    for i in range(3):
        for j in range(3):  # on a grid of one or two pixels several fall on the same place
            grid[:, (i - 1) % height, (j - 1) % width] += SPATIAL[:, i, j]
    spectrum = np.fft.fft2(grid)
    return [spectrum[0].real, spectrum[1:]]


BANKS: Mapping[str, Callable[[int, int, int], list[Array]]] = {
    "octave": octave_filters,
    "half": half_filters,
    "second-half": second_half_filters,
    "spatial": spatial_filters,
}


@lru_cache(maxsize=256)
def _made(kind: str, height: int, width: int, angles: int) -> list[Array]:
    return BANKS[kind](height, width, angles)


@lru_cache(maxsize=256)
def bank(
    kind: str,
    height: int,
    width: int,
    angles: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Bank:
    """The filters of one layer, made once for a grid of H x W pixels. kind: one of ``BANKS``."""
    # An inference tensor in the cache could not be trained through later.
    with torch.inference_mode(False):
        return Bank(*(_tensor(f, dtype, device) for f in _made(kind, height, width, angles)))


def _tensor(values: Array, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    if np.iscomplexobj(values):
        dtype = dtype.to_complex()
    return torch.from_numpy(values).to(device, dtype)


def convolve(x: Tensor, transfers: Tensor, stride: int = 1) -> Tensor:
    """Periodic convolution of every picture with every filter, every ``stride``-th pixel of it:
    (..., H, W) and (K, H, W) -> (..., K, H / stride, W / stride), complex."""
    spectrum = torch.fft.fft2(x)
    # Filter by filter: what is in flight then fits into the cache, twice as fast as all at once.
    found = [torch.fft.ifft2(spectrum * f)[..., ::stride, ::stride] for f in transfers]
    return torch.stack(found, -3)


def modulus(z: Tensor, eps: float = EPS) -> Tensor:
    """sqrt(|z|^2 + eps): collapses the phase; real, with bounded derivatives for eps > 0."""
    return (z.real.square() + z.imag.square() + eps).sqrt()


def skip(z: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
    """The modulus, and the coefficients as they are."""
    return modulus(z, eps), z


def soft_threshold(z: Tensor, threshold: Tensor | float, eps: float = EPS) -> Tensor:
    """(|z| - threshold)_+ e^(i phase): shrinks the amplitude and keeps the phase. Of real
    numbers: the sign. Continuous, with finite gradients at 0 for eps > 0."""
    if not z.is_complex():
        return z.sign() * (z.abs() - threshold).clamp_min(0)
    a = modulus(z, eps)
    return z * ((a - threshold).clamp_min(0) / a)


def phases(z: Tensor) -> Tensor:
    """Positive parts of Re z, Im z, -Re z and -Im z: (..., H, W) -> (..., 4, H, W)."""
    return torch.stack([z.real, z.imag, -z.real, -z.imag], -3).relu()


def scattering(
    x: Tensor, octaves: int, angles: int = 8, order: int = 2, eps: float = EPS
) -> Tensor:
    """Scattering coefficients of a picture (Bruna and Mallat 2013).

    (B, C, H, W), sides multiples of 2^J -> (B, C, P, H / 2^J, W / 2^J) for J = ``octaves`` and
    P = 1 + J L, and J (J - 1) L^2 / 2 more for order 2: local means of x, of |x * psi_1|, and of
    ||x * psi_1| * psi_2| with a coarser psi_2. Coefficients at scale 2^j are computed on every
    2^j-th pixel, where psi of scale j is that of scale 0.
    """
    first, second = [_averaged(x, octaves)[:, :, None]], []
    for j in range(octaves):
        u = _moduli(x, j, angles, eps)
        first.append(_averaged(u, octaves - j))
        for k in range(1, octaves - j) if order > 1 else ():
            v = _moduli(u, k, angles, eps).flatten(2, 3)
            second.append(_averaged(v, octaves - j - k))
    return torch.cat(first + second, 2)


def _moduli(x: Tensor, scale: int, angles: int, eps: float) -> Tensor:
    """|x * psi| of one scale: (..., H, W) -> (..., L, H / 2^scale, W / 2^scale)."""
    filters = _wavelets(*x.shape[-2:], angles, scale, x.dtype, x.device)
    return modulus(convolve(x, filters, 2**scale), eps)


def _averaged(x: Tensor, octaves: int) -> Tensor:
    """Local means over 2^octaves pixels: (..., H, W) -> (..., H / 2^octaves, W / 2^octaves)."""
    filters = _low_pass(*x.shape[-2:], octaves, x.dtype, x.device)
    return convolve(x, filters, 2**octaves).real.squeeze(-3)


@lru_cache(maxsize=256)
def _wavelets(
    height: int, width: int, angles: int, scale: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        return _tensor(wavelets(height, width, angles, octave(angles, scale)), dtype, device)


@lru_cache(maxsize=256)
def _low_pass(
    height: int, width: int, octaves: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        return _tensor(low_pass(height, width, WIDTH * 2 ** (octaves - 1))[None], dtype, device)
