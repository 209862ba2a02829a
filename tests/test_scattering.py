"""Morlet wavelets and scattering: closed forms, symmetries, and a second way to compute each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import data
from skimage.transform import resize
from torch import Tensor

from cdnctl.transforms import scattering as s

RNG = np.random.default_rng(0)


def picture(size: int = 32, channels: int = 2) -> Tensor:
    """Float64 (1, C, H, W): parts of a photograph."""
    gray = resize(data.camera().astype(np.float64) / 255, (size, size * channels))
    parts = np.stack(np.split(gray, channels, axis=1))
    return torch.from_numpy(parts)[None]


def mirrored(spectrum: np.ndarray) -> np.ndarray:
    """Transfer functions (..., H, W) at minus the frequency."""
    height, width = spectrum.shape[-2:]
    return spectrum[..., -np.arange(height) % height, :][..., -np.arange(width) % width]


def filters(kind: str, size: int, angles: int = 4) -> s.Bank:
    return s.bank(kind, size, size, angles, torch.float64)


# -- filters --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["octave", "half", "second-half"])
@pytest.mark.parametrize("angles", [4, 8])
def test_wavelets_have_no_mean_and_low_passes_keep_it(kind: str, angles: int) -> None:
    for size in (2, 4, 32):
        found = filters(kind, size, angles)
        assert found.bands[:, 0, 0].abs().max() < 1e-12
        # A Gaussian of few samples: its sum by Poisson's formula.
        variance = 0.64 if kind == "octave" else 0.32
        assert found.low[0, 0] == pytest.approx((1 + 2 * math.exp(-2 * math.pi**2 * variance)) ** 2)
        assert found.bands.isfinite().all()


def test_a_gabor_function_is_its_formula() -> None:
    """In the plane: a Gaussian around the wave's frequency, wider where the pulse is narrower."""
    size, sigma, frequency, theta, slant = 48, 2.5, 0.9, 0.6, 0.7
    w = 2 * np.pi * np.fft.fftfreq(size)
    r, c = np.meshgrid(w, w, indexing="ij")
    along = np.cos(theta) * r + np.sin(theta) * c - frequency
    across = np.cos(theta) * c - np.sin(theta) * r
    exact = np.exp(-(sigma**2) * (along**2 + (across / slant) ** 2) / 2)
    found = s.transfer(s.gabor(size, size, sigma, frequency, theta, slant))
    np.testing.assert_allclose(found, exact, atol=1e-8)


def test_a_small_grid_holds_the_same_filters() -> None:
    """Periodic filters are samples of one transfer function, however small the grid."""
    for kind in s.BANKS:
        large, small = filters(kind, 32), filters(kind, 8)
        torch.testing.assert_close(large.low[::4, ::4], small.low)
        torch.testing.assert_close(large.bands[:, ::4, ::4], small.bands)


@pytest.mark.parametrize(("angles", "lowest"), [(4, 0.132), (8, 0.123)])
def test_the_bank_is_no_tight_frame(angles: int, lowest: float) -> None:
    found = filters("octave", 64, angles)
    squares = (found.bands.numpy() ** 2).sum(0)
    total = found.low.numpy() ** 2 + (squares + mirrored(squares)) / 2
    assert total.min() == pytest.approx(lowest, abs=1e-3)
    assert total.max() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("angles", [4, 8])
def test_two_half_octaves_are_one(angles: int) -> None:
    """Low-pass behind low-pass, and wavelet behind low-pass: two octaves above the finest,
    where sampling leaves no trace."""
    size, theta = 64, s.directions(angles)[1]

    def made(sigma: float, frequency: float = 0.0, slant: float = 1.0) -> np.ndarray:
        return s.transfer(s.gabor(size, size, 4 * sigma, frequency / 4, theta, slant))

    blur = made(s.HALF_BLUR)
    np.testing.assert_allclose(blur * blur, made(s.WIDTH), atol=1e-9)
    through, wanted = made(*s.second_half(angles)) * blur, made(*s.octave(angles, 0.5))
    np.testing.assert_allclose(through / through.max(), wanted / wanted.max(), atol=1e-9)


def test_a_quarter_turn_permutes_the_angles() -> None:
    x = picture(channels=1)[0, 0]
    bands = filters("octave", 32, 8).bands
    turned = s.modulus(s.convolve(x.rot90(1, (0, 1)).roll(1, 0), bands))  # about the origin
    upright = s.modulus(s.convolve(x, bands)).rot90(1, (1, 2)).roll(1, 1)
    torch.testing.assert_close(turned, upright.roll(4, 0))
    assert not torch.allclose(turned, upright)


def test_filters_agree_with_kymatio() -> None:
    """Whose constants are of single precision, and whose pi is 3.1415."""
    theirs = pytest.importorskip("kymatio.scattering2d.filter_bank").filter_bank(32, 32, 3, 8)
    for psi in theirs["psi"]:
        ours = s.wavelets(32, 32, 8, s.octave(8, psi["j"]))[psi["theta"]]
        np.testing.assert_allclose(ours, psi["levels"][0], atol=1e-4)
    np.testing.assert_allclose(s.low_pass(32, 32, 3.2), theirs["phi"]["levels"][0], atol=1e-4)


def test_spatial_filters_are_orthonormal_and_turn_into_each_other() -> None:
    flat = s.SPATIAL.reshape(5, 9)
    np.testing.assert_allclose(flat @ flat.T, np.eye(5), atol=1e-12)
    turned = np.rot90(s.SPATIAL, axes=(1, 2)).reshape(5, 9)
    np.testing.assert_allclose(np.abs(turned @ flat.T).sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(np.abs(turned @ flat.T)[[1, 2], [2, 1]], 1, atol=1e-12)


def test_a_bank_made_without_gradients_can_be_trained_through() -> None:
    s.bank.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        s.bank("half", 6, 10, 4)
    x = torch.randn(1, 6, 10, requires_grad=True)
    s.convolve(x, s.bank("half", 6, 10, 4).bands).abs().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# -- convolution ----------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_a_sum_over_shifts(stride: int) -> None:
    x = torch.from_numpy(RNG.normal(size=(2, 6, 8)))
    psi = torch.from_numpy(s.morlet(6, 8, 0.8, 2.0, 0.4))
    spectrum = torch.from_numpy(s.transfer(psi.numpy()))[None]
    direct = sum(psi[i, j] * x.roll((i, j), (1, 2)) for i in range(6) for j in range(8))
    assert isinstance(direct, Tensor)
    found = s.convolve(x, spectrum, stride)[:, 0]
    torch.testing.assert_close(found, direct[:, ::stride, ::stride])


def test_a_shift_turns_the_phase_and_keeps_the_modulus() -> None:
    row = torch.arange(32, dtype=torch.float64)
    wave = torch.exp(1j * 0.75 * math.pi * row)[:, None].expand(32, 32)  # along the angle 0
    psi = torch.from_numpy(s.wavelets(32, 32, 4, s.octave(4))[1:2])
    z, moved = s.convolve(wave, psi), s.convolve(wave.roll(1, 0), psi)
    torch.testing.assert_close(moved, z * np.exp(-0.75j * math.pi))
    torch.testing.assert_close(s.modulus(moved, 0), psi[0, 12, 0].expand(1, 32, 32))
    x = picture()[0, 0]
    coarse = torch.from_numpy(s.wavelets(32, 32, 4, s.octave(4, 2)))
    z, moved = s.convolve(x, coarse), s.convolve(x.roll(2, 0), coarse)
    change = (s.modulus(moved) - s.modulus(z)).norm() / (moved - z).norm()
    assert change < 0.5, "the modulus of a photograph moves much less than its coefficients"


# -- nonlinearities -------------------------------------------------------------------------


def numbers(count: int, seed: int = 0) -> Tensor:
    """Circular complex normal numbers of unit variance, the first of them zero."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, dtype=torch.complex128, generator=g)
    z[0] = 0
    return z


def test_modulus_and_threshold_split_a_number_into_amplitude_and_phase() -> None:
    z = numbers(1000)
    torch.testing.assert_close(s.modulus(z, 0), z.abs())
    kept = s.soft_threshold(z, 0.3)
    torch.testing.assert_close(kept.abs(), (z.abs() - 0.3).clamp_min(0), rtol=0, atol=1e-6)
    inside = z.abs() > 0.3
    torch.testing.assert_close(kept.angle()[inside], z.angle()[inside])
    torch.testing.assert_close(s.soft_threshold(z, 0.0), z)
    torch.testing.assert_close(
        s.phases(z[:, None, None])[:, :, 0, 0].sum(1), z.real.abs() + z.imag.abs()
    )
    real = s.soft_threshold(z.real, 0.3)
    torch.testing.assert_close(real, z.real.sign() * (z.real.abs() - 0.3).clamp_min(0))


def test_only_the_modulus_has_a_mean() -> None:
    """Of circular numbers: sqrt(pi) / 2 of their rms. What keeps the phase has mean zero."""
    z = numbers(400_000)
    assert s.modulus(z).mean() == pytest.approx(math.sqrt(math.pi) / 2, abs=3e-3)
    assert s.soft_threshold(z, 0.1).mean().abs() < 5e-3


@pytest.mark.parametrize("name", ["modulus", "soft_threshold"])
def test_gradients_are_right_and_finite_at_zero(name: str) -> None:
    def function(parts: Tensor) -> Tensor:
        z = torch.view_as_complex(parts)
        out = s.modulus(z, 1e-2) if name == "modulus" else s.soft_threshold(z, 0.5, 1e-2)
        return torch.view_as_real(out) if out.is_complex() else out

    parts = torch.view_as_real(numbers(6)).clone().requires_grad_()
    assert torch.autograd.gradcheck(function, parts)
    if name == "modulus":
        assert torch.autograd.gradgradcheck(function, parts)


# -- scattering -----------------------------------------------------------------------------


def by_definition(x: Tensor, octaves: int, angles: int) -> Tensor:
    """Orders 0 to 2 of scattering along paths, each with its own filters on its own grid,
    by sums over shifts."""

    def blur(u: Tensor, j: int) -> Tensor:
        kernel = s.gabor(*u.shape[-2:], 0.8 * 2 ** (octaves - 1 - j), 0).real
        return shifted(u, kernel)[..., :: 2 ** (octaves - j), :: 2 ** (octaves - j)]

    def band(u: Tensor, j: int, theta: float) -> Tensor:
        kernel = s.morlet(*u.shape[-2:], 0.8 * 2**j, 0.75 * np.pi / 2**j, theta, 4 / angles)
        return shifted(u, kernel).abs()[..., :: 2**j, :: 2**j]

    def shifted(u: Tensor, kernel: np.ndarray) -> Tensor:
        return sum(k * u.roll(at, (-2, -1)) for at, k in np.ndenumerate(kernel))  # type: ignore

    first, second = [blur(x, 0)], []
    for j in range(octaves):
        for theta in s.directions(angles):
            first.append(blur(band(x, j, theta), j))
    for j in range(octaves):
        for k in range(1, octaves - j):
            for theta in s.directions(angles):
                u = band(x, j, theta)
                second += [blur(band(u, k, t), j + k) for t in s.directions(angles)]
    return torch.stack(first + second, 2)


def test_scattering_is_its_definition() -> None:
    x = picture(16)[:, :1]
    found = s.scattering(x, octaves=2, angles=2, eps=0.0)
    assert found.shape == (1, 1, 1 + 2 * 2 + 4, 4, 4)
    torch.testing.assert_close(found, by_definition(x, 2, 2))


@pytest.mark.parametrize(("octaves", "angles", "order", "count"), [(3, 8, 2, 217), (2, 4, 1, 9)])
def test_scattering_counts_its_paths(octaves: int, angles: int, order: int, count: int) -> None:
    assert s.scattering(torch.rand(2, 3, 16, 8), octaves, angles, order).shape == (
        *(2, 3, count),
        *(16 >> octaves, 8 >> octaves),
    )


def test_scattering_follows_shifts_and_forgets_the_mean() -> None:
    x = picture()
    found = s.scattering(x, 2, 4)
    torch.testing.assert_close(s.scattering(x.roll(4, -1), 2, 4), found.roll(1, -1))
    brighter = s.scattering(x + 1, 2, 4)
    torch.testing.assert_close(brighter[:, :, 1:], found[:, :, 1:])
    torch.testing.assert_close(brighter[:, :, 0], found[:, :, 0] + 1)
    # Contraction: the filters are below 1 but for rounding, the modulus shortens distances.
    other = picture().flip(-1)
    apart = (s.scattering(other, 2, 4) - found).square().sum() * 4**2
    assert apart <= (other - x).square().sum()
