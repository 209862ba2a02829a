"""Which pixels speak for a class.

D_c - D = sigma^2 grad_y log p(c | y): moving the picture along it makes the class
more probable. Positive along a pixel's change means evidence for the class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cdnctl.api import Model
from cdnctl.errors import UsageError
from cdnctl.images import to_unit
from cdnctl.restore import Field, ranked


@dataclass(frozen=True)
class Evidence:
    """Evidence of a picture for one class."""

    label: str
    gradient: np.ndarray  # D_c - D, float32 (H, W, C), in the unit of the pixels
    support: np.ndarray  # (H, W): D_c - D times the denoised picture's deviation from gray, summed
    posterior: dict[str, float]  # most probable class first


@torch.no_grad()
def evidence(model: Model, pixels: np.ndarray, sigma: float, label: str | None = None) -> Evidence:
    """Evidence map of a class (None: the most probable one).

    pixels: (H, W, C), any dtype, see `images.to_unit`. sigma in [0, 1] pixel units. ``support`` is
    gradient times picture: positive where what the picture shows makes the class more
    probable, negative where it speaks against it.
    """
    if not (model.module.denoises and model.module.classifies):
        raise UsageError(f"model {model.name!r} ({model.header.arch}) has no joint density")
    field = Field(model, pixels, sigma)
    logits = field.logits()
    order = ranked(model, logits)
    label = next(iter(order)) if label is None else label
    one_hot = model.weights(label)
    assert one_hot is not None
    posterior = logits.softmax(0)
    # The correction is linear in the weights: with weights that sum to zero, one pass
    # gives the difference, and what both have in common never enters.
    gradient = field.correction(one_hot - posterior)
    denoised = to_unit(pixels) + field.correction()
    support = (gradient * (denoised - denoised.mean((0, 1)))).sum(-1)
    return Evidence(label, gradient, support, order)


def overlay(pixels: np.ndarray, support: np.ndarray) -> np.ndarray:
    """A picture of evidence: red for, blue against, over the darkened gray picture.

    pixels: (H, W, C) in [0, 1]; support: (H, W), any unit. Returns (H, W, 3) in [0, 1].
    The colour saturates at the 99th percentile of the absolute support.
    """
    gray = np.clip(pixels, 0, 1).mean(-1, keepdims=True).repeat(3, axis=-1) * 0.6 + 0.2
    scale = float(np.percentile(np.abs(support), 99)) or 1.0
    amount = np.clip(np.abs(support) / scale, 0, 1)[..., None]
    red, blue = np.array([0.85, 0.1, 0.1]), np.array([0.1, 0.25, 0.9])
    colour = np.where(support[..., None] > 0, red, blue)
    return (gray * (1 - amount) + colour * amount).astype(np.float32)
