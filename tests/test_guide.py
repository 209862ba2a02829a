"""The guided denoiser and what is made with it, against Gaussian conditioning in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from fields_oracle import GaussianField
from torch import Tensor

from cdnctl.core.linear import dense
from cdnctl.inverse.guide import FLOOR, Guided, draw
from cdnctl.inverse.operators import (
    BandLimit,
    Bicubic,
    BlockMean,
    Convolution,
    Mask,
    Operator,
    Rows,
)
from cdnctl.sampling import fixed, geometric, step

FIELD = GaussianField.smooth(4, 8)
N = FIELD.size


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uneven() -> Tensor:
    return torch.rand(3, 5, generator=generator(9), dtype=torch.float64) / 15


def hole(height: int = 4, width: int = 8) -> Mask:
    known = torch.ones(height, width, dtype=torch.bool)
    known[1:3, 2:6] = False
    return Mask(known)


OPERATORS: dict[str, Operator] = {
    "hole": hole(),
    "some pixels": Mask(torch.rand(4, 8, generator=generator(1)) < 0.3),
    "block mean": BlockMean(2),
    "bicubic": Bicubic(2),
    "blur": Convolution(uneven()),
    "valid blur": Convolution(uneven(), valid=True),
    "band limit": BandLimit.low(4, 8, 0.5),
    "rows": Rows.random(12, (1, 4, 8), generator(2)),
}


@pytest.fixture(params=OPERATORS, scope="module")
def operator(request: pytest.FixtureRequest) -> Operator:
    return OPERATORS[request.param]


def matrix(a: Operator) -> Tensor:
    """A as (k, n)."""
    return dense(a.apply, torch.zeros(1, 1, 4, 8, dtype=torch.float64))


def measured(a: Operator, noise: float, count: int = 1, seed: int = 3) -> Tensor:
    m = a.apply(FIELD.draw(count, generator(seed)))
    return m + noise * a.apply(a.adjoint(torch.randn(m.shape, generator=generator(4)).to(m)))


def given_both(y: Tensor, sigma: float, rows: Tensor, m: Tensor, noise: float) -> Tensor:
    """E[x | y, m], flat, by conditioning on a measurement of everything and on that of A."""
    both = torch.cat([torch.eye(N, dtype=torch.float64) / sigma, rows / noise])
    values = torch.cat([y.flatten() / sigma, m.flatten() / noise])
    return FIELD.posterior(both, values, 1.0)[0]


# -- one call -------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-4, 0.05, 0.5])
@pytest.mark.parametrize("sigma", [0.03, 0.3])
def test_with_the_jacobian_it_is_the_mean_given_both(
    operator: Operator, noise: float, sigma: float
) -> None:
    m = measured(operator, noise)
    y = FIELD.draw(1, generator(5)) + sigma * torch.randn(1, 1, 4, 8, generator=generator(6))
    guided = Guided(FIELD, operator, m, noise, exact=200, floor=0.0)
    want = given_both(y, sigma, matrix(operator), m, noise)
    # A measurement all but free of noise is a hard system, for the check as for the guide.
    atol = 1e-8 if noise > 1e-3 else 1e-5
    torch.testing.assert_close(guided(y, sigma).flatten(), want, rtol=0, atol=atol)


def test_without_it_is_a_projection(operator: Operator) -> None:
    """D + A^T (A A^T)^+ (m - A D): for orthonormal rows the constraint of Kadkhodaie and
    Simoncelli, (I - P) (D - y) + A^T (m - A y) as the way from y."""
    if not operator.closed:
        pytest.skip("solved to single precision only")
    m, y = measured(operator, 0), FIELD.draw(1, generator(5)) + 0.1
    rows, d = matrix(operator), FIELD(y, 0.3).flatten()
    want = d + torch.linalg.pinv(rows, rtol=1e-9) @ (m.flatten() - rows @ d)
    got = Guided(FIELD, operator, m)(y, 0.3).flatten()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)
    if operator.scale == 1.0:
        away = (d - y.flatten()) - rows.T @ (rows @ (d - y.flatten()))
        toward = rows.T @ (m.flatten() - rows @ y.flatten())
        torch.testing.assert_close(got - y.flatten(), away + toward, rtol=0, atol=1e-9)


def test_without_it_noise_is_weighed_against_sigma(operator: Operator) -> None:
    """argmin |A x - m|^2 / tau^2 + |x - D|^2 / sigma^2, the data step of half-quadratic
    splitting."""
    noise, sigma = 0.2, 0.3
    m, y = measured(operator, noise), FIELD.draw(1, generator(5))
    rows, d = matrix(operator), FIELD(y, sigma).flatten()
    normal = rows.T @ rows / noise**2 + torch.eye(N, dtype=torch.float64) / sigma**2
    want = torch.linalg.solve(normal, rows.T @ m.flatten() / noise**2 + d / sigma**2)
    got = Guided(FIELD, operator, m, noise)(y, sigma).flatten()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("exact", [0, 4])
def test_each_picture_of_a_batch_has_its_own_level_and_measurement(
    operator: Operator, exact: int
) -> None:
    m, y = measured(operator, 0.1, 3), FIELD.draw(3, generator(7))
    levels = torch.tensor([0.05, 0.2, 0.6], dtype=torch.float64)
    together = Guided(FIELD, operator, m, 0.1, exact)(y, levels)
    for i in range(3):
        alone = Guided(FIELD, operator, m[i : i + 1], 0.1, exact)(y[i : i + 1], float(levels[i]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_what_lies_in_a_hole_does_not_matter() -> None:
    a, y = hole(), FIELD.draw(1, generator(5))
    m = FIELD.draw(1, generator(3))
    other = torch.where(a.known, m, torch.nan)
    for exact in (0, 3):
        one, two = (Guided(FIELD, a, t, exact=exact)(y, 0.3) for t in (m, other))
        assert torch.equal(one, two)


def test_the_floor_bounds_the_system() -> None:
    """For a denoiser with negative eigenvalues, as trained ones have, it stays finite."""

    def trained(y: Tensor, sigma: Tensor | float) -> Tensor:
        return FIELD(y, sigma) - 3e-4 * (y - 0.5)

    m = measured(OPERATORS["some pixels"], 0)
    guided = Guided(trained, OPERATORS["some pixels"], m, exact=30)
    x = guided(FIELD.draw(1, generator(5)), 0.4)
    assert x.isfinite().all() and (x - 0.5).abs().max() < 2
    assert FLOOR**2 > 3e-4


# -- the law --------------------------------------------------------------------------


def law(
    a: Operator, m: Tensor, noise: float, sigmas: list[float], beta: float, exact: bool
) -> tuple[Tensor, Tensor]:
    """Mean, (n,), and covariance, (n, n), of `draw`, by dense matrices: every step is affine."""
    eye, rows, gray = torch.eye(N, dtype=torch.float64), matrix(a), torch.full((N,), 0.5).double()

    def affine(s: float) -> tuple[Tensor, Tensor]:
        """M and b of D_m(y) = M y + b."""
        j = FIELD.covariance() @ torch.linalg.inv(FIELD.covariance() + s**2 * eye)
        if exact:
            ridge = max((noise / s) ** 2, FLOOR**2 * a.bound)
            gain = j @ rows.T @ torch.linalg.inv(rows @ j @ rows.T + ridge * torch.eye(len(rows)))
        else:
            ridge = (noise / s) ** 2
            gain = rows.T @ torch.linalg.pinv(rows @ rows.T + ridge * torch.eye(len(rows)))
        keep = eye - gain @ rows
        return keep @ j, keep @ (gray - j @ gray) + gain @ m.flatten()

    pull = torch.linalg.pinv(rows @ rows.T + (noise / sigmas[0]) ** 2 * torch.eye(len(rows)))
    mean = gray + rows.T @ pull @ (m.flatten() - rows @ gray)
    cov = sigmas[0] ** 2 * eye
    for s, t in pairwise(sigmas):
        h, amplitude = step(s, t, beta)
        keep, push = affine(s)
        mean = mean + h * (keep @ mean + push - mean)
        moved = (1 - h) * eye + h * keep
        cov = moved @ cov @ moved.T + amplitude**2 * eye
    keep, push = affine(sigmas[-1])
    mean, cov = keep @ mean + push, keep @ cov @ keep.T
    if not noise:
        back = torch.linalg.pinv(rows)
        unseen = eye - back @ rows
        mean, cov = mean + back @ (m.flatten() - rows @ mean), unseen @ cov @ unseen.T
    return mean, cov


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("exact", [0, 12])
@pytest.mark.parametrize(
    ("name", "noise"),
    [("hole", 0.0), ("block mean", 0.0), ("blur", 0.05), ("valid blur", 0.05), ("rows", 0.1)],
)
def test_draws_have_the_law_of_the_recursion(
    name: str, noise: float, exact: int, beta: float
) -> None:
    """Mean and the whole covariance: made white by the exact law, draws are white."""
    a, count = OPERATORS[name], 1500
    m, sigmas = measured(a, noise), geometric(0.8, 0.03, 8)
    x = draw(Guided(FIELD, a, m, noise, exact), sigmas, count, beta=beta, generator=generator(8))
    mean, cov = law(a, m, noise, sigmas, beta, bool(exact))
    values, vectors = torch.linalg.eigh(cov)
    along = (x.flatten(1) - mean) @ vectors
    free = values > 1e-9
    assert (along[:, ~free].abs() < 1e-4).all(), "what the measurement fixes varies"
    assert free.sum() >= N // 3
    white = along[:, free] / values[free].sqrt()
    assert white.mean(0).abs().max() * math.sqrt(count) < 4.5
    second = white.T @ white / count - torch.eye(len(white.T), dtype=torch.float64)
    errors = torch.full_like(second, 1.0).fill_diagonal_(math.sqrt(2)) / math.sqrt(count)
    assert (second / errors).abs().max() < 5


def bias(a: Operator, field: GaussianField, sigmas: list[float], beta: float, exact: int) -> float:
    """Root mean square of (mean of the draws - posterior mean) / posterior std over pixels that
    were not measured and 64 measurements; the mean of draws is that of steps without noise."""
    shape = field.spectrum.shape
    rows = dense(a.apply, torch.zeros(1, 1, *shape, dtype=torch.float64))
    x = field.draw(64, generator(1))
    m = a.apply(x)
    guided = Guided(field, a, m, exact=exact)
    y = guided.start(sigmas[0])
    for s, t in pairwise(sigmas):
        y = y + step(s, t, beta)[0] * (guided(y, s) - y)
    y = guided.finished(guided(y, sigmas[-1])).flatten(1)
    exact_means = []
    for one in m:
        mean, cov = field.posterior(rows, one.flatten(), 1e-7)
        exact_means.append(mean)
    std = cov.diagonal().clamp_min(0).sqrt()
    free = std > 1e-3
    return float(((y - torch.stack(exact_means)) / std)[:, free].square().mean().sqrt())


@pytest.mark.parametrize(
    ("a", "shares"),
    [
        (BlockMean(4), (0.024, 0.131, 0.232)),
        (
            Mask(
                torch.zeros(8, 8).index_put(
                    (torch.arange(8), torch.arange(8) * 3 % 8), torch.ones(8)
                )
            ),
            None,
        ),
    ],
)
def test_the_short_cut_is_biased_and_the_jacobian_is_not(a: Operator, shares: object) -> None:
    field = GaussianField.smooth(8, 8)
    short = [bias(a, field, fixed(1.0, 3e-3, 0.01, beta), beta, 0) for beta in (0.1, 0.5, 1.0)]
    exact = [bias(a, field, geometric(1.0, 3e-3, 101), beta, 16) for beta in (0.5, 1.0)]
    print(short, exact)
