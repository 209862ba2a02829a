"""Energies of fields: exact derivatives, and score matching that finds known parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.fields.bands import Bands, half_octaves, octave, whole
from cdnctl.fields.energy import (
    Energy,
    Features,
    score_matching,
    smallest_eigenvalues,
    window,
)
from cdnctl.fields.simulate import gaussian, phi4

BANDS = {
    "pixels": whole(),
    "haar": octave("haar")[0],
    "db4": octave("db4")[0],
    "fine half": half_octaves("db2")[0],
    "coarse half": half_octaves("db2")[1],
}
ANY = pytest.mark.parametrize("bands", BANDS.values(), ids=BANDS.keys())
MIXED = Features(
    powers=(2, 4),
    centres=(-1.5, -0.5, 0.5, 1.5),
    width=1.0,
    shifts=(((0, 1), (1, 0)), ((1, 1),), ((2, -1),)),
)
BETA = 0.68
PHI4 = Features(powers=(4, 2), shifts=(((0, 1), (1, 0)),))
TRUTH = torch.tensor([1, -1, -BETA], dtype=torch.float64)


def pictures(count: int, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, side, side, dtype=torch.float64, generator=generator)


# -- bands --------------------------------------------------------------------------------------


@ANY
def test_bands_are_part_of_an_orthogonal_matrix(bands: Bands) -> None:
    x = pictures(3)
    z = bands.take(x)
    torch.testing.assert_close(bands.take(bands.give(z)), z)
    other = torch.randn_like(z)
    torch.testing.assert_close((z * other).sum(), (x * bands.give(other)).sum())
    torch.testing.assert_close(bands.take(bands.rest(x)), torch.zeros_like(z))


def test_octaves_and_their_halves_leave_the_same_coarser_picture() -> None:
    x = pictures(2, 16)
    (one,), (fine, coarse) = octave("db2"), half_octaves("db2")
    torch.testing.assert_close(one.rest(x), coarse.rest(fine.rest(x)))


@ANY
def test_projections_are_summed_up_right(bands: Bands) -> None:
    side = 8
    eye = torch.eye(side * side, dtype=torch.float64).reshape(-1, side, side)
    dense = bands.give(bands.take(eye)).reshape(side * side, side * side)
    torch.testing.assert_close(bands.weights(side).flatten(), dense.diagonal())
    for shift in ((0, 0), (0, 1), (1, 0), (2, -1)):
        moved = eye.roll(shift, (1, 2)).reshape(side * side, side * side)
        assert bands.trace(side, shift) == pytest.approx(float((dense * moved).sum()), abs=1e-9)


def test_shares_of_pixels_are_the_published_ones() -> None:
    weights = {name: octave(name)[0].weights(8) for name in ("haar", "db2", "db4")}
    torch.testing.assert_close(weights["haar"], torch.full((8, 8), 0.75, dtype=torch.float64))
    for name, values in (("db2", (0.487, 0.797, 0.920)), ("db4", (0.737, 0.7502, 0.7627))):
        found = weights[name].flatten().sort().values[[0, 32, 63]]
        torch.testing.assert_close(found, torch.tensor(values).double(), atol=6e-4, rtol=0)
    for name, trace in (("haar", -0.5), ("db2", -0.5625), ("db4", -0.5981)):
        # The Laplacian of the sum over nearest neighbours, by the pixel.
        both = octave(name)[0].trace(16, (0, 1)) + octave(name)[0].trace(16, (1, 0))
        assert 2 * both / 256 == pytest.approx(trace, abs=1e-4)


# -- derivatives ----------------------------------------------------------------------------------


@ANY
def test_gradients_and_laplacians_are_exact(bands: Bands) -> None:
    """Those of autograd, in the coefficients of the bands."""
    x = pictures(2)
    gradients = bands.take(MIXED.slopes(x))
    laplacians = MIXED.laplacians(x, bands)
    for b in range(len(x)):

        def values(z: Tensor, rest: Tensor) -> Tensor:
            return MIXED.values((rest + bands.give(z))[None])[0]

        z, rest = bands.take(x[b]), bands.rest(x[b])
        jacobian = torch.autograd.functional.jacobian(lambda t, r=rest: values(t, r), z)
        torch.testing.assert_close(gradients[:, b], jacobian)
        for f in range(len(MIXED)):
            hessian = torch.autograd.functional.hessian(
                lambda t, r=rest, f=f: values(t, r)[f], z
            ).reshape(z.numel(), z.numel())
            torch.testing.assert_close(laplacians[f, b], hessian.trace())


def mixed_energy() -> Energy:
    theta = torch.linspace(-2, 3, len(MIXED), dtype=torch.float64)
    return Energy(MIXED, theta)


def test_energies_are_their_features_times_the_parameters() -> None:
    x = pictures(3).requires_grad_()
    energy = mixed_energy()
    expected = MIXED.values(x) @ energy.theta
    value, gradient = energy(x.detach())
    torch.testing.assert_close(value, expected.detach(), atol=1e-7, rtol=0)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=0)


@ANY
def test_the_smallest_eigenvalue_is_that_of_the_hessian(bands: Bands) -> None:
    energy, x = mixed_energy(), pictures(2)
    found = smallest_eigenvalues(energy, bands, x)
    for picture, eigenvalue in zip(x, found, strict=True):
        z, rest = bands.take(picture), bands.rest(picture)
        hessian = torch.autograd.functional.hessian(
            lambda t, r=rest: MIXED.values((r + bands.give(t))[None])[0] @ energy.theta, z
        ).reshape(z.numel(), z.numel())
        torch.testing.assert_close(eigenvalue, torch.linalg.eigvalsh(hessian)[0])


def test_windows_hold_every_product_once() -> None:
    assert len(window(16, 2)) == 13 and window(16, 2)[0] == ((0, 0),)
    assert window(1, 2) == (((0, 0),),)
    assert len(window(2, 3)) == 4  # all pairs of a 2 x 2 picture by their difference
    for side in (3, 4):  # differences s and -s are one product
        own = (side % 2 == 0) * 3 + 1  # differences that are their own opposite
        assert len(window(side, side)) == (side * side + own) // 2


# -- score matching --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lattice() -> Tensor:
    return phi4(1024, 8, BETA, seed=2, spacing=20)


@ANY
def test_the_couplings_of_phi4_come_back(lattice: Tensor, bands: Bands) -> None:
    """But for the coarser half: its law integrates the finer one out, and is another one."""
    if bands is BANDS["coarse half"]:
        pytest.skip("not a law of the energy itself")
    found = score_matching(lattice, PHI4, bands)
    assert ((found.energy.theta - TRUTH).abs() < 4 * found.errors).all()
    assert (found.errors < 0.12).all() and found.condition < 100


@pytest.mark.slow
def test_the_couplings_of_phi4_at_16() -> None:
    x = phi4(4096, 16, BETA, seed=3)
    found = score_matching(x, PHI4, octave("haar")[0])
    assert ((found.energy.theta - TRUTH).abs() < 4 * found.errors).all()
    assert (found.errors < torch.tensor([0.004, 0.01, 0.005])).all()


def test_standard_errors_are_those_of_repetitions() -> None:
    """Over fits to independent sets of fields."""
    features = Features(shifts=window(8, 1))
    fits = [
        score_matching(gaussian(100, 8, lambda k: 1 / (1 + k * k), seed), features, BANDS["haar"])
        for seed in range(100)
    ]
    spread = torch.stack([fit.energy.theta for fit in fits]).std(0)
    told = torch.stack([fit.errors for fit in fits]).mean(0)
    assert ((spread / told - 1).abs() < 0.35).all()


def gmrf(k_rows: Tensor, k_columns: Tensor) -> Tensor:
    """Eigenvalues of a precision of short reach, different along the two axes."""
    return (
        2.5
        - 1.2 * torch.cos(k_rows)
        - 0.7 * torch.cos(k_columns)
        + 0.3 * torch.cos(k_rows + k_columns)
    )


@pytest.mark.parametrize("name", ["pixels", "haar", "db4", "fine half"])
def test_gaussian_fields_return_their_precision(name: str) -> None:
    side, count = 16, 3000
    turns = torch.fft.fftfreq(side, dtype=torch.float64) * 2 * torch.pi
    precision = gmrf(turns[:, None], turns)
    white = gaussian(count, side, torch.ones_like, seed=5)
    x = torch.fft.ifft2(torch.fft.fft2(white) / precision.sqrt()).real
    features = Features(shifts=window(side, 1))
    found = score_matching(x, features, BANDS[name])
    expected = torch.zeros(len(features), dtype=torch.float64)
    # E = x'Px / 2: half of the precision at shift 0, and of each other pair of shifts once.
    for shift, value in (((0, 0), 1.25), ((1, 0), -0.6), ((0, 1), -0.35), ((1, 1), 0.15)):
        same = [i for i, (s,) in enumerate(features.shifts) if _same(s, shift, side)]
        expected[same[0]] = value
    assert ((found.energy.theta - expected).abs() < 4 * found.errors).all()
    torch.testing.assert_close(Energy(features, expected).transfer(side), precision)


def _same(a: tuple[int, int], b: tuple[int, int], side: int) -> bool:
    return any(
        all((p - sign * q) % side == 0 for p, q in zip(a, b, strict=True)) for sign in (1, -1)
    )


@pytest.mark.slow
def test_half_octaves_of_smooth_wavelets_are_nearer_to_log_concave() -> None:
    """None is log-concave everywhere, and phi^4 itself nowhere; figures computed for L = 16."""
    x = phi4(64, 16, BETA, seed=6)
    energy = Energy(PHI4, TRUTH)
    worst = {
        name: smallest_eigenvalues(energy, bands, x)
        for name, bands in (
            ("pixels", whole()),
            ("octave haar", octave("haar")[0]),
            ("octave db4", octave("db4")[0]),
            ("half haar", half_octaves("haar")[0]),
            ("half db4", half_octaves("db4")[0]),
        )
    }
    means = [float(values.mean()) for values in worst.values()]
    assert means == sorted(means)
    assert (worst["octave db4"] < 0).all()
    assert 0 < (worst["half haar"] < 0).double().mean() < 0.7


def test_too_little_to_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="1 fields of 8 x 8"):
        score_matching(pictures(1), Features(shifts=window(8, 4)), BANDS["haar"])
    with pytest.raises(UsageError, match="pixels below 900"):
        score_matching(pictures(50), Features(centres=(0.0, 900.0)), BANDS["haar"])
