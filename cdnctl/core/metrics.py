"""Measures of a restored picture and of a classification."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(restored: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture in dB for the data range [0, 1]: (B, C, H, W) -> (B,).

    Infinite where the pictures are equal. Clip ``restored`` first if the protocol says so.
    """
    mse = (restored.double() - clean.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(mse)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of pictures whose most probable class is the label: (B, K), (B,) -> [0, 1]."""
    return (logits.argmax(1) == labels).double().mean().item()
