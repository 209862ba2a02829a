"""Training losses of a joint model (Thiry and Guth 2024, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def score_matching(denoised: Tensor, clean: Tensor, sigma: Tensor, power: float = 0.0) -> Tensor:
    """Denoising score matching per picture: (sigma^power / 2) mean |D - x|^2 / sigma^2, (B,).

    Equal to sigma^2 times the squared error of the score, per dimension, up to a
    constant. It falls as noise grows, so the low levels dominate a mean over
    sigma; ``power`` > 0 weighs the high levels up.
    """
    error = (denoised - clean).square().mean((1, 2, 3))
    return 0.5 * error * sigma ** (power - 2)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log p(c | y) per picture in nats, (B,); zero where the label is -1 (unlabelled)."""
    return F.cross_entropy(
        logits, labels, ignore_index=-1, reduction="none", label_smoothing=smoothing
    )
