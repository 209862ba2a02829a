"""What a threshold does to normal numbers, in closed form.

z is N(m, s^2), the threshold t is 0 or more; all three broadcast against each other. These are
the within-class mean and variance of a frame coefficient after shrinkage, for a class whose
pictures are Gaussian (Zarka, Guth and Mallat 2021, arXiv 2012.10424).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and variance, of the same shape."""

    def __init__(self, mean: Tensor, second: Tensor):
        self.mean = mean
        self.variance = second - mean.square()


def _positive(mean: Tensor, std: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor]:
    """E (z - t)_+ and E (z - t)_+^2."""
    a = (mean - threshold) / std
    density = torch.exp(-a.square() / 2) / (2 * torch.pi) ** 0.5
    below = torch.special.ndtr(a)
    return std * (a * below + density), std.square() * ((a.square() + 1) * below + a * density)


def relu_moments(mean: Tensor, std: Tensor, threshold: Tensor | float = 0.0) -> Moments:
    """Of (z - t)_+, a rectifier with a bias."""
    return Moments(*_positive(mean, std, threshold))


def soft_moments(mean: Tensor, std: Tensor, threshold: Tensor | float) -> Moments:
    """Of sign(z) (|z| - t)_+, the soft threshold: two rectifiers that are never both on."""
    above, above2 = _positive(mean, std, threshold)
    below, below2 = _positive(-mean, std, threshold)
    return Moments(above - below, above2 + below2)
