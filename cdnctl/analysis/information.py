"""What a class can tell a denoiser: no more than it is news.

With y = x + sigma n and snr = 1 / sigma^2, for the best denoisers with and without the class,

    E|x - D|^2 - E|x - D_c|^2 = 2 dI(c; y) / d snr

(Guo, Shamai and Verdu 2005, for y and for y given c), summed over all dimensions. So the gains at
all levels, weighted by d snr / 2, add up to what there is to be known: the entropy of the classes,
if pictures show them. Any class, and however good the network, gains log K nats at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdnctl.core import joint
from cdnctl.core.joint import Model
from cdnctl.core.noise import add_noise
from cdnctl.errors import UsageError


@dataclass(frozen=True)
class Gain:
    """What telling the true class changes at one noise level, per picture, over all pixels."""

    sigma: float  # in the unit of the pictures
    gain: float  # mean of |x - D|^2 - |x - D_c|^2: as measured, and negative by chance too
    error: float  # standard error of that
    shift: float  # mean of |D_c - D|^2: for an exact model the same, with far less chance in it


@torch.no_grad()
def class_gain(
    model: Model,
    x: Tensor,
    labels: Tensor,
    sigma: float,
    generator: torch.Generator | None = None,
) -> Gain:
    """The gain of the true classes (B,) at one level, for clean pictures (B, C, H, W)."""
    y = add_noise(x, sigma, generator)
    classes = joint.posterior(model, y[:1], sigma).shape[1]  # type: ignore[arg-type]
    told = torch.nn.functional.one_hot(labels, classes).to(y)
    without, given = joint.denoise(model, y, sigma), joint.denoise(model, y, sigma, told)

    def square(values: Tensor) -> Tensor:
        return values.double().square().flatten(1).sum(1)

    gains = square(x - without) - square(x - given)
    error = gains.std() / len(gains) ** 0.5 if len(gains) > 1 else torch.tensor(float("inf"))
    return Gain(sigma, gains.mean().item(), error.item(), square(given - without).mean().item())


def information(sigmas: Sequence[float], gains: Sequence[float]) -> list[float]:
    """I(c; y) in nats at each of these levels, but for what is known at the highest one.

    sigmas: two or more, in any order, as are the gains. The integral of gain / (2 sigma^4)
    d(sigma^2), by the trapezium rule on the logarithm of sigma, where the integrand is
    gain / sigma^2 and smooth.
    """
    if len(sigmas) != len(gains) or len(sigmas) < 2 or min(sigmas) <= 0:
        raise UsageError(f"{len(gains)} gains at {len(sigmas)} noise levels: give two above 0")
    order = sorted(range(len(sigmas)), key=lambda i: -sigmas[i])
    s = torch.tensor([sigmas[i] for i in order], dtype=torch.float64)
    slope = torch.tensor([gains[i] for i in order], dtype=torch.float64) / s.square()
    parts = (slope[1:] + slope[:-1]) / 2 * -s.log().diff()
    total = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    found = dict(zip(order, total.tolist(), strict=True))
    return [found[i] for i in range(len(sigmas))]


def entropy(labels: Tensor) -> float:
    """Of the shares of classes (B,), in nats: the most that can be known."""
    p = labels.bincount().double() / len(labels)
    return float(-torch.xlogy(p, p).sum())
