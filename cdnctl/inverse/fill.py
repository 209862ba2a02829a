"""Smooth fills of holes, to start from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

SWEEPS = 8  # of the mean of four neighbours, at each scale


def membrane(pixels: Tensor, known: Tensor) -> Tensor:
    """Pixels (B, C, H, W) whose unknown ones are about the mean of their neighbours: Laplace's
    equation with the known ones as its boundary, solved from coarse to fine (Brandt 1977), not to
    the end.

    known: boolean, (H, W), (1, H, W) or (C, H, W), with at least one known pixel in every channel.
    What the unknown pixels hold does not matter, if they are numbers.
    """
    share = known.to(pixels).expand(pixels.shape)
    scales = [(pixels * share, share)]  # the sum over known pixels and their share, over cells
    while max(scales[-1][1].shape[-2:]) > 1:
        total, share = (avg_pool2d(t, 2, ceil_mode=True) for t in scales[-1])
        scales.append((total, share))
    total, share = scales.pop()
    found = total / share
    for total, share in reversed(scales):
        some = share > 0
        mean = total / torch.where(some, share, 1.0)
        found = interpolate(found, size=total.shape[-2:], mode="bilinear", align_corners=False)
        found = torch.where(some, mean, found)
        for _ in range(SWEEPS):
            found = torch.where(some, mean, _around(found))
    return found


def _around(x: Tensor) -> Tensor:
    """The mean of the four neighbours; beyond the edge the picture goes on as at it."""
    wide = pad(x, (1, 1, 1, 1), mode="replicate")
    up, down = wide[..., :-2, 1:-1], wide[..., 2:, 1:-1]
    return (up + down + wide[..., 1:-1, :-2] + wide[..., 1:-1, 2:]) / 4
