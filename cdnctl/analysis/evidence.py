"""Which pixels speak for a class.

grad_y log p(c | y) = (D_c - D) / sigma^2: moving the picture along it makes the class more
probable. Times what the picture shows there, it is what a pixel adds to log p(c | y).

The gradient of a network is rough: it depends on the last bits of the noise, and on where the
picture lies on the grid of the network's strides. So it is averaged over some more noise
(Smilkov et al. 2017, arXiv 1706.03825) and over shifts of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cdnctl import figures
from cdnctl.api import Model
from cdnctl.core.joint import MIN_SIGMA, Corrector, HasPosterior
from cdnctl.core.noise import noised_array
from cdnctl.errors import UsageError
from cdnctl.images import PEAK, Image, to_unit
from cdnctl.restore import View, at_class_scale, memory_errors, ranked

DRAWS = 32  # of noise and shift: a pass each over some 64 x 64 pixels
SMOOTHING_SIGMA = 25 / PEAK  # of the noise that is added
BLUR = 1 / 32  # of the picture's shorter side: standard deviation of the window of `heat`


@dataclass(frozen=True)
class Evidence:
    """Evidence of a picture for one class, at the size at which it was classified, (h, w)."""

    label: str
    # Of log p(label | y), (h, w, C), in nats per unit of the pixels.
    gradient: np.ndarray = field(repr=False)
    # (h, w), in nats: gradient times the picture's deviation from its mean colour, summed.
    support: np.ndarray = field(repr=False)
    posterior: dict[str, float]  # most probable class first

    def heat(self, height: int, width: int) -> np.ndarray:
        """The support as a map of the picture's size that can be read: float32 (height, width).

        Averaged over a Gaussian window, for the eye sees regions, not pixels. In nats per
        hundredth of the picture's area, which does not depend on its size.
        """
        from scipy.ndimage import gaussian_filter

        spread = BLUR * min(self.support.shape)
        smooth = gaussian_filter(self.support * (self.support.size / 100), spread, mode="reflect")
        return figures.resized(smooth, height, width)


@torch.no_grad()
def evidence(
    model: Model,
    pixels: np.ndarray,
    sigma: float,
    label: str | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Evidence:
    """Evidence of a picture for a class (None: the most probable one).

    pixels: (H, W, C), any dtype, see `images.to_unit`. sigma in [0, 1] pixel units. ``support``
    is positive where what the picture shows makes the class more probable, negative where it
    speaks against it. ``draws``: of noise and shift, to average over; with 0 it is the gradient
    for the picture as it is. ImageError if memory does not suffice.
    """
    if not (isinstance(model.module, Corrector) and isinstance(model.module, HasPosterior)):
        raise UsageError(f"model {model.name!r} ({model.header.arch}) has no joint density")
    scaled = at_class_scale(View(model, pixels, sigma))
    small = to_unit(scaled.pixels)  # of a gray picture one channel, however it is stored

    with memory_errors(scaled):
        correction, logits = View(model, small, scaled.sigma).solve()
        order = ranked(model, logits)
        label = next(iter(order)) if label is None else label
        one_hot = model.mixture(label)
        assert one_hot is not None
        if draws:
            most = max(model.sigma_range[1] / scaled.repeat**0.5, scaled.sigma)
            level = min(math.hypot(scaled.sigma, SMOOTHING_SIGMA), most)
            added = math.sqrt(level**2 - scaled.sigma**2)
            gradient = np.zeros_like(small)
            for y in _looks(small, added, model, draws, seed):
                found = _gradient(View(model, y, level), one_hot)
                gradient += found[-small.shape[0] :, -small.shape[1] :] / np.float32(draws)
        else:
            gradient = _gradient(View(model, small, scaled.sigma), one_hot)
    shown = small + correction
    support = (gradient * (shown - shown.mean((0, 1)))).sum(-1)
    return Evidence(label, gradient, support, order)


def _gradient(view: View, one_hot: Tensor) -> np.ndarray:
    """grad_y log p(c | y), (h, w, C), for the class of the one-hot weights."""
    # The correction is linear in the weights: with weights that sum to zero, one pass gives the
    # difference, and what both have in common never enters.
    difference = view.correction(one_hot - view.logits().softmax(0))
    return difference * (view.repeat / max(view.told, MIN_SIGMA) ** 2)


def _looks(
    pixels: np.ndarray, sigma: float, model: Model, draws: int, seed: int
) -> Iterator[np.ndarray]:
    """Pictures (h, w, C) with noise, shifted down and to the right by less than a cell of the
    network; what comes in there is mirrored."""
    rng = np.random.default_rng(seed)
    # Multiples of these fill a square evenly, however many there are (Roberts 2018).
    steps = np.array([0.7548776662466927, 0.5698402909980532])
    for i in range(draws):
        down, right = (i * steps % 1 * model.needs.multiple).astype(int)
        shifted = np.pad(pixels, ((down, 0), (right, 0), (0, 0)), "symmetric")
        yield noised_array(shifted, sigma, rng)


def drawn(image: Image, found: Evidence) -> Image:
    """The evidence over the picture in gray, with the key to it: for people to look at."""
    size = figures.size_of_map(*image.samples.shape[:2])
    heat = found.heat(*size)
    top = float(np.percentile(np.abs(heat), 99.5)) or 1.0
    ramp = np.linspace(-1, 1, 256)[None]
    scale = figures.Scale(
        f"evidence for {found.label} (probability {found.posterior[found.label]:.1%})",
        figures.evidence_colours(np.full((1, 256, 1), 0.5), ramp),
        [f"{-top:.2g} (against)", "0", f"{top:+.2g} (for)"],
        f"change of log p({found.label}), in nats per 1% of the picture",
    )
    picture = figures.fitted(image, *size)
    return figures.with_scale(figures.evidence_colours(picture, heat / top), scale)
