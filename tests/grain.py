"""Noise with a known law that is not white, for tests of what is measured and told of it."""

from __future__ import annotations

import torch
from torch import Tensor

from cdnctl.core.coloured import AXES, OCTAVES, octave_of, said


def shaped(white: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """White noise (B, 3, H, W) of unit variance given the relative levels, (B, 2, OCTAVES), of
    luma and chroma: (B, 3, H, W) of unit variance on average over channels, and its spectrum as in
    `Told`. Levels are joined smoothly; the borders are periodic."""
    at = octave_of(white.shape[-2], white.shape[-1], white.device)
    place = at.clamp(0, OCTAVES - 1)
    left = place.long().clamp_max(OCTAVES - 2)
    logs = levels.log()
    joined = torch.lerp(logs[..., left], logs[..., left + 1], place - left)  # (B, 2, H, W)
    power = (2 * joined).exp()
    total = ((power[:, 0] + 2 * power[:, 1]) / 3).mean((1, 2))
    power = power / total.view(-1, 1, 1, 1)
    band = (at + 0.5).floor().clamp(0, OCTAVES - 1)
    bands = torch.stack([(band == j).to(power.dtype) for j in range(OCTAVES)])
    bands = bands / bands.sum((1, 2), keepdim=True)
    means = torch.einsum("bahw,jhw->baj", power, bands)
    gain = power.sqrt()[:, [0, 1, 1]]
    axes = torch.fft.ifft2(torch.fft.fft2(white) * gain).real
    return torch.einsum("ac,bahw->bchw", AXES.to(white), axes), said(means.sqrt())
