"""Whether a model can tell pictures of another kind from those that it was trained on.

Every score is higher for pictures that the model takes for its own; none is fitted.

- ``log p(y)``: the log-marginal of the noisy picture, up to a constant that is the same for
  all pictures of a size. Known to prefer simple pictures to its own kind (Nalisnick et al.
  2019, arXiv 1810.09136).
- ``score norm``: minus sigma |grad log p(y)|, the "approximate mass" of Grathwohl et al.
  (2020, arXiv 1912.03263) in the unit of the noise.
- ``denoising error``: minus the mean squared error of E[x | y], the clean picture x being
  known.
- ``max softmax``: the largest p(c | y) (Hendrycks and Gimpel 2017, arXiv 1610.02136).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cdnctl.api import Model
from cdnctl.core.joint import Corrector, HasPosterior, Joint, log_marginal
from cdnctl.core.metrics import auroc
from cdnctl.core.noise import noisy_version
from cdnctl.grouping import batches
from cdnctl.restore import batch_size

LOG_P, SCORE_NORM, ERROR, SOFTMAX = "log p(y)", "score norm", "denoising error", "max softmax"

Picture = tuple[str, np.ndarray]
"""A name, on which its noise depends, and float32 pixels (H, W, C) in [0, 1]."""


@dataclass(frozen=True)
class Separation:
    """How well a score tells a set of pictures from those of the model's own kind."""

    score: str
    sigma: float  # in [0, 1]
    auroc: float  # 1: always right, 1/2: by chance, 0: always the wrong way round
    pictures: int  # of the model's own kind
    others: int


@torch.no_grad()
def scores(network: nn.Module, x: Tensor, y: Tensor, sigma: float) -> dict[str, Tensor]:
    """The scores, (B,) each, of noisy pictures y of clean ones x, (B, C, H, W), that the network
    can give: all of them only a joint density, and at sigma 0 only the last."""
    found, logits = {}, None
    if isinstance(network, Corrector) and sigma > 0:
        if isinstance(network, Joint):
            found[LOG_P] = log_marginal(network, y, sigma)
        correction, logits = network.correction(y, sigma)
        found[SCORE_NORM] = -correction.flatten(1).norm(dim=1) / sigma
        found[ERROR] = -(y + correction - x).square().flatten(1).mean(1)
    if isinstance(network, HasPosterior):
        logits = network.logits(y, sigma) if logits is None else logits
        found[SOFTMAX] = logits.softmax(1).amax(1)
    return found


def measure(
    model: Model,
    pictures: Iterable[Picture],
    sigma: float,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """The scores, (n,) each, of pictures with noise of standard deviation sigma (in [0, 1])."""
    parts: dict[str, list[Tensor]] = {}
    for group in batches(pictures, lambda p: p[1].shape, batch_size):
        noisy = [noisy_version(x, sigma, name, seed) for name, x in group]
        x, y = (
            torch.from_numpy(np.stack(stack).transpose(0, 3, 1, 2)).to(model.device)
            for stack in ([x for _, x in group], noisy)
        )
        for name, values in scores(model.module, x, y, sigma).items():
            parts.setdefault(name, []).append(values.cpu())
        for _ in group:
            advance()
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def separations(
    inside: Mapping[str, np.ndarray], outside: Mapping[str, np.ndarray], sigma: float
) -> list[Separation]:
    """How well each score that was measured on both sets tells them apart."""
    return [
        Separation(name, sigma, auroc(own, outside[name]), len(own), len(outside[name]))
        for name, own in inside.items()
        if name in outside
    ]


def fit(pixels: np.ndarray, side: int, channels: int) -> np.ndarray:
    """The central square of (H, W, C), resized without aliasing: float32 (side, side, channels).

    Gray pictures are repeated over the channels. A picture of that size is left as it is.
    """
    from skimage.transform import resize

    height, width = pixels.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = pixels[top : top + short, left : left + short]
    if short != side:
        square = resize(square, (side, side), anti_aliasing=short > side)
    return np.ascontiguousarray(np.broadcast_to(square, (side, side, channels)), np.float32)


def synthetic(count: int, side: int, channels: int = 3, seed: int = 0) -> Iterator[Picture]:
    """Pictures that no camera takes, without noise or texture, (side, side, channels): linear
    gradients, checkerboards and smooth blobs by turns, each between two random colours."""
    rng = np.random.default_rng(seed)
    row, column = (np.mgrid[:side, :side] + 0.5) / side

    def gradient() -> np.ndarray:
        angle = rng.uniform(0, 2 * np.pi)
        return row * np.cos(angle) + column * np.sin(angle)

    def checkerboard() -> np.ndarray:
        cell, phase = rng.integers(1, side // 2 + 1), rng.integers(0, side, (2, 1, 1))
        return ((np.mgrid[:side, :side] + phase) // cell).sum(0) % 2

    def blobs() -> np.ndarray:
        centres, widths = rng.random((5, 2)), rng.uniform(0.1, 0.4, 5)
        return sum(
            np.exp(-((row - r) ** 2 + (column - c) ** 2) / (2 * w**2))
            for (r, c), w in zip(centres, widths, strict=True)
        )

    for i in range(count):
        kind = (gradient, checkerboard, blobs)[i % 3]
        shape = kind()
        shape = (shape - shape.min()) / max(np.ptp(shape), 1e-6)
        dark, bright = rng.random((2, channels))
        pixels = dark + shape[:, :, None] * (bright - dark)
        yield f"{kind.__name__} {i}", pixels.astype(np.float32)
