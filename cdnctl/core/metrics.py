"""Measures of restored pictures and of classifications."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def psnr(restored: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per picture in dB for the data range [0, 1]: (B, C, H, W) -> (B,).

    Infinite where the pictures are equal. Clip ``restored`` first if the protocol says so.

    >>> clean = torch.zeros(1, 3, 4, 4)
    >>> round(psnr(clean + 0.1, clean).item(), 4)
    20.0
    """
    mse = (restored.double() - clean.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(mse)


def picture_psnr(restored: np.ndarray, clean: np.ndarray) -> float:
    """PSNR in dB of (H, W, C) in [0, 1]."""
    a, b = (torch.from_numpy(np.ascontiguousarray(v))[None] for v in (restored, clean))
    return float(psnr(a, b))


def ssim(restored: np.ndarray, clean: np.ndarray) -> float | None:
    """Structural similarity (Wang et al. 2004: Gaussian window of 1.5 pixels, mean over channels)
    of (H, W, C) in [0, 1] by scikit-image; None for pictures smaller than its window of 11."""
    from skimage.metrics import structural_similarity

    if min(clean.shape[:2]) < 11:
        return None
    value = structural_similarity(
        restored.astype(np.float64),
        clean.astype(np.float64),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of pictures whose most probable class is the label: (B, K), (B,) -> [0, 1]."""
    return (logits.argmax(1) == labels).double().mean().item()


def interval(correct: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an accuracy, ``correct`` of ``total``, for the draw of pictures: it holds the
    true one with at least this probability (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    found = binomtest(correct, total).proportion_ci(level, "exact")
    return float(found.low), float(found.high)


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Probability that a score of ``inside`` exceeds one of ``outside``, ties counting half:
    the area under the ROC curve, by ranks (Mann and Whitney 1947). (n,) and (m,).

    >>> auroc(np.array([3, 2, 2]), np.array([1, 2]))  # of the six pairs two are ties
    0.8333333333333334
    """
    from scipy.stats import rankdata

    n, m = len(inside), len(outside)
    ranks = rankdata(np.concatenate([inside, outside]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))
