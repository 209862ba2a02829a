"""The simulated camera: what must hold of optics, mosaic, noise and files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import picture

from cdnctl.core.camera import (
    Camera,
    demosaic,
    mosaic,
    pair,
    photograph,
    to_display,
    to_linear,
)

PLAIN = Camera(lens=0, contrast=0, smooth=0, quality=None)


def test_light_and_back() -> None:
    x = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(to_display(to_linear(x)), x, atol=1e-7)


@pytest.mark.parametrize("how", ["malvar", "bilinear"])
def test_demosaicing_keeps_what_was_measured(how: str) -> None:
    raw = np.random.default_rng(0).random((12, 14))
    np.testing.assert_allclose(mosaic(demosaic(raw, how)), raw, atol=1e-12)


@pytest.mark.parametrize("how", ["malvar", "bilinear"])
def test_demosaicing_of_ramps_of_gray_is_exact(how: str) -> None:
    y, x = np.mgrid[:16, :18] / 40
    flat = np.stack([0.2 + x + y] * 3, 2)
    inner = slice(2, -2), slice(2, -2)  # ramps have no mirror image
    np.testing.assert_allclose(demosaic(mosaic(flat), how)[inner], flat[inner], atol=1e-12)


def test_demosaicing_by_another_name() -> None:
    with pytest.raises(ValueError, match="'nearest'"):
        demosaic(np.zeros((4, 4)), "nearest")


def test_flat_colours_come_out_as_they_went_in() -> None:
    scene = np.broadcast_to([0.7, 0.4, 0.2], (16, 16, 3))
    np.testing.assert_allclose(photograph(scene, PLAIN), scene, atol=1e-3)


def test_noise_on_the_sensor_has_the_variance_that_is_stated() -> None:
    camera = replace(PLAIN, gain=1e-3, read=4e-3, red=1, blue=1, overlap=0)
    light = 0.3
    scene = np.full((256, 256, 3), to_display(np.array(light)))
    taken = mosaic(to_linear(photograph(scene, camera, np.random.default_rng(0))))
    assert taken.mean() == pytest.approx(light, rel=0.01)
    assert taken.var() == pytest.approx(camera.gain * light + camera.read**2, rel=0.03)


def test_noise_of_a_photograph_is_wide_and_strongest_in_the_shadows() -> None:
    rng = np.random.default_rng(0)
    camera = replace(PLAIN, gain=5e-4, read=5e-4)
    dark, light = (np.full((128, 128, 3), v) for v in (0.2, 0.8))
    noise = {v[0, 0, 0]: photograph(v, camera, rng) - v for v in (dark, light)}
    assert noise[0.2].std() > 1.3 * noise[0.8].std()
    luma = noise[0.8].mean(2)
    luma = luma - luma.mean()
    assert (luma[1:] * luma[:-1]).mean() > 0.2 * luma.var()


def test_the_truth_of_a_pair_has_neither_noise_nor_jpeg() -> None:
    scene = picture(64, 64)
    camera = Camera(quality=80, resaved=75)
    clean, taken = pair(scene, camera, np.random.default_rng(0))
    np.testing.assert_array_equal(clean, photograph(scene, replace(PLAIN, lens=camera.lens)))
    assert 0 < np.abs(taken - clean).mean() < 0.05
    np.testing.assert_array_equal(np.rint(taken * 255), taken * 255)


def test_random_cameras_give_finite_pictures_of_the_same_size() -> None:
    rng = np.random.default_rng(1)
    scene = picture(32, 40)
    for _ in range(20):
        clean, taken = pair(scene, Camera.random(rng), rng)
        assert clean.shape == taken.shape == scene.shape
        assert 0 <= taken.min() <= taken.max() <= 1
