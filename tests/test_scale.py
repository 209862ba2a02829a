"""Class scores at the scale of the training; denoising at none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import noisy_picture, tiny

from cdnctl import images
from cdnctl.analysis.attacks import log_posterior
from cdnctl.api import Model
from cdnctl.core.noise import noisy_version
from cdnctl.images import Image
from cdnctl.measure.evaluate import Sample, evaluate
from cdnctl.restore import Settings, classify, restore, restore_batch
from cdnctl.restore.scale import Shrink

SIGMA, PATCH = 0.2, 16
LARGE = [(48, 66), (240, 270)]  # in a batch, and in tiles


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Trained on small crops: every picture of these tests is large for it."""
    return tiny(tmp_path_factory.mktemp("w"), patch=PATCH, widths=[8], blocks=[1])


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The same weights, said to be of large crops: no picture is large."""
    return tiny(tmp_path_factory.mktemp("w"), patch=512, widths=[8], blocks=[1])


def as_batch(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]


# -- area averaging -------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_a_whole_factor_is_the_mean_of_blocks(factor: int) -> None:
    y = torch.randn(2, 3, 8 * factor, 11 * factor, dtype=torch.float64)
    shrink = Shrink(8 * factor, 11 * factor, 8)
    assert (shrink.height, shrink.width, shrink.factor) == (8, 11, factor)
    assert shrink.noise == pytest.approx(1 / factor)
    blocks = y.unflatten(3, (11, factor)).unflatten(2, (8, factor))
    torch.testing.assert_close(shrink(y), blocks.mean((3, 5)), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 99))
def test_every_pixel_counts_alike(height: int, width: int, side: int, seed: int) -> None:
    """The mean of the picture is kept, and so is a flat one; the shorter side is as asked."""
    shrink = Shrink(height, width, side)
    y = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    small = shrink(y)
    assert small.shape[2:] == (shrink.height, shrink.width)
    assert min(small.shape[2:]) == min(height, width, side)
    torch.testing.assert_close(small.mean(), y.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(shrink(torch.full_like(y, 0.3)), torch.full_like(small, 0.3))


@pytest.mark.parametrize("size", [(300, 451), (123, 100), (64, 700)])
def test_what_is_left_of_noise(size: tuple[int, int]) -> None:
    shrink = Shrink(*size, 40)
    noise = np.random.default_rng(0).standard_normal((*size, 30)).astype(np.float32)
    left = shrink.samples(noise)
    assert left.std() == pytest.approx(shrink.noise, rel=0.02)
    assert 0.6 / shrink.factor < shrink.noise < 1 / shrink.factor, "shared pixels are averaged more"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_samples_are_averaged_in_blocks_of_rows(
    dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdnctl.restore.scale.BLOCK", 1000)
    samples = images.from_unit(np.clip(noisy_picture(90, 77), 0, 1), np.dtype(dtype))
    shrink = Shrink(90, 77, 20)
    expected = shrink(as_batch(images.to_unit(samples)))[0].permute(1, 2, 0)
    np.testing.assert_allclose(shrink.samples(samples), expected, atol=1e-6)


def test_small_pictures_stay_as_they_are() -> None:
    y = torch.randn(1, 3, 20, 30)
    for side in (20, 21, 100):
        shrink = Shrink(20, 30, side)
        assert shrink.factor == shrink.noise == 1 and torch.equal(shrink(y), y)


# -- classes --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", LARGE)
def test_classes_are_those_of_the_small_picture(
    model: Model, size: tuple[int, int], channels: int
) -> None:
    y = noisy_picture(*size, channels)
    shrink = Shrink(*size, PATCH)
    told = SIGMA * shrink.noise * (3**0.5 if channels == 1 else 1)
    small = shrink(as_batch(y)).repeat(1, 3 // channels, 1, 1)
    multiple = model.module.config.multiple
    assert shrink.height % multiple == shrink.width % multiple == 0, "nothing is mirrored"
    expected = model.posterior(small, told)[0]
    found = classify(Image.of(y, np.float32), model, SIGMA)
    assert found.size == (shrink.height, shrink.width)
    assert found.factor == pytest.approx(shrink.factor)
    values = torch.tensor([found.posterior[name] for name in model.classes])
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)
    as_it_is = model.posterior(as_batch(y).repeat(1, 3 // channels, 1, 1), SIGMA)[0]
    assert (values - as_it_is).abs().max() > 1e-3, "or the scale would make no difference"


def test_gray_need_not_be_stored_as_gray(model: Model) -> None:
    y = noisy_picture(48, 64, 1)
    found = (classify(Image.of(p, np.float32), model, SIGMA) for p in (y, y.repeat(3, -1)))
    assert len({tuple(f.posterior.items()) for f in found}) == 1


@pytest.mark.parametrize("size", LARGE)
def test_denoising_knows_no_scale(model: Model, same: Model, size: tuple[int, int]) -> None:
    """To the bit, but for what the most probable class decides."""
    y = Image.of(noisy_picture(*size), np.float32)
    for options in ({}, {"target": {"dog": 1.0}}, {"target": {"dog": 1.0}, "guidance": 2.0}):
        large, small = (restore(y, m, Settings(SIGMA, tile=100, **options)) for m in (model, same))
        np.testing.assert_array_equal(large.image.samples, small.image.samples)
        assert large.posterior == pytest.approx(classify(y, model, SIGMA).posterior, abs=1e-5)
        assert small.posterior == pytest.approx(classify(y, same, SIGMA).posterior, abs=1e-5)


@pytest.mark.parametrize("size", LARGE)
def test_auto_is_the_class_of_the_small_picture(model: Model, size: tuple[int, int]) -> None:
    """Also among pictures of other classes."""
    found = {}
    for seed in range(40):  # pictures of at least two classes
        pixels = noisy_picture(*size, sigma=0.1, seed=seed) + 0.2 * np.float32(seed % 9 - 4)
        y = Image.of(pixels, np.float32)
        found.setdefault(next(iter(classify(y, model, SIGMA).posterior)), y)
    assert len(found) > 1
    auto = Settings(SIGMA, target="auto", tile=100)
    together = list(found.values())
    results = [restore(y, model, auto) for y in together]
    if size == LARGE[0]:
        batch = restore_batch(together, model, auto)
        for one, other in zip(results, batch, strict=True):
            np.testing.assert_array_equal(one.image.samples, other.image.samples)
            assert one.posterior == other.posterior
    for (name, y), result in zip(found.items(), results, strict=True):
        told = restore(y, model, Settings(SIGMA, target={name: 1.0}, tile=100))
        np.testing.assert_array_equal(result.image.samples, told.image.samples)
        assert next(iter(result.posterior)) == name


@pytest.mark.parametrize("sigma", [0.0, SIGMA])
def test_accuracy_and_attacks_are_of_what_classify_says(
    model: Model, tmp_path: Path, sigma: float
) -> None:
    clean = Image.of(noisy_picture(48, 66, sigma=0.05))
    images.write(clean, tmp_path / "a.png")
    sample = Sample(tmp_path / "a.png", "dog")
    (row,) = evaluate([sample], model, [sigma])
    noisy = noisy_version(clean.pixels, sigma, sample.key, 0) if sigma else clean.pixels
    said = classify(Image.of(noisy, np.float32), model, sigma).posterior
    assert row.predicted == next(iter(said))
    attacked = log_posterior(model, sigma)(as_batch(noisy)).exp()[0].tolist()
    for name, p in zip(model.classes, attacked, strict=True):
        assert said[name] == pytest.approx(p, abs=1e-5)
