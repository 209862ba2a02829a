"""Noise that is not white: its law by octave and axis, what is told of it, and who hears it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from grain import shaped
from tiny import noisy_picture, tiny
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.coloured import (
    AXES,
    OCTAVES,
    Told,
    curve,
    local_tone,
    octave_of,
)
from cdnctl.models import REGISTRY, NetConfig
from cdnctl.restore import Level, Stack, View
from cdnctl.restore.measuring import measure
from cdnctl.restore.noise import Noise

SHAPE = (2, 3, 32, 32)
NET = NetConfig(
    num_classes=3, widths=(8, 16), blocks=(1, 1), unshuffle=2, norm="pixel", head=8, coloured=True
)


def white(count: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def network(arch: str, **changes: Any) -> Any:
    """With weights that are random throughout: ears, which start at zero, too."""
    net = REGISTRY[arch].module(replace(NET, **changes)).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    return net


def test_axes_are_at_right_angles_and_of_length_1() -> None:
    torch.testing.assert_close(AXES @ AXES.T, torch.eye(3))


def test_octaves_halve() -> None:
    """A wave of 2^(j+1.5) pixels lies in the middle of octave j, the mean in none."""
    at = octave_of(96, 96)
    assert at[0, 0] == torch.inf and at[0, 48] == -0.5
    for wavelength in (4, 8, 16, 32):
        assert at[0, 96 // wavelength] == at[96 // wavelength, 0]
        assert at[0, 96 // wavelength] == pytest.approx(np.log2(wavelength) - 1.5)


def test_equal_levels_are_white_noise() -> None:
    """Whatever they are: levels are relative."""
    n = white(64, 32)
    noise, spectrum = shaped(n, 3 * torch.ones(64, 2, OCTAVES))
    torch.testing.assert_close(spectrum, torch.zeros_like(spectrum), atol=1e-5, rtol=0)
    # The same squares: it is the same noise, turned in the space of colours.
    torch.testing.assert_close(noise.square().sum(1), n.square().sum(1), atol=1e-4, rtol=1e-4)


def test_noise_has_unit_variance_and_the_spectrum_that_is_said() -> None:
    levels = torch.empty(6, 2, OCTAVES).uniform_(0.3, 2, generator=torch.Generator().manual_seed(0))
    noise, spectrum = shaped(white(6, 512), levels)
    assert spectrum.shape == (6, 2, OCTAVES)
    power = torch.fft.fft2(torch.einsum("ac,bchw->bahw", AXES, noise)).abs().square() / 512**2
    assert (noise.square().mean((1, 2, 3)) - 1).abs().max() < 0.05
    band = (octave_of(512, 512) + 0.5).floor().clamp(0, OCTAVES - 1)
    for j in range(OCTAVES):
        found = power[..., band == j].mean(-1)  # (6, 3)
        for axis, said in ((0, spectrum[:, 0, j]), (1, spectrum[:, 1, j]), (2, spectrum[:, 1, j])):
            assert (found[:, axis].sqrt().log() - said).abs().max() < 0.1


def test_measured_levels_are_those_that_are_told_in_training() -> None:
    """`measure` looks at pictures by cosines and means, training at Fourier bands."""
    levels = torch.tensor([[[0.5, 1, 1, 0.9], [0.4, 1.2, 1.6, 1.5]]])
    noise, spectrum = shaped(white(1, 512), levels)
    found = measure((0.5 + 0.05 * noise[0]).permute(1, 2, 0).numpy())
    logs = np.log(found.octaves / 0.05)
    said = spectrum[0].numpy()[[0, 1, 1]]
    assert np.abs(logs - said).max() < 0.3
    assert found.sigma == pytest.approx(0.05, rel=0.1)


def test_curves_go_through_their_knots() -> None:
    knots = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    tones = torch.linspace(0, 1, knots.shape[1]).expand(4, 1, 1, -1)
    torch.testing.assert_close(curve(tones, knots)[:, 0, 0], knots)
    between = curve(tones[..., :1] + 0.125, knots)[:, 0, 0, 0]
    torch.testing.assert_close(between, (knots[:, 0] + knots[:, 1]) / 2)
    beyond = curve(torch.tensor([-1.0, 2.0]).expand(4, 1, 1, -1), knots)[:, 0, 0]
    torch.testing.assert_close(beyond, knots[:, [0, -1]])


def test_a_tone_is_a_mean_of_what_is_there() -> None:
    y = torch.rand(2, 3, 9, 9)
    tone = local_tone(y)
    torch.testing.assert_close(tone[:, 0, 4, 4], y[:, :, 2:7, 2:7].mean((1, 2, 3)))
    torch.testing.assert_close(tone[:, 0, 0, 0], y[:, :, :3, :3].mean((1, 2, 3)))


@pytest.mark.parametrize("arch", ["hybrid", "gradresnet"])
@pytest.mark.parametrize("size", [(32, 32), (30, 27)])
def test_white_noise_told_at_length_is_white_noise_told(arch: str, size: tuple[int, int]) -> None:
    net = network(arch)
    y, sigma = torch.rand(2, 3, *size, dtype=torch.float64), torch.tensor([0.1, 0.3]).double()
    told = Told(sigma, torch.zeros(2, 2, OCTAVES), torch.ones(2, 1, *size))
    for mixture in (None, torch.tensor([0.0, 2, -1])):
        for a, b in zip(
            net.correction(y, told, mixture), net.correction(y, sigma, mixture), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("arch", ["hybrid", "gradresnet"])
def test_every_part_of_what_is_told_is_heard(arch: str) -> None:
    net = network(arch)
    y, sigma = torch.rand(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0.1, 0.3]).double()
    spectrum, relief = torch.zeros(2, 2, OCTAVES), torch.ones(2, 1, 32, 32)
    plain = net.correction(y, Told(sigma, spectrum, relief))[0]
    for axis in range(2):
        for octave in range(OCTAVES):
            other = spectrum.clone()
            other[1, axis, octave] = 0.5
            moved = (net.correction(y, Told(sigma, other, relief))[0] - plain).abs().amax((1, 2, 3))
            assert moved[0] == 0 and moved[1] > 1e-4
    other = relief.clone()
    other[0, 0, :4, :4] = 2
    moved = (net.correction(y, Told(sigma, spectrum, other))[0] - plain).abs().amax((1, 2, 3))
    assert moved[0] > 1e-4 and moved[1] == 0


def test_what_is_told_is_held_fixed_in_the_gradient() -> None:
    """The score of the tied network is the gradient of its density, whatever it hears."""
    net = network("gradresnet")
    y = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    told = Told(
        torch.tensor([0.1, 0.3]).double(),
        torch.randn(2, 2, OCTAVES, dtype=torch.float64),
        1 + torch.rand(2, 1, 16, 16, dtype=torch.float64),
    )
    f = net.log_joint(y, told).logsumexp(1).sum()
    (gradient,) = torch.autograd.grad(f, y)
    variance = told.sigma.square().view(-1, 1, 1, 1)
    torch.testing.assert_close(net.correction(y, told)[0], variance * gradient)


def test_a_network_that_starts_to_hear_stays_what_it_is() -> None:
    net = REGISTRY["hybrid"].module(NET)
    y, sigma = torch.rand(*SHAPE), torch.full((2,), 0.1)
    loud = Told(sigma, torch.ones(2, 2, OCTAVES), torch.ones(2, 1, 32, 32))
    torch.testing.assert_close(net.correction(y, loud)[0], net.correction(y, sigma)[0])


CAMERA = Noise(
    (0.0, 0.4, 1.0),
    (1.3, 1.0, 0.7),
    ((0.05, 0.1, 0.09, 0.08), (0.04, 0.12, 0.15, 0.14), (0.04, 0.12, 0.15, 0.14)),
    0.7,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = tiny(tmp_path_factory.mktemp("weights"), "hybrid", coloured=True)
    g = torch.Generator().manual_seed(0)
    for name, p in model.module.named_parameters():
        if ".ears." in name:
            p.data = torch.randn(p.shape, generator=g)
    return model


def test_what_was_measured_is_told(model: Model) -> None:
    y = noisy_picture(80, 96)
    view = View(model, y, Level(0.07, CAMERA))
    told = view.hears(torch.from_numpy(y.transpose(2, 0, 1))[None])
    assert isinstance(told, Told) and told.sigma.item() == pytest.approx(view.sigma)
    assert view.sigma == pytest.approx(CAMERA.heard) and CAMERA.heard <= CAMERA.sigma
    want = np.log(np.array(CAMERA.levels)[:2] / CAMERA.sigma)
    np.testing.assert_allclose(told.spectrum[0].numpy(), want, atol=1e-6)
    tone = y[:5, :5].mean()
    at = Noise.curve(CAMERA, np.asarray(tone))
    assert told.relief[0, 0, 2, 2].item() == pytest.approx(float(at), abs=1e-6)


def test_white_gray_and_given_noise_is_told_by_its_level_alone(model: Model) -> None:
    y = noisy_picture(80, 96)
    for level in (0.1, Level(0.1, Noise.white(0.1))):
        assert not View(model, y, level).coloured
    gray = np.repeat(y[:, :, :1], 3, 2)
    assert not View(model, gray, Level(0.1, CAMERA)).coloured
    deaf = replace(model.module.needs, coloured=False)
    hearing, model.module.needs = model.module.needs, deaf
    try:
        assert not View(model, y, Level(0.1, CAMERA)).coloured
    finally:
        model.module.needs = hearing


def test_tiles_hear_what_the_whole_hears(model: Model) -> None:
    y = noisy_picture(300, 260)
    level = Level(0.07, CAMERA)
    whole, tiles = View(model, y, level, 1000), View(model, y, level, 130)
    assert len(tiles.tiles) > 4 and len(whole.tiles) == 1
    plain = View(model, y, whole.sigma, 1000)
    for mixture in (None, torch.tensor([1.0, 0, 0])):
        ours = whole.correction(mixture)
        np.testing.assert_allclose(tiles.correction(mixture), ours, atol=1e-4)
        assert np.abs(plain.correction(mixture) - ours).max() > 1e-3, "or nothing was heard"


def test_each_of_a_stack_hears_its_own_noise(model: Model) -> None:
    pictures = [noisy_picture(64, 64, seed=seed) for seed in range(3)]
    levels = [Level(0.07, CAMERA), Level(0.1), Level(0.2, Noise.white(0.2))]
    views = [View(model, y, level) for y, level in zip(pictures, levels, strict=True)]
    together = Stack(views).solve()
    for y, level, found in zip(pictures, levels, together, strict=True):
        alone, _ = View(model, y, level).solve()
        np.testing.assert_allclose(found, alone, atol=1e-6)
