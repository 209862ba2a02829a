"""What is known of noise before it is measured: its kind, or a profile of a camera."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from processes import Run
from tiny import save_tiny, write

from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.restore import Noise, noise_level
from cdnctl.restore.measuring import measure
from cdnctl.restore.profiles import known_noise, profile

CAMERA = Noise(
    (0.1, 0.5, 0.9),
    (1.4, 0.9, 0.5),
    ((0.02, 0.03, 0.035, 0.03), (0.03, 0.05, 0.06, 0.06), (0.025, 0.05, 0.06, 0.06)),
    0.9,
)


def absolute(noise: Noise, tones: np.ndarray) -> np.ndarray:
    """Level of a pixel's noise at tones."""
    level: np.ndarray = noise.sigma * noise.curve(tones)
    return level


def grainy(sigma: float, shape: tuple[int, ...] = (96, 128, 3), seed: int = 0) -> np.ndarray:
    """Flat gray with white noise."""
    rng = np.random.default_rng(seed)
    return np.asarray(0.5 + sigma * rng.standard_normal(shape))


# -- profiles -------------------------------------------------------------------------------


def test_profile_of_equal_pictures_is_their_noise() -> None:
    made = profile([CAMERA] * 3)
    tones = np.linspace(0, 1, 9)
    assert made.pictures == 3 and made.noise.confidence == 1
    np.testing.assert_allclose(absolute(made.noise, tones), absolute(CAMERA, tones), rtol=1e-6)
    np.testing.assert_allclose(
        made.noise.octaves / made.noise.sigma, CAMERA.octaves / CAMERA.sigma, rtol=1e-6
    )


def test_profile_joins_pictures_of_shadows_and_of_lights() -> None:
    """Each tells of its own tones; on the scale of pixels, not of what is usual in the picture."""
    tones = np.linspace(0.1, 0.9, 65)
    parts = []
    for own in (tones[:40], tones[25:]):
        part = CAMERA.within(own)
        knots = np.linspace(own[0], own[-1], 25)
        parts.append(replace(part, tones=tuple(knots), shape=tuple(part.curve(knots))))
    found = absolute(profile(parts).noise, tones)
    np.testing.assert_allclose(found, absolute(CAMERA, tones), rtol=0.02)


def test_outliers_and_the_unsure_have_no_say() -> None:
    loud = replace(CAMERA, levels=tuple(tuple(9 * x for x in row) for row in CAMERA.levels))
    unsure = replace(loud, confidence=0.1)
    gray = Noise.white(0.5, 1)
    made = profile([CAMERA, CAMERA, CAMERA, loud, unsure, unsure, unsure, unsure, gray])
    assert made.pictures == 4 and len(made.noise.levels) == 3
    assert made.noise.sigma / CAMERA.sigma == pytest.approx(
        profile([CAMERA]).noise.sigma / CAMERA.sigma, rel=1e-6
    )
    with pytest.raises(ImageError, match="none of 2 pictures"):
        profile([unsure, unsure])


def test_a_profile_has_the_same_levels_in_every_picture() -> None:
    tones = np.random.default_rng(0).uniform(0, 0.4, 1000)
    within = CAMERA.within(tones)
    np.testing.assert_allclose(absolute(within, tones), absolute(CAMERA, tones))
    assert np.mean(within.curve(tones) ** 2) == pytest.approx(1)
    assert within.sigma > CAMERA.sigma  # shadows have more


def test_a_profile_of_another_camera() -> None:
    """The picture is believed where it surely shows its noise, and nothing is said else."""
    made = profile([measure(grainy(0.02, (256, 256, 3)), camera=True)]).noise
    for sigma, alike in ((0.02, True), (0.015, True), (0.06, False), (0.006, False)):
        level = noise_level(grainy(sigma, (256, 256, 3), seed=3), kind=made)
        assert (level.doubt == "") == alike, sigma
        assert level.sigma > 0
    assert f"noise of {255 * made.sigma:.2g} where" in level.doubt
    assert noise_level(grainy(0.06, (32, 32, 3)), kind=made).doubt == "", "too small to tell"


# -- what is known --------------------------------------------------------------------------


def test_white_is_told_as_one_level_and_camera_as_measured() -> None:
    soft = 0.5 + 0.04 * grainy(1, (64, 64, 3)).repeat(2, 0).repeat(2, 1)
    auto, white = (noise_level(soft.astype(np.float32), kind=k) for k in ("auto", "white"))
    assert auto.noise and auto.noise.camera
    assert white.noise and white.noise.is_white and not white.noise.camera
    assert white.sigma == auto.sigma > 0
    plain = grainy(0.05).astype(np.float32)
    auto, camera = (noise_level(plain, kind=k) for k in ("auto", "camera"))
    assert auto.noise and auto.noise.is_white
    assert camera.noise and not camera.noise.is_white
    assert camera.noise.sigma == pytest.approx(0.05, rel=0.1)


def test_a_profile_is_for_gray_or_for_colour() -> None:
    colour = Image.of(grainy(0.05), np.uint8)
    gray = Image.of(grainy(0.05, (96, 128, 1)), np.uint8)
    level = noise_level(colour, kind=CAMERA)
    assert level.noise and absolute(level.noise, np.array(0.5)) == pytest.approx(
        absolute(CAMERA, np.array(0.5))
    )
    with pytest.raises(ImageError, match="gray, but the noise profile is of colour"):
        noise_level(gray, kind=CAMERA)
    with pytest.raises(ImageError, match="colour, but the noise profile is of gray"):
        noise_level(colour, kind=Noise.white(0.05, 1))


def test_known_noise_refuses_what_is_none(tmp_path: Path) -> None:
    assert known_noise("camera") == "camera"
    (tmp_path / "a.json").write_text(CAMERA.to_json())
    assert known_noise(str(tmp_path / "a.json")) == replace(CAMERA, confidence=1.0)
    for text in ("{}", "text", '{"tones": [0, 1]}'):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UsageError, match=r"b\.json' is not a noise profile"):
            known_noise(str(tmp_path / "b.json"))
    with pytest.raises(UsageError, match="'cam', but must be auto, white, camera"):
        known_noise("cam")


def test_a_folder_makes_a_profile_to_denoise_by(tmp_path: Path, cdnctl: Run) -> None:
    for seed in range(2):
        write(tmp_path / "shots" / f"{seed}.png", grainy(0.05, seed=seed))
    write(tmp_path / "shots" / "small.png", grainy(0.05, (20, 20, 3)))
    done = cdnctl("noise", "shots", "--save", "iso.json")
    assert done.code == 0 and "profile of 2 of 2 pictures" in done.text
    assert json.loads((tmp_path / "iso.json").read_text())["pictures"] == 2
    assert known_noise("iso.json").sigma == pytest.approx(  # type: ignore[union-attr]
        measure(grainy(0.05)).sigma, rel=0.05
    )
    assert cdnctl("noise", "shots", "--save", "iso.json").code == 2
    write(tmp_path / "loud.png", grainy(0.15))
    options = ("denoise", "loud.png", "--model", save_tiny(tmp_path / "m.safetensors"), "--json")
    (record,) = cdnctl(*options, "--noise", "iso.json").records
    assert record["sigma"] == pytest.approx(0.05 * 255, rel=0.1)
    done = cdnctl(*options, "--noise", "white", "--sigma", "5", "--overwrite")
    assert done.code == 2 and "--sigma 5" in done.err
