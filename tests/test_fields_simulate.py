"""Simulated fields: the laws that they claim to have."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.fields import simulate
from cdnctl.fields.simulate import (
    frequencies,
    gaussian,
    log_normal,
    neighbours,
    phi4,
    radial,
    spectrum,
)


def power_law(k: Tensor) -> Tensor:
    return (1 + k * k) ** -1.5


def error(values: Tensor) -> float:
    """Standard error of a mean of independent values."""
    return float(values.std() / len(values) ** 0.5)


# -- Gaussian and log-normal ------------------------------------------------------------------


def test_gaussian_fields_have_their_spectrum_mode_by_mode() -> None:
    count, wanted = 4000, 3 * power_law(frequencies(8))
    x = gaussian(count, 8, lambda k: 3 * power_law(k), seed=1)
    ratio = spectrum(x) / wanted
    # |mode|^2 is chi^2 of 2 degrees of freedom, of 1 where the mode is real: at most sqrt(2/count).
    assert (ratio - 1).abs().max() < 4.5 * (2 / count) ** 0.5
    assert abs(float(x.mean())) < 4 * error(x.mean((1, 2)))


def test_the_standard_deviation_is_that_of_a_pixel() -> None:
    x = gaussian(3000, 8, power_law, seed=2, std=0.7)
    variances = x.square().mean((1, 2))
    assert abs(float(variances.mean()) - 0.49) < 4 * error(variances)


def test_log_normal_fields_have_their_moments_and_correlations() -> None:
    std, side = 0.6, 16
    x = log_normal(6000, side, power_law, seed=3, std=std)
    power = power_law(frequencies(side))
    xi = torch.fft.ifft2(power).real
    expected = (xi / xi[0, 0] * std**2).exp() - 1
    for lag in ((0, 0), (0, 1), (2, 3), (0, 8)):
        found = (x * x.roll(lag, (1, 2))).mean((1, 2))
        assert abs(float(found.mean() - expected[lag])) < 4 * error(found), lag
    cubes = (x**3).mean((1, 2))
    v = np.expm1(std**2)
    skewness = (np.exp(std**2) + 2) * v**0.5
    assert abs(float(cubes.mean()) - skewness * v**1.5) < 4 * error(cubes)
    assert abs(float(x.mean())) < 4 * error(x.mean((1, 2)))


def test_rings_of_a_spectrum() -> None:
    np.testing.assert_allclose(radial(frequencies(8).round()), np.arange(5))
    assert float(radial(spectrum(torch.ones(1, 4, 4)))[0]) == 16  # all in the mode of zero


@pytest.mark.parametrize("bad", [lambda k: -k, lambda k: 1 / k, lambda k: 0 * k])
def test_what_is_no_spectrum_is_refused(bad: object) -> None:
    with pytest.raises(UsageError, match="spectrum"):
        gaussian(1, 4, bad, seed=0)  # type: ignore[arg-type]


# -- phi^4 --------------------------------------------------------------------------------------


def exact_2x2(beta: float) -> dict[str, float]:
    """Moments on the 2 x 2 lattice, where every pair of neighbours meets twice, by quadrature."""
    nodes = np.linspace(-2.8, 2.8, 33)
    a, b, c, d = np.meshgrid(nodes, nodes, nodes, nodes, indexing="ij", sparse=True)
    products = 2 * (a * b + b * c + c * d + d * a)
    energy = sum(v**4 - v**2 for v in (a, b, c, d)) - beta * products
    density = np.exp(energy.min() - energy)
    density /= density.sum()
    return {
        "squares": float((density * a**2).sum()),
        "products": float((density * products).sum() / 8),
        "mean": float((density * (a + b + c + d) ** 2).sum() / 16),
    }


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.68])
def test_phi4_on_four_sites_has_its_exact_moments(beta: float) -> None:
    x = phi4(8000, 2, beta, seed=4, burn=60, spacing=8)
    assert x.shape == (8000, 2, 2) and x.dtype == torch.float64
    found = {
        "squares": x.square().mean((1, 2)),
        "products": (x * neighbours(x)).mean((1, 2)) / 4,
        "mean": x.mean((1, 2)) ** 2,
    }
    for name, expected in exact_2x2(beta).items():
        # Later states of a chain are not quite independent: twice the error of those that are.
        assert abs(float(found[name].mean()) - expected) < 4 * 2 * error(found[name]), name


@pytest.mark.parametrize("move", ["_metropolis", "_swendsen_wang"])
def test_each_move_of_phi4_alone_keeps_the_density(
    move: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fields of the right law, moved by one of the two a few times, are of the right law."""
    beta = 0.5
    x = phi4(8000, 2, beta, seed=5, burn=60, spacing=8).numpy()
    rng = np.random.default_rng(6)
    for _ in range(20):
        x = getattr(simulate, move)(x, beta, rng)
    fields = torch.from_numpy(x)
    products = (fields * neighbours(fields)).mean((1, 2)) / 4
    expected = exact_2x2(beta)["products"]
    assert abs(float(products.mean()) - expected) < 4 * 2 * error(products)


def test_phi4_fulfils_the_identities_of_its_energy() -> None:
    """E[phi_i dE/dphi_i] = 1 and E[(dE/dphi_i)^2] = E[d^2E/dphi_i^2], whatever the side."""
    beta = 0.68
    x = phi4(1024, 16, beta, seed=7)
    slope = 4 * x**3 - 2 * x - beta * neighbours(x)
    first = (x * slope).mean((1, 2))
    second = (slope.square() - (12 * x * x - 2)).mean((1, 2))
    assert abs(float(first.mean()) - 1) < 4 * error(first)
    assert abs(float(second.mean())) < 4 * error(second)
    assert abs(float(x.mean())) < 5 * error(x.mean((1, 2)))  # either sign is as likely


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: gaussian(2, 4, power_law, seed),
        lambda seed: log_normal(2, 4, power_law, seed),
        lambda seed: phi4(2, 4, 0.5, seed, burn=2),
    ],
)
def test_one_seed_one_field(make: object) -> None:
    assert torch.equal(make(8), make(8))  # type: ignore[operator]
    assert not torch.equal(make(8), make(9))  # type: ignore[operator]
    fields = make(8)  # type: ignore[operator]
    assert not torch.equal(fields[0], fields[1])


@pytest.mark.parametrize(
    ("count", "side", "beta", "words"),
    [(1, 5, 0.5, "5"), (1, 4, -1.0, "-1"), (1, 4, float("nan"), "nan"), (0, 4, 0.5, "0 fields")],
)
def test_impossible_lattices_are_refused(count: int, side: int, beta: float, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        phi4(count, side, beta, seed=0)


def test_chains_are_states_of_their_own() -> None:
    x = phi4(300, 2, 0.0, seed=9, burn=30, spacing=8)
    for a, b in itertools.pairwise(x):
        assert not torch.equal(a, b)
