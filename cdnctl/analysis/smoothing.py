"""Certified classes: what no change of a picture within a radius can alter.

Randomised smoothing (Cohen, Rosenfeld and Kolter 2019). Let a classifier look at x + sigma n, n
white Gaussian. If its most frequent answer has a probability of at least p > 1/2, it is also the
most frequent one at every x + d with |d|_2 < sigma Phi^-1(p). p is bounded from below by counting
(Clopper and Pearson 1934). A model that knows p(c | y) at the level sigma is such a classifier
already: nothing has to be trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import beta, norm
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.mirror import mirrored
from cdnctl.errors import UsageError
from cdnctl.images import Image
from cdnctl.restore import batch_size, check_channels
from cdnctl.restore.scale import Shrink
from cdnctl.units import PEAK

Classifier = Callable[[Tensor], Tensor]
"""Scores of classes of noisy pictures: (B, C, H, W) to (B, K)."""

SELECTING = 100  # draws that say which class is to be certified, and count for nothing else
LEAST_DRAWS = 10


@dataclass(frozen=True)
class Certificate:
    """What is certain about a picture, but for a chance of 1 - confidence."""

    label: int | None  # the class; None where none has certainly half of the answers
    radius: float  # no change of a smaller Euclidean norm alters it; 0 without a class
    lower: float  # bound on the probability of the class that was tried


def lower_bound(count: int, draws: int, confidence: float) -> float:
    """The probability that is certainly exceeded, with this confidence, by that of an event which
    came ``count`` times in ``draws`` (Clopper and Pearson, one-sided)."""
    return float(beta.ppf(1 - confidence, count, draws - count + 1)) if count else 0.0


def radius_of(probability: float, sigma: float) -> float:
    """sigma Phi^-1(p), and 0 for p up to 1/2."""
    return max(0.0, sigma * float(norm.ppf(probability)))


def largest_radius(draws: int, sigma: float, confidence: float) -> float:
    """What is certified where all draws say the same."""
    return radius_of(lower_bound(draws, draws, confidence), sigma)


def certify(
    classify: Classifier,
    x: Tensor,
    sigma: float,
    draws: int,
    confidence: float,
    generator: torch.Generator,
    *,
    batch: int = 32,
    watch: Callable[[float], None] = lambda share: None,
) -> Certificate:
    """The class of one picture (1, C, H, W) under noise of standard deviation sigma, and how far
    it holds, in the unit of x. SELECTING draws more than ``draws`` choose which class is tried:
    the same ones must not choose and count.
    """
    done, total = 0, SELECTING + draws

    @torch.no_grad()
    def answers(count: int) -> Tensor:
        nonlocal done
        found = []
        while count:
            size = min(batch, count)
            noise = torch.randn((size, *x.shape[1:]), generator=generator, dtype=x.dtype)
            found.append(classify(x + sigma * noise.to(x.device)).argmax(1).cpu())
            count, done = count - size, done + size
            watch(done / total)
        return torch.cat(found)

    label = int(answers(SELECTING).mode().values)
    lower = lower_bound(int((answers(draws) == label).sum()), draws, confidence)
    if lower <= 0.5:
        return Certificate(None, 0.0, lower)
    return Certificate(label, radius_of(lower, sigma), lower)


def check_smoothing(model: Model, sigma: float, draws: int, confidence: float) -> None:
    """UsageError for a model or numbers with which nothing can be certified."""
    model.classifier("certify classes")
    low, high = model.sigma_range
    if not 0 < sigma <= high:
        raise UsageError(
            f"sigma {sigma * PEAK:g} of the smoothing is beyond what model {model.name!r} knows: "
            f"give a level above {low * PEAK:g} and up to {high * PEAK:g}"
        )
    if not 0.5 <= confidence < 1:
        raise UsageError(f"confidence is {confidence:g}, but must be at least 0.5 and below 1")
    if draws < LEAST_DRAWS:
        raise UsageError(f"{draws} draws are too few to count: give {LEAST_DRAWS} or more")


def certified(
    image: Image,
    model: Model,
    sigma: float,
    draws: int,
    confidence: float = 0.999,
    seed: int = 0,
    watch: Callable[[float], None] = lambda share: None,
) -> Certificate:
    """The class of a picture, seen at the scale of the training under noise of level sigma there,
    and the radius in its own pixels, in [0, 1]; gray counts in all channels of the network.

    A change of norm r of a picture that is shrunk, m pixels to one, leaves r / sqrt(m) of it at
    most: so the radius is sqrt(m) times that of the small picture.
    """
    check_smoothing(model, sigma, draws, confidence)
    check_channels(model, image.samples.shape[2])
    height, width = image.samples.shape[:2]
    shrink = Shrink(height, width, model.header.patch)
    pixels = torch.from_numpy(shrink.samples(image.samples)).permute(2, 0, 1)[None]
    x = pixels.to(model.device).expand(-1, model.needs.channels, -1, -1)
    network = model.classifier()

    def classify(y: Tensor) -> Tensor:
        return network.logits(mirrored(y, model.needs.multiple), sigma)

    found = certify(
        classify,
        x,
        sigma,
        draws,
        confidence,
        torch.Generator().manual_seed(seed),
        batch=batch_size(shrink.height, shrink.width),
        watch=watch,
    )
    enlarged = (height * width / (shrink.height * shrink.width)) ** 0.5
    return Certificate(found.label, found.radius * enlarged, found.lower)
