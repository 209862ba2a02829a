"""The guided denoiser and what is made with it, against Gaussian conditioning in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from fields_oracle import GaussianField
from oracle import Array, Component, GaussianMixture
from scipy.stats import multivariate_normal
from torch import Tensor

from cdnctl.core.joint import denoise
from cdnctl.core.linear import dense
from cdnctl.errors import UsageError
from cdnctl.inverse.guide import FLOOR, Guided, draw, reconstruct
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


@pytest.mark.slow
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
    assert free.sum() >= 8
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


LINE = GaussianField.smooth(1, 32)
BLOCKS = Rows(torch.kron(torch.eye(8), torch.full((1, 4), 0.5)).double(), (1, 1, 32))
GAP = Mask((torch.arange(32) >= 12)[None])


@pytest.mark.parametrize(
    ("a", "known"), [(BLOCKS, (0.034, 0.144, 0.233)), (GAP, (0.163, 0.346, 0.439))]
)
def test_the_bias_of_the_short_cut(a: Operator, known: tuple[float, ...]) -> None:
    """It grows with beta, as the recursion in dense matrices says (computed apart from this
    code, over 20 measurements); the Jacobian with a tenth of the steps has little of it, and
    more without new noise than with it."""
    short = [bias(a, LINE, fixed(1.0, 3e-3, 0.03, beta), beta, 0) for beta in (0.1, 0.5, 1.0)]
    np.testing.assert_allclose(short, known, rtol=0.2)
    half, flow = (bias(a, LINE, geometric(1.0, 3e-3, 101), beta, 16) for beta in (0.5, 1.0))
    assert half < 0.06 and half < flow / 2 and half < short[1] / 4


# -- other priors ---------------------------------------------------------------------


def responsibilities(parts: list[Component], rows: Array, m: Array, noise: float) -> Array:
    """p(component | m), (..., K), for m = rows x + noise, (..., k)."""
    logs = []
    for p in parts:
        total = rows @ p.cov @ rows.T + noise**2 * np.eye(len(rows))
        logs.append(np.log(p.share) + multivariate_normal(rows @ p.mean, total).logpdf(m))
    weights = np.exp(np.stack(logs, -1) - np.max(logs, 0)[..., None])
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("seed", [2, 4])
def test_shares_of_components(seed: int) -> None:
    """Three kinds of pictures of 2 x 3 pixels, of which two were measured, with noise: how often
    each kind is drawn. No guide that replaces p(x | y) by a Gaussian has the exact shares, but
    with the Jacobian they are within a few percent, and without it far away."""
    rng = np.random.default_rng(3)
    parts = []
    for share in (0.5, 0.3, 0.2):
        root = rng.normal(size=(6, 6))
        parts.append(Component(share, 0.5 + 0.2 * rng.normal(size=6), 0.01 * root @ root.T / 6))
    model = GaussianMixture([parts], (1, 2, 3))
    a, noise, rows = Mask(torch.tensor([[1, 0, 0], [0, 1, 0]])), 0.05, np.eye(6)[[0, 4]]

    rng = np.random.default_rng(seed)
    part = parts[rng.choice(3, p=[p.share for p in parts])]
    seen = rows @ rng.multivariate_normal(part.mean, part.cov) + noise * rng.normal(size=2)
    m = a.adjoint(torch.from_numpy(seen @ rows).view(1, 1, 2, 3))
    want = responsibilities(parts, rows, seen, noise)
    far = {}
    for exact in (0, 2):
        guided = Guided(lambda y, s: denoise(model, y, s), a, m, noise, exact)
        x = draw(guided, geometric(2.0, 0.01, 30), 500, generator=generator(seed))
        found = responsibilities(parts, np.eye(6), x.flatten(1).numpy(), 1e-3).mean(0)
        far[exact] = np.abs(found - want).sum() / 2
    assert far[2] < 0.13 and far[0] > 0.23 and far[0] > 2 * far[2]


# -- pictures from it -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_reconstruction_goes_to_the_posterior_mean(operator: Operator, noise: float) -> None:
    """With v / (v + sigma^2) of every deviation left per step, v the posterior variance."""
    if not operator.closed:
        pytest.skip("solved to single precision only")
    noise = noise or (1e-3 if operator.scale is None else 0.0)  # a blur needs some
    m, sigmas = measured(operator, noise), geometric(0.4, 0.05, 6)
    mean, cov = FIELD.posterior(matrix(operator), m.flatten(), noise or 1e-7)
    guided = Guided(FIELD, operator, m, noise, exact=200, floor=0.0)
    rest = torch.eye(N, dtype=torch.float64)
    for s in sigmas:
        rest = torch.linalg.solve(cov + s**2 * rest.new_ones(N).diag(), cov) @ rest
    for start in (None, FIELD.draw(1, generator(8))):
        begin = guided.start(sigmas[0]) if start is None else start
        want = mean + rest @ (begin.flatten() - mean)
        got = reconstruct(guided, sigmas, start).flatten()
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert (got - mean).norm() < 0.1 * (begin.flatten() - mean).norm() + 1e-9
    assert torch.equal(reconstruct(guided, sigmas), reconstruct(guided, sigmas))


@pytest.mark.parametrize("exact", [0, 3])
def test_a_measurement_without_noise_is_met(operator: Operator, exact: int) -> None:
    if operator.scale is None and not isinstance(operator, Bicubic):
        pytest.skip("a blur hides some of it")
    m = measured(operator, 0)
    guided = Guided(FIELD, operator, m, exact=exact)
    for x in (
        reconstruct(guided, [0.3, 0.1]),
        draw(guided, [0.3, 0.1], 3, generator=generator()),
    ):
        torch.testing.assert_close(operator.apply(x), m.expand_as(operator.apply(x)))


def test_a_measurement_with_noise_is_not_met() -> None:
    m = measured(OPERATORS["block mean"], 0.2)
    x = reconstruct(Guided(FIELD, BlockMean(2), m, 0.2, 10), geometric(0.4, 0.02, 12))
    assert (BlockMean(2).apply(x) - m).norm() > 0.3 * (m - m.mean()).norm()


def test_the_start_is_gray_where_nothing_is_known() -> None:
    a = hole()
    m = measured(a, 0)
    start = Guided(FIELD, a, m).start(0.4)
    assert torch.equal(start[..., a.known], m[..., a.known])
    assert (start[..., ~a.known] == 0.5).all()
    noisy = Guided(FIELD, a, m, noise=0.4).start(0.4)
    torch.testing.assert_close(noisy[..., a.known], (m[..., a.known] + 0.5) / 2)


def test_the_mean_of_ten_draws_beats_one_by_the_law() -> None:
    """An exact draw has twice the least squared error, a mean of ten 1.1 times: 2.6 dB. With the
    noise level of networks, only after stirring: without, what varies slowly varies too little."""
    field, count = GaussianField.smooth(8, 8, 0.08, 1.0), 40
    known = torch.zeros(8, 8, dtype=torch.bool)
    known[0] = True
    x = field.draw(count, generator(1))
    guided = Guided(field, Mask(known), x.repeat(10, 1, 1, 1), exact=4)
    gains, spreads = [], []
    for stirs in (0, 12):
        drawn = draw(guided, geometric(0.39, 0.01, 40), stirs=stirs, generator=generator(2))
        draws = drawn.view(10, count, 1, 8, 8)
        one = (draws - x).square().mean()
        ten = (draws.mean(0) - x).square().mean()
        gains.append(10 * math.log10(float(one / ten)))
        spreads.append(float(draws.var(0).sum((1, 2, 3)).mean()))
    rows = dense(guided.operator.apply, torch.zeros(1, 1, 8, 8, dtype=torch.float64))
    exact = float(field.posterior(rows, torch.zeros(64, dtype=torch.float64), 1e-6)[1].trace())
    cold, stirred = (s / exact for s in spreads)
    assert cold < 0.8 < 0.84 < stirred < 1
    assert gains[0] + 0.2 < gains[1] and 2.2 < gains[1] < 2.8


def test_a_generator_decides_everything() -> None:
    guided = Guided(FIELD, hole(), measured(hole(), 0), exact=2)
    one, two, other = (
        draw(guided, [0.4, 0.1], 2, stirs=2, generator=generator(s)) for s in (1, 1, 2)
    )
    assert torch.equal(one, two) and not torch.allclose(one, other)
    assert not torch.allclose(one[0], one[1])


def test_draws_of_several_pictures_are_one_each() -> None:
    m = measured(hole(), 0, 3)
    guided = Guided(FIELD, hole(), m)
    assert draw(guided, [0.4, 0.1], generator=generator()).shape == (3, 1, 4, 8)
    with pytest.raises(UsageError, match="2 draws of 3 pictures"):
        draw(guided, [0.4, 0.1], 2)
    with pytest.raises(UsageError, match="noise -1"):
        Guided(FIELD, hole(), m, noise=-1)
