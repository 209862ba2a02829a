"""How strong a restoration is: for luma and chroma apart, and place by place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from processes import Run
from tiny import noisy_picture, save_tiny, tiny, write

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.coloured import AXES
from cdnctl.errors import ImageError
from cdnctl.images import Image
from cdnctl.restore import Mask, Settings, restore

SIGMA = 0.2
BIG = (180, 200)  # so large that pictures go through the network one by one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of little reach: its tiles may be small."""
    return tiny(tmp_path_factory.mktemp("narrow"), widths=[8], blocks=[1], patch=512)


def exact(pixels: np.ndarray) -> Image:
    """A picture of float samples: nothing is rounded or clipped."""
    return Image.of(pixels, np.float32)


# -- luma and chroma ------------------------------------------------------------------------


def test_strengths_weigh_the_axes_of_the_correction(model: Model) -> None:
    y = noisy_picture()
    full = restore(exact(y), model, Settings(SIGMA)).image.pixels - y
    apart = restore(exact(y), model, Settings(SIGMA, strength=(0.3, 0.8))).image.pixels - y
    axes = AXES.numpy()
    np.testing.assert_allclose(apart @ axes.T, full @ axes.T * [0.3, 0.8, 0.8], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_equal_strengths_are_one_to_the_bit(model: Model, dtype: type) -> None:
    image = Image.of(noisy_picture(), dtype)
    for one in (0.0, 0.4, 1.0):
        apart = restore(image, model, Settings(SIGMA, strength=(one, one))).image.samples
        together = restore(image, model, Settings(SIGMA, strength=one)).image.samples
        np.testing.assert_array_equal(apart, together)
    np.testing.assert_array_equal(
        restore(image, model, Settings(SIGMA, strength=(0, 0))).image.samples, image.samples
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_pictures_take_the_strength_of_luma(model: Model, channels: int) -> None:
    y = np.repeat(noisy_picture(channels=1), channels, 2)
    luma = restore(exact(y), model, Settings(SIGMA, strength=(0.4, 1.0))).image.pixels
    both = restore(exact(y), model, Settings(SIGMA, strength=0.4)).image.pixels
    np.testing.assert_allclose(luma, both, atol=1e-6)


def test_what_a_class_changes_is_weighed_as_it_is(tmp_path: Path) -> None:
    """Of the whole, by Pythagoras: luma and chroma are at right angles."""
    told = Settings(SIGMA, target={"dog": 1.0})
    for size in ((48, 64), BIG):
        image, wide = exact(noisy_picture(*size)), tiny(tmp_path)
        whole, luma, chroma = (
            restore(image, wide, replace(told, strength=s)).class_change
            for s in (1.0, (1.0, 0.0), (0.0, 1.0))
        )
        assert luma and chroma and whole == pytest.approx(np.hypot(luma, chroma), rel=1e-4)


def test_strengths_on_the_command_line(tmp_path: Path, cdnctl: Run) -> None:
    model = save_tiny(tmp_path / "m.safetensors")
    images.write(exact(noisy_picture()), tmp_path / "a.tif")

    def run(strength: str) -> np.ndarray:
        done = cdnctl(
            "denoise", "a.tif", "-o", "b.tif", "--overwrite", "--model", model, "--sigma", "30",
            "--strength", strength,
        )  # fmt: skip
        assert done.code == 0
        return images.read(tmp_path / "b.tif").samples

    np.testing.assert_array_equal(run("1,1"), run("1"))
    assert not np.array_equal(run("0.5,1"), run("1"))
    for wrong in ("1,1,1", "a", "0.5,", "2,1", "nan"):
        done = cdnctl("denoise", "a.tif", "-o", "c.tif", "--strength", wrong)
        assert done.code == 2 and repr(wrong) in done.err


# -- masks ----------------------------------------------------------------------------------


def masked(weights: np.ndarray) -> Mask:
    return Mask(weights.astype(np.float32), "mask.png")


@pytest.mark.parametrize("size", [(48, 64), BIG])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.float64])
def test_white_masks_are_none_and_black_ones_the_input(
    model: Model, size: tuple[int, int], dtype: type
) -> None:
    rng = np.random.default_rng(0)
    image = Image.of(noisy_picture(*size), dtype)
    if dtype == np.uint32:  # every bit in use
        image = image.with_samples(rng.integers(0, 2**32, image.samples.shape, np.uint32))
    plain = restore(image, model, Settings(SIGMA)).image.samples
    white = restore(image, model, Settings(SIGMA, mask=masked(np.ones(size)))).image.samples
    black = restore(image, model, Settings(SIGMA, mask=masked(np.zeros(size)))).image.samples
    np.testing.assert_array_equal(white, plain)
    np.testing.assert_array_equal(black, image.samples)
    assert not np.array_equal(plain, black)


def test_masks_weigh_the_change_of_each_pixel_and_tiles_equal_the_whole(model: Model) -> None:
    y = noisy_picture(*BIG)
    weights = np.random.default_rng(0).random(BIG, np.float32)
    full = restore(exact(y), model, Settings(SIGMA)).image.pixels - y
    told = Settings(SIGMA, mask=masked(weights), strength=(0.5, 1.0))
    half = replace(told, mask=None)
    apart = restore(exact(y), model, half).image.pixels - y
    whole = restore(exact(y), model, told).image.pixels - y
    np.testing.assert_allclose(whole, weights[..., None] * apart, atol=1e-6)
    tiled = restore(exact(y), model, replace(told, tile=100)).image.pixels - y
    np.testing.assert_allclose(tiled, whole, atol=1e-5)
    assert np.abs(whole).max() > 0.01 and not np.allclose(whole, full, atol=1e-3)


def test_a_mask_is_the_mean_of_colours_and_black_where_transparent() -> None:
    colours = np.array([[[0.0, 0, 0], [1, 1, 1], [0.3, 0.6, 0.9], [1, 1, 1]]])
    alpha = np.array([[1, 1, 1, 0.25]])
    mask = Mask.of(Image(colours, alpha), "mask.png")
    np.testing.assert_allclose(mask.weights, [[0, 1, 0.6, 0.25]], atol=1e-6)
    with pytest.raises(ImageError, match="from 0 to 2"):
        Mask.of(Image(2 * colours), "mask.tif")


def test_a_mask_on_the_command_line(tmp_path: Path, cdnctl: Run) -> None:
    options = ("--model", save_tiny(tmp_path / "m.safetensors"), "--sigma", "30")
    write(tmp_path / "a.png", noisy_picture())
    sky = np.zeros((48, 64, 1))
    sky[:20] = 1
    write(tmp_path / "sky.png", sky)
    assert cdnctl("denoise", "a.png", "-o", "b.png", "--mask", "sky.png", *options).code == 0
    before, after = (images.read(tmp_path / name).samples for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(after[20:], before[20:])
    assert not np.array_equal(after[:20], before[:20])
    write(tmp_path / "small.png", sky[:40])
    done = cdnctl("denoise", "a.png", "-o", "c.png", "--mask", "small.png", *options)
    assert done.code == 1 and "64 x 40" in done.err and "64 x 48" in done.err
    assert done.err.count("\n") == 1 and not (tmp_path / "c.png").exists()


def test_another_mask_is_another_result(tmp_path: Path, cdnctl: Run) -> None:
    """A folder is gone on with for the same mask alone."""
    write(tmp_path / "in" / "a.png", noisy_picture())
    model = save_tiny(tmp_path / "m.safetensors")
    options = ("denoise", "in", "-o", "out", "--model", model, "--json", "--resume", "--mask")
    for name, weight in (("white.png", 1.0), ("also white.png", 1.0), ("gray.png", 0.5)):
        write(tmp_path / name, np.full((48, 64, 1), weight))
    kinds = [
        cdnctl(*options, name).records[0]["event"]
        for name in ("white.png", "also white.png", "gray.png")
    ]
    assert kinds == ["restored", "skipped", "restored"]


# -- what is said ---------------------------------------------------------------------------


def test_denoise_says_what_it_measured(tmp_path: Path, cdnctl: Run) -> None:
    rng = np.random.default_rng(0)
    soft = np.repeat(np.repeat(rng.standard_normal((96, 96, 3)), 2, 0), 2, 1)
    write(tmp_path / "in" / "a.png", 0.5 + 0.04 * soft)
    model = save_tiny(tmp_path / "m.safetensors")
    said = cdnctl("denoise", "in", "-o", "out", "--model", model)
    assert said.code == 0 and "camera noise: sigma 1" in said.text and " px, chroma" in said.text
    assert "model m" in said.text
    (line,) = (tmp_path / "out" / "cdnctl-manifest.jsonl").read_text().splitlines()
    assert '"grain": ' in line
    again = ("denoise", "in", "-o", "out", "--model", model, "--overwrite", "--json")
    record = cdnctl(*again).records[0]
    assert len(record["noise"]["levels"]) == 3 and record["noise"]["grain"] > 1.5
    assert record["model"] == "m"
    assert cdnctl(*again, "--sigma", "10").records[0]["noise"] is None
