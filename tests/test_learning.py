"""Learning curves that are measured: the estimators, and the constants of theory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Run
from tiny import write

from cdnctl.errors import UsageError
from cdnctl.measure.learning import analysed, features, learning, loss, regressed

pytestmark = pytest.mark.slow  # seconds each


def examples(count: int, dimensions: int, separation: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    x = rng.normal(size=(count, dimensions))
    x[:, 0] += (labels - 0.5) * separation
    return x, labels


def test_both_find_the_truth_from_many_examples() -> None:
    """The logit of two Gaussian classes is separation * x_0."""
    x, labels = examples(40_000, 3, 2.0)
    for learn in (analysed, regressed):
        found = learn(x, labels)
        np.testing.assert_allclose(found, [0, 2, 0, 0], atol=0.08)
        # No other logit of this form has a smaller loss, up to what the ridge costs.
        for i in range(4):
            away = found + 0.2 * np.eye(4)[i]
            assert loss(away, x, labels) > loss(found, x, labels)


def test_v_is_that_of_theory_on_its_own_ground() -> None:
    x, labels = examples(60_000, 4, 3.17)
    generative, discriminative = learning(x, labels, [200, 400, 800], repetitions=60)
    for one in (generative, discriminative):
        assert one.losses == tuple(sorted(one.losses, reverse=True))
        assert one.curve.v == pytest.approx(one.theory, rel=0.35)
    assert generative.curve.v < 0.75 * discriminative.curve.v
    # Both families hold the truth: with many examples they lose the same.
    assert generative.curve.b == pytest.approx(discriminative.curve.b, abs=0.004)


def test_components_are_of_variance_one_and_in_order() -> None:
    rng = np.random.default_rng(1)
    pictures = rng.normal(size=(3000, 2, 3)) * [1, 5, 2] + 7
    found = features(pictures, 3)
    np.testing.assert_allclose(found.T @ found / 3000, np.eye(3), atol=1e-9)
    flat = pictures.reshape(3000, -1)
    strong = flat[:, [1, 4]]  # the values of variance 25 span the first two
    for k in (0, 1):
        share = [np.corrcoef(found[:, k], s)[0, 1] ** 2 for s in strong.T]
        assert sum(share) > 0.97
    with pytest.raises(UsageError, match="1 to 5"):
        features(pictures, 6)


def test_the_command(cdnctl: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for name, level in (("dark", 0.45), ("light", 0.55), ("other", 0.9)):
        for i in range(30):
            grain = rng.normal(0, 0.2, (8, 8, 3))
            write(tmp_path / "set" / name / f"{i}.png", np.clip(level + grain, 0, 1))
    options = ("--dimensions", 2, "--counts", "8,24")
    done = cdnctl("bench", "learning", "set", "--classes", "dark,light", *options, "--json")
    assert done.code == 0, done.err
    rows: Any = done.records[0]
    assert [row["approach"] for row in rows] == ["generative", "discriminative"]
    assert all(row["at 8"] > 0 and row["at 24"] > 0 for row in rows)
    for bad, word in (("dark,blue", "'dark,blue'"), ("dark", "dark, light, other")):
        refused = cdnctl("bench", "learning", "set", "--classes", bad)
        assert refused.code == 2 and word in refused.err
    refused = cdnctl("bench", "learning", "set", "--classes", "dark,light", "--counts", "8,400")
    assert refused.code == 2 and "400" in refused.err
