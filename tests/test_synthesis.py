"""Pictures from noise: the law that they have, and the command that writes them."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from processes import Run
from tiny import CLASSES, save_tiny, tiny
from torch import Tensor

from cdnctl.analysis.synthesis import LOWEST, draw
from cdnctl.api import Model
from cdnctl.errors import UnknownClassError, UsageError
from cdnctl.figures import gallery
from cdnctl.images import Image
from cdnctl.sampling import geometric, mode_variance

HIGH = 6.0


def drawn(model: Model, count: int, steps: int, **options: object) -> Tensor:
    return torch.stack(list(draw(model, count, steps, **options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("churn", [0.0, 1.0, 3.0])
def test_the_prior_of_a_gaussian_model(tmp_path: Path, churn: float) -> None:
    """Its pixels are independent, of mean 1/2 and standard deviation 1/4; the sampler gives them
    the variance that its recursion says."""
    model = tiny(tmp_path, gaussian=True, patch=16, high=HIGH)
    x = drawn(model, 40, 12, churn=churn, seed=1)
    assert x.shape == (40, 3, 16, 16)
    sigmas = geometric(HIGH, LOWEST, 12)
    beta = 1 / (1 + churn * sigmas[1] / sigmas[0])
    expected = mode_variance(0.25**2, sigmas, beta, HIGH**2)
    pixels = x.double().flatten()
    n = len(pixels)
    assert abs(float(pixels.mean()) - 0.5) < 4 * (expected / n) ** 0.5
    assert abs(float(pixels.var()) / expected - 1) < 4 * (2 / n) ** 0.5


def test_a_class_is_told_and_guidance_weighs_it(tmp_path: Path) -> None:
    model = tiny(tmp_path, patch=8, high=HIGH)
    none, cat, dog = (drawn(model, 2, 4, label=label) for label in (None, "cat", "dog"))
    assert not torch.equal(none, cat) and not torch.equal(cat, dog)
    # One step is D of the noise: linear in the guidance, from no class to the class and beyond.
    none, cat = (drawn(model, 2, 1, label=label) for label in (None, "cat"))
    for guidance in (0.0, 1.0, 3.0):
        x = drawn(model, 2, 1, label="cat", guidance=guidance)
        torch.testing.assert_close(x, none + guidance * (cat - none), atol=1e-5, rtol=1e-4)


def test_a_seed_gives_the_same_pictures(tmp_path: Path) -> None:
    model = tiny(tmp_path, patch=8, high=HIGH)
    first, again, other = (drawn(model, 18, 3, churn=1.0, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(x.flatten().tolist()) for x in first}) == 18, "batches differ"


def test_progress_rises_to_the_end(tmp_path: Path) -> None:
    shares: list[float] = []
    drawn(tiny(tmp_path, patch=8, high=HIGH), 20, 3, watch=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1 and len(shares) == 6


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'tiny' knows noise up to sigma 484.5 of 255 only"):
        drawn(tiny(tmp_path, high=1.9), 1, 2)
    model = tiny(tmp_path, patch=8, high=HIGH)
    with pytest.raises(UsageError, match="churn is -1"):
        drawn(model, 1, 2, churn=-1.0)
    with pytest.raises(UsageError, match="guidance is inf"):
        drawn(model, 1, 2, label="cat", guidance=float("inf"))
    with pytest.raises(UnknownClassError, match="'horse'"):
        drawn(model, 1, 2, label="horse")
    with pytest.raises(UsageError, match="cannot make pictures"):
        drawn(tiny(tmp_path, "classifier", patch=8, high=HIGH), 1, 2)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_a_sheet_holds_every_picture(count: int) -> None:
    pictures = [np.full((8, 8, 3), (i + 1) / 20, np.float32) for i in range(count)]
    samples = gallery([("", Image.of(pixels)) for pixels in pictures]).samples
    side = 8 * (1024 // (8 * int(np.ceil(count**0.5))))
    for pixels in pictures:
        level = np.rint(pixels[0, 0, 0] * 255)
        assert (samples == level).all(2).sum() == side**2  # enlarged by a whole factor
    many = gallery([("", Image.of(np.zeros((32, 32, 1), np.float32)))] * 1000).samples
    assert (many == 0).all(2).sum() == 1000 * 32**2


# -- the command ------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "wide.safetensors", patch=8, high=HIGH)


def test_a_sheet_and_a_file_each(cdnctl: Run, wide: Path, tmp_path: Path) -> None:
    common = ("sample", "--model", wide, "--class", CLASSES[2], "--count", 11, "--steps", 2)
    done = cdnctl(*common, "-o", "sheet.png")
    assert done.code == 0 and "11 pictures of café crème -> sheet.png" in done.text
    done = cdnctl(*common, "-o", "each/", "--json", "--seed", 3)
    assert done.code == 0
    names = [f"each/{CLASSES[2]}-{i:02}.png" for i in range(11)]
    assert [r["output"] for r in done.records] == names
    assert {(r["class"], r["seed"], r["pictures"]) for r in done.records} == {(CLASSES[2], 3, 1)}
    for name in names:
        assert iio.imread(tmp_path / name).shape == (8, 8, 3)
    before = (tmp_path / names[0]).read_bytes()
    assert cdnctl(*common, "-o", "each/").code == 2, "it is there"
    assert cdnctl(*common, "-o", "each/", "--seed", 3, "--overwrite").code == 0
    assert (tmp_path / names[0]).read_bytes() == before


@pytest.mark.parametrize(
    "options,fault",
    [
        (("-o", "x.png", "--guidance", "2"), "give --class as well"),
        (("-o", "x.txt"), "'x.txt' must be a picture file"),
        (("-o", "x.png", "--class", "horse"), "does not know the class 'horse'"),
        (("-o", "x.png", "--model", "photo"), "knows noise up to sigma"),
    ],
)
def test_refusals(
    cdnctl: Run, wide: Path, tmp_path: Path, options: tuple[str, ...], fault: str
) -> None:
    done = cdnctl("sample", "--model", wide, *options)
    assert done.code == 2 and fault in done.err and done.err.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {wide.name}
