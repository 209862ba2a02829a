"""Simulated cameras of the training against `camera`, which says the same in another way, and what
is told of their noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from camera import Camera, demosaic, mosaic, photograph, to_display, to_linear
from grain import shaped
from skimage.data import astronaut
from torch import Tensor

from cdnctl.core.coloured import AXES, OCTAVES, curve, local_tone
from cdnctl.core.tone import to_display as to_display_too
from cdnctl.core.tone import to_light
from cdnctl.training import cameras
from cdnctl.training.cameras import MARGIN, Cameras, described, photographs

KINDS = ["bilinear", "malvar", "directed"]


def scene(side: int = 96) -> np.ndarray:
    return astronaut()[60 : 60 + side, 180 : 180 + side] / 255


def tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1))).float()[None]


def still(count: int = 1, **changes: float) -> Cameras:
    """Cameras without JPEG to speak of, smoothing or sharpening."""
    plain = dict.fromkeys(Cameras._fields, 0.0) | {"exposure": 1, "lens": 0.7, "gain": 5e-4}
    plain |= {"read": 1e-3, "red": 2.0, "blue": 1.6, "overlap": 0.7, "radius": 1, "quality": 100}
    return Cameras(*(_of(count, name, value) for name, value in (plain | changes).items()))


def _of(count: int, name: str, value: float) -> Tensor:
    whole = name in ("demosaic", "quality", "subsampled", "resaved")
    return torch.full((count,), value, dtype=torch.int64 if whole else torch.float32)


def inner(x: Any) -> Any:
    return x[..., MARGIN:-MARGIN, MARGIN:-MARGIN]


def test_light_and_display_are_as_in_the_other_camera() -> None:
    shown = np.linspace(0, 1, 101)
    light = to_light(torch.from_numpy(shown))
    np.testing.assert_allclose(light, to_linear(shown), atol=1e-7)
    np.testing.assert_allclose(to_display_too(light), to_display(to_linear(shown)), atol=1e-7)


@pytest.mark.parametrize("how", ["bilinear", "malvar"])
def test_demosaicing_is_as_in_the_other_camera(how: str) -> None:
    raw = mosaic(scene())
    found = cameras.DEMOSAICERS[KINDS.index(how)](torch.from_numpy(raw).float()[None, None])
    np.testing.assert_allclose(found[0], demosaic(raw, how).transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("how", range(len(cameras.DEMOSAICERS)))
def test_demosaicing_keeps_what_was_measured_and_grays_without_detail(how: int) -> None:
    colours = torch.rand(2, 3, 24, 24)
    raw = cameras.mosaic(colours)
    full = cameras.DEMOSAICERS[how](raw)
    torch.testing.assert_close(cameras.mosaic(full), raw)
    ramp = torch.linspace(0, 1, 24).expand(1, 3, 24, 24)
    for gray in (ramp, ramp.mT):
        found = cameras.DEMOSAICERS[how](cameras.mosaic(gray))
        torch.testing.assert_close(found[..., 3:-3, 3:-3], gray[..., 3:-3, 3:-3])


def test_edges_are_followed() -> None:
    """Bilinear interpolation makes colours at the edge of a gray step, the directed one none."""
    step = (torch.arange(24) >= 12).float().expand(1, 3, 24, 24)
    for picture in (step, step.mT):
        raw = cameras.mosaic(picture)
        assert (inner(cameras.bilinear(raw)) - inner(picture)).abs().max() > 0.2
        green = inner(cameras.directed(raw))[:, 1] - inner(picture)[:, 1]
        assert green.abs().max() < 1e-6


@pytest.mark.parametrize("how", ["bilinear", "malvar"])
def test_clean_photographs_are_those_of_the_other_camera(how: str) -> None:
    other = Camera(demosaic=how, contrast=0.4, smooth=1.5, quality=None)
    mine = still(demosaic=KINDS.index(how), contrast=0.4, smooth=1.5)
    clean, _ = photographs(tensor(scene()), mine, torch.Generator().manual_seed(0))
    want = photograph(scene(), other).transpose(2, 0, 1)
    np.testing.assert_allclose(clean[0], inner(want), atol=2e-3)


def test_noise_is_as_strong_as_in_the_other_camera() -> None:
    flat = np.full((256, 256, 3), [0.5, 0.3, 0.6])
    clean, noisy = photographs(tensor(flat), still(demosaic=1), torch.Generator().manual_seed(0))
    rng = np.random.default_rng(0)
    other = photograph(flat, Camera(quality=100, subsampling=0), rng) - photograph(
        flat, Camera(quality=None)
    )
    found, want = (noisy - clean)[0].std((1, 2)).numpy(), other.std((0, 1))
    np.testing.assert_allclose(found, want, rtol=0.05)


def test_every_camera_takes_its_own_photograph() -> None:
    """Rows of a batch do not know of each other."""
    several = Cameras.random(6, torch.Generator().manual_seed(1))
    scenes = tensor(scene()).repeat(6, 1, 1, 1)
    clean, noisy = photographs(scenes, several, torch.Generator().manual_seed(0))
    assert clean.shape == noisy.shape == (6, 3, 80, 80)
    assert min(clean.min(), noisy.min()) >= 0 and max(clean.max(), noisy.max()) <= 1
    for i in range(6):
        row = Cameras(*(field[i : i + 1] for field in several))
        alone, _ = photographs(scenes[:1], row, torch.Generator().manual_seed(0))
        torch.testing.assert_close(alone[0], clean[i], atol=1e-5, rtol=1e-5)


def test_random_cameras_are_of_all_kinds() -> None:
    many = Cameras.random(500, torch.Generator().manual_seed(0))
    assert set(many.demosaic.tolist()) == set(range(len(cameras.DEMOSAICERS)))
    for name in ("smooth", "blur", "sharp", "resaved"):
        share = (getattr(many, name) > 0).float().mean()
        assert 0.2 < share < 0.8, name
    assert many.gain.min() < 4e-5 and many.gain.max() > 1.5e-3
    assert many.exposure.max() == 1 and many.exposure.min() < 0.5


LEVELS = torch.tensor([[[0.6, 1, 1.3, 1.5], [0.3, 0.8, 1.6, 2.0]], [[1.0, 1, 1, 1]] * 2])


def test_noise_is_described_by_what_it_was_made_of() -> None:
    g = torch.Generator().manual_seed(0)
    noise, spectrum = shaped(torch.randn(2, 3, 256, 256, generator=g), LEVELS)
    ramp = torch.linspace(0.1, 0.9, 256).expand(2, 3, 256, 256)
    knots = torch.linspace(1.5, 0.5, 5).expand(2, 5)
    strength = torch.tensor([0.02, 0.08]).view(-1, 1, 1, 1) * curve(local_tone(ramp), knots)
    sigma, found, shape = described(ramp, ramp + strength * noise)
    real = strength.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(sigma, real, rtol=0.03, atol=0)
    assert (found - spectrum).abs().max() < 0.15
    relative = curve(local_tone(ramp), shape)
    torch.testing.assert_close(relative, strength / real.view(-1, 1, 1, 1), rtol=0.12, atol=0)
    torch.testing.assert_close(relative.square().mean((1, 2, 3)), torch.ones(2), rtol=0.02, atol=0)


def test_white_noise_is_described_as_white() -> None:
    g = torch.Generator().manual_seed(0)
    clean = torch.full((1, 3, 256, 256), 0.5)
    sigma, spectrum, knots = described(clean, clean + 0.1 * torch.randn(clean.shape, generator=g))
    assert sigma.item() == pytest.approx(0.1, rel=0.01)
    assert spectrum.shape == (1, 2, OCTAVES) and spectrum.abs().max() < 0.15
    assert (knots - 1).abs().max() < 0.1


def test_grain_of_bilinear_demosaicing_is_coarse_and_its_colours_more_so() -> None:
    """Closed form: interpolated from its neighbours, a mosaic of white noise loses the finest
    octave, and chroma, with a quarter to half as many samples, loses more."""
    raw = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    full = cameras.bilinear(raw)
    power = torch.fft.fft2(torch.einsum("ac,bchw->bahw", AXES, full)).abs().square()[0] / 256**2
    # At zero frequency a mosaic's colours are means of 1/4, 1/2 and 1/4 of its samples, spread
    # over all: their spectra are 4, 2 and 4 times as strong as that of white noise.
    low = power[:, :12, :12].flatten(1)[:, 1:].mean(1)
    want = AXES.square() @ torch.tensor([4.0, 2, 4])
    torch.testing.assert_close(low, want, rtol=0.25, atol=0)
    assert power[0, 128, 128 - 8 : 128 + 8].mean() < 0.2 * power[0, 1:12, 1:12].mean()
