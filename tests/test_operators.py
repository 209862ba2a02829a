"""Operators: adjoints, flags and closed forms in float64; what they measure, against others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import convolve, gaussian_filter
from tiny import picture
from torch import Tensor

from cdnctl.core.linear import dense, dot
from cdnctl.errors import UsageError
from cdnctl.inverse.operators import (
    BandLimit,
    Bicubic,
    BlockMean,
    Convolution,
    Mask,
    Operator,
    Rows,
    gaussian,
    motion,
)

SHAPE = (2, 3, 12, 18)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lopsided(height: int = 4, width: int = 5) -> Tensor:
    """A kernel without any symmetry, some of it negative."""
    return draw(height, width, seed=3) + 1


OPERATORS: dict[str, Callable[[], Operator]] = {
    "mask": lambda: Mask(draw(12, 18) > 0),
    "mask of each channel": lambda: Mask(draw(3, 12, 18) > 0),
    "block mean 2": lambda: BlockMean(2),
    "block mean 3": lambda: BlockMean(3),
    "bicubic 2": lambda: Bicubic(2),
    "bicubic 3": lambda: Bicubic(3),
    "periodic": lambda: Convolution(lopsided()),
    "periodic, odd": lambda: Convolution(lopsided(3, 7)),
    "valid": lambda: Convolution(lopsided(), valid=True),
    "valid, odd": lambda: Convolution(lopsided(3, 7), valid=True),
    "low": lambda: BandLimit.low(12, 18, 0.5),
    "band": lambda: BandLimit(band()),
    "rows": lambda: Rows.random(100, SHAPE[1:], torch.Generator().manual_seed(1)),
}


def band() -> Tensor:
    """Some frequencies and their opposites."""
    chosen = draw(12, 18, seed=5) > 0.7
    return chosen | chosen.flip((0, 1)).roll((1, 1), (0, 1))


@pytest.fixture(params=OPERATORS, scope="module")
def operator(request: pytest.FixtureRequest) -> Operator:
    return OPERATORS[request.param]()


def measurement(a: Operator, seed: int = 1) -> Tensor:
    """One that A can give: for a projection not everything is."""
    return a.apply(draw(*SHAPE, seed=seed))


def gram(a: Operator) -> Tensor:
    """A A^T of one picture, dense."""
    like = draw(*a.shape((1, *SHAPE[1:])))
    return dense(lambda m: a.apply(a.adjoint(m)), like)


@pytest.mark.parametrize("seed", range(3))
def test_the_adjoint(operator: Operator, seed: int) -> None:
    x, m = draw(*SHAPE, seed=seed), draw(*operator.shape(SHAPE), seed=seed + 10)
    assert operator.apply(x).shape == operator.shape(SHAPE) == m.shape
    assert operator.adjoint(m).shape == SHAPE
    left, right = dot(operator.apply(x), m), dot(x, operator.adjoint(m))
    assert (left - right).abs().max() < 1e-10 * x.norm() * m.norm()


def test_linear(operator: Operator) -> None:
    x, z = draw(*SHAPE, seed=1), draw(*SHAPE, seed=2)
    both = 2 * operator.apply(x) - 3 * operator.apply(z)
    torch.testing.assert_close(operator.apply(2 * x - 3 * z), both)


def test_flags(operator: Operator) -> None:
    """A A^T = scale on what can be measured, and only where it is said; the bound holds and is
    no worse than twice what it must be, or floors would mean nothing."""
    matrix = gram(operator)
    values = torch.linalg.eigvalsh(matrix)
    assert operator.bound / 2.5 < values.max() < operator.bound * (1 + 1e-9)
    flat = all(min(abs(v), abs(v - values.max())) < 1e-9 for v in values)
    assert flat == (operator.scale is not None)
    if operator.scale is not None:
        assert operator.scale == operator.bound
        torch.testing.assert_close(matrix @ matrix, operator.scale * matrix)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_solve(operator: Operator, ridge: float) -> None:
    """(A A^T + ridge) solve(m) = m for a measurement m; one ridge for both, or one for each."""
    m = measurement(operator)
    exact = operator.closed or ridge > 0  # conjugate gradients need a condition
    rtol = 1e-9 if operator.closed else 1e-4
    for given in (ridge, torch.full((2,), ridge, dtype=m.dtype)):
        u = operator.solve(m, given)
        if exact:
            again = operator.apply(operator.adjoint(u)) + ridge * u
            torch.testing.assert_close(again, m, rtol=rtol, atol=rtol)


def test_solve_with_a_ridge_for_each_picture(operator: Operator) -> None:
    m, ridges = measurement(operator), torch.tensor([0.2, 0.7]).double()
    u = operator.solve(m, ridges)
    for i in range(2):
        torch.testing.assert_close(
            u[i : i + 1], operator.solve(m[i : i + 1], float(ridges[i])), rtol=1e-4, atol=1e-5
        )


def test_meet(operator: Operator) -> None:
    """The nearest picture with the measurement: it has it, and the way to it is along A^T."""
    x, m = draw(*SHAPE, seed=4), measurement(operator)
    met = operator.meet(x, m)
    if operator.closed:
        torch.testing.assert_close(operator.apply(met), m, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(operator.meet(met, m), met, rtol=1e-8, atol=1e-8)
        # It stays in the range of A^T: what A does not see is as it was.
        unseen = draw(*SHAPE, seed=6)
        unseen = unseen - operator.adjoint(operator.solve(operator.apply(unseen)))
        assert dot(met - x, unseen).abs().max() < 1e-7
    else:
        before, after = (operator.apply(p) - m for p in (x, met))
        assert after.norm() < 0.02 * before.norm()


def test_dtype_and_gradient(operator: Operator) -> None:
    x = draw(*SHAPE).float().requires_grad_()
    m = operator.apply(x)
    assert m.dtype == operator.adjoint(m).dtype == operator.solve(m).dtype == torch.float32
    v = draw(*operator.shape(SHAPE), seed=8).float()
    (pulled,) = torch.autograd.grad(m, x, v)
    torch.testing.assert_close(pulled, operator.adjoint(v), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mask", "block mean 3", "bicubic 2", "bicubic 3", "valid"])
def test_reach(name: str) -> None:
    """How far beyond its own cell of the grid a measurement looks, no less and no more."""
    operator = OPERATORS[name]() if name != "mask" else Mask(torch.ones(48, 48))
    spot = torch.zeros(1, 1, 48, 48, dtype=torch.float64)
    spot[..., 24, 24] = 1
    met = operator.apply(spot)[0, 0].abs() > 1e-9
    # Of a valid convolution the first measurement is that of a pixel inside.
    kernel = operator.kernel if isinstance(operator, Convolution) else torch.ones(1, 1)
    far = 0
    for axis in range(2):
        inside = kernel.shape[axis] - 1 - kernel.shape[axis] // 2
        first = met.any(1 - axis).nonzero().flatten() * operator.grid + inside
        last = first + operator.grid - 1
        far = max(far, int((first - 24).max()), int((24 - last).max()))
    assert far == operator.reach


# -- what they measure ----------------------------------------------------------------


def photo(height: int, width: int) -> Tensor:
    return torch.from_numpy(picture(height, width)).permute(2, 0, 1)[None].double()


def test_a_mask_does_not_look_at_what_is_missing() -> None:
    x = draw(1, 1, 4, 4)
    known = torch.ones(4, 4, dtype=torch.bool)
    known[1, 2] = False
    x[0, 0, 1, 2] = torch.nan
    m = Mask(known).apply(x)
    assert m.isfinite().all() and m[0, 0, 1, 2] == 0


def test_block_means_are_in_the_unit_of_pictures() -> None:
    """Those of Kadkhodaie and Simoncelli are larger by the factor."""
    m = BlockMean(4).apply(torch.full((1, 3, 8, 8), 0.7))
    torch.testing.assert_close(m, torch.full((1, 3, 2, 2), 0.7))


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_bicubic_is_pillows(factor: int) -> None:
    x = photo(48, 36)
    plane = Image.fromarray(x[0, 1].float().numpy())
    small = plane.resize((36 // factor, 48 // factor), Image.Resampling.BICUBIC)
    got = Bicubic(factor).apply(x)[0, 1]
    np.testing.assert_allclose(got, np.asarray(small), atol=2e-7)


@pytest.mark.parametrize("size", [(3, 5), (4, 3), (5, 4), (1, 1), (12, 18)])
def test_convolution_is_no_correlation(size: tuple[int, int]) -> None:
    """scipy's, which turns the kernel round and knows all four conventions of a centre."""
    kernel, x = lopsided(*size), draw(1, 1, 12, 18)
    # Of an even side scipy takes the pixel after the middle as its centre, too.
    want = convolve(x[0, 0].numpy(), kernel.numpy(), mode="wrap")
    if all(n % 2 for n in size):
        np.testing.assert_allclose(Convolution(kernel).apply(x)[0, 0], want, atol=1e-12)
    point = torch.zeros(1, 1, 12, 18, dtype=torch.float64)
    point[0, 0, 6, 9] = 1
    seen = Convolution(kernel).apply(point)[0, 0].roll((size[0] // 2 - 6, size[1] // 2 - 9), (0, 1))
    np.testing.assert_allclose(seen[: size[0], : size[1]], kernel, atol=1e-12)


@pytest.mark.parametrize("size", [(3, 5), (4, 3), (12, 18)])
def test_valid_never_wraps(size: tuple[int, int]) -> None:
    """What is next to the edge does not depend on the opposite edge: numpy's sliding windows."""
    kernel, x = lopsided(*size), draw(1, 1, 12, 18)
    windows = np.lib.stride_tricks.sliding_window_view(x[0, 0].numpy(), size)
    want = np.einsum("ijkl,kl->ij", windows, kernel.flip((0, 1)).numpy())
    np.testing.assert_allclose(Convolution(kernel, valid=True).apply(x)[0, 0], want, atol=1e-12)


def test_band_limit_is_a_projection_and_passes_its_frequencies() -> None:
    a = BandLimit.low(12, 18, 0.5)
    x = draw(1, 1, 12, 18)
    m = a.apply(x)
    torch.testing.assert_close(a.apply(m), m)
    kept = torch.fft.fft2(m).abs()[0, 0] > 1e-12
    assert torch.equal(kept, a.passed)
    assert a.passed.sum() == 7 * 9  # |k| <= 3 of 12, |k| <= 4 of 18
    whole = BandLimit.low(12, 18, 1.0)
    torch.testing.assert_close(whole.apply(x), x)


def test_a_band_limit_without_opposite_frequencies_is_refused() -> None:
    """As published: a rectangle of one corner of the Fourier plane, which is no projection."""
    corner = torch.zeros(16, 16, dtype=torch.bool)
    corner[:5, :5] = True
    with pytest.raises(UsageError, match="opposite"):
        BandLimit(corner)


def test_random_rows_are_orthonormal() -> None:
    a = Rows.random(30, (1, 6, 8), torch.Generator().manual_seed(0))
    torch.testing.assert_close(a.rows @ a.rows.T, torch.eye(30, dtype=torch.float64))
    other = Rows.random(30, (1, 6, 8), torch.Generator().manual_seed(1))
    assert (a.rows - other.rows).abs().max() > 0.1


# -- kernels --------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.3, 1.0, 1.6, 2.7])
def test_gaussian_kernel(std: float) -> None:
    x = draw(1, 1, 32, 34)
    want = gaussian_filter(x[0, 0].numpy(), std, mode="wrap")
    np.testing.assert_allclose(Convolution(gaussian(std)).apply(x)[0, 0], want, atol=1e-9)


def centre_and_spread(kernel: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean position, (row, column) from the middle, and covariance, in pixels."""
    rows, columns = (np.arange(n) - n // 2 for n in kernel.shape)
    where = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    weights = kernel.numpy().ravel()
    mean = weights @ where
    return mean, np.einsum("k,ki,kj->ij", weights, where - mean, where - mean)


def test_motion_along_the_axes_is_a_box() -> None:
    np.testing.assert_allclose(motion(9, 0), np.full((1, 9), 1 / 9))
    np.testing.assert_allclose(motion(9, 90), np.full((9, 1), 1 / 9))
    np.testing.assert_allclose(motion(4, 180), np.array([[0.125, 0.25, 0.25, 0.25, 0.125]]))
    np.testing.assert_allclose(motion(0.4, 0), [[1.0]])


def test_motion_is_counterclockwise() -> None:
    kernel = motion(8, 45)  # up to the right: small rows with large columns
    assert kernel.shape == (7, 7) and kernel[0, 6] > 0 and kernel[0, 0] == 0
    torch.testing.assert_close(kernel.flip(1), motion(8, 135))
    torch.testing.assert_close(kernel, motion(8, 225))


@pytest.mark.parametrize("degrees", [0, 10, 30, 77, 90, 120, 200, -30, 359.9])
@pytest.mark.parametrize("length", [1, 2.5, 9, 24])
def test_motion_has_the_length_and_the_direction(length: float, degrees: float) -> None:
    kernel = motion(length, degrees)
    assert abs(float(kernel.sum()) - 1) < 1e-12 and kernel.min() >= 0
    assert kernel.shape[0] % 2 == kernel.shape[1] % 2 == 1
    mean, covariance = centre_and_spread(kernel)
    np.testing.assert_allclose(mean, 0, atol=1e-9)
    angle = np.deg2rad(degrees)
    way = length * np.array([-np.sin(angle), np.cos(angle)])
    # A uniform path has covariance way way^T / 12; rounding to pixels moves each by up to 1/2.
    np.testing.assert_allclose(covariance, np.outer(way, way) / 12, atol=0.26 + 0.02 * length)


# -- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Mask(torch.zeros(4, 4)), "every pixel is missing"),
        (lambda: BlockMean(0), "factor of 0"),
        (lambda: Bicubic(-2), "factor of -2"),
        (lambda: Convolution(torch.tensor([[1.0, -1.0]])), "sums to 0"),
        (lambda: Convolution(torch.zeros(3, 3)), "sums to 0"),
        (lambda: Convolution(torch.full((2, 2), torch.nan)), "finite"),
        (lambda: gaussian(0), "above 0"),
        (lambda: gaussian(float("nan")), "above 0"),
        (lambda: motion(-1, 0), "-1 pixels"),
        (lambda: motion(3, float("inf")), "inf degrees"),
        (lambda: Rows.random(9, (1, 2, 4)), "9 measurements"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        make()


@pytest.mark.parametrize(
    ("operator", "match"),
    [
        (Mask(torch.ones(4, 5)), "5 x 4 pixels, the picture 18 x 12"),
        (BlockMean(5), "18 x 12 pixels cannot be divided by 5"),
        (Bicubic(4), "cannot be divided by 4"),
        (Convolution(torch.ones(13, 3)), "3 x 13 pixels, the picture 18 x 12"),
        (BandLimit.low(4, 5, 0.5), "5 x 4 pixels"),
        (Rows.random(3, (1, 2, 4)), "not of"),
    ],
)
def test_pictures_that_do_not_suit_are_refused(operator: Operator, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        operator.shape(SHAPE)
