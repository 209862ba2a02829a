"""How many steps sampling takes: the recursions against dense matrices and sampled fields."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from cdnctl.analysis.steps import (
    detail_covariance,
    detail_variances,
    euler_variance,
    lattice_power,
    steps_until,
)
from cdnctl.fields.simulate import filtered
from cdnctl.sampling import geometric, mode_variance, sample
from cdnctl.transforms.wavelet import quarters, split

WAVELETS = ["haar", "db4"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def waves_of(fields: Tensor) -> Tensor:
    """Orthonormal Fourier coefficients: of white noise of variance v their mean square is v."""
    return torch.fft.fft2(fields, norm="ortho")


def test_lattice_power_is_what_it_says() -> None:
    power = lattice_power(8, 3)
    assert power.mean().item() == pytest.approx(1)
    want = [((2 * math.pi / 8) ** 2) ** -1.5, 2**-1.5, 4**-1.5, 8**-1.5]
    found = [power[0, 0], power[0, 2], power[0, 4], power[4, 4]]
    assert [(f / found[1]).item() for f in found] == pytest.approx([w / want[1] for w in want])


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_details_given_the_coarser_picture_are_a_schur_complement(wavelet: str) -> None:
    power, side = lattice_power(8, 3), 8
    pulses = torch.eye(side**2, dtype=torch.float64).view(-1, side, side)
    w = quarters(pulses, wavelet).flatten(1).T
    c = w @ filtered(pulses, power).flatten(1) @ w.T
    std = c.diag()[16:].sqrt()
    mean = torch.linalg.solve(c[:16, :16], c[:16, 16:]).T / std[:, None]
    rest = c[16:, 16:] / std[:, None] / std - mean @ c[:16, 16:] / std
    want = torch.linalg.eigvalsh(rest)
    found = detail_variances(power, wavelet)
    assert found.shape == (4, 4, 3)
    torch.testing.assert_close(found.flatten().sort().values, want)
    assert want.min() > 0.1 and want.max() > want.min()
    # The mean of the details of one coarser picture.
    low = randn(4, 4)
    factor, _ = detail_covariance(power, wavelet)
    got = torch.fft.ifft2(factor.movedim(-1, 0) * torch.fft.fft2(low)).real
    torch.testing.assert_close(got.flatten(), mean @ low.flatten())


def test_many_short_steps_sample_exactly() -> None:
    modes = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64)
    errors = [(euler_variance(modes, n) / modes - 1).abs().max().item() for n in (100, 1000, 8000)]
    assert errors[0] > 5 * errors[1] > 25 * errors[2] and errors[2] < 0.002


def test_one_step_of_the_published_sampler() -> None:
    """From the variance 1 at the time t back to 0: (1 + t - 2 t / v_t)^2 + 2 t."""
    modes, t = torch.tensor([0.25, 2.0], dtype=torch.float64), 0.7
    noisy = math.exp(-2 * t) * modes + 1 - math.exp(-2 * t)
    want = (1 + t - 2 * t / noisy) ** 2 + 2 * t
    torch.testing.assert_close(euler_variance(modes, 1, longest=t), want)


def agrees(sampled: Tensor, want: Tensor, worst: Tensor) -> None:
    """Squared moduli of modes, (B, ...), against their variances: that of the worst mode within
    three standard errors of its mean, all within five."""
    error = sampled.std(0) / len(sampled) ** 0.5
    off = (sampled.mean(0) - want).abs() / error
    assert off.flatten()[worst.flatten().argmax()] < 3 and off.max() < 5


def test_sampled_pixels_agree_with_the_recursion() -> None:
    power, sigmas, beta = lattice_power(16, 1.75), geometric(20, 0.05, 24), 0.6
    start = 20 * randn(2000, 16, 16)

    def wiener(y: Tensor, sigma: Tensor | float) -> Tensor:
        return filtered(y, power / (power + sigma**2))

    fields = sample(wiener, start, sigmas, beta, torch.Generator().manual_seed(1))
    want = mode_variance(power, sigmas, beta, 400.0)
    worst = (want / power - 1).abs()
    assert worst.max() > 0.2  # so few steps are not enough: the recursion says by how much
    agrees(waves_of(fields).abs().square(), want, worst)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_sampled_details_agree_with_the_recursion(wavelet: str) -> None:
    """Given a coarser picture each, which moves their mean."""
    power, sigmas, beta = lattice_power(16, 1.75), geometric(20, 0.05, 16), 0.6
    low, _ = split(filtered(randn(1000, 16, 16), power.sqrt()), wavelet)
    factor, covariance = detail_covariance(power, wavelet)
    mean = torch.fft.ifft2(factor.movedim(-1, 0) * torch.fft.fft2(low)[:, None]).real

    def conditional(y: Tensor, sigma: Tensor | float) -> Tensor:
        noisy = covariance + torch.eye(3) * sigma**2
        gain = covariance @ torch.linalg.inv(noisy)
        rest = torch.fft.fft2(y - mean).movedim(1, -1)[..., None]
        return mean + torch.fft.ifft2((gain @ rest)[..., 0].movedim(-1, 1)).real

    start = mean + 20 * randn(1000, 3, 8, 8, seed=2)
    details = sample(conditional, start, sigmas, beta, torch.Generator().manual_seed(1))
    variances, modes = torch.linalg.eigh(covariance)
    rest = waves_of(details - mean).movedim(1, -1)
    sampled = (modes.mH @ rest[..., None])[..., 0].abs().square()
    want = mode_variance(variances, sigmas, beta, 400.0)
    worst = (want / variances - 1).abs()
    assert worst.max() > 0.2
    agrees(sampled, want, worst)


def test_sampled_fields_of_the_published_sampler_agree_too() -> None:
    power, count = lattice_power(16, 1.75), 20
    x = randn(2000, 16, 16)
    for time, sooner in pairwise([5 * (1 - i / count) ** 2 for i in range(count + 1)]):
        gap, kept = time - sooner, math.exp(-2 * time)
        score = -filtered(x, 1 / (kept * power + 1 - kept))
        x = x + gap * (x + 2 * score) + (2 * gap) ** 0.5 * randn(*x.shape, seed=int(1e4 * time))
    want = euler_variance(power, count)
    agrees(waves_of(x).abs().square(), want, (want / power - 1).abs())


def test_steps_are_the_first_that_are_enough() -> None:
    modes = torch.tensor([1.0, 2.0, 2.0])
    assert steps_until(modes, lambda v, n: v * (1 + 1 / n)) == 22  # 18 is not, of 8, 10, 12, ...
    assert steps_until(modes, lambda v, n: torch.where(v > 1.5, v * (1 - 0.8 / n), v)) == 18
    assert steps_until(modes, lambda v, n: v + 10 / n, most=100) is None


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [1.75, 3.0])
def test_the_steps_of_details_do_not_grow_with_the_field(exponent: float) -> None:
    spectra = [lattice_power(side, exponent) for side in (16, 64, 256)]
    modes = [detail_variances(s, "db4") for s in spectra]
    details = [steps_until(v, euler_variance) for v in modes]
    assert details == [48 if exponent < 2 else 70] * 3
    pixels = [steps_until(s, euler_variance, most=500) for s in spectra]
    assert pixels == ([84, 213, 444] if exponent < 2 else [213, 444, None])
    spread = [(v.max() / v.min()).item() for v in modes]
    assert spread[2] < 1.01 * spread[0]
