"""How far a denoiser must see: the best linear ones of Gaussian fields, in closed form.

A field is stationary and periodic, (n, n), with a spectrum S of the same shape: C = F* S F with
the orthonormal Fourier transform F, so that the variance of a pixel is the mean of S. Noise is
white of level sigma. Three kinds of estimators, each the best linear one of what it sees, and its
mean squared error per pixel:

- all of the field (Wiener): `wiener_error`;
- a square of reach x reach pixels: `flat_error`;
- scale by scale: the coarsest picture as a whole, then details from the coarser picture, which was
  found before, and the noisy details, both in a square of reach x reach cells: `scales_error`.

The filters of details are fitted to the clean coarser picture and used on the one that was found,
as the networks of `cdnctl.models.multiscale` are (Kadkhodaie, Guth, Mallat and Simoncelli 2023,
arXiv 2303.02984). Everything is float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.fields.simulate import filtered, frequencies, scaled
from cdnctl.transforms.wavelet import merge, split


def power_law(side: int, exponent: float, corner: float = 1.0, std: float = 1.0) -> Tensor:
    """The spectrum (side, side) that falls as (k^2 + corner^2)^(-exponent / 2), k in waves per
    side, of pixels with the given standard deviation."""
    power = (frequencies(side).square() + corner**2) ** (-exponent / 2)
    return scaled(power, std)


def wiener_error(spectrum: Tensor, sigma: float) -> float:
    """Of the best linear denoiser, which sees the whole field."""
    return float((spectrum * sigma**2 / (spectrum + sigma**2)).mean())


def flat_error(spectrum: Tensor, sigma: float, reach: int) -> float:
    """Of the best linear denoiser that sees reach x reach pixels around each; reach is odd."""
    _check(reach, len(spectrum))
    covariance = torch.fft.ifft2(spectrum).real[None, None]
    noisy, target = _normal(covariance, reach, torch.tensor([sigma**2], dtype=torch.float64))
    explained = (target * torch.linalg.solve(noisy, target)).sum()
    return float(covariance[0, 0, 0, 0] - explained)


def band_covariances(spectrum: Tensor, wavelet: str = "haar") -> Tensor:
    """R[a, b, u] = E a(v + u) b(v) of the four bands of one split, (4, 4, n/2, n/2): the coarser
    picture first, then the details in the order of `cdnctl.transforms.wavelet.split`."""
    half = len(spectrum) // 2
    pulses = torch.zeros(4, 4, half, half, dtype=torch.float64)
    pulses[range(4), range(4), 0, 0] = 1  # one band at a time
    fields = filtered(merge(pulses[:, 0], pulses[:, 1:], wavelet), spectrum)
    low, details = split(fields, wavelet)
    return torch.cat([low[:, None], details], 1).transpose(0, 1)


def coarser(spectrum: Tensor, wavelet: str = "haar") -> Tensor:
    """The spectrum of the coarser picture, (n/2, n/2)."""
    return torch.fft.fft2(band_covariances(spectrum, wavelet)[0, 0]).real


def detail_filters(
    spectrum: Tensor, sigma: float, reach: int, wavelet: str = "haar"
) -> tuple[Tensor, float]:
    """The best linear filters of the details of one split, (3, 4, reach, reach), from the clean
    coarser picture and the noisy details; and their error per detail coefficient.

    What they are to be multiplied with lies around the cell as in a correlation (`conv2d`).
    """
    covariance = band_covariances(spectrum, wavelet)
    _check(reach, covariance.shape[-1])
    noise = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64) * sigma**2
    noisy, target = _normal(covariance, reach, noise)
    filters = torch.linalg.solve(noisy, target[:, 1:])
    variance = covariance[range(1, 4), range(1, 4), 0, 0].sum()
    error = (variance - (filters * target[:, 1:]).sum()) / 3
    return filters.T.reshape(3, 4, reach, reach), float(error)


def by_scales(
    y: Tensor, spectrum: Tensor, sigma: float, reach: int, levels: int, wavelet: str = "haar"
) -> Tensor:
    """Noisy fields (B, n, n) denoised scale after scale, from the coarsest on."""
    if levels == 0:
        return filtered(y, spectrum / (spectrum + sigma**2))
    low, details = split(y, wavelet)
    found = by_scales(low, coarser(spectrum, wavelet), sigma, reach, levels - 1, wavelet)
    filters, _ = detail_filters(spectrum, sigma, reach, wavelet)
    given = F.pad(torch.cat([found[:, None], details], 1), [reach // 2] * 4, "circular")
    return merge(found, F.conv2d(given, filters), wavelet)


def scales_error(
    spectrum: Tensor, sigma: float, reach: int, levels: int, wavelet: str = "haar"
) -> float:
    """Of `by_scales`, exactly.

    It is a linear map L that commutes with shifts by 2^levels: the error (L - I) C (L - I)^T +
    sigma^2 L L^T is the mean over the columns of the pixels of one such cell.
    """
    side, cell = len(spectrum), 2**levels
    pulses = torch.zeros(cell**2, side, side, dtype=torch.float64)
    place = torch.arange(cell**2)
    pulses[place, place // cell, place % cell] = 1

    def denoised(y: Tensor) -> Tensor:
        return by_scales(y, spectrum, sigma, reach, levels, wavelet)

    signal = filtered(pulses, spectrum.sqrt())
    lost = (denoised(signal) - signal).square().sum((1, 2)).mean()
    kept = denoised(pulses).square().sum((1, 2)).mean()
    return float(lost + sigma**2 * kept)


def _normal(covariance: Tensor, reach: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The normal equations of all that is seen: its covariance, (A r^2, A r^2), with the variance
    ``noise`` (A,) added to the channels, and its covariance with the A clean channels at the
    centre, (A r^2, A). covariance: (A, A, m, m), as `band_covariances` gives it."""
    side = covariance.shape[-1]
    offset = torch.arange(reach) - reach // 2
    rows, columns = (t.flatten() for t in torch.meshgrid(offset, offset, indexing="ij"))

    def between(left: Tensor, right: Tensor) -> Tensor:
        return (left[:, None] - right) % side

    at = covariance[..., between(rows, rows), between(columns, columns)]  # (A, A, r^2, r^2)
    seen = at.transpose(1, 2).flatten(0, 1).flatten(1, 2)
    target = covariance[..., rows % side, columns % side]  # (A, A, r^2)
    target = target.transpose(1, 2).flatten(0, 1)
    return seen + noise.repeat_interleave(reach**2).diag(), target


def _check(reach: int, side: int) -> None:
    if reach % 2 == 0 or not 1 <= reach <= side:
        raise UsageError(f"a reach of {reach}: give an odd number from 1 to the side, {side}")
