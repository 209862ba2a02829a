"""A denoiser that changes a picture by more than its noise has left its ground.

For y = x + sigma n and the posterior mean D, E (D - y)^2 = sigma^2 (1 - mean dD/dy), per
pixel (Stein 1981), and dD/dy is a covariance over sigma^2, so its mean is not negative: a
window of D - y holds no more than sigma^2 on average. What does not keep to that is held back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cdnctl.core.joint import per_sample

WINDOW = 15  # pixels; large enough for a mean, small enough to find the place
# Standard deviations that a window of pure noise may lie above sigma^2: none does in 100
# megapixels.
SPREAD = 8.0
# At this many times the limit's root nothing is left of a change. Little is won by what a model
# says of a picture that it does not know, and scaled to the limit it may still be all wrong.
FAR = 1.5


def held_back(
    correction: Tensor, sigma: Tensor | float, step: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A correction D - y, (B, C, H, W), where sigma allows it, and the factor that it took,
    (B, 1, H, W) in [0, 1].

    sigma: float or (B,), in the unit of the picture. step: the distance of two values that a
    sample can have, whose rounding is noise as well. Where the mean square over a window
    exceeds the limit L, the correction fades out, until at FAR^2 L the input is left. Values that
    are not finite stay so.
    """
    square = correction.detach().square().mean(1, keepdim=True)
    power = _around(square)
    # At the edges a window holds fewer pixels.
    count = avg_pool2d(torch.ones_like(square[:1]), WINDOW, 1, WINDOW // 2, divisor_override=1)
    count = count * correction.shape[1]
    variance = per_sample(sigma, correction).square() + step**2 / 12
    limit = variance * (1 + SPREAD * (2 / count).sqrt())
    # Without noise the limit may be zero, and so may a correction.
    ratio = limit / power.clamp_min(limit).clamp_min(torch.finfo(limit.dtype).tiny)
    far = 1 / FAR**2
    factor = ratio.sqrt() * ((ratio - far) / (1 - far)).clamp_min(0)
    return factor * correction, factor


def held_to(correction: Tensor, allowed: Tensor) -> Tensor:
    """A correction, (B, C, H, W), made weaker where its mean square over a window exceeds that of
    ``allowed``, (B, 1, H, W), the standard deviation that it may have in each place.

    For noise that was measured: a denoiser that takes more than there is takes texture.
    """
    power = _around(correction.detach().square().mean(1, keepdim=True))
    limit = _around(allowed.detach().square())
    # Where nothing is allowed, nothing is left.
    tiny = torch.finfo(limit.dtype).tiny
    return correction * (limit / power.clamp_min(limit).clamp_min(tiny)).sqrt()


def _around(square: Tensor) -> Tensor:
    """Means over a window around each place; only the part inside the picture counts."""
    return avg_pool2d(square, WINDOW, 1, WINDOW // 2, count_include_pad=False)
