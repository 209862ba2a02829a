"""Eigenvectors of the Jacobian, its part between classes, calibration: closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fields_oracle import GaussianField
from oracle import GaussianMixture
from tiny import tiny
from torch import Tensor

from cdnctl.analysis.basis import Calibration, basis, between_classes, calibration
from cdnctl.core.joint import denoise
from cdnctl.core.linear import Jacobian, dense
from cdnctl.core.noise import add_noise

SHAPE = (1, 3, 4)
CLASSES = (1, 3, 2)
SIGMA = 0.1
K = len(CLASSES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> GaussianMixture:
    return GaussianMixture.random(CLASSES, SHAPE, 0)


@pytest.fixture(scope="module")
def ambiguous(model: GaussianMixture) -> Tensor:
    """The noisy picture of twenty whose class is the least certain."""
    y = model.sample(np.full(20, SIGMA), 0)
    most = [max(model.closed_form(v.numpy(), SIGMA).posterior) for v in y.flatten(1)]
    assert min(most) < 0.8
    return y[int(np.argmin(most))][None]


def test_the_basis_is_that_of_the_posterior_covariance(
    model: GaussianMixture, ambiguous: Tensor
) -> None:
    found = basis(lambda t: denoise(model, t, SIGMA), ambiguous, 4, 400, generator=generator())
    exact = model.closed_form(ambiguous.flatten().numpy(), SIGMA)
    values, vectors = np.linalg.eigh(exact.cov / SIGMA**2)
    np.testing.assert_allclose(found.top, values[::-1][:4], atol=1e-4)
    np.testing.assert_allclose(found.bottom, values[:4], atol=1e-4)
    assert found.top[0] > 1, "between classes it is less certain than the noise"
    for got, want in (
        (found.top_vectors.flatten(1), vectors[:, ::-1]),
        (found.bottom_vectors.flatten(1), vectors),
    ):
        assert abs(float(got[0] @ torch.from_numpy(want[:, 0].copy()))) > 0.999
    assert abs(found.dimension - values.sum()) < 4 * found.dimension_error < 0.2 * values.sum()
    shrunk = exact.cov / SIGMA**2 @ (ambiguous.flatten().numpy() - 0.5)
    want = np.linalg.norm(exact.mean - 0.5 - shrunk) / np.linalg.norm(exact.mean - 0.5)
    assert abs(found.bias - want) < 1e-8 and want > 0.05


def test_a_field_around_gray_is_shrunk_and_nothing_else() -> None:
    """Without bias, and with one if its mean is elsewhere."""
    field = GaussianField.smooth(4, 8)
    y = add_noise(field.draw(1, generator()), 0.2, generator(1))
    found = basis(lambda t: field(t, 0.2), y, 3)
    assert found.bias < 1e-12
    moved = basis(lambda t: field(t - 0.2, 0.2) + 0.2, y, 3)
    assert moved.bias > 1e-3
    exact = (field.spectrum / (field.spectrum + 0.04)).sum().item()
    assert abs(found.dimension - exact) < 5 * found.dimension_error


def test_the_jacobian_splits_by_class(model: GaussianMixture, ambiguous: Tensor) -> None:
    """J = sum_c p(c | y) J_c + Cov_c(D_c) / sigma^2, to 1e-8; rank K - 1 and positive."""
    exact = model.closed_form(ambiguous.flatten().numpy(), SIGMA)
    p = torch.from_numpy(exact.posterior)
    one_hot = torch.eye(K, dtype=torch.float64)

    def jacobian(weights: Tensor | None) -> Tensor:
        j = Jacobian(lambda t: denoise(model, t, SIGMA, weights), ambiguous)
        return dense(j.transposed, ambiguous)

    means = torch.cat([denoise(model, ambiguous, SIGMA, one_hot[c]) for c in range(K)])
    within = sum(float(p[c]) * jacobian(one_hot[c]) for c in range(K))
    values, vectors = between_classes(means.detach(), p, SIGMA)
    flat = vectors.flatten(1)
    between = flat.T @ (values[:, None] * flat)
    torch.testing.assert_close(jacobian(None), within + between, rtol=0, atol=1e-8)
    assert values[-1] < 1e-12 < 1e-2 < values[0] and list(values) == sorted(values, reverse=True)
    torch.testing.assert_close(flat[: K - 1] @ flat[: K - 1].T, one_hot[: K - 1, : K - 1])


@pytest.mark.parametrize("arch", ["gradresnet", "hybrid"])
def test_networks(tmp_path: Path, arch: str) -> None:
    """Of a hybrid, whose Jacobian is not symmetric, the symmetric part; the bias by its own J."""
    network = tiny(tmp_path, arch).double()
    y = 0.5 + 0.2 * torch.randn(1, 3, 8, 8, generator=generator(3), dtype=torch.float64)
    found = basis(lambda t: network(t, 0.2), y, 2, symmetric=arch == "gradresnet")
    j = torch.autograd.functional.jacobian(lambda t: network(t, 0.2), y).reshape(192, 192)
    values = torch.linalg.eigvalsh((j + j.T) / 2)
    torch.testing.assert_close(found.top, values.flip(0)[:2], atol=1e-3, rtol=0)
    torch.testing.assert_close(found.bottom, values[:2], atol=1e-3, rtol=0)
    d = network(y, 0.2) - 0.5
    net = d.flatten() - j @ (y - 0.5).flatten()
    assert abs(found.bias - float(net.norm() / d.norm())) < 1e-9


# -- calibration ----------------------------------------------------------------------


def test_the_posterior_mean_is_calibrated(model: GaussianMixture) -> None:
    clean = model.sample(np.zeros(3000), 1)

    def exact(y: Tensor, sigma: Tensor | float) -> Tensor:
        return denoise(model, y, sigma)

    found = calibration(exact, clean, SIGMA, 8, generator())
    ratio, error = found.ratio()
    assert abs(ratio - 1) < 4 * error < 0.2
    # What is expected is the trace of the posterior covariance, picture by picture.
    y = add_noise(clean, SIGMA, generator())
    for i in range(3):
        cov = model.closed_form(y[i].flatten().numpy(), SIGMA).cov
        assert abs(found.expected[i] / (np.trace(cov) / 12) - 1) < 0.7
    made = (exact(y, SIGMA) - clean).square().mean((1, 2, 3))
    torch.testing.assert_close(found.made, made)


def test_a_level_for_each_picture() -> None:
    field = GaussianField.smooth(4, 8)
    clean = field.draw(4000, generator())
    levels = torch.tensor([0.05, 0.4], dtype=torch.float64).repeat(2000)
    found = calibration(field, clean, levels, generator=generator(1))
    for level in (0.05, 0.4):
        part = Calibration(found.expected[levels == level], found.made[levels == level])
        exact = (field.spectrum * level**2 / (field.spectrum + level**2)).mean()
        assert abs(part.made.mean() / exact - 1) < 0.05
        assert abs(part.expected.mean() / exact - 1) < 0.02


def test_a_denoiser_that_is_told_too_little_noise_is_found_out() -> None:
    """It leaves noise in, and its Jacobian expects even more error than that makes."""
    field = GaussianField.smooth(4, 8)
    clean = field.draw(2000, generator())
    found = calibration(lambda y, s: field(y, s / 2), clean, 0.2, generator=generator(1))
    ratio, error = found.ratio()
    gain = field.spectrum / (field.spectrum + 0.01)
    exact = ((1 - gain) ** 2 * field.spectrum + gain**2 * 0.04).mean() / (0.04 * gain.mean())
    assert abs(ratio - float(exact)) < 4 * error and ratio < 1 - 10 * error


def test_the_error_of_the_ratio_is_that_of_repetitions() -> None:
    field = GaussianField.smooth(4, 8)
    found = calibration(field, field.draw(8000, generator()), 0.2, generator=generator(1))
    parts = [
        replace(found, expected=e, made=m).ratio()
        for e, m in zip(found.expected.view(200, 40), found.made.view(200, 40), strict=True)
    ]
    ratios, errors = np.array(parts).T
    assert abs(ratios.std() / errors.mean() - 1) < 0.2
