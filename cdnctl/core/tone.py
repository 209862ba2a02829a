"""The tone curve of sRGB (IEC 61966-2-1): a power with a straight foot."""

from __future__ import annotations

import torch
from torch import Tensor

_POWER, _FOOT = 2.4, 12.92  # exponent, and slope of the foot


def to_light(shown: Tensor) -> Tensor:
    """Light of sRGB values."""
    high = ((shown + 0.055) / 1.055) ** _POWER
    return torch.where(shown <= 0.04045, shown / _FOOT, high)


def to_display(light: Tensor) -> Tensor:
    """sRGB values of light, which is clipped to what can be shown."""
    light = light.clamp(0, 1)
    high = 1.055 * light.clamp_min(0.0031308) ** (1 / _POWER) - 0.055
    return torch.where(light <= 0.0031308, light * _FOOT, high)
