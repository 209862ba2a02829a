"""One sampler for every denoiser: pictures from noise by steps to lower noise levels.

From y = x + sigma n to a level sigma' < sigma:

    h  = min(1, (1 - sigma' / sigma) / beta)
    y' = y + h (D(y, sigma) - y) + sqrt(sigma'^2 - (1 - h)^2 sigma^2) z,    z white

and the last output is D(y, sigma) at the last level. beta in (0, 1] is the churn: 1 adds no noise
and is the Euler step of the probability flow, DDIM (Song et al. 2021); `ancestral` gives the
value that is DDPM's (Ho et al. 2020), 1/2 for small steps; less replaces noise more often. It is
the iteration of Kadkhodaie and Simoncelli 2021 with sigma' = (1 - beta h) sigma.

A denoiser that knows a measurement, `cdnctl.inverse.guide`, makes draws from the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from cdnctl.core.joint import Denoiser
from cdnctl.errors import UsageError

Variance = TypeVar("Variance", float, Tensor)
Watch = Callable[[float], None]  # is told the share of the work that is done, in (0, 1]


def step(sigma: float, lower: float, beta: float) -> tuple[float, float]:
    """(h, amplitude of the new noise) of the step from one noise level to a lower one.

    >>> step(0.5, 0.25, beta=1.0)  # no new noise: a step of DDIM
    (0.5, 0.0)
    >>> step(0.5, 0.25, beta=0.5)  # all noise replaced
    (1.0, 0.25)
    """
    h = min(1.0, (1 - lower / sigma) / beta)
    return h, math.sqrt(max(lower**2 - ((1 - h) * sigma) ** 2, 0.0))


def ancestral(ratio: float) -> float:
    """The beta with which a step from sigma to ratio * sigma is that of DDPM: a draw from
    p(y' | y, x = D(y)). Constant on a geometric schedule."""
    return 1 / (1 + ratio)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    y: Tensor,
    sigmas: Sequence[float],
    beta: float = 0.5,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Pictures, like y, from noisy ones at the level sigmas[0]; not clipped.

    y: (B, C, H, W). sigmas: descending, positive, in the unit of the pixels; one denoising each.
    generator: on the device of y. UsageError for other levels or a beta not in (0, 1].
    """
    _check(sigmas)
    if not 0 < beta <= 1:
        raise UsageError(f"beta = {beta:g}: give a number above 0, and 1 at most")
    for i, (sigma, lower) in enumerate(pairwise(sigmas), 1):
        h, amplitude = step(sigma, lower, beta)
        y = y + h * (denoise(y, sigma) - y)
        if amplitude:
            noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
            y = y + amplitude * noise
        if watch:
            watch(i / len(sigmas))
    y = denoise(y, sigmas[-1])
    if watch:
        watch(1.0)
    return y


@torch.no_grad()
def settle(
    denoise: Denoiser,
    y: Tensor,
    sigmas: Sequence[float],
    watch: Watch | None = None,
    pull: float = 1.0,
    drive: float = 0.0,
) -> Tensor:
    """Where D(y, sigma) = y, like y, by y <- D(y, sigma) from the first level to the last.

    No noise is added, and there is nothing random in it. Such a y is a mode of the density at the
    level sigma, and descending levels follow it to less smoothing. For a denoiser that knows a
    measurement and a Gaussian prior it is the posterior mean: each step leaves the fraction
    v / (v + sigma^2) of a deviation in a direction of posterior variance v.

    To go faster, in [0, 1) and [1, 2): ``drive`` goes on by that share of the last change first
    (Polyak 1964), and ``pull`` takes that multiple of the denoiser's change. No direction
    oscillates for ever if (1 + drive) (pull - 1) < 1 - drive (pull - 1).
    """
    _check(sigmas)
    if not (1 <= pull < 2 and 0 <= drive < 1):
        raise UsageError(f"pull {pull:g} and drive {drive:g}: give them in [1, 2) and [0, 1)")
    before = y
    for i, sigma in enumerate(sigmas, 1):
        ahead = y + drive * (y - before) if drive else y
        before, y = y, denoise(ahead, sigma)
        if pull > 1:
            y = ahead + pull * (y - ahead)
        if watch:
            watch(i / len(sigmas))
    return y


@torch.no_grad()
def stir(
    denoise: Denoiser,
    y: Tensor,
    sigma: float,
    count: int,
    h: float = 0.2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``count`` steps at one level, that of y: y + h (D(y) - y) and as much noise as was lost.

    They carry y to the density of noisy pictures at that level. A start that is one picture plus
    noise lacks the variance of the pictures, and `sample` alone would never restore a share
    (v / (v + sigma^2))^(1 / beta) of a component's variance v. Each step leaves the fraction
    1 - h sigma^2 / (v + sigma^2) of a deviation; the variance comes out too low by about the share
    h v / (v + sigma^2) / 2 (Langevin's equation in steps).
    """
    amplitude = sigma * math.sqrt(1 - (1 - h) ** 2)
    for _ in range(count):
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device)
        y = y + h * (denoise(y, sigma) - y) + amplitude * noise
    return y


def mode_variance(
    variance: Variance, sigmas: Sequence[float], beta: float, start: float
) -> Variance:
    """The variance that `sample` gives to a component of pictures that is Gaussian of the given
    variance, from y with the variance ``start`` in it; exact, for the exact denoiser. Of many
    components at once for a tensor of variances."""
    v = start + 0 * variance
    for sigma, lower in pairwise(sigmas):
        h, amplitude = step(sigma, lower, beta)
        v = (1 - h * sigma**2 / (variance + sigma**2)) ** 2 * v + amplitude**2
    return v * (variance / (variance + sigmas[-1] ** 2)) ** 2


# -- schedules ------------------------------------------------------------------------


def geometric(high: float, low: float, count: int) -> list[float]:
    """``count`` levels from high to low with a constant ratio; low alone if it is one.

    >>> geometric(0.5, 0.125, 3)
    [0.5, 0.25, 0.125]
    """
    _check([high, low])
    if count < 1:
        raise UsageError(f"{count} noise levels: give 1 or more")
    return [high * (low / high) ** (k / (count - 1)) for k in range(count - 1)] + [low]


def ornstein_uhlenbeck(high: float, count: int) -> list[float]:
    """``count`` levels sqrt(exp(2 t) - 1) from high to near 0, with t falling as (1 - k/n)^2:
    the quadratic schedule of a process that forgets the picture at rate 1 (Guth et al. 2022)."""
    _check([high])
    if count < 1:
        raise UsageError(f"{count} noise levels: give 1 or more")
    longest = math.log1p(high**2) / 2
    return [math.sqrt(math.expm1(2 * longest * (1 - k / count) ** 2)) for k in range(count)]


def fixed(high: float, low: float, h: float, beta: float) -> list[float]:
    """Levels whose steps with this beta all have this h, from high down to the first one <= low
    (Kadkhodaie and Simoncelli 2021, with sigma counted and not estimated)."""
    return _falling(high, low, beta, lambda k: h)


def rising(high: float, low: float, h: float, beta: float) -> list[float]:
    """Levels whose step k = 1, 2 ... has h k / (1 + h (k - 1)), as published by Kadkhodaie and
    Simoncelli. Its long steps lose 10 to 45 percent of the variance: for replication."""
    return _falling(high, low, beta, lambda k: h * k / (1 + h * (k - 1)))


def _falling(high: float, low: float, beta: float, h_of: Callable[[int], float]) -> list[float]:
    _check([high, low])
    levels = [high]
    while levels[-1] > low:
        ratio = 1 - beta * h_of(len(levels))
        if not 0 < ratio < 1:
            raise UsageError(
                f"a step to {ratio:g} times the noise level: give h and beta in (0, 1)"
            )
        levels.append(levels[-1] * ratio)
    return levels


def _check(sigmas: Sequence[float]) -> None:
    descending = all(a > b for a, b in pairwise(sigmas))
    if not sigmas or not descending or not (sigmas[-1] > 0 and sigmas[0] < math.inf):
        shown = ", ".join(f"{s:g}" for s in sigmas[:8])
        raise UsageError(f"noise levels {shown or 'none'}: give descending ones above 0")
