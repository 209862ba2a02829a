"""Measuring noise, and taking it out: against pictures whose noise is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from camera import Camera, pair
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.transform import resize

from cdnctl.core.noise import unclipped_gain
from cdnctl.images import Image
from cdnctl.restore import noise_level
from cdnctl.restore.measuring import halved, measure
from cdnctl.restore.noise import AXES, OCTAVES, Noise


def scene(name: str = "astronaut", channels: int = 3) -> np.ndarray:
    """A picture of scikit-image, of half its size, which hides what noise it has itself."""
    pixels = np.asarray(getattr(data, name)(), float)
    pixels = halved((pixels if pixels.ndim == 3 else pixels[:, :, None]) / 255)
    return pixels.mean(2, keepdims=True) if channels == 1 else pixels


def white(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("sigma", [25, 50, 75])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "cat"])
def test_strong_white_noise_is_found_in_files_that_cut_it_off(name: str, sigma: float) -> None:
    clean = scene(name)
    noise = measure(np.clip(clean + sigma / 255 * white(clean.shape), 0, 1))
    assert noise.is_white
    assert 255 * noise.sigma == pytest.approx(sigma, rel=0.12)


@pytest.mark.parametrize("sigma", [5, 15, 25, 50])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "cat"])
def test_white_noise_is_found_and_called_white(name: str, sigma: float) -> None:
    clean = scene(name)
    noise = measure(clean + sigma / 255 * white(clean.shape))
    assert noise.is_white
    assert 255 * noise.sigma == pytest.approx(sigma, rel=0.1)
    assert 255 * noise.safe == pytest.approx(sigma, rel=0.1)
    assert noise.summary().startswith("white noise")


@pytest.mark.parametrize("sigma", [25, 50])
def test_white_noise_of_gray_pictures(sigma: float) -> None:
    clean = scene(channels=1)
    noise = measure(clean + sigma / 255 * white(clean.shape))
    assert 255 * noise.sigma == pytest.approx(sigma, rel=0.15)


def test_scale_of_levels() -> None:
    """Pure noise: the level of every axis and octave is that of its own white noise."""
    noise = measure(0.5 + 0.05 * white((256, 256, 3)))
    np.testing.assert_allclose(noise.octaves, 0.05, rtol=0.05)
    assert noise.grain == pytest.approx(1, abs=0.05)
    assert noise.chroma == pytest.approx(1, abs=0.05)
    assert noise.confidence == 1


def test_axes_are_at_right_angles() -> None:
    np.testing.assert_allclose(AXES @ AXES.T, np.eye(3), atol=1e-12)


def test_grain_of_noise_that_is_repeated() -> None:
    """Noise of squares of 2 x 2 has a grain of two pixels, and its level before averaging."""
    squares = 0.04 * white((160, 160, 3)).repeat(2, 0).repeat(2, 1)
    noise = measure(0.5 + squares)
    assert noise.grain == pytest.approx(2, rel=0.15)
    assert not noise.is_white


def test_noise_of_single_tones() -> None:
    clean = np.linspace(0.1, 0.9, 384)[None, :, None] * np.ones((384, 1, 3))
    sigma = 0.01 + 0.04 * (1 - clean)
    noise = measure(clean + sigma * white(clean.shape))
    tones = np.array([0.15, 0.5, 0.85])
    found = noise.sigma * noise.curve(tones)
    np.testing.assert_allclose(found, 0.01 + 0.04 * (1 - tones), rtol=0.12)


def test_chroma_noise_is_told_from_luma_noise() -> None:
    noise = measure(0.5 + 0.02 * white((256, 256, 3)) * [1, 3, 3] @ AXES)
    assert noise.chroma == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("gain", [2e-4, 1e-3])
@pytest.mark.parametrize("name", ["coffee", "cat"])
def test_noise_of_a_camera(gain: float, name: str) -> None:
    """Within a factor of 1.5 of the truth, and told more than the finest pixels say."""
    soft = np.clip(resize(scene(name), (512, 512), order=3), 0, 1)
    camera = Camera(gain=gain, read=2 * gain, quality=95)
    clean, taken = pair(soft, camera, np.random.default_rng(0))
    noise, truth = measure(taken), measure(0.5 + taken - clean)
    assert 1 / 1.5 < noise.sigma / truth.sigma < 1.5
    assert 1 / 1.5 < noise.told / truth.told < 1.5
    assert noise.told > 1.9 * noise.levels[0][0]
    assert noise.grain > 1.2
    assert noise.confidence > 0.5
    assert noise.summary().startswith("camera noise: sigma ")


def test_noise_that_jpeg_has_thinned_is_still_told_by_its_coarser_octave() -> None:
    soft = np.clip(resize(scene("coffee"), (512, 512), order=3), 0, 1)
    camera = Camera(gain=4e-4, read=8e-4, quality=95, resaved=75)
    clean, taken = pair(soft, camera, np.random.default_rng(0))
    noise, truth = measure(taken), measure(0.5 + taken - clean)
    assert noise.confidence > 0.5
    assert 0.4 < noise.told / truth.told < 1.5


def test_drawings_have_no_noise() -> None:
    drawing = np.ones((256, 256, 3))
    drawing[40:90, 30:200] = 0.2, 0.4, 0.9
    drawing[120:122, :] = 0
    drawing[150:250:4, 20:240] = 0.1
    noise = measure(drawing)
    assert 255 * noise.safe < 0.5
    assert measure(np.full((64, 64, 3), 0.3)).safe == 0


@pytest.mark.parametrize("name", ["grass", "gravel"])
def test_texture_is_not_sure_to_be_noise(name: str) -> None:
    noise = measure(np.asarray(getattr(data, name)(), float)[:, :, None] / 255)
    assert noise.confidence < 0.5
    assert "unsure" in noise.summary()


def test_strong_noise_without_colour_is_texture() -> None:
    """A sensor's pixels see one colour each; what grows on meadows is green all over."""
    coarse = gaussian_filter(white((256, 256, 3)), (0.7, 0.7, 0))
    without = measure(0.5 + 0.1 * coarse * [1, 0.02, 0.02] @ AXES)
    assert without.told > 20 / 255
    assert without.confidence == 0
    assert measure(0.5 + 0.1 * coarse @ AXES).confidence > 0.9
    # Gray pictures have none to tell: sure or not, what was measured is told as it is.
    gray = measure(0.5 + 0.1 * coarse[:, :, :1])
    assert gray.confidence > 0.9
    assert gray.safe == pytest.approx(gray.confidence * gray.levels[0][1])


def test_flat_borders_white_areas_and_hidden_parts_do_not_count() -> None:
    clean = scene()
    noisy = np.clip(clean + 10 / 255 * white(clean.shape), 0, 1)
    alone = measure(noisy).sigma
    framed = np.pad(noisy, ((100, 100), (60, 60), (0, 0)), constant_values=1.0)
    assert measure(framed).sigma == pytest.approx(alone, rel=0.05)
    alpha = np.zeros(framed.shape[:2])
    alpha[100:-100, 60:-60] = 1
    hidden = framed + (alpha[:, :, None] == 0) * 0.3 * (white(framed.shape) - 1)
    assert measure(hidden, alpha).sigma == pytest.approx(alone, rel=0.05)


def test_large_pictures_are_judged_by_a_sample() -> None:
    noise = measure(0.5 + 0.05 * white((1300, 2000, 1)))
    assert noise.sigma == pytest.approx(0.05, rel=0.05)


def test_pictures_too_small_to_tell() -> None:
    noise = measure(np.random.default_rng(0).random((7, 30, 3)))
    assert noise.confidence == 0 and noise.sigma == 0


def test_profiles_survive_json() -> None:
    noise = measure(0.5 + 0.05 * white((128, 128, 3)))
    assert Noise.from_json(noise.to_json()) == noise


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        Noise.white(0.1).to_json().replace("0.1", "-0.1"),
        Noise.white(0.1).to_json().replace("0.1", "NaN"),
        replace(Noise.white(0.1), tones=(0.0, 0.0)).to_json(),
        replace(Noise.white(0.1), levels=((0.1,), (0.1,))).to_json(),
    ],
)
def test_what_is_not_a_profile(text: str) -> None:
    with pytest.raises(ValueError, match="not a noise profile"):
        Noise.from_json(text)


def test_white_profile() -> None:
    noise = Noise.white(0.1)
    assert noise.sigma == pytest.approx(0.1) and noise.told == 0.1 and noise.is_white
    assert noise.grain == 1 and noise.chroma == 1 and np.shape(noise.levels) == (3, OCTAVES)


def test_dithers_stripes_and_checks_are_no_noise() -> None:
    """Few values, or few frequencies, whatever the contrast."""
    place = np.arange(128)
    checks = np.where((place[:, None] + place) % 2, 0.85, 0.15)[..., None].repeat(3, -1)
    stripes = np.where(place % 2, 0.35, 0.63)[None, :, None] * np.ones((128, 1, 3))
    photo = data.coffee()[100:228, 200:328] / 255
    bayer = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16
    dither = np.floor(photo * 3 + np.tile(bayer, (32, 32))[..., None]) / 3
    for clean in (checks, stripes, dither):
        level = noise_level(Image.of(np.clip(clean, 0, 1), np.uint8).samples)
        assert level.sigma == 0
    noisy = Image.of(np.clip(checks + 5 / 255 * white(checks.shape), 0, 1), np.uint8)
    assert noise_level(noisy.samples).sigma < 6 / 255
    assert (
        noise_level(Image.of(photo + 15 / 255 * white(photo.shape), np.uint8).samples).sigma > 0.05
    )


def test_clipped_noise_is_measured_as_it_was_before() -> None:
    """By its own mean and variance: the gain of the variance is that of the clipping."""
    rng = np.random.default_rng(0)
    for mu in (0.0, 0.1, 0.5, 0.95):
        for sigma in (0.02, 0.1, 0.3):
            y = np.clip(mu + sigma * rng.standard_normal(400_000), 0, 1)
            gain = unclipped_gain(y.mean(keepdims=True), y.var(keepdims=True), 100.0)
            assert np.sqrt(gain[0] * y.var()) == pytest.approx(sigma, rel=0.02), (mu, sigma)
    assert unclipped_gain(np.array([0.5, 0.001]), np.array([1e-6, 0.1])).tolist() == [1, 4]
