"""Noise and noise levels. Randomness is an argument everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from cdnctl.core.joint import per_sample


def add_noise(x: Tensor, sigma: Tensor | float, generator: torch.Generator | None = None) -> Tensor:
    """y = x + sigma * eps, eps white Gaussian of unit variance, like x, not clipped.

    x: (B, C, H, W). sigma: float or (B,), in the unit of x.
    """
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return x + per_sample(sigma, x) * eps


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
