"""Pictures whose black and white are not the ends of what their samples can hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processes import Run
from tiny import noisy_picture, save_tiny

from cdnctl import images
from cdnctl.cli.options import parse_range
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.restore import Percentiles, black_and_white, on_own_scale, on_unit_scale


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("scale", [(0.0, 200.0), (10.5, 150.25), Percentiles(0.1, 99.9)])
def test_what_is_not_changed_comes_back(dtype: type, scale: object) -> None:
    counts = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(dtype)
    image = Image(counts)
    ends = black_and_white(image, scale, "a.tif")  # type: ignore[arg-type]
    unit = on_unit_scale(image, ends, "a.tif")
    assert ends is not None and unit.dtype.kind == "f"
    expected = (counts.astype(float) - ends[0]) / (ends[1] - ends[0])
    np.testing.assert_allclose(unit.samples, expected, rtol=1e-5, atol=1e-6)
    back = on_own_scale(unit, ends, image.dtype).samples
    assert back.dtype == dtype
    np.testing.assert_allclose(back, counts, atol=0 if np.dtype(dtype).kind == "u" else 1e-4)


def test_what_lies_beyond_a_type_is_clipped_to_it() -> None:
    unit = Image(np.array([[[-1.0], [0.5], [2.0]]], np.float32))
    back = on_own_scale(unit, (0.0, 60000.0), np.dtype(np.uint16)).samples
    np.testing.assert_array_equal(back[0, :, 0], [0, 30000, 65535])


def test_percentiles_do_not_count_what_is_hidden() -> None:
    samples = np.concatenate([np.linspace(0, 1000, 101), np.full(99, 60000)])[:, None, None]
    alpha = (samples[:, :, 0] <= 1000).astype(np.uint16)
    image = Image(samples.astype(np.uint16), alpha)
    assert black_and_white(image, Percentiles(10, 90), "a.png") == (100, 900)
    flat = Image(np.full((8, 8, 1), 7, np.uint16))
    with pytest.raises(ImageError, match="are both 7"):
        black_and_white(flat, Percentiles(1, 99), "a.png")


@pytest.mark.parametrize("top, dtype, hint", [(4000, np.uint16, "0:4095"), (0.05, "f4", "0:0.05")])
def test_a_picture_that_fills_little_of_its_range_is_asked(
    top: float, dtype: object, hint: str
) -> None:
    ramp = np.linspace(0, top, 100).reshape(10, 10, 1).astype(dtype)  # type: ignore[call-overload]
    (note,) = on_unit_scale(Image(ramp), None, "a.tif").notes
    assert f"--range {hint}" in note
    for quiet in (ramp * 12, ramp * 0 + ramp.max(), (ramp > 0).astype(np.uint8)):
        assert on_unit_scale(Image(quiet), None, "a.tif").notes == ()
    assert on_unit_scale(Image(ramp), (0, top), "a.tif").notes == ()


def test_ranges_as_they_are_told() -> None:
    assert parse_range("0:4095") == (0, 4095)
    assert parse_range("p0.1:p99.9") == Percentiles(0.1, 99.9)
    for wrong in ("p1:99", "p99:p1", "p-1:p50", "p0:p101", "1:2:3", "-5:-6", "p:p"):
        with pytest.raises(UsageError, match="--range is"):
            parse_range(wrong)


def test_twelve_bits_in_sixteen(tmp_path: Path, cdnctl: Run) -> None:
    """As the same picture on the scale of 0..1, in the same counts."""
    pixels = np.clip(noisy_picture(100, 120, sigma=0.1), 0, 1)
    counts = np.rint(4095 * pixels).astype(np.uint16)
    images.write(Image(counts), tmp_path / "counts.png")
    images.write(Image((counts / 4095).astype(np.float32)), tmp_path / "unit.tif")
    options = ("--model", save_tiny(tmp_path / "m.safetensors"), "--json")
    (asked,) = cdnctl("denoise", "counts.png", *options).records
    assert any("--range 0:4095" in note for note in asked["notes"])
    (done,) = cdnctl("denoise", "counts.png", *options, "--overwrite", "--range", "0:4095").records
    (unit,) = cdnctl("denoise", "unit.tif", *options).records
    assert done["sigma"] == pytest.approx(unit["sigma"], rel=1e-3) and done["sigma"] > 10
    assert done["notes"] == unit["notes"]
    found = images.read(tmp_path / "counts_denoised.png").samples
    expected = images.read(tmp_path / "unit_denoised.tif").samples
    assert found.dtype == np.uint16 and np.abs(found - counts.astype(float)).max() > 10
    np.testing.assert_allclose(found, np.clip(4095 * expected, 0, None), atol=0.6)
    piped = cdnctl("denoise", "counts.png", "-o", "-", *options[:2], "--range", "p0:p100")
    assert images.decode(piped.out, "piped.png").dtype == np.uint16
