"""The sampler: its law on Gaussian fields, and what it is at special values of beta."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from fields_oracle import GaussianField, in_units_of_error
from torch import Tensor

from cdnctl.core.noise import add_noise
from cdnctl.errors import UsageError
from cdnctl.sampling import (
    ancestral,
    fixed,
    geometric,
    mode_variance,
    ornstein_uhlenbeck,
    rising,
    sample,
    settle,
    step,
    stir,
)

FIELD = GaussianField.smooth(4, 8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scalar(variance: float):  # type: ignore[no-untyped-def]
    """The exact denoiser of independent pixels of mean zero."""
    return lambda y, sigma: y * variance / (variance + sigma**2)


# -- the law --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "beta"), [(5, 0.3), (5, 0.5), (5, 1.0), (30, 0.1), (30, 0.5), (30, 1.0)]
)
def test_the_variance_of_every_mode(count: int, beta: float) -> None:
    """Mean zero and the variance of the recursion, in every Fourier component of a field."""
    sigmas = geometric(1.0, 0.05, count)
    y = add_noise(torch.full((4000, 1, 4, 8), 0.5, dtype=torch.float64), 1.0, generator(1))
    x = sample(FIELD, y, sigmas, beta, generator(2)) - 0.5
    # The orthonormal Fourier transform of white noise is white: real and imaginary parts of
    # variance 1/2, but for the four components that are real.
    modes = torch.fft.fft2(x, norm="ortho")[:, 0]
    power = (modes.abs() ** 2).mean(0)
    exact = torch.tensor(
        [[mode_variance(float(s), sigmas, beta, 1.0) for s in row] for row in FIELD.spectrum]
    )
    deviation = (power / exact - 1) / math.sqrt(2 / 4000)  # complex ones: half of that, or less
    assert deviation.abs().max() < 4.5
    assert deviation.std() > 0.3, "too good: not drawn"
    assert (modes.mean(0).abs() / (exact / 4000).sqrt()).max() < 4.5


@pytest.mark.parametrize(
    ("variance", "h", "beta", "share"),
    [(0.1, 0.01, 0.1, 0.9950), (1, 0.01, 0.5, 0.747), (1, 0.01, 1, 0.499)],
)
def test_the_limit_of_fixed_steps(variance: float, h: float, beta: float, share: float) -> None:
    """v / s = (1 - h/2) (1 - (s / (s + sigma0^2))^(1 / beta)): the last factor is the variance
    of the prior that was not there at the start."""
    sigmas = fixed(1.0, 1e-3, h, beta)
    got = mode_variance(variance, sigmas, beta, 1.0) / variance
    formula = (1 - h / 2) * (1 - (variance / (variance + 1)) ** (1 / beta))
    assert abs(got - formula) < 2e-3 and abs(got - share) < 2e-3
    whole = mode_variance(variance, sigmas, beta, 1.0 + variance) / variance
    assert 1 - h / 2 - 1e-3 < whole < 1


@pytest.mark.parametrize(
    ("variance", "shares"),
    [
        (0.01, (0.56, 0.73, 0.86, 0.90)),
        (0.1, (0.57, 0.76, 0.88, 0.85)),
        (1, (0.60, 0.81, 0.70, 0.49)),
    ],
)
def test_the_rising_schedule_loses_variance(variance: float, shares: tuple[float, ...]) -> None:
    for beta, share in zip((0.01, 0.1, 0.5, 1), shares, strict=True):
        sigmas = rising(1.0, 1e-3, 0.01, beta)
        assert abs(mode_variance(variance, sigmas, beta, 1.0) / variance - share) < 0.011


def test_the_recursion_is_that_of_the_sampler() -> None:
    """One pixel, many draws, long steps: means and variances of something not stationary."""
    sigmas = [1.0, 0.3, 0.2, 0.02]
    y = add_noise(torch.zeros(40000, 1, 1, 1, dtype=torch.float64), 1.5, generator(3))
    x = sample(scalar(0.5), y, sigmas, 0.7, generator(4))
    exact = mode_variance(0.5, sigmas, 0.7, 1.5**2)
    assert np.abs(in_units_of_error(x.flatten().numpy(), exact)) < 4


@pytest.mark.parametrize(("variance", "h"), [(0.02, 0.2), (0.3, 0.2), (0.3, 1.0), (3.0, 0.5)])
def test_stirring_goes_to_the_density_of_its_level(variance: float, h: float) -> None:
    """v = (2 - h) (s + sigma^2) / (2 - a), a = h sigma^2 / (s + sigma^2), whatever the start;
    a deviation of the mean falls by 1 - a per step."""
    s = 0.4
    a = h * s**2 / (variance + s**2)
    y = torch.full((20000, 1, 1, 1), 5.0, dtype=torch.float64)
    x = stir(scalar(variance), y, s, 3, h, generator(1)).flatten().numpy()
    spread = (1 - (1 - h) ** 2) * s**2 * sum((1 - a) ** (2 * k) for k in range(3))
    assert abs(x.mean() - 5 * (1 - a) ** 3) < 4 * math.sqrt(spread / 20000)
    assert np.abs(in_units_of_error(x - 5 * (1 - a) ** 3, spread)) < 4
    limit = (2 - h) * (variance + s**2) / (2 - a)
    x = stir(scalar(variance), 0 * y, s, math.ceil(4 / a), h, generator(2)).flatten().numpy()
    assert np.abs(in_units_of_error(x, limit)) < 4


# -- what it is ----------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.9, 0.999])
def test_ancestral_steps_are_those_of_ddpm(ratio: float) -> None:
    """q(y' | y, x): the product of N(y'; x, t^2) and N(y; y', s^2 - t^2) by Bayes' rule."""
    s, t = 0.7, 0.7 * ratio
    h, amplitude = step(s, t, ancestral(ratio))
    precision = 1 / t**2 + 1 / (s**2 - t**2)
    of_x, of_y = 1 / t**2 / precision, 1 / (s**2 - t**2) / precision
    assert abs(h - of_x) < 1e-12 and abs(1 - h - of_y) < 1e-12
    assert abs(amplitude**2 - 1 / precision) < 1e-12
    assert abs(ancestral(ratio) - (1 - math.sqrt(1 - h)) / h) < 1e-9


def test_ancestral_sampling_is_ddpm() -> None:
    """As Ho et al. write it, variance preserving: x_t = sqrt(a) x_0 + sqrt(1 - a) n."""
    sigmas = geometric(2.0, 0.1, 7)
    y = add_noise(FIELD.draw(3, generator(5)), 2.0, generator(6))
    got = sample(FIELD, y, sigmas, ancestral(sigmas[1] / sigmas[0]), generator(7))
    noise = generator(7)
    a = [1 / (1 + s**2) for s in sigmas]
    x = y * math.sqrt(a[0])
    for i in range(len(sigmas) - 1):
        clean = FIELD(x / math.sqrt(a[i]), sigmas[i])
        alpha = a[i] / a[i + 1]
        mean = (
            math.sqrt(a[i + 1]) * (1 - alpha) / (1 - a[i]) * clean
            + math.sqrt(alpha) * (1 - a[i + 1]) / (1 - a[i]) * x
        )
        variance = (1 - a[i + 1]) / (1 - a[i]) * (1 - alpha)
        z = torch.randn(x.shape, generator=noise, dtype=x.dtype)
        x = mean + math.sqrt(variance) * z
    torch.testing.assert_close(got, FIELD(x / math.sqrt(a[-1]), sigmas[-1]), rtol=1e-11, atol=1e-11)


def test_without_churn_it_is_ddim() -> None:
    """x' = sqrt(a') D + sqrt(1 - a') (x - sqrt(a) D) / sqrt(1 - a), and nothing random."""
    sigmas = geometric(2.0, 0.1, 7)
    y = add_noise(FIELD.draw(3, generator(5)), 2.0, generator(6))
    a = [1 / (1 + s**2) for s in sigmas]
    x = y * math.sqrt(a[0])
    for i in range(len(sigmas) - 1):
        clean = FIELD(x / math.sqrt(a[i]), sigmas[i])
        noise = (x - math.sqrt(a[i]) * clean) / math.sqrt(1 - a[i])
        x = math.sqrt(a[i + 1]) * clean + math.sqrt(1 - a[i + 1]) * noise
    want = FIELD(x / math.sqrt(a[-1]), sigmas[-1])
    torch.testing.assert_close(sample(FIELD, y, sigmas, 1.0), want, rtol=1e-11, atol=1e-11)


def test_without_churn_it_follows_the_probability_flow() -> None:
    """y sqrt((v + t^2) / (v + s^2)), the exact solution for a linear denoiser."""
    v, sigmas = 0.3, geometric(1.0, 0.01, 5001)
    y = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    got = float(sample(scalar(v), y, sigmas, 1.0))
    exact = math.sqrt((v + sigmas[-1] ** 2) / (v + 1)) * v / (v + sigmas[-1] ** 2)
    assert abs(got / exact - 1) < 5e-4
    coarse = float(sample(scalar(v), y, geometric(1.0, 0.01, 51), 1.0))
    assert 50 < abs(coarse / exact - 1) / abs(got / exact - 1) < 200, "an Euler step: first order"


def test_one_level_is_one_denoising() -> None:
    y = FIELD.draw(2, generator())
    torch.testing.assert_close(sample(FIELD, y, [0.3]), FIELD(y, 0.3))
    torch.testing.assert_close(settle(FIELD, y, [0.3]), FIELD(y, 0.3))


def test_settling_contracts_as_said() -> None:
    sigmas = geometric(0.5, 0.01, 6)
    y = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    want = math.prod(0.2 / (0.2 + s**2) for s in sigmas)
    assert abs(float(settle(scalar(0.2), y, sigmas)) / want - 1) < 1e-12


@pytest.mark.parametrize(("pull", "drive"), [(1.3, 0.0), (1.0, 0.5), (1.3, 0.5)])
def test_settling_faster_goes_where_it_went(pull: float, drive: float) -> None:
    """Its recursion in each direction, which ends sooner where the posterior is wide, and ends
    where it is narrow."""
    sigmas = geometric(0.1, 0.05, 12)
    y = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for v in (0.2, 1e-8):
        before = want = 1.0
        for s in sigmas:
            left = 1 - pull * s**2 / (v + s**2)
            before, want = want, left * (want + drive * (want - before))
        got = float(settle(scalar(v), y, sigmas, pull=pull, drive=drive))
        assert abs(got - want) < 1e-12
        assert abs(got) < abs(float(settle(scalar(v), y, sigmas))) or abs(got) < 0.05
    with pytest.raises(UsageError, match="pull"):
        settle(scalar(0.2), y, sigmas, pull=2.0)


# -- manners --------------------------------------------------------------------------


def test_a_generator_decides_everything() -> None:
    y = add_noise(FIELD.draw(2, generator()), 1.0, generator())
    sigmas = geometric(1.0, 0.1, 5)
    one, two, other = (sample(FIELD, y, sigmas, generator=generator(s)) for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.allclose(one, other)


@pytest.mark.parametrize("run", [sample, settle])
def test_progress(run) -> None:  # type: ignore[no-untyped-def]
    told: list[float] = []
    run(FIELD, FIELD.draw(1, generator()), geometric(1.0, 0.1, 4), watch=told.append)
    assert told == [0.25, 0.5, 0.75, 1.0]


def test_the_start_is_left_alone_and_no_graph_is_kept() -> None:
    y = FIELD.draw(1, generator()).requires_grad_()
    before = y.detach().clone()
    x = sample(FIELD, y, [1.0, 0.5], generator=generator())
    assert torch.equal(y, before) and not x.requires_grad


def test_schedules() -> None:
    levels = geometric(1.0, 0.01, 5)
    np.testing.assert_allclose(levels, [1.0, 10**-0.5, 0.1, 10**-1.5, 0.01])
    assert geometric(1.0, 0.01, 1) == [0.01]
    levels = ornstein_uhlenbeck(1.5, 8)
    assert len(levels) == 8 and abs(levels[0] - 1.5) < 1e-12
    times = np.sqrt(np.log1p(np.square(levels)) / 2)
    np.testing.assert_allclose(np.diff(times, 2), 0, atol=1e-12)
    np.testing.assert_allclose(times[-1] / times[0], 1 / 8)
    levels = fixed(1.0, 0.01, 0.05, 0.4)
    assert levels[-1] <= 0.01 < levels[-2]
    for pair in pairwise(levels):
        assert abs(step(*pair, 0.4)[0] - 0.05) < 1e-12
    h = [step(*pair, 0.4)[0] for pair in pairwise(rising(1, 0.01, 0.1, 0.4))]
    np.testing.assert_allclose(h[:3], [0.1, 0.2 / 1.1, 0.3 / 1.2])


@pytest.mark.parametrize(
    "sigmas", [[], [0.1, 0.2], [0.1, 0.1], [0.1, 0.0], [math.nan], [math.inf, 1]]
)
def test_levels_that_do_not_descend_are_refused(sigmas: list[float]) -> None:
    y = torch.zeros(1, 1, 2, 2)
    for run in (sample, settle):
        with pytest.raises(UsageError, match="descending"):
            run(scalar(1), y, sigmas)


@pytest.mark.parametrize("beta", [0, -1, 1.1, math.nan])
def test_a_beta_that_cannot_be_is_refused(beta: float) -> None:
    with pytest.raises(UsageError, match="beta"):
        sample(scalar(1), torch.zeros(1, 1, 2, 2), [1.0, 0.5], beta)


def test_steps_that_do_not_fall_are_refused() -> None:
    for h, beta in ((0, 0.5), (-0.1, 0.5), (1.0, 1.0), (2, 1)):
        with pytest.raises(UsageError, match="give h and beta"):
            fixed(1.0, 0.1, h, beta)


def per_picture_levels(y: Tensor, sigma: float) -> Tensor:
    return FIELD(y, torch.full((len(y),), sigma, dtype=y.dtype))


def test_a_denoiser_with_a_level_per_picture_is_the_same() -> None:
    y = FIELD.draw(2, generator())
    torch.testing.assert_close(
        sample(per_picture_levels, y, [0.4, 0.2], 1.0), sample(FIELD, y, [0.4, 0.2], 1.0)
    )
