"""The best linear denoisers of what is seen, against closed forms and dense matrices."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cdnctl.analysis.locality import (
    band_covariances,
    by_scales,
    coarser,
    detail_filters,
    flat_error,
    power_law,
    scales_error,
    wiener_error,
)
from cdnctl.errors import UsageError
from cdnctl.fields.simulate import filtered
from cdnctl.transforms.wavelet import quarters

WAVELETS = ["haar", "db2"]


def dense(spectrum: Tensor) -> Tensor:
    """The covariance of all pixels, (n^2, n^2)."""
    side = len(spectrum)
    pulses = torch.eye(side**2, dtype=torch.float64).view(-1, side, side)
    return filtered(pulses, spectrum).flatten(1)


def bands(side: int, wavelet: str) -> Tensor:
    """The wavelet transform as a matrix: rows are coefficients, band after band."""
    pulses = torch.eye(side**2, dtype=torch.float64).view(-1, side, side)
    return quarters(pulses, wavelet).flatten(1).T


def psnr(error: float) -> float:
    return -10 * math.log10(error)


def test_power_law_is_what_it_says() -> None:
    spectrum = power_law(32, 3, corner=2, std=0.25)
    assert spectrum.mean().item() == pytest.approx(0.0625)
    falls = [spectrum[0, k].item() / spectrum[0, 0].item() for k in (1, 2, 5)]
    assert falls == pytest.approx([(4 / (k * k + 4)) ** 1.5 for k in (1, 2, 5)])


def test_who_sees_everything_is_as_good_as_wiener() -> None:
    spectrum = power_law(9, 3)
    want = wiener_error(spectrum, 0.7)
    assert flat_error(spectrum, 0.7, 9) == pytest.approx(want, rel=1e-9)
    covariance = dense(spectrum)
    kept = covariance @ torch.linalg.inv(covariance + 0.49 * torch.eye(81).double())
    assert want == pytest.approx((covariance - kept @ covariance).trace().item() / 81, rel=1e-9)


def test_the_more_is_seen_the_better() -> None:
    spectrum = power_law(32, 3)
    for sigma in (0.1, 1.0):
        flat = [flat_error(spectrum, sigma, r) for r in (1, 3, 5, 9)]
        details = [detail_filters(spectrum, sigma, r)[1] for r in (1, 3, 5, 9)]
        assert flat == sorted(flat, reverse=True) and details == sorted(details, reverse=True)
        assert flat[-1] > wiener_error(spectrum, sigma)
        assert flat[0] == pytest.approx(sigma**2 / (1 + sigma**2))  # each pixel for itself


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_of_white_fields_nobody_sees_more(wavelet: str) -> None:
    spectrum, want = torch.full((16, 16), 0.3, dtype=torch.float64), 0.3 * 0.5 / 0.8
    sigma = 0.5**0.5
    assert flat_error(spectrum, sigma, 5) == pytest.approx(want)
    assert detail_filters(spectrum, sigma, 3, wavelet)[1] == pytest.approx(want)
    assert scales_error(spectrum, sigma, 3, 2, wavelet) == pytest.approx(want)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_covariances_of_bands_are_those_of_the_dense_matrix(wavelet: str) -> None:
    spectrum = power_law(8, 2.5)
    w = bands(8, wavelet)
    found = band_covariances(spectrum, wavelet)
    # Of band a everywhere with band b at the first cell.
    want = (w @ dense(spectrum) @ w.T).view(4, 16, 4, 16)
    torch.testing.assert_close(found.flatten(2), want[..., 0].transpose(1, 2))
    torch.testing.assert_close(dense(coarser(spectrum, wavelet)), want[0, :, 0])


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_the_error_by_scales_is_that_of_the_dense_matrices(wavelet: str) -> None:
    spectrum, sigma = power_law(16, 3), 0.6
    eye = torch.eye(256, dtype=torch.float64)
    found = by_scales(eye.view(-1, 16, 16), spectrum, sigma, 3, 2, wavelet).flatten(1).T
    lost = (found - eye) @ dense(spectrum) @ (found - eye).T + sigma**2 * found @ found.T
    want = lost.trace().item() / 256
    assert scales_error(spectrum, sigma, 3, 2, wavelet) == pytest.approx(want, rel=1e-9)
    assert want > wiener_error(spectrum, sigma)


def test_filters_of_details_are_the_best_of_what_they_see() -> None:
    """No small change of them makes the error, by the dense covariance, smaller."""
    spectrum, sigma, reach = power_law(16, 3), 0.6, 3
    filters, error = detail_filters(spectrum, sigma, reach)
    w = bands(16, "haar")
    covariance = (w @ dense(spectrum) @ w.T).view(4, 64, 4, 64)

    def measured(filters: Tensor) -> float:
        """The mean squared error of details, from the clean coarser picture."""
        bank = torch.zeros(3, 4, 8, 8, dtype=torch.float64)
        bank[..., [[-1], [0], [1]], [-1, 0, 1]] = filters
        rows = torch.stack([torch.roll(bank, (u // 8, u % 8), (2, 3)) for u in range(64)], 1)
        a, c = rows.reshape(192, 256), covariance.reshape(256, 256)
        miss = a - torch.cat([torch.zeros(192, 64), torch.eye(192)], 1).double()
        return float((miss @ c @ miss.T).trace() + sigma**2 * a[:, 64:].square().sum()) / 192

    assert measured(filters) == pytest.approx(error, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        change = 0.01 * torch.randn(filters.shape, generator=generator, dtype=torch.float64)
        assert measured(filters + change) > error and measured(filters - change) > error


@pytest.mark.slow
def test_a_field_like_photographs() -> None:
    """A flat filter of 5 loses 3.4 dB in strong noise; by scales 3 see as much as 5."""
    spectrum, levels = power_law(128, 3, std=0.25), (20 / 255, 100 / 255, 260 / 255)
    full = [psnr(wiener_error(spectrum, s)) for s in levels]
    assert full == pytest.approx([27.76, 21.85, 18.86], abs=0.01)
    for reach, want in ((5, [27.74, 20.69, 15.50]), (13, [27.76, 21.84, 18.58])):
        flat = [psnr(flat_error(spectrum, s, reach)) for s in levels]
        assert flat == pytest.approx(want, abs=0.01)
    three, five = ([psnr(scales_error(spectrum, s, r, 3)) for s in levels] for r in (3, 5))
    assert three == pytest.approx(five, abs=0.02)
    assert all(0.2 < f - c < 0.4 for f, c in zip(full, five, strict=True))


@pytest.mark.parametrize("reach", [0, 2, 11])
def test_reaches_that_cannot_be(reach: int) -> None:
    with pytest.raises(UsageError, match=f"a reach of {reach}: give an odd number from 1 to"):
        flat_error(power_law(8, 3), 0.5, reach)


@pytest.mark.slow
def test_the_script_prints_the_table() -> None:
    script = Path(__file__).parent.parent / "examples" / "local_oracle.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["sigma", "20", "100", "260"]
    assert [line[-3:] for line in lines if line[:3] == ["5", "x", "5"]] == [
        ["27.74", "20.69", "15.50"],
        ["27.52", "21.51", "18.61"],
    ]
