"""Phase collapse shown in seconds: two stationary textures of mean zero and different spectra, and
a linear classifier on means over positions (Guth, Zarka and Mallat 2022, arXiv 2110.05283)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from cdnctl.transforms import scattering as waves

SIZE, COUNT = 32, 600


def textures(seed: int) -> tuple[Tensor, Tensor]:
    """Gaussian fields of one energy, most of it in waves along rows or along columns: (N, H, W),
    and which of them."""
    frequency = 2 * np.pi * np.fft.fftfreq(SIZE)
    rows, columns = np.meshgrid(frequency, frequency, indexing="ij")
    spectra = np.stack([np.exp(-((np.abs(a) - 2) ** 2) - b**2) for a, b in
                        ((rows, columns), (columns, rows))])  # fmt: skip
    spectra[:, 0, 0] = 0  # mean zero in every picture: nothing to be told by it
    spectra /= spectra.mean((1, 2), keepdims=True)
    labels = np.arange(COUNT) % 2
    noise = np.random.default_rng(seed).normal(size=(COUNT, SIZE, SIZE))
    fields = np.fft.ifft2(np.fft.fft2(noise) * np.sqrt(spectra[labels])).real
    return torch.from_numpy(fields), torch.from_numpy(labels)


@lru_cache(maxsize=2)
def coefficients(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the pictures: wavelets (N, L, H, W), means of the low-pass (N, 1); and the labels."""
    x, labels = textures(seed)
    bank = waves.bank("octave", SIZE, SIZE, 4, x.dtype)
    low = waves.convolve(x, bank.low[None]).real.mean((2, 3))
    return waves.convolve(x, bank.bands), low, labels


def means(rho: Callable[[Tensor], Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Means over positions of rho of the wavelet coefficients, and of the low-pass: (N, F); and
    the labels."""
    bands, low, labels = coefficients(seed)
    z = rho(bands).mean((2, 3))
    return torch.cat([low, torch.view_as_real(z).flatten(1) if z.is_complex() else z], 1), labels


def accuracy_of(rho: Callable[[Tensor], Tensor]) -> float:
    """Share of new pictures that the best linear classifier of others gets right: least squares
    on standardised features."""
    (features, labels), (unseen, truth) = means(rho, 1), means(rho, 2)
    centre, spread = features.mean(0), features.std(0).clamp_min(1e-12)
    design, test = (
        torch.cat([(f - centre) / spread, torch.ones(len(f), 1)], 1) for f in (features, unseen)
    )
    ridge = 1e-6 * len(design) * torch.eye(design.shape[1], dtype=design.dtype)
    sign = 2.0 * labels - 1
    w = torch.linalg.solve(design.T @ design + ridge, design.T @ sign.to(design))
    return ((test @ w > 0) == (truth == 1)).double().mean().item()


# Twice the spread of a share of as many coins.
BY_CHANCE = pytest.approx(0.5, abs=2 * 0.5 / COUNT**0.5)


def test_the_modulus_tells_spectra_apart() -> None:
    assert accuracy_of(waves.modulus) > 0.98


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_what_keeps_the_phase_does_not(threshold: float) -> None:
    """A threshold of 0 is a linear map; larger ones are none, and see as little."""
    assert accuracy_of(lambda z: waves.soft_threshold(z, threshold)) == BY_CHANCE


def test_rectified_phases_do_as_the_modulus() -> None:
    assert accuracy_of(lambda z: waves.phases(z).flatten(1, 2)) > 0.98


def test_the_textures_have_one_energy_and_no_mean() -> None:
    x, labels = textures(0)
    energy = [x[labels == k].square().mean().item() for k in (0, 1)]
    assert energy == pytest.approx([1, 1], rel=0.05)
    assert x.mean((1, 2)).abs().max() < 1e-12
