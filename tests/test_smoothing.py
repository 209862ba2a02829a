"""Certificates: never more than is true, and not much less."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Run
from scipy.stats import binom
from tiny import noisy_picture, save_tiny, tiny, write
from torch import Tensor

from cdnctl.analysis.smoothing import (
    SELECTING,
    certified,
    certify,
    largest_radius,
    lower_bound,
    radius_of,
)
from cdnctl.errors import UsageError
from cdnctl.images import Image
from cdnctl.restore.scale import Shrink

SIGMA = 0.25


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_bound_holds_as_often_as_it_says(confidence: float) -> None:
    """Exactly, by summing over all counts; and no less seldom than it must for a lucky p."""
    draws = 40
    bounds = np.array([lower_bound(k, draws, confidence) for k in range(draws + 1)])
    assert (np.diff(bounds) > 0).all() and bounds[0] == 0
    assert bounds[-1] == pytest.approx((1 - confidence) ** (1 / draws))
    for p in np.linspace(0.01, 0.99, 99):
        wrong = binom.pmf(np.arange(draws + 1), draws, p)[bounds > p].sum()
        assert wrong <= 1 - confidence + 1e-12
    # Just below a bound that count and all larger ones are wrong, with the full probability.
    p = bounds[30] - 1e-9
    assert binom.sf(29, draws, p) == pytest.approx(1 - confidence, rel=1e-4)


class Plane:
    """A linear classifier of two classes; counts what it is shown."""

    def __init__(self, seed: int):
        self.w = torch.randn(3 * 4 * 5, generator=seeded(seed), dtype=torch.float64)
        self.seen = 0

    def __call__(self, y: Tensor) -> Tensor:
        self.seen += len(y)
        score = (y - 0.5).flatten(1) @ self.w
        return torch.stack([torch.zeros_like(score), score], 1)

    def at(self, distance: float) -> Tensor:
        """A picture on the side of class 1, so far from the boundary."""
        x = 0.5 + distance * self.w / self.w.norm()
        return x.view(1, 3, 4, 5)


@pytest.mark.parametrize("seed", range(12))
def test_no_more_than_the_true_distance(seed: int) -> None:
    plane = Plane(seed)
    for distance in (0.05, 0.2, 0.4):
        x = plane.at(distance)
        found = certify(plane, x, SIGMA, 2000, 0.9999, seeded(seed))
        assert found.radius <= distance
        if distance > 0.1:
            assert found.label == 1 and found.radius > 0.7 * distance
            assert found.radius == pytest.approx(radius_of(found.lower, SIGMA))
            # So far that noise never leads astray, but no further than the draws can tell.
    far = certify(plane, plane.at(10.0), SIGMA, 500, 0.999, seeded(seed))
    assert far.radius == pytest.approx(largest_radius(500, SIGMA, 0.999))


def test_on_the_boundary_it_abstains() -> None:
    for seed in range(9):
        plane = Plane(seed)
        assert certify(plane, plane.at(0.0), SIGMA, 100, 0.99, seeded(seed)).label is None


def test_draws_that_choose_do_not_count() -> None:
    plane, shares = Plane(0), []
    certify(plane, plane.at(0.1), SIGMA, 70, 0.9, seeded(0), watch=shares.append)
    assert plane.seen == SELECTING + 70
    assert shares == sorted(shares) and shares[-1] == 1

    def turncoat(y: Tensor) -> Tensor:  # class 1 while choosing, class 0 when it counts
        turncoat.seen += len(y)  # type: ignore[attr-defined]
        late = turncoat.seen > SELECTING  # type: ignore[attr-defined]
        return torch.tensor([1.0, 0.0] if late else [0.0, 1.0]).expand(len(y), 2)

    turncoat.seen = 0  # type: ignore[attr-defined]
    found = certify(turncoat, plane.at(0.1), SIGMA, 70, 0.9, seeded(0))
    assert (found.label, found.lower) == (None, 0.0)


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (33, 57), (64, 17)])
def test_shrinking_shortens_changes(size: tuple[int, int]) -> None:
    """By which the radius in a large picture is larger: the norm of the map is 1 / sqrt(m)."""
    shrink = Shrink(*size, 16)
    m = size[0] * size[1] / (shrink.height * shrink.width)
    basis = torch.eye(size[0] * size[1]).view(-1, 1, *size)
    norm = torch.linalg.matrix_norm(shrink(basis).flatten(1), 2).item()
    assert norm == pytest.approx(m**-0.5, rel=1e-4)


def test_of_a_model(tmp_path: Path) -> None:
    model = tiny(tmp_path, patch=16)
    small, gray = noisy_picture(16, 16), noisy_picture(16, 20, 1)
    found = certified(Image(small), model, SIGMA, 60, 0.9, 3)
    assert found == certified(Image(small), model, SIGMA, 60, 0.9, 3)
    assert found.label == model.posterior(small, SIGMA).argmax() and found.radius > 0
    certified(Image(gray), model, SIGMA, 20)
    large = certified(Image(small.repeat(2, 0).repeat(2, 1)), model, SIGMA, 60, 0.9, 3)
    assert (large.label, large.lower) == (found.label, pytest.approx(found.lower))
    assert large.radius == pytest.approx(2 * found.radius)
    for options, fault in (
        ((0.5, 100), "sigma 127.5 of the smoothing is beyond"),
        ((math.nan, 100), "is beyond"),
        ((SIGMA, 9), "9 draws are too few"),
        ((SIGMA, 100, 1.0), "confidence is 1"),
    ):
        with pytest.raises(UsageError, match=fault):
            certified(Image(small), model, *options)
    with pytest.raises(UsageError, match="cannot certify classes"):
        certified(Image(small), tiny(tmp_path, "unet", patch=16), SIGMA, 100)


# -- the commands -----------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "w" / "tiny.safetensors", patch=16)


def test_classify(cdnctl: Run, weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.full((16, 16, 3), 0.9, np.float32))
    run = ("classify", "a.png", "--model", weights, "--certify", 64, "--draws", 40)
    done = cdnctl(*run)
    assert done.code == 0 and "certified within l2 0." in done.text
    assert "40 draws certify a radius of 0.25 at most" in done.err
    (record,) = cdnctl(*run, "--json", "-q").records
    assert record["class"] and 0 < record["radius"] < 0.26 and record["draws"] == 40
    (record,) = cdnctl(*run, "--json", "-q", "--draws", 10, "--confidence", 0.99999).records
    assert record["class"] is None and record["radius"] == 0
    assert "abstains" in cdnctl(*run, "--draws", 10, "--confidence", 0.99999).text


@pytest.mark.parametrize(
    "options,fault",
    [
        (("--certify", "64", "--sigma", "25"), "leave out --sigma 25"),
        (("--certify", "0"), "--certify is '0'"),
        (("--certify", "auto"), "--certify is 'auto'"),
        (("--certify", "many"), "--certify: sigma is 'many'"),
        (("--certify", "200"), "beyond what model 'tiny' knows"),
    ],
)
def test_refusals(
    cdnctl: Run, weights: Path, tmp_path: Path, options: tuple[str, ...], fault: str
) -> None:
    write(tmp_path / "a.png")
    done = cdnctl("classify", "a.png", "--model", weights, *options, "-q")
    assert done.code == 2 and fault in done.err and done.err.count("\n") == 1


def test_accuracy_of_a_folder(cdnctl: Run, weights: Path, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        for i in range(2):
            write(tmp_path / "set" / label / f"{i}.png", noisy_picture(16, 16, seed=i))
    run = ("certify", "set", "--model", weights, "--draws", 40, "--radius", "0.1,0,5", "--json")
    done = cdnctl(*run)
    assert done.code == 0 and "certify no more than 0.2" in done.err
    rows = json.loads(done.out)["certified"]
    assert [row["radius"] for row in rows] == [0, 0.1, 5]
    shares = [row["certified_accuracy"] for row in rows]
    assert shares == sorted(shares, reverse=True) and shares[-1] == 0 < shares[0] <= 0.5
    for row in rows:
        assert row["interval"][0] <= row["certified_accuracy"] <= row["interval"][1]
        assert row["pictures"] == 4
    assert cdnctl(*run).out == done.out, "the same seed"
    assert cdnctl(*run, "--radius", "far").code == 2
    write(tmp_path / "flat" / "a.png")
    done = cdnctl("certify", "flat", "--model", weights)
    assert done.code == 2 and "needs folders named after classes" in done.err
