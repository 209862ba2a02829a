"""How uncertain each restored pixel is.

The posterior covariance of the clean picture is sigma^2 dD/dy (Miyasawa 1961; Manor
and Michaeli 2024), a symmetric matrix because D is a gradient. Its diagonal is a
variance per pixel, its trace over sigma^2 the effective dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cdnctl import figures
from cdnctl.api import Model
from cdnctl.images import PEAK, Image
from cdnctl.restore import (
    Settings,
    View,
    choose_class,
    class_mixture,
    in_tiles_that_fit,
    noise_level,
)

BLUR = 3  # pixels, standard deviation of the window of what is drawn
WINDOW = 9  # pixels, over which the variances of a whole picture are averaged


@dataclass(frozen=True)
class Uncertainty:
    """Posterior spread of a picture."""

    std: Tensor  # posterior standard deviation, like y, in the unit of y
    dimension: float  # trace dD/dy, between 0 and the number of pixels times channels
    probes: int


def uncertainty(
    denoise: Callable[[Tensor], Tensor],
    y: Tensor,
    sigma: float,
    probes: int = 16,
    generator: torch.Generator | None = None,
    window: int = 1,
) -> Uncertainty:
    """Posterior standard deviation of every pixel by Hutchinson's estimator.

    denoise: differentiable, (1, C, H, W) to the same, at the noise level sigma.
    Each probe v of random signs costs one vector-Jacobian product; v * (dD/dy)^T v
    has the wanted diagonal as its mean, with an error that falls as 1/sqrt(probes).
    ``window``: variances are averaged over squares of that odd side, which trades
    resolution for less error. Negative estimates are then set to zero.
    """
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        out = denoise(leaf)
        diagonal = torch.zeros_like(y)
        for _ in range(probes):
            sign = torch.randint(0, 2, y.shape, generator=generator, device="cpu") * 2 - 1
            v = sign.to(y)
            (jacobian,) = torch.autograd.grad(out, leaf, v, retain_graph=True)
            diagonal += v * jacobian / probes
    trace = diagonal.cpu().double().sum().item()  # on the host: MPS knows no float64
    if window > 1:
        diagonal = avg_pool2d(
            diagonal, window, stride=1, padding=window // 2, count_include_pad=False
        )
    return Uncertainty(sigma * diagonal.clamp_min(0).sqrt(), trace, probes)


def posterior_std(
    image: Image, model: Model, settings: Settings, probes: int = 24, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Uncertainty of a whole picture, tile by tile, and the noise level used.

    Returns the posterior standard deviation of each pixel, float32 (H, W, 1) in [0, 1] pixel
    units (root mean square over channels, variances averaged over 9 x 9 pixels), and sigma.
    The class mixture w is held fixed, so it is the mean over classes of the posterior variance
    given the class; what the classes differ in, sum_c w_c (D_c - D)^2, is left out.
    ImageError if memory does not suffice; without a ``settings.tile`` smaller tiles are tried
    first.
    """
    sigma = noise_level(image, sigma=settings.sigma, kind=settings.noise).sigma

    def spread(view: View) -> np.ndarray:
        mixture = None
        if settings.target is not None:
            chosen, _ = choose_class(view, settings)
            mixture = class_mixture(model, chosen, view.logits())
        generator = torch.Generator().manual_seed(seed)

        def of_tile(y: Tensor) -> Tensor:
            return uncertainty(
                lambda t: t + view.correct(t, mixture), y, sigma, probes, generator, WINDOW
            ).std

        return view.over_tiles(of_tile)

    view = View(model, image.samples, sigma, settings.tile, memory=settings.memory, gradient=True)
    _, std = in_tiles_that_fit(view, spread)
    return np.sqrt((std**2).mean(-1, keepdims=True)), sigma


def drawn(std: np.ndarray, sigma: float) -> Image:
    """Posterior standard deviations (H, W), in [0, 1] pixel units, for people to look at: dark
    where the restored picture is sure, bright where it is not, with the key to it.

    Variances are averaged once more, over a Gaussian window: the square one leaves a grid.
    """
    from scipy.ndimage import gaussian_filter

    size = figures.size_of_map(*std.shape)
    smooth = np.sqrt(gaussian_filter(std.astype(np.float64) ** 2, BLUR, mode="reflect"))
    shown = figures.resized(smooth, *size)
    top = float(np.percentile(shown, 99.5)) or 1.0
    scale = figures.Scale(
        f"uncertainty of each restored pixel (noise {PEAK * sigma:.3g})",
        figures.heat_colours(np.linspace(0, 1, 256)[None]),
        [f"{PEAK * top * share:.2g}" for share in (0, 0.5, 1)],
        "posterior standard deviation, on the scale of 0..255",
    )
    return figures.with_scale(figures.heat_colours(shown / top), scale)
