"""Pictures from noise: what a model takes for pictures, drawn from its prior.

From y = 1/2 + sigma n at the highest level that the model knows down to LOWEST, by the sampler
of `cdnctl.sampling`, one class told all the way or none. At a level well above the spread of
pictures, which is about 1/4 a pixel but more in means over many, y is next to pure noise; below
`LEAST` it is not, and what comes out would be no draw from the prior.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import inf, isfinite

import torch
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.joint import Mixture
from cdnctl.errors import UsageError
from cdnctl.sampling import Watch, geometric, sample
from cdnctl.units import PEAK

LEAST = 2.0  # of the highest level that a model must know, in [0, 1] units
LOWEST = 2 / PEAK  # level of the last step: noise that nobody sees
BATCH = 16  # pictures in the network together


def draw(
    model: Model,
    count: int,
    steps: int,
    *,
    label: str | None = None,
    guidance: float = 1.0,
    churn: float = 0.0,
    seed: int = 0,
    watch: Watch = lambda share: None,
) -> Iterator[Tensor]:
    """``count`` pictures, (C, side, side) each, not clipped; side is that of the training crops.

    steps: network passes a picture. label: a class, or None. guidance: g of D + g (D_c - D).
    churn: 0 adds no noise on the way (DDIM), 1 as much as DDPM, more replaces more. seed and count
    decide the noise. watch: is told the share of the pictures that is done.

    UsageError for a model that does not denoise, or whose prior cannot be reached from noise.
    """
    if not 0 <= churn < inf:
        raise UsageError(f"churn is {churn:g}, but must be a number of 0 or more")
    if not isfinite(guidance):
        raise UsageError(f"guidance is {guidance:g}, but must be a finite number")
    highest = model.sigma_range[1]
    network = model.corrector("make pictures")
    if highest < LEAST:
        raise UsageError(
            f"model {model.name!r} knows noise up to sigma {highest * PEAK:.4g} of 255 only, where "
            f"pictures still show through, so that its prior is not reached from pure noise: give "
            f"a model that knows {LEAST * PEAK:.0f} or more, such as --model cifar10"
        )
    target = model.mixture(label)
    mixture: Mixture = target
    if target is not None and guidance != 1:

        def mixture(logits: Tensor) -> Tensor:
            p = logits.softmax(1)
            return p + guidance * (target.to(p) - p)

    def denoise(y: Tensor, sigma: Tensor | float) -> Tensor:
        return y + network.correction(y, sigma, mixture)[0]

    def tell(first: int, size: int, share: float) -> None:
        watch((first + share * size) / count)

    # Of an endless range, as of a model that was told of none, what is far above any picture.
    sigmas = geometric(min(highest, 10 * LEAST), LOWEST, steps)
    ratio = sigmas[-1] / sigmas[0] if steps == 1 else sigmas[1] / sigmas[0]
    beta = 1 / (1 + churn * ratio)  # 1 for no churn, `sampling.ancestral` for 1
    generator = torch.Generator(model.device).manual_seed(seed)
    side, channels = model.header.patch, model.needs.channels
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        noise = torch.randn((size, channels, side, side), generator=generator, device=model.device)
        done = sample(
            denoise,
            0.5 + sigmas[0] * noise,
            sigmas,
            beta,
            generator,
            partial(tell, first, size),
        )
        yield from done
