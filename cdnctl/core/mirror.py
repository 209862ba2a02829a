"""Pictures that go on beyond their edges, mirrored there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def reflected(start: int, stop: int, size: int) -> np.ndarray:
    """Indices start..stop-1 of an axis, those beyond its ``size`` mirrored at the edge.

    The edge is repeated, and the mirror image mirrored again as needed, down to size 1.

    >>> reflected(-2, 5, size=3).tolist()
    [1, 0, 0, 1, 2, 2, 1]
    """
    index = np.arange(start, stop) % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)


def mirrored(y: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) with sides mirrored at their ends up to multiples of ``multiple``."""
    for axis in (2, 3):
        size = y.shape[axis]
        if size % multiple:
            index = torch.from_numpy(reflected(0, size + -size % multiple, size))
            y = y.index_select(axis, index.to(y.device))
    return y
