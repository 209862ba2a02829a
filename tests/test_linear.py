"""Products with Jacobians, eigenpairs, traces and linear systems, against dense matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fields_oracle import GaussianField
from oracle import GaussianMixture
from tiny import tiny
from torch import Tensor

from cdnctl.core.joint import denoise
from cdnctl.core.linear import (
    Jacobian,
    conjugate_gradient,
    dense,
    eigenpairs,
    hutchinson,
)
from cdnctl.errors import UsageError

SHAPE = (1, 3, 4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lopsided(y: Tensor) -> Tensor:
    """Something smooth whose Jacobian has no symmetry at all."""
    n = y[0].numel()
    mixed = torch.tanh(y.flatten(1) @ draw(n, n, seed=7)) @ draw(n, n, seed=8)
    return (mixed + y.flatten(1) ** 2).view_as(y)


# -- Jacobians ------------------------------------------------------------------------


def test_products_with_a_jacobian_without_symmetry() -> None:
    """Two pictures at once, each with its own J, against torch's dense one."""
    y, v = draw(2, *SHAPE, seed=1), draw(2, *SHAPE, seed=2)
    with torch.no_grad():
        jacobian = Jacobian(lopsided, y)
        torch.testing.assert_close(jacobian.value, lopsided(y))
        for _ in range(2):  # the graph is there for the next product, too
            forward, back = jacobian.times(v), jacobian.transposed(v)
        both = jacobian.symmetric(v)
    for i in range(2):
        j = torch.autograd.functional.jacobian(lambda t: lopsided(t[None])[0], y[i])
        j = j.reshape(12, 12)
        assert (j - j.T).norm() > 0.5 * j.norm()
        flat = v[i].flatten()
        torch.testing.assert_close(forward[i].flatten(), j @ flat)
        torch.testing.assert_close(back[i].flatten(), j.T @ flat)
        torch.testing.assert_close(both[i].flatten(), (j + j.T) @ flat / 2)
    assert not (forward.requires_grad or back.requires_grad or jacobian.value.requires_grad)


def test_the_posterior_covariance_is_that_of_the_mixture() -> None:
    """sigma^2 J = Cov[x | y], to 1e-8; an eigenvalue above 1 where it is between components."""
    model = GaussianMixture.random((1, 3, 2), SHAPE, 0)
    sigma = 0.1
    y = model.sample(np.full(20, sigma), 0)
    largest = 0.0
    for picture in y:
        jacobian = Jacobian(lambda t: denoise(model, t, sigma), picture[None])
        got = dense(jacobian.transposed, picture[None])
        exact = model.closed_form(picture.flatten().numpy(), sigma).cov / sigma**2
        np.testing.assert_allclose(got, exact, atol=1e-8)
        largest = max(largest, float(torch.linalg.eigvalsh(got)[-1]))
    assert largest > 1, "no picture between two components: lambda > 1 was not seen"


@pytest.mark.parametrize("arch", ["gradresnet", "hybrid"])
def test_a_gradient_has_a_symmetric_jacobian(tmp_path: Path, arch: str) -> None:
    """J v by two ways for a network that is a gradient; a hybrid is none, and not homogeneous
    is either: D is not J y."""
    model = tiny(tmp_path, arch).double()
    y, v = 0.5 + 0.2 * draw(1, 3, 16, 16, seed=1), draw(1, 3, 16, 16, seed=2)
    jacobian = Jacobian(lambda t: model(t, 0.2), y)
    forward, back = jacobian.times(v), jacobian.transposed(v)
    asymmetry = float((forward - back).norm() / back.norm())
    assert (asymmetry < 1e-9) if arch == "gradresnet" else (asymmetry > 1e-3)
    step = 1e-5
    ahead, behind = model(y + step * v, 0.2), model(y - step * v, 0.2)
    torch.testing.assert_close(forward, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-7)
    assert (jacobian.value - jacobian.times(y)).norm() > 1e-2 * jacobian.value.norm()


# -- eigenpairs -----------------------------------------------------------------------


def test_eigenpairs_of_a_field() -> None:
    """S / (S + sigma^2): values to 1e-6, and for degenerate ones the same subspaces."""
    field, sigma = GaussianField.smooth(8, 8), 0.2
    y = field.draw(1, torch.Generator().manual_seed(0))
    product = Jacobian(lambda t: field(t, sigma), y).transposed
    shrinkage = (field.spectrum / (field.spectrum + sigma**2)).flatten().sort().values
    for largest in (True, False):
        values, vectors = eigenpairs(product, y, 9, largest, tolerance=0)
        want = shrinkage.flip(0)[:9] if largest else shrinkage[:9]
        torch.testing.assert_close(values, want, atol=1e-6, rtol=0)
        assert vectors.shape == (9, 1, 8, 8)
        torch.testing.assert_close(
            vectors.flatten(1) @ vectors.flatten(1).T, torch.eye(9, dtype=torch.float64)
        )
        for value, vector in zip(values, vectors, strict=True):
            assert (product(vector[None]) - value * vector).norm() < 1e-6
    # Of the nine largest the constant, and four and four of two rings of frequencies.
    top = eigenpairs(product, y, 9, tolerance=0)[1].flatten(1)
    k2 = torch.fft.fftfreq(8, 1 / 8).square()
    ring = (k2[:, None] + k2 <= 2).double()
    projector = dense(lambda t: field.filtered(t, ring), y)
    torch.testing.assert_close(top.T @ top, projector, atol=1e-6, rtol=0)


def test_smallest_eigenvalues_next_to_zero() -> None:
    """Where a relative tolerance would never be met."""
    values = torch.cat([torch.tensor([-0.01, 1e-6, 0.004]), torch.linspace(0.01, 1.5, 61)]).double()
    basis = torch.linalg.qr(draw(64, 64))[0]
    matrix = (basis * values) @ basis.T
    like = torch.zeros(1, 1, 8, 8)  # float32, as networks are
    got, _ = eigenpairs(lambda v: (matrix.float() @ v.flatten()).view_as(v), like, 3, largest=False)
    torch.testing.assert_close(got.double(), values[:3], atol=1e-4, rtol=0)


def test_eigenpairs_are_the_same_twice_and_refuse_too_many() -> None:
    field = GaussianField.smooth(4, 4)
    y = field.draw(1, torch.Generator().manual_seed(0))
    product = Jacobian(lambda t: field(t, 0.2), y).transposed
    one, two = (eigenpairs(product, y, 3) for _ in range(2))
    assert torch.equal(one[1], two[1])
    for count in (0, 16):
        with pytest.raises(UsageError, match=f"{count} eigenvectors"):
            eigenpairs(product, y, count)


# -- traces ---------------------------------------------------------------------------


def test_hutchinson() -> None:
    """Diagonal and trace of each picture without bias, and an error that is what it says."""
    matrices = torch.stack([draw(12, 12, seed=s) for s in (3, 4)])

    def product(v: Tensor) -> Tensor:
        return (matrices @ v.flatten(1)[..., None]).view_as(v)

    like = torch.zeros(2, *SHAPE, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    diagonal, trace, error = hutchinson(product, like, 4000, generator)
    exact = matrices.diagonal(dim1=1, dim2=2)
    off = (matrices**2).sum(2) - exact**2  # variance of a probe of the diagonal
    assert ((diagonal.flatten(1) - exact).abs() / (off / 4000).sqrt()).max() < 4.5
    assert ((trace - exact.sum(1)).abs() / error).max() < 4
    both = matrices + matrices.mT
    spread = ((both**2).sum((1, 2)) - (2 * exact).square().sum(1)) / 2  # of a probe of the trace
    torch.testing.assert_close(error, (spread / 4000).sqrt(), rtol=0.08, atol=0)


def test_hutchinson_is_exact_for_a_diagonal_map() -> None:
    factors = draw(2, *SHAPE)
    diagonal, trace, error = hutchinson(lambda v: factors * v, factors, 3)
    torch.testing.assert_close(diagonal, factors)
    torch.testing.assert_close(trace, factors.sum((1, 2, 3)))
    assert error.max() < 1e-12
    assert hutchinson(lambda v: factors * v, factors, 1)[2].isinf().all()


# -- linear systems -------------------------------------------------------------------


def systems(count: int = 3, size: int = 12) -> Tensor:
    roots = torch.stack([draw(size, size, seed=s) for s in range(count)])
    return roots @ roots.mT + 0.1 * torch.eye(size, dtype=torch.float64)


def test_conjugate_gradients_solve_a_system_per_picture() -> None:
    a, b = systems(), draw(3, *SHAPE, seed=9)
    b[1] *= 1e-9
    calls = []

    def product(v: Tensor) -> Tensor:
        calls.append(1)
        return (a @ v.flatten(1)[..., None]).view_as(v)

    x = conjugate_gradient(product, b, 60)
    exact = torch.linalg.solve(a, b.flatten(1)).view_as(b)
    assert ((x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max() < 1e-9
    assert len(calls) < 60, "more is asked for than rounding allows"
    calls.clear()
    rough = conjugate_gradient(product, b, 60, tolerance=0.1)
    rest = (b - product(rough)).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    assert rest.max() < 0.1001 and len(calls) < 20


def test_conjugate_gradients_minimise_over_the_krylov_space() -> None:
    """After k steps no vector of span(b, A b ... A^(k-1) b) has less error in the energy norm."""
    a, b = systems(1)[0], draw(1, *SHAPE, seed=9)
    x = conjugate_gradient(lambda v: (a @ v.flatten()).view_as(v), b, 3).flatten()
    krylov = torch.stack([torch.linalg.matrix_power(a, k) @ b.flatten() for k in range(3)], 1)
    best = krylov @ torch.linalg.solve(krylov.T @ a @ krylov, krylov.T @ b.flatten())
    torch.testing.assert_close(x, best, rtol=1e-6, atol=1e-9)


def test_conjugate_gradients_stop_where_the_map_is_not_positive() -> None:
    """One picture has a map that is: it is solved in spite of the other."""
    good = systems(1)[0]
    bad = torch.diag(torch.linspace(-1, 1, 12, dtype=torch.float64))
    a = torch.stack([good, bad])
    b = draw(2, *SHAPE, seed=9)
    x = conjugate_gradient(lambda v: (a @ v.flatten(1)[..., None]).view_as(v), b, 60)
    torch.testing.assert_close(x[0].flatten(), torch.linalg.solve(good, b[0].flatten()))
    assert x.isfinite().all() and x[1].norm() < 100 * b[1].norm()
    assert torch.equal(conjugate_gradient(lambda v: -v, b, 5), torch.zeros_like(b))
    assert torch.equal(conjugate_gradient(lambda v: v, 0 * b, 5), torch.zeros_like(b))
