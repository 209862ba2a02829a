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
from cdnctl.images import Image
from cdnctl.restore import Settings, restore

SIGMA = 0.2
BIG = (80, 833)  # more than a batch of small pictures takes: it goes through `restore` alone


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
