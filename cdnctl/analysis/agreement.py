"""Whether two denoisers, trained on different pictures of one kind, do the same.

After Kadkhodaie, Guth, Simoncelli and Mallat (2024, "Generalization in diffusion models arises
from geometry-adaptive harmonic representations"): networks that have seen too few pictures
remember them, and two that have seen different ones disagree; with enough of them both come to
one function. D1 and D2 of disjoint halves are two draws of what training makes of N pictures, so
half of their squared distance estimates the variance V of a denoiser over training sets, and

    E |x - D|^2 = E |x - mean D|^2 + V.

The share V / E |x - D|^2 is what would be gained by the mean over all training sets. Two that
remember, of which either errs by its own nearest pictures, have a share of about a half.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf, log10, nan, sqrt

import numpy as np
import torch
from torch import Tensor

from cdnctl.analysis.ood import fit
from cdnctl.core.joint import Denoiser
from cdnctl.core.noise import noisy_version

BATCH = 32  # pictures in a network together
ENOUGH = 0.05  # share of variance below which more pictures would change next to nothing
REMEMBERS = 0.4  # share above which networks err as those do that remember pictures


@dataclass(frozen=True)
class Accord:
    """Two denoisers at one noise level; pixels and sigma in [0, 1].

    errors: mean squared error of either. apart: E (D1 - D2)^2 per pixel. cosine: of y - D1 and
    y - D2, what either takes for noise, over all pictures; -1 to 1.
    """

    sigma: float
    pictures: int
    errors: tuple[float, float]
    apart: float
    cosine: float
    share: float  # of the error that is variance over training sets, 0 to 2; nan without error
    uncertain: float  # standard error of the share, from the spread over pictures

    @property
    def psnrs(self) -> tuple[float, float]:
        """Of either denoiser in dB, by the mean error of all pictures; not clipped."""
        first, second = (-10 * log10(e) if e else inf for e in self.errors)
        return first, second

    @property
    def gain(self) -> float:
        """What the mean over many training sets of this size would gain, in dB; infinite where
        all of the error, or more, is variance."""
        return inf if self.share >= 1 else -10 * log10(1 - self.share)


def accord(
    first: Denoiser, second: Denoiser, pairs: Iterable[tuple[Tensor, Tensor]], sigma: float
) -> Accord:
    """Two denoisers on the same noisy pictures.

    pairs: batches of clean and noisy pictures, (B, C, H, W) each, with noise of level sigma.
    ValueError without any picture.
    """
    rows = []
    with torch.no_grad():
        for clean, noisy in pairs:
            one, two = first(noisy, sigma), second(noisy, sigma)
            terms = (
                (one - clean, one - clean),
                (two - clean, two - clean),
                (one - two, one - two),
                (noisy - one, noisy - two),
                (noisy - one, noisy - one),
                (noisy - two, noisy - two),
            )
            sizes = [(a.double() * b.double()).flatten(1).mean(1).cpu() for a, b in terms]
            rows.append(torch.stack(sizes, 1))
    if not rows:
        raise ValueError("two denoisers are compared on pictures, but there are none")
    each = torch.cat(rows).numpy()
    means = each.mean(0)
    error = (each[:, 0] + each[:, 1]) / 2
    share = means[2] / 2 / error.mean() if error.any() else nan
    n = len(each)
    # Of a ratio of means: the spread of what is left of each numerator.
    left = each[:, 2] / 2 - share * error
    spread = sqrt(float((left**2).sum()) / (n * (n - 1))) / error.mean() if n > 1 else nan
    norms = sqrt(float(means[4] * means[5]))
    return Accord(
        sigma=sigma,
        pictures=n,
        errors=(float(means[0]), float(means[1])),
        apart=float(means[2]),
        cosine=float(means[3]) / norms if norms else nan,
        share=float(share),
        uncertain=float(spread) if error.any() else nan,
    )


def pairs(
    pictures: Iterable[tuple[str, np.ndarray]], sigma: float, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for `accord` of named pictures of one size, (H, W, C) float32 in [0, 1]. The noise
    of a picture depends on its name, sigma and seed alone; it is not clipped."""
    batch: list[tuple[Tensor, Tensor]] = []

    def stacked() -> tuple[Tensor, Tensor]:
        clean, noisy = (torch.stack(part).to(device) for part in zip(*batch, strict=True))
        return clean, noisy

    for name, pixels in pictures:
        both = pixels, noisy_version(pixels, sigma, name, seed)
        clean, noisy = (torch.from_numpy(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in both)
        batch.append((clean, noisy))
        if len(batch) == BATCH:
            yield stacked()
            batch = []
    if batch:
        yield stacked()


def verdict(share: float) -> str:
    """What a share of variance says of the number of pictures: "enough", "more" would help, or
    "remembers": far too few."""
    return "enough" if share < ENOUGH else "more" if share < REMEMBERS else "remembers"


# -- pictures beside each other ---------------------------------------------------------


def likeness(first: Tensor, second: Tensor) -> Tensor:
    """Correlation of pictures, (B, ...) each, to (B,): the cosine of them without their mean
    value, -1 to 1; 0 where one of them is flat."""
    return (_unit(first) * _unit(second)).sum(1)


def nearest(drawn: Tensor, pictures: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """The likest of many pictures for each of a few: correlations (B,), and their indices (B,).

    drawn: (B, C, S, S), squares. pictures: batches of (M, C, S, S). They are compared in all eight
    turns and mirror images, as training may have shown them. ValueError if there are none.
    """
    turned = [torch.rot90(x, k, (2, 3)) for k in range(4) for x in (drawn, drawn.flip(3))]
    wanted = _unit(torch.cat(turned))  # (8 B, n)
    best = torch.full((len(drawn),), -inf, dtype=torch.float64)
    where = torch.full((len(drawn),), -1)
    start = 0
    for batch in pictures:
        found = (wanted @ _unit(batch).T).view(8, len(drawn), len(batch)).amax(0).cpu()
        value, index = found.max(1)
        better = value > best
        best, where = torch.where(better, value, best), torch.where(better, index + start, where)
        start += len(batch)
    if not start:
        raise ValueError("the nearest of no pictures was asked for")
    return best, where


def _unit(pictures: Tensor) -> Tensor:
    """Vectors of length 1 and mean 0, (B, n) in float64; 0 where a picture is flat."""
    flat = pictures.flatten(1).double()
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)


def crop(pixels: np.ndarray, side: int, channels: int) -> np.ndarray:
    """The central square of a picture (H, W, C) as a network was trained on: float32
    (side, side, channels). A smaller picture is enlarged; gray is repeated, colour averaged."""
    height, width = pixels.shape[:2]
    if min(height, width) >= side:
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    if pixels.shape[2] > channels:
        pixels = pixels.mean(2, keepdims=True)
    return fit(pixels, side, channels)
