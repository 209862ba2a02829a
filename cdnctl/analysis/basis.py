"""In which patterns a picture is restored: the eigenvectors of a denoiser's Jacobian.

J = dD/dy of the posterior mean is the posterior covariance over sigma^2. Along an eigenvector
with the value lambda, noise is left by that factor and the clean picture is uncertain by
sqrt(lambda) sigma: the top ones are what is kept and may be wrong, the bottom ones what is taken
for noise. Above 1 the picture is less certain than the noise alone would make it: there may be an
edge here or there. (Mohan et al. 2020; Thiry and Guth 2024; Manor and Michaeli 2024)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.joint import Denoiser, Joint, per_sample
from cdnctl.core.linear import Jacobian, Map, eigenpairs, hutchinson
from cdnctl.core.noise import add_noise
from cdnctl.errors import UsageError
from cdnctl.figures import gallery
from cdnctl.images import Image, from_unit, to_unit
from cdnctl.restore.prior import Prior
from cdnctl.restore.samples import is_gray

SIDE = 96  # pixels of a picture whose basis is shown: each pattern takes 10 to 20 passes
GRAY = 0.5  # the origin of pictures here: a denoiser's shrinkage is towards it


@dataclass(frozen=True)
class Basis:
    """Of one picture (C, H, W), ``count`` eigenvectors at both ends."""

    top: Tensor  # (count,), the largest first
    top_vectors: Tensor  # (count, C, H, W), of unit norm
    bottom: Tensor  # (count,), the smallest first; of a trained denoiser some are negative
    bottom_vectors: Tensor
    dimension: float  # trace of J: how many values of the picture are kept
    dimension_error: float  # its standard error
    # |D - 1/2 - J (y - 1/2)| / |D - 1/2|. Where it is small, and only there, D is the shrinkage of
    # y - 1/2 by the eigenvalues. (Without biases in a network it would be zero around 0.)
    bias: float


def basis(
    denoise: Map,
    y: Tensor,
    count: int,
    probes: int = 16,
    symmetric: bool = True,
    generator: torch.Generator | None = None,
) -> Basis:
    """The `Basis` of a denoiser at one noisy picture.

    denoise: differentiable, (1, C, H, W) to the same, at the noise level of y. symmetric: whether
    its Jacobian is, as that of a gradient; otherwise the eigenvectors are those of (J + J^T) / 2,
    for twice the passes. Takes ``probes`` passes back and 10 to 20 for every eigenvector.
    UsageError for more eigenvectors than the picture has values.
    """
    jacobian = Jacobian(denoise, y)
    product = jacobian.transposed if symmetric else jacobian.symmetric
    top, top_vectors = eigenpairs(product, y, count)
    bottom, bottom_vectors = eigenpairs(product, y, count, largest=False)
    _, trace, error = hutchinson(jacobian.transposed, y, probes, generator)
    moved = jacobian.value - GRAY
    net = moved - (jacobian.transposed if symmetric else jacobian.times)(y - GRAY)
    return Basis(
        top,
        top_vectors,
        bottom,
        bottom_vectors,
        dimension=trace.item(),
        dimension_error=error.item(),
        bias=(net.norm() / moved.norm().clamp_min(torch.finfo(y.dtype).tiny)).item(),
    )


def between_classes(means: Tensor, posterior: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """What not knowing the class adds to the Jacobian, as eigenvalues, (r,), largest first, and
    eigenvectors, (r, C, H, W), of unit norm; r = min(K, C H W).

        J = sum_c p(c | y) J_c + Cov_c(D_c) / sigma^2

    means: D_c(y), (K, C, H, W). posterior: p(c | y), (K,). The covariance has a rank of K - 1
    at most, so that the last value of K is zero. Values sum up to the part of the trace.
    """
    off = means - torch.einsum("k,kchw->chw", posterior, means)
    weighted = posterior.sqrt().view(-1, 1) * off.flatten(1) / sigma
    _, roots, vectors = torch.linalg.svd(weighted, full_matrices=False)
    return roots.square(), vectors.view(-1, *means.shape[1:])


def explained(
    image: Image, model: Model, sigma: float, count: int, label: str | None = None
) -> tuple[Image, Basis]:
    """The basis in which the middle of a picture, SIDE pixels wide at most, is restored, as a
    contact sheet, and in numbers.

    sigma: of its noise, in [0, 1] pixel units. label: a class, for E[x | y, c]; None: all.
    UsageError for a sigma of 0 or more patterns than the picture has values.
    """
    if sigma <= 0:
        raise UsageError("sigma is 0, and without noise nothing is taken out: give --sigma")
    samples = image.samples[:, :, :1] if is_gray(image.samples) else image.samples
    for axis in (0, 1):
        start = max(0, (samples.shape[axis] - SIDE) // 2)
        samples = samples.take(range(start, min(start + SIDE, samples.shape[axis])), axis)
    height, width, channels = samples.shape
    prior = Prior(model, (channels, height, width), model.mixture(label))
    y = torch.from_numpy(to_unit(samples)).permute(2, 0, 1)[None].to(model.device)
    found = basis(
        lambda t: prior(t, sigma),
        y,
        count,
        symmetric=isinstance(model.module, Joint),
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        cells = [("the picture", _shown(y[0])), ("restored", _shown(prior(y, sigma)[0]))]
    values = [*found.top.tolist(), *found.bottom.tolist()]
    for value, vector in zip(values, [*found.top_vectors, *found.bottom_vectors], strict=True):
        cells.append((f"kept {value:.3f}", _shown(GRAY + vector / (2 * vector.abs().max()))))
    return gallery(cells), found


def _shown(pixels: Tensor) -> Image:
    """A picture (C, H, W)."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image(from_unit(array, np.dtype(np.uint8)))


@dataclass(frozen=True)
class Calibration:
    """Squared errors that a denoiser expects of itself and makes, per picture, (B,), as means
    over the picture's values, in the squared unit of its pixels."""

    expected: Tensor
    made: Tensor

    def ratio(self) -> tuple[float, float]:
        """Squared error made over that expected, in the mean over pictures, and its standard
        error: 1 is calibrated, more is too sure. Needs two pictures for the error."""
        made, expected = self.made.double().mean(), self.expected.double().mean()
        ratio = made / expected
        off = self.made.double() - ratio * self.expected.double()
        return ratio.item(), (off.std() / len(off) ** 0.5 / expected).item()


def calibration(
    denoise: Denoiser,
    clean: Tensor,
    sigma: Tensor | float,
    probes: int = 4,
    generator: torch.Generator | None = None,
) -> Calibration:
    """sigma^2 tr J against |D - x|^2 for pictures x, (B, C, H, W), with noise that is added; for
    the posterior mean both have the same expectation. sigma: a number, or one per picture."""
    y = add_noise(clean, sigma, generator)
    jacobian = Jacobian(lambda t: denoise(t, sigma), y)
    _, trace, _ = hutchinson(jacobian.transposed, y, probes, generator)
    variance = per_sample(sigma, y).flatten().square()
    return Calibration(
        expected=variance * trace / y[0].numel(),
        made=(jacobian.value - clean).square().mean((1, 2, 3)),
    )
