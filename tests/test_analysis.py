"""Explanations: the formulas that they claim to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, noisy_picture, tiny
from torch import Tensor

from cdnctl.analysis.evidence import evidence, overlay
from cdnctl.analysis.uncertainty import posterior_std, uncertainty
from cdnctl.api import Model
from cdnctl.errors import UnknownClassError, UsageError
from cdnctl.images import Image
from cdnctl.restore import Settings

SIGMA = 0.2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("weights"))


# -- evidence -------------------------------------------------------------------------------


def test_evidence_is_the_gradient_of_the_log_posterior(model: Model) -> None:
    y = noisy_picture()
    for c, name in enumerate(CLASSES):
        leaf = torch.from_numpy(y.transpose(2, 0, 1).copy())[None].requires_grad_()
        log_p = model.module.log_joint(leaf, SIGMA).log_softmax(1)[0, c]
        (gradient,) = torch.autograd.grad(log_p, leaf)
        expected = SIGMA**2 * gradient[0].permute(1, 2, 0).numpy()
        assert np.abs(expected).max() > 1e-3
        found = evidence(model, y, SIGMA, name)
        assert found.label == name
        np.testing.assert_allclose(found.gradient, expected, atol=1e-4 * np.abs(expected).max())


def test_following_the_evidence_makes_a_class_more_probable(model: Model) -> None:
    y = noisy_picture()
    for name in CLASSES:
        found = evidence(model, y, SIGMA, name)
        assert (
            evidence(model, y + 0.1 * found.gradient, SIGMA).posterior[name]
            > (found.posterior[name])
        )


def test_evidence_balances_over_the_classes(model: Model) -> None:
    """D = sum_c p(c | y) D_c, so what speaks for one speaks against the others."""
    maps = {name: evidence(model, noisy_picture(), SIGMA, name) for name in CLASSES}
    total = sum(e.posterior[name] * e.gradient for name, e in maps.items())
    largest = max(np.abs(e.gradient).max() for e in maps.values())
    assert np.abs(total).max() < 1e-5 * largest


def test_evidence_of_the_most_probable_class(model: Model) -> None:
    found = evidence(model, noisy_picture(), SIGMA)
    assert found.label == max(found.posterior, key=found.posterior.__getitem__)
    assert list(found.posterior.values()) == sorted(found.posterior.values(), reverse=True)


def test_support_is_the_gradient_along_the_pictures_deviation(model: Model) -> None:
    y = noisy_picture()
    found = evidence(model, y, SIGMA, "dog")
    denoised = model.denoise(torch.from_numpy(y.transpose(2, 0, 1).copy()), SIGMA)
    shown = denoised - denoised.mean((1, 2), keepdim=True)
    expected = (found.gradient * shown.permute(1, 2, 0).numpy()).sum(2)
    np.testing.assert_allclose(found.support, expected, atol=1e-6)


def test_evidence_of_gray_pictures(model: Model) -> None:
    found = evidence(model, noisy_picture(channels=1), SIGMA)
    assert found.gradient.shape == (48, 64, 1) and found.support.shape == (48, 64)


def test_evidence_needs_a_joint_density_and_a_known_class(tmp_path: Path, model: Model) -> None:
    for arch in ("unet", "classifier"):
        with pytest.raises(UsageError, match="no joint density"):
            evidence(tiny(tmp_path, arch), noisy_picture(), SIGMA)
    with pytest.raises(UnknownClassError, match="zebra"):
        evidence(model, noisy_picture(), SIGMA, "zebra")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1.0, 1e6])
def test_overlay(channels: int, scale: float) -> None:
    pixels = noisy_picture(channels=channels, sigma=1.0)  # reaches far out of [0, 1]
    support = scale * np.random.default_rng(0).standard_normal(pixels.shape[:2])
    support[:, :20] = 0
    shown = overlay(pixels, support)
    assert shown.shape == (48, 64, 3) and 0 <= shown.min() <= shown.max() <= 1
    red, green, blue = np.moveaxis(shown, 2, 0)
    np.testing.assert_array_equal(red[support == 0], blue[support == 0])
    np.testing.assert_array_equal(red[support == 0], green[support == 0])
    assert (red[support > 0] > blue[support > 0]).all()
    assert (red[support < 0] < blue[support < 0]).all()


def test_overlay_shows_the_picture_where_nothing_speaks() -> None:
    pixels = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64, 1)
    shown = overlay(pixels, np.zeros((48, 64)))
    assert (np.diff(shown[..., 0].ravel()) > 0).all(), "in the order of its brightness"


# -- uncertainty ----------------------------------------------------------------------------


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_linear_gaussian_denoiser(a: float) -> None:
    """Prior variance s^2, a = s^2 / (s^2 + sigma^2): the posterior variance is a sigma^2."""
    y = torch.randn(1, 3, 5, 7, dtype=torch.float64)
    found = uncertainty(lambda t: a * t, y, SIGMA, probes=1)
    torch.testing.assert_close(found.std, torch.full_like(y, SIGMA * a**0.5))
    assert found.dimension == pytest.approx(a * y.numel()) and found.probes == 1


def test_general_symmetric_denoiser() -> None:
    """The estimate is within five standard errors of the diagonal; its error shrinks."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(27, 27, dtype=torch.float64, generator=generator) / 27**0.5
    matrix = root @ root.T + 0.1 * torch.eye(27)
    y = torch.randn(1, 3, 3, 3, dtype=torch.float64, generator=generator)
    spread = (matrix - matrix.diagonal().diag()).square().sum(1)  # variance of one probe

    def denoise(t: Tensor) -> Tensor:
        return (matrix @ t.flatten()).view_as(t)

    errors = []
    for probes in (30, 3000):
        found = uncertainty(denoise, y, SIGMA, probes, generator)
        error = (found.std / SIGMA).square().flatten() - matrix.diagonal()
        assert (error.abs() < 5 * (spread / probes).sqrt()).all()
        assert found.dimension == pytest.approx(
            matrix.trace().item(), abs=5 * (2 * spread.sum().item() / probes) ** 0.5
        )
        errors.append(error.square().mean().sqrt().item())
    assert errors[1] < errors[0] / 4


def test_negative_variances_become_zero() -> None:
    y = torch.zeros(1, 1, 4, 4)
    assert torch.equal(uncertainty(lambda t: -t, y, SIGMA, 1).std, y)


def test_window_averages_variances() -> None:
    """With a diagonal matrix every probe is exact, so nothing but the window is seen."""
    diagonal = torch.rand(1, 2, 6, 9, dtype=torch.float64)
    found = uncertainty(lambda t: diagonal * t, torch.zeros_like(diagonal), SIGMA, 1, window=3)
    for i, j in [(0, 0), (2, 4), (5, 8)]:
        near = diagonal[0, :, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
        torch.testing.assert_close(found.std[0, :, i, j], SIGMA * near.sqrt())


def test_randomness_is_an_argument_and_the_input_is_left_alone() -> None:
    y = torch.randn(1, 1, 6, 6)
    before = y.clone()

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return uncertainty(lambda t: t.cumsum(3).cumsum(2), y, SIGMA, 4, generator).std

    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, before) and not y.requires_grad


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(30, 41), (91, 137)])
def test_whole_pictures(tmp_path: Path, channels: int, size: tuple[int, int]) -> None:
    """An exact Gaussian model: sigma sqrt(a) everywhere, over tiles and their seams too."""
    exact = tiny(tmp_path, gaussian=True)
    y = noisy_picture(*size, channels)
    std, sigma = posterior_std(Image.of(y, np.float32), exact, Settings(SIGMA, tile=70), probes=2)
    seen = SIGMA * (3**0.5 if channels == 1 else 1)
    a = 0.25**2 / (0.25**2 + seen**2)
    assert sigma == SIGMA and std.shape == (*size, 1)
    np.testing.assert_allclose(std, SIGMA * a**0.5, rtol=1e-4)


def test_whole_pictures_repeat_and_follow_the_class(model: Model) -> None:
    y = Image.of(noisy_picture(20, 24), np.float32)
    first, _ = posterior_std(y, model, Settings(SIGMA), probes=4)
    again, _ = posterior_std(y, model, Settings(SIGMA), probes=4)
    other, _ = posterior_std(y, model, Settings(SIGMA, target={"dog": 1.0}), probes=4)
    np.testing.assert_array_equal(first, again)
    assert np.isfinite(first).all() and (first >= 0).all()
    assert np.abs(first - other).max() > 1e-4
