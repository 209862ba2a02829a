"""Noise and noise levels. Randomness is an argument everywhere."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from cdnctl.core.joint import per_sample


def noised(x: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
    """y = x + sigma * noise, like x, not clipped.

    x: (B, C, H, W). sigma: float or (B,), in the unit of x. noise: like x, or one of its pictures.
    """
    return x + per_sample(sigma, x) * noise


def add_noise(x: Tensor, sigma: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
    """y = x + sigma * eps, eps white Gaussian of unit variance, like x, not clipped.

    x: (B, C, H, W). sigma: float or (B,), in the unit of x.
    """
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return noised(x, sigma, noise)


def noised_array(x: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """`add_noise` for an array of any shape, float32."""
    return x + np.float32(sigma) * rng.standard_normal(x.shape, np.float32)


def noisy_version(clean: np.ndarray, sigma: float, name: str, seed: int) -> np.ndarray:
    """`noised_array` of a named picture, float32 (H, W, C). The noise depends on name, sigma and
    seed alone: neither the order of pictures nor their number changes it."""
    key = zlib.crc32(f"{name} {sigma:.9f}".encode())
    return noised_array(clean, sigma, np.random.default_rng([seed, key]))


def sample_sigma(
    count: int, low: float, high: float, power: float, generator: torch.Generator | None = None
) -> Tensor:
    """Random noise levels, (count,), in [low, high]: low + (high - low) * u^power, u uniform.

    power = 1 is the uniform distribution; above 1 favours low noise. Stratified: one u in each
    of ``count`` equal parts of [0, 1], in random order, so that every batch holds all levels.
    """
    order = torch.randperm(count, generator=generator)
    u = (order + torch.rand(count, generator=generator)) / count
    return low + (high - low) * u**power


def clipped_mean(x: np.ndarray, sigma: float) -> np.ndarray:
    """E[clip(x + sigma n, 0, 1)] with n standard normal, like x: what the mean of a file's samples
    is where noise reaches the ends of their range. x in [0, 1]; sigma > 0 in the same unit."""
    from scipy.special import ndtr

    def density(t: np.ndarray) -> np.ndarray:
        return np.exp(-t * t / 2) / (2 * np.pi) ** 0.5

    low, high = -x / sigma, (1 - x) / sigma
    inside = ndtr(high) - ndtr(low)
    return x * inside + sigma * (density(low) - density(high)) + ndtr(-high)


def without_clipping(mean: np.ndarray, sigma: float) -> np.ndarray:
    """The x in [0, 1], like ``mean``, whose `clipped_mean` is ``mean``; 0 or 1 for values that
    clipped noise cannot have as its mean."""
    grid = np.linspace(0, 1, 4097)
    return np.interp(mean, clipped_mean(grid, sigma), grid).astype(mean.dtype)


def ends(y: np.ndarray, window: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the samples of y, (H, W, C) in [0, 1], that lie at 0 and at 1, in squares of
    ``window`` pixels around each; like y."""
    from scipy.ndimage import uniform_filter

    size = (window, window, 1)
    low, high = (uniform_filter(at.astype(np.float32), size) for at in (y <= 0, y >= 1))
    return low, high


def unclipped(
    denoised: np.ndarray, sigma: float, shares: tuple[np.ndarray, np.ndarray], step: float
) -> np.ndarray:
    """A denoised picture, (H, W, C), without what clipped noise did to its blacks and whites.

    Where noise was cut off at the ends of the range, a denoiser of white noise finds the mean of
    what was left: gray for black. ``shares`` of samples at the ends, from `ends`, tell where it
    was: if there are at least half as many as such noise leaves there, the mean is inverted, and if
    there are fewer, only in part. step: the distance of two values that a sample can have.
    """
    from scipy.special import ndtr

    x = without_clipping(denoised, sigma)
    near = np.minimum(x, 1 - x)  # to the end that matters
    share = np.where(x < 0.5, *shares)
    expected = ndtr((step / 2 - near) / sigma)
    few = 0.01  # samples of a window that prove nothing
    weight = np.minimum(2 * (share + few) / (expected + 2 * few), 1)
    return (denoised + weight * (x - denoised)).astype(denoised.dtype)


def unclipped_gain(mean: np.ndarray, variance: np.ndarray, most: float = 4.0) -> np.ndarray:
    """How many times greater the variance of Gaussian noise was before it was clipped to [0, 1],
    where clipped it has this mean and variance: arrays of one shape, as the result, which is at
    most ``most``."""
    from scipy.special import ndtr

    def spread_of(mu: np.ndarray, sigma: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Variance of clipped noise around ``mu``, whose mean after that is ``mean``."""
        low, high = -mu / sigma, (1 - mu) / sigma  # the ends, in standard deviations
        at_low, at_high = (np.exp(-(z**2) / 2) / (2 * np.pi) ** 0.5 for z in (low, high))
        inside = (mu**2 + sigma**2) * (ndtr(high) - ndtr(low))
        return inside + sigma * (mu * at_low - (1 + mu) * at_high) + ndtr(-high) - mean**2

    mu, sigma = mean.astype(float), np.sqrt(np.maximum(variance, 1e-12))
    least = sigma.copy()
    for _ in range(50):
        first = clipped_mean(mu, sigma)
        spread = spread_of(mu, sigma, first)
        mu = np.clip(mu + mean - first, -2, 3)
        step = np.sqrt(variance / np.maximum(spread, 1e-12))
        sigma = np.clip(sigma * np.clip(step, 0.5, 2), least, least * most**0.5)
    return (sigma / least) ** 2
