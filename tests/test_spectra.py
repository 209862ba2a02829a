"""Covariance algebra against closed forms and planted spectra."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from cdnctl.core import spectra


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def covariance(d: int, seed: int, rank: int | None = None) -> Tensor:
    rows = randn(rank or 2 * d, d, seed=seed)
    return rows.T @ rows / len(rows)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# -- alignment ------------------------------------------------------------------------------


def test_samples_are_positions() -> None:
    x = randn(2, 3, 4, 5)
    found = spectra.samples(x)
    assert found.shape == (40, 3)
    close(found[0 * 20 + 2 * 5 + 1], x[0, :, 2, 1])
    close(spectra.samples(x.flatten(1), channels=3), found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_alignment_finds_the_turn(dtype: torch.dtype) -> None:
    a = randn(100, 6, dtype=dtype)
    turn = torch.linalg.qr(randn(6, 6, seed=1, dtype=dtype))[0]
    b = a @ turn.T
    k = spectra.cross(b, a)
    close(spectra.align(k), turn)
    energies = [float(spectra.trace(spectra.cross(t, t))) for t in (a, b)]
    assert spectra.explained(k, *energies) == pytest.approx(1)


def test_alignment_is_orthogonal_procrustes() -> None:
    a, b = randn(50, 6), randn(50, 6, seed=1)
    found = spectra.align(spectra.cross(b, a))
    close(found.T, torch.from_numpy(orthogonal_procrustes(a.numpy(), b.numpy())[0]))
    energy, other = (t.square().sum(1).mean().item() for t in (a, b))
    left = (a @ found.T - b).square().sum(1).mean().item()
    share = spectra.explained(spectra.cross(b, a), energy, other)
    assert share == pytest.approx(1 - left / (energy + other))
    assert share < 0.5


def test_alignment_of_unequal_widths_keeps_the_narrow_side() -> None:
    a, b = randn(50, 4), randn(50, 7, seed=1)
    found = spectra.align(spectra.cross(b, a))
    assert found.shape == (7, 4)
    close(found.T @ found, torch.eye(4, dtype=torch.float64))


# -- distances ------------------------------------------------------------------------------


def test_roots_square_to_what_they_are_of() -> None:
    c = covariance(5, 0, rank=3)
    close(spectra.root(c) @ spectra.root(c), c)


def test_the_cosine_is_1_for_multiples_and_0_for_orthogonal_ranges() -> None:
    c = covariance(5, 0)
    assert spectra.bures_cosine(c, 3 * c) == pytest.approx(1)
    first, second = (
        torch.diag(torch.tensor([1.0, 2, 0, 0])),
        torch.diag(torch.tensor([0, 0, 3, 1.0])),
    )
    assert spectra.bures_cosine(first, second) == pytest.approx(0, abs=1e-6)
    assert math.isnan(spectra.bures_cosine(c, 0 * c))


def test_distances_of_commuting_covariances_are_those_of_their_roots() -> None:
    turn = spectra.rotation(4, generator())
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 2, 3, 4], [0.5, 9, 1, 0]))
    first, second = (turn @ torch.diag(v) @ turn.T for v in (a, b))
    roots = (a.sqrt() * b.sqrt()).sum().item()
    assert spectra.wasserstein(first, second) == pytest.approx(
        (a.sqrt() - b.sqrt()).square().sum().item()
    )
    assert spectra.bures_cosine(first, second) == pytest.approx(
        roots / math.sqrt(a.sum().item() * b.sum().item())
    )


def test_distances_do_not_mind_a_common_turn() -> None:
    a, b, turn = covariance(5, 0), covariance(5, 1), spectra.rotation(5, generator())
    turned = [turn @ c @ turn.T for c in (a, b)]
    assert spectra.bures_cosine(*turned) == pytest.approx(spectra.bures_cosine(a, b))
    assert spectra.wasserstein(*turned) == pytest.approx(spectra.wasserstein(a, b))
    assert spectra.bures_cosine(a, turned[0]) < 0.999


@pytest.mark.parametrize(
    ("d", "n", "cosine"), [(256, 256, 0.746), (128, 256, 0.875), (64, 512, 0.968)]
)
def test_unrelated_noise_looks_alike(d: int, n: int, cosine: float) -> None:
    """Why covariances of weights must be shrunk before they are compared."""
    white = [randn(n, d, seed=s) for s in (0, 1)]
    found = [w.T @ w / n for w in white]
    assert spectra.bures_cosine(*found) == pytest.approx(cosine, abs=0.01)
    assert all(spectra.trace(spectra.shrunk(c, n)) == 0 for c in found)


# -- shrinkage ------------------------------------------------------------------------------


def test_shrinkage_inverts_the_spread_of_spikes() -> None:
    for d, n in ((64, 256), (256, 256), (512, 256)):
        spikes = torch.tensor([5.0, 20.0, 300.0], dtype=torch.float64)
        close(spectra.shrunk_values(spectra.spread_spike(spikes, d / n), d, n), spikes)


def test_planted_variances_come_back() -> None:
    d, n, spikes = 256, 512, torch.tensor([20.0, 8, 3, 0.5], dtype=torch.float64)
    scale = torch.cat([(1 + spikes).sqrt(), torch.ones(d - 4, dtype=torch.float64)])
    found = []
    for seed in range(12):
        rows = randn(n, d, seed=seed) * scale
        values = torch.linalg.eigvalsh(rows.T @ rows / n).flip(0)
        found.append(spectra.shrunk_values(values, d, n)[:4])
    mean = torch.stack(found).mean(0)
    for got, want, spread in zip(mean, spikes[:3], (1.3, 0.5, 0.26), strict=False):
        assert got == pytest.approx(want.item(), abs=4 * spread / math.sqrt(12))
    assert mean[3] < 0.1  # below what can be told from noise


def test_noise_rarely_passes_the_raised_edge() -> None:
    d, n, draws = 48, 96, 300
    top = [
        torch.linalg.eigvalsh(w.T @ w / n)[-1].item()
        for w in (randn(n, d, seed=s) for s in range(draws))
    ]
    passed = sum(t > spectra.edge(d, n) for t in top)
    assert passed <= 0.03 * draws
    assert sum(t > (1 + math.sqrt(d / n)) ** 2 for t in top) > 0.08 * draws


def test_shrinkage_has_a_unit_and_keeps_directions() -> None:
    v = torch.linalg.qr(randn(64, 1))[0]
    along = randn(256, 1, seed=2)
    rows = randn(256, 64, seed=1) + 4 * along / along.square().mean().sqrt() * v.T
    c = rows.T @ rows / 256
    found = spectra.shrunk(c, 256)
    close(spectra.shrunk(0.01 * c, 256, noise=0.01), 0.01 * found)
    values, vectors = torch.linalg.eigh(found)
    assert values[-1] == pytest.approx(16, rel=0.1) and values[-2].abs() < 1e-9
    assert (vectors[:, -1] @ v[:, 0]).abs() > 0.98


def test_effective_ranks() -> None:
    assert spectra.effective_rank(torch.eye(9)) == pytest.approx(5)
    v = randn(9, 1)
    assert spectra.effective_rank(v @ v.T) == pytest.approx(1)
    assert spectra.effective_rank(torch.zeros(3, 3)) == 0
    assert spectra.effective_rank(torch.diag(torch.tensor([1.0, 3.0]))) == pytest.approx(5 / 4)


def test_rotations_are_orthogonal_and_uniform() -> None:
    turns = torch.stack([spectra.rotation(3, generator(s)) for s in range(2000)])
    close(turns @ turns.mT, torch.eye(3, dtype=torch.float64).expand(2000, 3, 3))
    assert turns.mean(0).abs().max() < 0.06  # qr alone favours one sign of the diagonal
