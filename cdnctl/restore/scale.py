"""Pictures at the scale at which a network has learnt classes.

A class head knows what things look like in its training crops. A photograph of ten times that
size shows it fur where it expects a cat, so class scores are taken of a smaller copy, whose
shorter side is that of the crops. Denoising has no such scale: noise is the same at every size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cdnctl.images import to_unit

BLOCK = 2**22  # samples that are turned into floats at once


class Shrink:
    """Area averaging of pictures of one size, down to a shorter side of ``side`` pixels.

    Smaller pictures stay as they are. ``height`` and ``width``: of the result. ``factor``: how
    many pixels become one along an axis, at least 1. ``noise``: what is left of the standard
    deviation of white noise (root mean square over pixels), 1 / factor for a whole factor.
    """

    def __init__(self, height: int, width: int, side: int):
        self.factor = max(1.0, min(height, width) / side)
        self.height, self.width = round(height / self.factor), round(width / self.factor)
        self._rows, self._columns = _windows(height, self.height), _windows(width, self.width)
        rows, columns = (
            weight.square().sum(1).mean().item() for _, weight in (self._rows, self._columns)
        )
        self.noise = float((rows * columns) ** 0.5)

    def __call__(self, y: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, height, width), differentiable."""
        return y if self.factor == 1 else _averaged(_averaged(y, self._columns, 3), self._rows, 2)

    def samples(self, samples: np.ndarray) -> np.ndarray:
        """Samples (H, W, C) of any dtype to float32 (height, width, C), see `images.to_unit`.

        In blocks of rows: there is never a copy of a large picture in floats.
        """
        if self.factor == 1:
            return to_unit(samples)
        rows = max(1, BLOCK // samples[0].size)
        narrow = [
            _averaged(torch.from_numpy(to_unit(samples[at : at + rows])), self._columns, 1)
            for at in range(0, len(samples), rows)
        ]
        return _averaged(torch.cat(narrow), self._rows, 0).numpy()


def _windows(size: int, parts: int) -> tuple[Tensor, Tensor]:
    """Positions and weights, (parts, n) each, of the means over equal parts of an axis; a pixel
    that lies in two of them counts in each with the share that lies there."""
    edges = torch.arange(parts + 1, dtype=torch.float64) * size / parts
    index = edges[:-1, None].floor() + torch.arange(-(-size // parts) + 1)
    inside = torch.minimum(edges[1:, None], index + 1) - torch.maximum(edges[:-1, None], index)
    weight = inside.clamp_min(0) * parts / size
    return index.clamp_max(size - 1).long(), weight.float()


def _averaged(y: Tensor, windows: tuple[Tensor, Tensor], axis: int) -> Tensor:
    """Weighted means along an axis."""
    index, weight = (part.to(y.device) for part in windows)
    picked = y.index_select(axis, index.flatten()).unflatten(axis, index.shape)
    shape = [1] * picked.ndim
    shape[axis : axis + 2] = weight.shape
    return (picked * weight.to(y.dtype).view(shape)).sum(axis + 1)
