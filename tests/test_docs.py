"""Every command in the README does what the README says; options, links and scores are real."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
from skimage import data
from typer.main import get_command

from cdnctl.checkpoints import bundled, read_header
from cdnctl.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if not line.startswith("pip install")]
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=cwd,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every file that the README's commands name."""
    here = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    cat = data.chelsea()[60:188, 100:292]

    def noisy(pixels, sigma=25):
        values = pixels + rng.normal(0, sigma, pixels.shape)
        return np.rint(np.clip(values, 0, 255)).astype(np.uint8)

    def save(name, pixels):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        iio.imwrite(here / name, pixels)

    save("photo.jpg", noisy(cat))
    save("in.png", noisy(cat))
    save("sky.png", np.repeat(np.arange(128) < 60, 192).reshape(128, 192).astype(np.uint8) * 255)
    cells = 100 + 3995 / 255 * noisy(np.stack([cat[..., 0], cat[::-1, :, 0]])).astype(float)
    tifffile.imwrite(here / "cells.tif", cells.astype(np.uint16), imagej=True)
    hole = np.zeros(cat.shape[:2], np.uint8)
    hole[40:60, 50:90] = 255
    save("hole.png", hole)
    for i in range(3):
        crop = cat[:, 20 * i : 20 * i + 64]
        save(f"shots/day {i}/é {i}.png", noisy(crop))
        save(f"pictures/{i}.png", crop)
        save(f"noisy/{i}.png", noisy(crop))
        for split in ("train", "val"):
            for label, picture in (("cat", cat), ("person", data.astronaut()[:128, 160:352])):
                save(f"dataset/{split}/{label}/{i}.png", picture[:64, 30 * i : 30 * i + 64])
    (here / "examples").symlink_to(ROOT / "examples")
    return here


def test_readme_has_the_two_set_up_commands():
    pip = [line for line in LINES if line.startswith("pip install")]
    assert len(pip) == 2
    assert all("-c constraints.txt" in line for line in pip)
    assert pip[0].endswith("cdnctl denoise examples/cat_noisy.png --sigma 50 --class cat")
    assert pip[1].endswith("pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, place):
    """Commands run in the order of the README: some use what earlier ones made."""
    result = run(command, place)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_outputs_that_the_readme_promises(place):
    assert iio.imread(place / "photo_denoised.jpg").shape == iio.imread(place / "photo.jpg").shape
    assert len(list((place / "restored").rglob("*.png"))) == 3
    assert (place / "why.png").is_file()
    assert iio.imread(place / "own.jpg").shape == iio.imread(place / "photo.jpg").shape
    for name in ("curves.png", "samples", "results.csv", "best", "last"):
        assert (place / "runs" / "1" / name).exists()
    assert np.load(place / "drawn.npy").shape == (50, 8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_python(code, place):
    result = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def options(command: Any) -> set[str]:
    """Of a command and those below it."""
    found = {name for parameter in command.params for name in parameter.opts}
    return found.union(*map(options, getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("name", ["README.md", "examples/README.md", "weights/README.md"])
def test_options_that_are_named_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:cdnctl [^`]*)?(--[a-z-]+)", text))
    assert named and named <= options(get_command(app)) | {"--help"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("[!.]*/*.md")) + sorted(ROOT.glob("*.md")))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", sorted(bundled()))
def test_scores_are_those_of_the_weights(name: str) -> None:
    """All of them in weights/README.md; of every model one folder's in the README."""
    results = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    leading = []
    for report in read_header(bundled()[name]).scores.values():
        first = report["scores"][0]
        if first["sigma"] is None:  # pairs, with the noise that they have
            gain = f"{first['psnr_noisy']:.2f} to {first['psnr']:.2f} dB"
            assert gain in results
            leading.append(gain in README)
            continue
        rows = {round(row["sigma"]): row for row in report["scores"]}
        psnr = [f"{rows[sigma]['psnr']:.2f}" for sigma in (15, 25, 50)]
        ssim = [f"{rows[sigma]['ssim']:.3f}" for sigma in (15, 25, 50)]
        cells = [f"{a} ({b})" for a, b in zip(psnr, ssim, strict=True)]
        assert f"| {' | '.join(cells)} |" in results
        leading.append(" / ".join(psnr) in README and " / ".join(ssim) in README)
        if 0 in rows:
            right = [f"{100 * rows[sigma]['accuracy']:.1f}" for sigma in (0, 15, 25, 50)]
            assert f"{' / '.join(right)} %" in README
            assert f"{' / '.join(right)} %" in results
    assert any(leading)
