"""Explanations: the formulas that they claim to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, noisy_picture, tiny
from torch import Tensor

from cdnctl.analysis.evidence import drawn as evidence_drawn
from cdnctl.analysis.evidence import evidence
from cdnctl.analysis.uncertainty import drawn, posterior_std, uncertainty
from cdnctl.api import Model
from cdnctl.errors import ImageError, UnknownClassError, UsageError
from cdnctl.images import Image
from cdnctl.restore import Settings, classify, restore
from cdnctl.restore.view import GRADIENT, MIN_TILE

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
        expected = gradient[0].permute(1, 2, 0).numpy()
        assert np.abs(expected).max() > 1e-2
        found = evidence(model, y, SIGMA, name, draws=0)
        assert found.label == name
        np.testing.assert_allclose(found.gradient, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.0, SIGMA])
def test_evidence_of_large_pictures_is_the_gradient_of_what_classify_says(
    tmp_path: Path, channels: int, sigma: float
) -> None:
    """Of the smaller copy, by finite differences; in one channel if the picture is gray."""
    small = tiny(tmp_path, patch=16)
    y = noisy_picture(48, 72, channels)
    found = evidence(small, y, sigma, "dog", draws=0)
    assert found.gradient.shape == (16, 24, channels) and found.support.shape == (16, 24)
    direction = np.random.default_rng(0).standard_normal(found.gradient.shape).astype(np.float32)
    large = np.kron(direction, np.ones((3, 3, 1), np.float32))
    step = 1e-3
    up, down = (
        np.log(classify(Image.of(y + t * large, np.float32), small, sigma).posterior["dog"])
        for t in (step, -step)
    )
    expected = (up - down) / (2 * step)
    assert (found.gradient * direction).sum() == pytest.approx(expected, rel=0.02, abs=1e-3)


@pytest.mark.parametrize("draws", [0, 8])
def test_following_the_evidence_makes_a_class_more_probable(model: Model, draws: int) -> None:
    y = noisy_picture()
    for name in CLASSES:
        found = evidence(model, y, SIGMA, name, draws)
        moved = evidence(model, y + 0.004 * found.gradient, SIGMA, draws=0)
        assert moved.posterior[name] > found.posterior[name]


def test_evidence_balances_over_the_classes(model: Model) -> None:
    """D = sum_c p(c | y) D_c, so what speaks for one speaks against the others."""
    maps = {name: evidence(model, noisy_picture(), SIGMA, name, draws=0) for name in CLASSES}
    total = sum(e.posterior[name] * e.gradient for name, e in maps.items())
    largest = max(np.abs(e.gradient).max() for e in maps.values())
    assert np.abs(total).max() < 1e-5 * largest


def test_evidence_of_the_most_probable_class(model: Model) -> None:
    found = evidence(model, noisy_picture(), SIGMA, draws=1)
    assert found.label == max(found.posterior, key=found.posterior.__getitem__)
    assert list(found.posterior.values()) == sorted(found.posterior.values(), reverse=True)
    classified = classify(Image.of(noisy_picture(), np.float32), model, SIGMA)
    assert found.posterior == pytest.approx(classified.posterior, abs=1e-6)


def test_support_is_the_gradient_along_the_pictures_deviation(model: Model) -> None:
    y = noisy_picture()
    denoised = model.denoise(torch.from_numpy(y.transpose(2, 0, 1).copy()), SIGMA)
    shown = denoised - denoised.mean((1, 2), keepdim=True)
    for draws in (0, 3):
        found = evidence(model, y, SIGMA, "dog", draws)
        expected = (found.gradient * shown.permute(1, 2, 0).numpy()).sum(2)
        np.testing.assert_allclose(found.support, expected, atol=1e-6)


def test_evidence_of_gray_pictures_however_they_are_stored(model: Model) -> None:
    y = noisy_picture(channels=1)
    gray, rgb = (evidence(model, pixels, SIGMA, "dog", 2) for pixels in (y, y.repeat(3, -1)))
    assert gray.gradient.shape == (48, 64, 1) and gray.support.shape == (48, 64)
    np.testing.assert_array_equal(gray.gradient, rgb.gradient)
    np.testing.assert_array_equal(gray.support, rgb.support)


def test_shifts_average_the_grid_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a flat picture nothing but the grid of the network's cells is seen."""
    monkeypatch.setattr("cdnctl.analysis.evidence.SMOOTHING_SIGMA", 0.0)
    flat = np.full((48, 64, 3), 0.7, np.float32)
    inside = (slice(16, -16), slice(16, -16))
    spreads = [
        evidence(model, flat, SIGMA, "dog", draws).gradient[inside].std((0, 1)).max()
        for draws in (0, 32)
    ]
    assert spreads[1] < 0.25 * spreads[0]


def test_draws_average_the_noise_out(model: Model) -> None:
    """Averages of more draws lie nearer to each other, and are repeated by their seed."""
    apart = []
    for draws in (2, 32):
        a, b, again = (
            evidence(model, noisy_picture(), SIGMA, "dog", draws, seed).gradient
            for seed in (0, 1, 0)
        )
        np.testing.assert_array_equal(a, again)
        apart.append(np.square(a - b).mean())
    assert 0 < apart[1] < 0.2 * apart[0]


def test_smoothing_stays_within_the_noise_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as the picture's own noise does: 0.4 is what the model has seen."""
    model = tiny(tmp_path)
    told: list[float] = []
    correct = type(model.module).correction

    def watched(self: object, y: Tensor, sigma: float, *args: object) -> object:
        told.append(sigma)
        return correct(self, y, sigma, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.module), "correction", watched)
    monkeypatch.setattr("cdnctl.analysis.evidence.SMOOTHING_SIGMA", 0.3)
    for channels in (1, 3):
        for sigma in (0.0, 0.2, 0.39, 0.5):
            told.clear()
            evidence(model, noisy_picture(20, 24, channels), sigma, draws=2)
            own = sigma * (3**0.5 if channels == 1 else 1)
            assert own <= told[-1] <= max(0.4, own) * 1.0001
            assert told[-1] > own or own >= 0.4


def test_heat_keeps_the_sum_and_does_not_depend_on_size(model: Model) -> None:
    found = evidence(model, noisy_picture(), SIGMA, "dog", draws=2)
    for size in ((48, 64), (96, 128), (480, 640), (24, 32)):
        heat = found.heat(*size)
        assert heat.shape == size and heat.dtype == np.float32
        assert 100 * heat.mean() == pytest.approx(found.support.sum(), rel=0.02, abs=1e-3)
    fine, coarse = found.heat(480, 640), found.heat(48, 64)
    np.testing.assert_allclose(
        fine.reshape(48, 10, 64, 10).mean((1, 3)), coarse, atol=0.1 * np.abs(coarse).max()
    )
    assert np.abs(np.diff(coarse)).max() < np.abs(np.diff(found.support * 30.72)).max()


def test_evidence_needs_a_joint_density_and_a_known_class(tmp_path: Path, model: Model) -> None:
    for arch in ("unet", "classifier"):
        with pytest.raises(UsageError, match="no joint density"):
            evidence(tiny(tmp_path, arch), noisy_picture(), SIGMA)
    with pytest.raises(UnknownClassError, match="zebra"):
        evidence(model, noisy_picture(), SIGMA, "zebra")


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (20, 24)])
@pytest.mark.parametrize("channels", [1, 3])
def test_evidence_of_any_size_is_drawn(model: Model, size: tuple[int, int], channels: int) -> None:
    y = noisy_picture(*size, channels)
    for sigma in (0.0, SIGMA):
        found = evidence(model, y, sigma, draws=2)
        assert np.isfinite(found.heat(*size)).all()
        sheet = evidence_drawn(Image.of(y), found).samples
        assert sheet.dtype == np.uint8 and sheet.shape[2] == 3 and min(sheet.shape[:2]) > 50


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


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(30, 41), (91, 137)])
def test_whole_pictures(tmp_path: Path, channels: int, size: tuple[int, int]) -> None:
    """An exact Gaussian model: sigma sqrt(a) everywhere, over tiles and their seams too."""
    exact = tiny(tmp_path, gaussian=True)
    # A picture of the model's own kind: it goes no further than its noise level allows.
    spread = (0.25**2 + SIGMA**2) ** 0.5
    y = 0.5 + spread * np.random.default_rng(0).standard_normal((*size, channels), np.float32)
    y = y.astype(np.float32)
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


def watch(model: Model, monkeypatch: pytest.MonkeyPatch, most: int | None = None) -> list[int]:
    """Pixels of the tiles that the network is given; for more than ``most`` memory runs out."""
    kind, sizes = type(model.module), []
    correction = kind.correction

    def watched(self: object, y: Tensor, *args: object) -> object:
        if most is not None and y[:, 0].numel() > most:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(y[:, 0].numel())
        return correction(self, y, *args)

    monkeypatch.setattr(kind, "correction", watched)
    return sizes


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of little reach: its tiles may be small."""
    return tiny(tmp_path_factory.mktemp("narrow"), widths=[8], blocks=[1], patch=512)


def test_uncertainty_keeps_to_its_memory(narrow: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which a gradient takes more of than restoring does; less than that gives smaller tiles."""
    y = Image.of(noisy_picture(235, 310), np.float32)
    need = narrow.needs.bytes_per_pixel
    sizes = watch(narrow, monkeypatch)
    memory = GRADIENT * MIN_TILE**2 * need
    posterior_std(y, narrow, Settings(SIGMA, memory=memory), probes=1)
    assert len(sizes) > 1 and GRADIENT * max(sizes) * need <= memory
    sizes.clear()
    restore(y, narrow, Settings(SIGMA, memory=memory))
    assert max(sizes) * need <= memory < GRADIENT * max(sizes) * need
    sizes.clear()
    with pytest.raises(ImageError, match=r"--memory allows 1 MB, .* allow more, or give --tile"):
        posterior_std(y, narrow, Settings(SIGMA, memory=10**6), probes=1)
    assert not sizes
    posterior_std(y, narrow, Settings(SIGMA, memory=10**6, tile=200), probes=1)
    assert max(sizes) <= 200**2, "the tile that was asked for is the tile"


def test_evidence_keeps_to_the_memory_that_is_free(
    narrow: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = watch(narrow, monkeypatch)
    pixels = np.tile(noisy_picture(100, 300), (1, 4, 1))  # too long to be shrunk
    evidence(narrow, pixels, SIGMA, draws=0)
    assert max(sizes) >= 120_000
    sizes.clear()
    need = narrow.needs.bytes_per_pixel
    monkeypatch.setattr("cdnctl.restore.view.available_memory", lambda _: 2 * MIN_TILE**2 * need)
    evidence(narrow, pixels, SIGMA, draws=1)
    assert max(sizes) <= MIN_TILE**2


def test_uncertainty_in_smaller_tiles_where_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers but for chance, which is drawn for each tile anew."""
    exact = tiny(tmp_path, widths=[8], blocks=[1], gaussian=True)
    y = np.random.default_rng(0).standard_normal((210, 240, 3), np.float32)
    image = Image.of(0.5 + 0.3 * y, np.float32)
    whole, _ = posterior_std(image, exact, Settings(SIGMA), probes=1)
    sizes = watch(exact, monkeypatch, 150**2)
    parts, _ = posterior_std(image, exact, Settings(SIGMA), probes=1)
    assert len(sizes) > 1 and max(sizes) <= 150**2
    np.testing.assert_allclose(parts, whole, rtol=1e-4)
    with pytest.raises(ImageError, match="give a smaller --tile"):
        posterior_std(image, exact, Settings(SIGMA, tile=200), probes=1)


def test_the_most_probable_class_is_that_of_the_small_picture(tmp_path: Path) -> None:
    """As in denoising: both are of the same picture."""
    model = tiny(tmp_path, patch=8)
    y = Image.of(noisy_picture(32, 40), np.float32)
    best = next(iter(restore(y, model, Settings(SIGMA, target="auto")).posterior))
    auto, _ = posterior_std(y, model, Settings(SIGMA, target="auto"), probes=2)
    for name in CLASSES:
        told, _ = posterior_std(y, model, Settings(SIGMA, target={name: 1.0}), probes=2)
        assert np.array_equal(auto, told) == (name == best)


def test_what_is_uncertain_is_drawn_bright() -> None:
    std = np.full((480, 600), 2 / 255, np.float32)
    std[:, 300:] = 8 / 255
    for values, expected in ((std, True), (np.zeros((480, 600)), False)):
        sheet = drawn(values, 25 / 255).samples.astype(int)
        left, right = sheet[:480, 20:280].sum(-1), sheet[:480, 320:580].sum(-1)
        assert (right.min() > left.max()) == expected
        assert len(sheet) > 500, "with its scale below"
