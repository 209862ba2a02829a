"""The scores of repairs and of confidence, for pictures of which the exact denoiser is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Run
from tiny import picture, save_tiny, write

from cdnctl import images
from cdnctl.api import Model, load
from cdnctl.errors import UsageError
from cdnctl.inverse.jpeg import SLACK
from cdnctl.measure.confidence import confidence
from cdnctl.measure.repairs import REPAIRS, Row, crops, measured

pytestmark = pytest.mark.slow  # seconds each

STD = 0.25  # of the pixels of the Gaussian model, which are independent, with mean 1/2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bell") / "bell.safetensors", gaussian=True)


@pytest.fixture(scope="module")
def bell(weights: Path) -> Model:
    """The exact denoiser of independent Gaussian pixels."""
    return load(weights)


def fields(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.5 + STD * torch.randn(1, 3, size, size, generator=generator) for _ in range(count)]


def rows(bell: Model, *names: str, count: int = 2, size: int = 64) -> dict[str, Row]:
    found = measured(fields(count, size), bell, names, samples=4)
    return {row.repair: row for row in found}


def rows_of(done: Any) -> list[dict[str, Any]]:
    (found,) = done.records
    return found


def decibels(variance: float) -> float:
    return -10 * math.log10(variance)


def test_what_is_missing_of_independent_pixels_costs_its_variance(bell: Model) -> None:
    """Nobody can tell more of a missing pixel than its mean, and of four than theirs."""
    # Scores are of clipped results: values beyond black and white, that are right, are lost.
    pictures = torch.cat(fields(2, 64))
    loss = float((pictures.clamp(0, 1) - pictures).square().mean())
    found = rows(bell, "random pixels", "squares", "upscale x2")
    for name, share in (("random pixels", 0.5), ("squares", 16**2 / 64**2)):
        row = found[name]
        assert row.psnr == pytest.approx(decibels(share * STD**2 + (1 - share) * loss), abs=0.25)
        assert row.other == "biharmonic" and row.gain > 1 and row.better == row.pictures == 2
    row = found["upscale x2"]
    assert row.psnr == pytest.approx(decibels(0.75 * STD**2), abs=0.2)
    assert row.gain == pytest.approx(row.psnr - row.other_psnr) and row.gain > 0.2


def test_the_mean_of_draws_is_better_by_the_law_of_exact_draws(bell: Model) -> None:
    """One has twice the least error, the mean of K (1 + 1/K) times: 10 log10(2 / 1.25) for 4."""
    generator = torch.Generator().manual_seed(1)
    small = [0.5 + STD * torch.randn(1, 3, 16, 16, generator=generator).clamp(-2, 2)]
    (row,) = measured(small, bell, ["samples"], samples=4)
    assert row.repair == "mean of 4 samples" and row.other == "one sample"
    assert row.gain == pytest.approx(10 * math.log10(2 / 1.25), abs=0.5)


def test_a_blur_is_undone_as_by_the_best_filter(bell: Model) -> None:
    """For independent Gaussian pixels the Wiener filter is the posterior mean; it sees no edge."""
    found = list(measured(fields(1, 64), bell, ["deblur"]))
    assert [row.other for row in found] == ["best Wiener filter", "plug-and-play, DPIR's schedule"]
    assert abs(found[0].gain) < 0.3
    assert found[1].psnr == found[0].psnr and found[1].other_psnr < found[0].psnr + 0.05


def test_a_file_is_left_in_its_box(bell: Model) -> None:
    smooth = torch.from_numpy(picture(64, 64).transpose(2, 0, 1).copy())[None].float()
    (row,) = measured([smooth], bell, ["JPEG 10"])
    assert row.outside is not None and row.outside <= SLACK
    assert row.other == "the file" and 15 < row.other_psnr < 45 and row.denoisings is not None


def test_the_exact_denoiser_is_calibrated(bell: Model) -> None:
    (found,) = confidence(fields(6, 32), bell, [0.1], probes=2, seed=1)
    exact = 0.1 * STD / math.hypot(0.1, STD)
    assert found.expected == pytest.approx(exact, rel=1e-3)  # J is a multiple of the identity
    assert found.made == pytest.approx(exact, rel=0.03)
    assert abs(found.ratio - 1) < 4 * found.error < 0.2
    # A gray picture is one with three equal channels.
    gray = [x[:, :1] for x in fields(2, 16)]
    repeated = [x.repeat(1, 3, 1, 1) for x in gray]
    assert next(confidence(gray, bell, [0.1])) == next(confidence(repeated, bell, [0.1]))
    with pytest.raises(UsageError, match="two or more"):
        next(confidence(fields(1, 32), bell, [0.1]))


def test_crops_are_the_middle_of_pictures_that_are_large_enough(tmp_path: Path) -> None:
    for i in range(5):
        write(tmp_path / f"{i}.png", picture(40 + i, 50))
    write(tmp_path / "small.png", picture(20, 20))
    files = sorted(tmp_path.iterdir())
    found = crops(files, 3, 32)
    assert len(found) == 3
    for i, part in zip((0, 2, 4), found, strict=True):
        top = (40 + i - 32) // 2
        pixels = images.read(tmp_path / f"{i}.png").pixels[top : top + 32, 9:41]
        np.testing.assert_array_equal(part[0].permute(1, 2, 0).numpy(), pixels)
    with pytest.raises(UsageError, match="--size"):
        crops(files, 3, 64)


def test_the_commands(cdnctl: Run, weights: Path, tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / "in" / f"{i}.png", picture(70, 66, top=9 * i))
    options = ("--model", weights, "--json")
    done = cdnctl("bench", "repair", "in", "--repairs", "upscale x2", "--size", "64", *options)
    assert done.code == 0, done.err
    (row,) = rows_of(done)
    assert (row["repair"], row["other"], row["pictures"]) == ("upscale x2", "bicubic", 2)
    assert row["gain"] == pytest.approx(row["psnr"] - row["other_psnr"], abs=1e-9)
    done = cdnctl("bench", "confidence", "in", "--sigma", "25", "--size", "32", *options)
    assert done.code == 0, done.err
    (row,) = rows_of(done)
    assert row["sigma"] == 25 and row["expected"] == pytest.approx(25 * 0.931, abs=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("repair", "in", "--repairs", "holes"), ["'holes'", *REPAIRS]),
        (("repair", "in", "--size", "65"), ["--size is 65", "even"]),
        (("repair", "in", "--size", "90"), ["90 x 90", "--size"]),
        (("confidence", "in", "--sigma", "0"), ["sigma 0"]),
    ],
)
def test_what_cannot_be_measured(
    cdnctl: Run, tmp_path: Path, options: tuple[str, ...], words: list[str]
) -> None:
    write(tmp_path / "in" / "0.png", picture(70, 66))
    done = cdnctl("bench", *options)
    assert done.code == 2
    assert all(word in done.err for word in words), done.err
