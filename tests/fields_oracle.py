"""Gaussian fields with every quantity of restoration in closed form, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class GaussianField:
    """A stationary field on a periodic (H, W) grid, of one channel, with mean 1/2."""

    def __init__(self, spectrum: Tensor):
        """spectrum: variances of the orthonormal Fourier components, (H, W), symmetric."""
        self.spectrum = spectrum
        self.size = spectrum.numel()

    @staticmethod
    def smooth(
        height: int, width: int, variance: float = 0.05, scale: float = 2.0
    ) -> GaussianField:
        """Spectrum ~ 1 / (1 + (k / scale)^2), k in cycles per picture, of this pixel variance."""
        k2 = [torch.fft.fftfreq(n, 1 / n, dtype=torch.float64) ** 2 for n in (height, width)]
        spectrum = 1 / (1 + (k2[0][:, None] + k2[1]) / scale**2)
        return GaussianField(spectrum * variance / spectrum.mean())

    def filtered(self, x: Tensor, factors: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x) * factors).real

    def __call__(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """The exact denoiser."""
        level = torch.as_tensor(sigma, dtype=y.dtype).reshape(-1, 1, 1, 1) ** 2
        return 0.5 + self.filtered(y - 0.5, self.spectrum / (self.spectrum + level))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Pictures, (count, 1, H, W)."""
        white = torch.randn(
            count, 1, *self.spectrum.shape, generator=generator, dtype=torch.float64
        )
        return 0.5 + self.filtered(white, self.spectrum.sqrt())

    def covariance(self) -> Tensor:
        """(n, n)."""
        basis = torch.eye(self.size, dtype=torch.float64).view(-1, 1, *self.spectrum.shape)
        return self.filtered(basis, self.spectrum).flatten(1)

    def posterior(self, rows: Tensor, m: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """Mean, (n,), and covariance, (n, n), of x given m = rows x + noise, m (k,)."""
        prior = self.covariance()
        cross = prior @ rows.T
        total = rows @ cross + noise**2 * torch.eye(len(rows), dtype=rows.dtype)
        gain = torch.linalg.solve(total, cross.T).T
        mean = 0.5 + gain @ (m - rows @ torch.full((self.size,), 0.5, dtype=rows.dtype))
        return mean, prior - gain @ cross.T


def in_units_of_error(drawn: np.ndarray, exact: float | np.ndarray) -> np.ndarray:
    """Deviations of sample variances (axis 0: samples of mean zero) from the exact ones, in
    standard errors of a variance of Gaussians."""
    found = (drawn**2).mean(0)
    return (found / exact - 1) / np.sqrt(2 / len(drawn))
