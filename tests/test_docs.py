"""Every command in the README does what the README says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from skimage import data

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


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_python(code, place):
    result = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_options_named_in_the_readme_exist():
    options = set(re.findall(r"`(--[a-z-]+)", README))
    help_texts = ""
    for command in (
        *("denoise", "classify", "evaluate", "attack", "certify", "explain", "sample", "train"),
    ):
        env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
        help_texts += subprocess.run(
            [sys.executable, "-m", "cdnctl", command, "--help"],
            capture_output=True,
            text=True,
            env=env,
            check=True,
        ).stdout
    assert options
    for option in options:
        assert option in help_texts, option
