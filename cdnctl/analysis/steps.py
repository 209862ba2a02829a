"""How many steps sampling takes: pixels against details given the coarser picture, by the variance
that each mode of a Gaussian field comes out with, exactly and without sampling.

A sampler is linear where its denoiser is, so the variance of a mode follows a recursion of its own
(`euler_variance` for the published sampler, `cdnctl.sampling.mode_variance` for that of this
package). The worst mode tells whether there are steps enough. Of pixels the spread of the modes'
variances grows with the field; of details, whitened band by band and given the coarser picture, it
does not (Guth, Coste, De Bortoli and Mallat 2022, arXiv 2208.05003).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from cdnctl.analysis.locality import band_covariances
from cdnctl.fields.simulate import scaled

LONGEST = 5.0  # time at which the published process has forgotten the picture
GROWTH, FEWEST, MOST = 1.2, 8, 20_000  # of the numbers of steps that are tried


def lattice_power(side: int, exponent: float) -> Tensor:
    """The spectrum |k|^-exponent on a lattice, (side, side), of pixels of variance 1.

    |k|^2 is that of the lattice's Laplacian, 4 sin^2(k / 2) for each axis; of the constant mode
    that of the longest wave, (2 pi / side)^2.
    """
    k = 2 * math.pi * torch.fft.fftfreq(side, dtype=torch.float64)
    axis = 4 * torch.sin(k / 2).square()
    square = axis[:, None] + axis
    square[0, 0] = (2 * math.pi / side) ** 2
    return scaled(square ** (-exponent / 2), 1.0)


def detail_covariance(spectrum: Tensor, wavelet: str = "haar") -> tuple[Tensor, Tensor]:
    """The law of the finest details given the coarser picture, wave by wave, (m, m, ...), m = n/2.

    Details are in units of the standard deviation of their band. Gives what a wave of the coarser
    picture is to be multiplied with for their mean, (m, m, 3), and their covariance, (m, m, 3, 3),
    both complex.
    """
    bands = band_covariances(spectrum, wavelet)
    std = bands[range(1, 4), range(1, 4), 0, 0].sqrt()
    waves = torch.fft.fft2(bands).permute(2, 3, 0, 1)
    mean = waves[..., 1:, 0] / waves[..., :1, 0] / std
    whole = waves[..., 1:, 1:] / std[:, None] / std
    known = mean[..., None] * mean[..., None, :].conj() * waves[..., :1, :1]
    return mean, whole - known


def detail_variances(spectrum: Tensor, wavelet: str = "haar") -> Tensor:
    """Variances of the modes of `detail_covariance`, (m, m, 3), ascending in each wave."""
    return torch.linalg.eigvalsh(detail_covariance(spectrum, wavelet)[1])


def euler_variance(
    variance: Tensor, count: int, longest: float = LONGEST, power: float = 2.0
) -> Tensor:
    """What modes come out with after ``count`` Euler steps of the published process, like variance.

    dX = -X dt + sqrt(2) dW backwards from white noise, at the times longest (1 - i/count)^power.
    """
    times = [longest * (1 - i / count) ** power for i in range(count + 1)]
    v = torch.ones_like(variance)
    for time, sooner in pairwise(times):
        gap, kept = time - sooner, math.exp(-2 * time)
        v = (1 + gap - 2 * gap / (kept * variance + 1 - kept)) ** 2 * v + 2 * gap
    return v


def steps_until(
    variance: Tensor,
    sampled: Callable[[Tensor, int], Tensor],
    tolerance: float = 0.05,
    most: int = MOST,
) -> int | None:
    """The number of steps after which no mode's variance is off by more than that share of it.

    variance: of the modes. sampled: what they come out with after a number of steps. Numbers are
    tried that grow by a fifth each time, from 8; None if ``most`` are not enough.
    """
    # Many modes share a variance, but for rounding.
    modes = variance.flatten().double().log().round(decimals=6).unique().exp()
    count = FEWEST
    while count <= most:
        if bool(((sampled(modes, count) / modes - 1).abs() <= tolerance).all()):
            return count
        count = math.ceil(GROWTH * count)
    return None
