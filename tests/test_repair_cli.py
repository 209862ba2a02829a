"""The commands inpaint, upscale and deblur, denoise --jpeg and explain --basis."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from processes import Run
from tiny import files, picture, write

from cdnctl import images
from cdnctl.restore.manifest import NAME

HEIGHT, WIDTH = 20, 24


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for i in range(2):
        write(tmp_path / "in" / f"{i}.png", picture(HEIGHT, WIDTH, top=40 + 20 * i))
    hole = np.zeros((HEIGHT, WIDTH, 1), np.float32)
    hole[5:11, 8:17] = 1
    write(tmp_path / "hole.png", hole)
    write(tmp_path / "black.png", 0 * hole)
    write(tmp_path / "white.png", 0 * hole + 1)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("inpaint", "--mask", "hole.png"),
        ("upscale", "--factor", 3),
        ("deblur", "--kernel", "gauss:0.8"),
    ],
)
def test_a_folder_is_gone_through_and_gone_on_with(
    cdnctl: Run, weights: Path, place: Path, command: tuple[str, ...]
) -> None:
    line = (*command, "in", "-o", "out", "--model", weights, "--steps", 2, "--json")
    done = cdnctl(*line)
    assert done.code == 0, done
    records = [r for r in done.records if r["event"] == "restored"]
    assert [r["steps"] for r in records] == [2, 2]
    factor = 3 if command[0] == "upscale" else 1
    for i in range(2):
        before, after = (images.read(place / f / f"{i}.png").samples for f in ("in", "out"))
        assert after.shape == (HEIGHT * factor, WIDTH * factor, 3)
        assert factor > 1 or (after != before).any()
    assert f'"operation": "{command[0]}"' in (place / "out" / NAME).read_text("utf-8")
    made = files(place / "out")
    again = cdnctl(*line, "--resume")
    assert [r["event"] for r in again.records] == ["skipped"] * 2 + ["finished"]
    changed = cdnctl(*line, "--resume", "--noise", 3)
    assert [r["event"] for r in changed.records] == ["restored"] * 2 + ["finished"]
    assert files(place / "out") != made


def test_samples_with_their_sheet_and_their_spread(cdnctl: Run, weights: Path, place: Path) -> None:
    line = ("inpaint", "in/0.png", "--mask", "hole.png", "--model", weights, "--steps", 2)
    more = ("--samples", 3, "--sheet", "sheet.png", "--uncertainty", "std.npy", "-o", "a.png")
    done = cdnctl(*line, *more)
    assert done.code == 0 and "mean of 3 samples, which differ by" in done.text
    std = np.load(place / "std.npy")
    hole = images.read(place / "hole.png").samples[..., 0] > 0
    assert std.shape == hole.shape and (std[hole] > 0).all() and std[~hole].max() < 1e-6
    sheet = images.read(place / "sheet.png").samples
    assert min(sheet.shape[:2]) >= 2 * HEIGHT
    plain = cdnctl(*line, "-o", "b.png")
    assert plain.code == 0
    again = cdnctl(*line, "-o", "c.png")
    assert again.code == 0
    found = files(place)
    assert found["b.png"] == found["c.png"] != found["a.png"]


def test_a_pipe(cdnctl: Run, weights: Path, place: Path) -> None:
    data = (place / "in" / "0.png").read_bytes()
    done = cdnctl("upscale", "-", "-o", "-", "--model", weights, "--steps", 1, stdin=data)
    assert done.code == 0
    assert images.decode(done.out, "x").samples.shape == (2 * HEIGHT, 2 * WIDTH, 3)


def test_a_kernel_from_a_file(cdnctl: Run, weights: Path, place: Path) -> None:
    write(place / "line.png", np.ones((1, 5, 1), np.float32))
    line = ("deblur", "in/0.png", "--model", weights, "--steps", 1)
    assert cdnctl(*line, "-o", "a.png", "--kernel", "line.png").code == 0
    assert cdnctl(*line, "-o", "b.png", "--kernel", "motion:5@0").code == 0
    a, b = (images.read(place / name).samples.astype(int) for name in ("a.png", "b.png"))
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize(
    "line, words",
    [
        ("inpaint in/0.png --mask black.png", "'black.png' has no white pixel"),
        ("inpaint in/0.png --mask white.png", "'white.png' is all white"),
        ("inpaint in/0.png --mask nowhere.png", "no such file"),
        ("inpaint in/0.png --mask hole.png --class zebra", "does not know the class 'zebra'"),
        ("inpaint in/0.png --mask hole.png --class auto", "name a class"),
        ("inpaint in/0.png --mask hole.png --sheet s.png", "'s.png' shows samples"),
        ("inpaint in --mask hole.png -o out --samples 2 --sheet s.png", "takes one picture, not 2"),
        ("upscale in/0.png --factor 0", "a factor of 0: give one of 2, 3, 4"),
        ("upscale in/0.png --noise 256", "--noise is 256"),
        ("deblur in/0.png --kernel black.png", "'black.png' sums to 0"),
        ("deblur in/0.png --kernel gauss:x", "'gauss:x'"),
        ("deblur in/0.png --kernel gauss:0", "a Gaussian blur of 0 pixels"),
        ("deblur in/0.png --kernel motion:-3@10", "a motion of -3 pixels"),
        ("denoise in/0.png --jpeg --strength 0.5", "--strength does not go with --jpeg"),
        ("explain in/0.png -o e.png --basis 2 --sigma 0", "sigma is 0"),
        ("explain in/0.png -o e.npy --basis 2", "'e.npy': --basis is drawn"),
    ],
)
def test_what_cannot_be_done(
    cdnctl: Run, weights: Path, place: Path, line: str, words: str
) -> None:
    before = files(place)
    done = cdnctl(*line.split(), "--model", weights)
    assert done.code == 2 and words in done.err and len(done.err.splitlines()) == 1
    assert files(place) == before


@pytest.mark.parametrize(
    "line, words",
    [
        ("inpaint {} --mask big.png", "30 x 20 pixels, the picture 24 x 20"),
        ("inpaint {} --mask alpha", "no alpha"),
        ("deblur {} --kernel gauss:3", "25 x 25 pixels, the picture 24 x 20"),
        ("denoise {} --jpeg", "is no JPEG file"),
    ],
)
def test_a_picture_that_does_not_suit(
    cdnctl: Run, weights: Path, place: Path, line: str, words: str
) -> None:
    """It is reported by its name; others go on."""
    hole = np.zeros((20, 30, 1), np.float32)
    hole[:5] = 1
    write(place / "big.png", hole)
    done = cdnctl(*line.format("in/0.png").split(), "--model", weights)
    assert done.code == 1 and words in done.err and "0.png'" in done.err
    many = cdnctl(*line.format("in").split(), "-o", "out", "--model", weights)
    assert many.code == 1 and "2 of 2 pictures failed" in many.err


def test_blocks_of_a_jpeg_file(cdnctl: Run, weights: Path, place: Path) -> None:
    pixels = np.rint(255 * picture(48, 64)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(place / "old.jpg", quality=15)
    line = ("denoise", "old.jpg", "--jpeg", "--model", weights)
    done = cdnctl(*line, "-o", "a.png", "--json", "--compare", "both.png")
    (record,) = done.records
    assert done.code == 0 and record["sigma"] > 1 and record["outside"] < 1.5
    data = (place / "old.jpg").read_bytes()
    piped = cdnctl("denoise", "-", "--jpeg", "--model", weights, "-o", "b.png", stdin=data)
    assert piped.code == 0
    found = files(place)
    assert found["a.png"] == found["b.png"] and "both.png" in found
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    (place / "inks.jpg").write_bytes(buffer.getvalue())
    refused = cdnctl("denoise", "inks.jpg", "--jpeg", "--model", weights)
    assert refused.code == 1 and "CMYK" in refused.err


def test_the_patterns_of_a_picture(cdnctl: Run, weights: Path, place: Path) -> None:
    done = cdnctl(
        "explain", "in/0.png", "-o", "e.png", "--basis", 2, "--sigma", 50, "--model", weights
    )
    assert done.code == 0 and f"of {HEIGHT * WIDTH * 3} values are kept" in done.text
    sheet = images.read(place / "e.png").samples
    assert sheet.shape[0] >= 2 * HEIGHT and sheet.shape[1] >= 3 * WIDTH
    tried = cdnctl(
        "explain", "in/0.png", "-o", "f.png", "--basis", 5000, "--sigma", 50, "--model", weights
    )
    assert tried.code == 2 and "5000 eigenvectors" in tried.err
