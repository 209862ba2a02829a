"""Corrections beyond what noise allows are held back; clipped noise is undone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from tiny import noisy_picture, tiny

from cdnctl.api import Model
from cdnctl.core.guard import FAR, WINDOW, held_back, held_to
from cdnctl.core.noise import clipped_mean, ends, unclipped, without_clipping
from cdnctl.images import Image
from cdnctl.models import Whole
from cdnctl.restore import Settings, restore, restore_batch


@pytest.mark.parametrize("sigma", [0.5 / 255, 5 / 255, 75 / 255])
@pytest.mark.parametrize("channels", [1, 3])
def test_pure_noise_is_never_too_much(sigma: float, channels: int) -> None:
    """A flat picture's correction is minus its noise: the largest that is right."""
    noise = torch.randn(8, channels, 200, 200, generator=torch.Generator().manual_seed(0))
    correction, factor = held_back(sigma * noise, sigma)
    assert (factor == 1).all() and torch.equal(correction, sigma * noise)


def test_too_much_fades_and_far_too_much_is_nothing() -> None:
    noise = torch.randn(1, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    left = []
    for times in (1.0, 1.7):
        correction, factor = held_back(times * 0.1 * noise, 0.1)
        assert (factor < 1).all() if times > 1 else (factor == 1).all()
        left.append(correction.std().item())
    assert left[0] > 0.09 and 0 < left[1] < 0.05
    assert not held_back(1.5 * FAR * 0.1 * noise, 0.1)[0].any()
    # A single place: all that is farther away than a window is as it was.
    noise *= 0.1
    spoilt = noise.clone()
    spoilt[:, :, 60, 60] += 9
    correction, factor = held_back(spoilt, 0.1)
    r = WINDOW // 2
    assert not correction[:, :, 60, 60].any()
    factor[:, :, 60 - r : 61 + r, 60 - r : 61 + r] = 1
    assert (factor == 1).all()


def test_levels_of_a_batch_are_its_pictures_own() -> None:
    noise = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.3])
    both = held_back(0.3 * noise, sigma)[0]
    assert torch.equal(both[1], 0.3 * noise[1]) and both[0].std() < 0.2


def test_a_correction_is_held_to_the_noise_that_was_measured() -> None:
    noise = 0.05 * torch.randn(1, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    allowed = torch.full((1, 1, 100, 100), 0.02)
    allowed[..., 50:] = 0.2
    held = held_to(noise, allowed)
    r = WINDOW // 2
    assert torch.equal(held[..., 50 + r :], noise[..., 50 + r :])
    assert 0.019 < held[..., : 50 - r].std() < 0.021
    assert not held_to(noise, 0 * allowed).any()


def broken(model: Model, monkeypatch: pytest.MonkeyPatch, top: int) -> Model:
    """A model whose corrections explode in the rows from ``top`` on, where they are not noise."""
    right = model.module.correction

    def wrong(
        y: torch.Tensor, sigma: float, mixture: object = None, whole: Whole | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        correction, logits = right(y, sigma, mixture, whole)
        correction[..., top:, :] += 0.8
        return correction, logits

    monkeypatch.setattr(model.module, "correction", wrong)
    return model


@pytest.mark.parametrize("size", [(40, 40), (160, 300)])  # together, and on their own
def test_a_broken_model_leaves_the_picture_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    image = Image.of(noisy_picture(*size), np.uint8)
    settings = Settings(sigma=25 / 255)
    sound = restore(image, tiny(tmp_path, gaussian=True), settings)
    assert sound.held == 0
    result = restore(image, broken(tiny(tmp_path, gaussian=True), monkeypatch, 24), settings)
    assert 0.2 < result.held <= 1
    assert np.array_equal(result.image.samples[32:], image.samples[32:])
    assert np.array_equal(result.image.samples[:16], sound.image.samples[:16])
    assert not np.array_equal(result.image.samples[:16], image.samples[:16])


def test_a_guarded_picture_in_tiles_is_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both the guard and the ends of the range look at surroundings beyond a tile."""
    y = np.random.default_rng(0).normal(0.02, 0.2, (96, 700, 3))
    image = Image.of(np.clip(y, 0, 1), np.uint8)
    model = tiny(tmp_path)
    right = model.module.correction

    def steep(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        correction, logits = right(*args)
        return 6 * correction, logits

    monkeypatch.setattr(model.module, "correction", steep)
    for settings in (Settings(0.02), Settings(0.1), Settings(0.2)):
        whole = restore(image, model, settings)
        parts = restore(image, model, Settings(settings.sigma, tile=150))
        assert np.abs(whole.image.samples.astype(int) - parts.image.samples).max() <= 1
    assert restore(image, model, Settings(0.02)).held > 0


# -- clipped noise -----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.02, 0.2, 0.5])
def test_the_mean_of_clipped_noise(sigma: float) -> None:
    x = np.array([0, 0.01, 0.1, 0.5, 0.93, 1])
    noise = np.random.default_rng(0).standard_normal((200_000, 1))
    drawn = np.clip(x + sigma * noise, 0, 1).mean(0)
    got = clipped_mean(x, sigma)
    np.testing.assert_allclose(got, drawn, atol=5 * sigma / 200_000**0.5)
    np.testing.assert_allclose(without_clipping(got, sigma), x, atol=1e-6)
    np.testing.assert_allclose(clipped_mean(1 - x, sigma), 1 - got, atol=1e-12)
    assert without_clipping(np.array([-0.1, 1.1]), sigma).tolist() == [0, 1]


def test_blacks_and_whites_come_back_where_their_noise_was_clipped_and_only_there() -> None:
    sigma, step = 50 / 255, 1 / 255
    clean = np.zeros((60, 60, 3))
    clean[:, 20:40], clean[:, 40:] = 0.5, 1
    y = clean + sigma * np.random.default_rng(0).standard_normal(clean.shape)
    denoised = clipped_mean(clean, sigma)
    assert denoised[0, 0, 0] > 0.07
    clipped = np.rint(np.clip(y, 0, 1) * 255) / 255
    back = unclipped(denoised, sigma, ends(clipped), step)
    assert np.abs(back - clean)[:, 5:-5].max() < 0.03
    assert np.abs(back - clean).mean() < 0.001 < 0.05 * np.abs(denoised - clean).mean()
    # A picture without noise, told of some, has its dark grays left as they are.
    dark = np.full((60, 60, 3), 0.05)
    left = unclipped(dark, sigma, ends(dark), step)
    assert np.abs(left - dark).max() < 0.003


def test_clipped_files_are_restored_without_a_veil(tmp_path: Path) -> None:
    """Through the whole way of a file: the Gaussian model's blacks are black again."""
    model = tiny(tmp_path, gaussian=True)
    clean = (data.chelsea()[:96, :96] > 110) * np.float32(1)
    y = np.clip(clean + 0.3 * noisy_picture(96, 96, sigma=1.0, seed=3), 0, 1)
    images = [Image.of(y, kind) for kind in (np.uint8, np.uint16, np.float32)]
    settings = Settings(sigma=0.3)
    small, wide, floats = (restore(image, model, settings).image.pixels for image in images)
    assert np.abs(small - wide).max() < 2 / 255
    assert np.square(small - clean).mean() < 0.92 * np.square(floats - clean).mean()
    assert restore_batch([Image.of(y[:40, :40], np.uint8)], model, settings)[
        0
    ].image.samples.shape == (40, 40, 3)


def test_without_noise_nothing_is_left_and_nothing_is_lost() -> None:
    """In samples without steps, for which the limit is zero."""
    correction = torch.zeros(2, 3, 20, 20)
    correction[1] = 0.1
    held, factor = held_back(correction, torch.zeros(2))
    assert torch.equal(held, torch.zeros_like(held)) and factor.isfinite().all()
