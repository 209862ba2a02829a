"""MALA: it keeps the density that it is given, exactly, whatever the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cdnctl.fields.mala import ACCEPTANCE, Target, mala


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everywhere(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def gaussian_target(precision: Tensor) -> Target:
    def target(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gradient = x @ precision
        return (x * gradient).sum(1) / 2, gradient, everywhere(x)

    return target


PRECISION = torch.tensor([[4, 1.5, 0], [1.5, 1, 0.2], [0, 0.2, 0.5]], dtype=torch.float64)
COVARIANCE = torch.linalg.inv(PRECISION)


def covariance_errors(x: Tensor) -> Tensor:
    """Of the sample covariance of independent Gaussian vectors: in standard errors, (n, n)."""
    variances = COVARIANCE.diagonal()
    errors = ((COVARIANCE**2 + variances * variances[:, None]) / len(x)).sqrt()
    return (x.T @ x / len(x) - COVARIANCE) / errors


@pytest.mark.parametrize("step", [0.05, 0.4])
def test_a_gaussian_stays_exactly_as_it_is(step: float) -> None:
    """From exact samples; with the larger step about half of the moves must be refused."""
    root = torch.linalg.cholesky(COVARIANCE)
    start = torch.randn(20000, 3, dtype=torch.float64, generator=seeded(1)) @ root.T
    run = mala(gaussian_target(PRECISION), start, step, 0, 30, seeded(2))
    assert run.step == step and run.left == 0
    assert covariance_errors(run.x).abs().max() < 4
    assert (run.accepted.mean() > 0.9) == (step < 0.1)


def test_a_gaussian_is_found_from_afar() -> None:
    start = torch.full((8000, 3), 5.0, dtype=torch.float64)
    run = mala(gaussian_target(PRECISION), start, 1e-3, 100, 200, seeded(3))
    assert abs(float(run.accepted.mean()) - ACCEPTANCE) < 0.05
    assert covariance_errors(run.x).abs().max() < 4
    assert (run.x.mean(0).abs() < 4 * (COVARIANCE.diagonal() / 8000).sqrt()).all()
    # The mean energy of n dimensions is n / 2.
    energy, _, _ = gaussian_target(PRECISION)(run.x)
    assert abs(float(energy.mean()) - 1.5) < 4 * (1.5 / 8000) ** 0.5


def test_two_wells_are_found_in_proportion() -> None:
    def target(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x[:, 0]
        return y**4 - 2 * y**2 - 0.3 * y, (4 * y**3 - 4 * y - 0.3)[:, None], everywhere(x)

    run = mala(target, torch.zeros(20000, 1, dtype=torch.float64), 0.1, 50, 300, seeded(4))
    grid = np.linspace(-3, 3, 2001)
    density = np.exp(-(grid**4) + 2 * grid**2 + 0.3 * grid)
    density /= density.sum()
    for power in (1, 2, 4):
        found = run.x[:, 0] ** power
        error = float(found.std()) / len(found) ** 0.5
        assert abs(float(found.mean()) - (density * grid**power).sum()) < 4 * error


def flat_target(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """No force, and a window of the unit square."""
    return torch.zeros(len(x)), torch.zeros_like(x), ((x >= 0) & (x <= 1)).all(1)


def test_a_window_is_not_left() -> None:
    start = torch.rand(20000, 2, dtype=torch.float64, generator=seeded(5))
    run = mala(flat_target, start, 0.02, 0, 30, seeded(6))
    assert flat_target(run.x)[2].all()
    assert 0.1 < run.left < 0.5
    assert run.accepted.mean() == pytest.approx(1 - run.left)
    counts = torch.histc(run.x[:, 0], 10, 0, 1)
    assert ((counts - 2000).abs() < 4.5 * 1800**0.5).all()  # as dense at its edges


def test_a_chain_that_starts_outside_a_window_comes_in() -> None:
    def target(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.square().sum(1) / 2, x, (x.abs() <= 1).all(1)

    start = torch.full((500, 2), 3.0, dtype=torch.float64)
    few, many = (target(mala(target, start, 0.1, 0, n, seeded(7)).x)[2] for n in (1, 200))
    assert not few.any() and many.all()


def test_a_seed_decides_every_move() -> None:
    start = torch.zeros(5, 3, dtype=torch.float64)
    runs = [mala(gaussian_target(PRECISION), start, 0.1, 3, 3, seeded(s)).x for s in (8, 8, 9)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
