"""Out of distribution: ranks against counted pairs, scores against closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import GaussianMixture
from tiny import picture, tiny
from torch import Tensor

from cdnctl.analysis.ood import (
    ERROR,
    LOG_P,
    SCORE_NORM,
    SOFTMAX,
    fit,
    measure,
    scores,
    separations,
    synthetic,
)
from cdnctl.core import joint
from cdnctl.core.metrics import auroc
from cdnctl.core.noise import noisy_version

SIGMA = 0.2
ALL = {LOG_P, SCORE_NORM, ERROR, SOFTMAX}

few = st.lists(st.integers(-3, 3), min_size=1, max_size=12)


@given(few, few)
def test_auroc_counts_pairs_and_half_of_the_ties(inside: list[int], outside: list[int]) -> None:
    wins = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    a, b = np.array(inside, float), np.array(outside, float)
    assert auroc(a, b) == pytest.approx(wins / (len(a) * len(b)), abs=1e-12)
    assert auroc(a, b) + auroc(b, a) == pytest.approx(1)
    assert auroc(np.exp(a), np.exp(b)) == pytest.approx(auroc(a, b)), "ranks alone matter"


class Oracle:
    """The Gaussian mixture in the form of a network."""

    def __init__(self, mixture: GaussianMixture):
        self.mixture, self.log_joint = mixture, mixture.log_joint
        self.logits = self.log_joint

    def correction(self, y: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        return sigma**2 * joint.score(self.mixture, y, sigma), self.log_joint(y, sigma)


def test_scores_have_their_closed_forms() -> None:
    mixture = GaussianMixture.random((2, 1, 3), (1, 2, 3), seed=0)
    y = mixture.sample(np.full(8, SIGMA), seed=1)
    x = torch.rand(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    found = scores(Oracle(mixture), x, y, SIGMA)  # type: ignore[arg-type]
    assert found.keys() == ALL
    for i in range(len(y)):
        exact = mixture.closed_form(y[i].flatten().numpy(), SIGMA)
        clean = x[i].flatten().numpy()
        expected = {
            LOG_P: np.log(np.exp(exact.log_joint).sum()),
            SCORE_NORM: -SIGMA * np.linalg.norm(exact.score),
            ERROR: -np.square(exact.mean - clean).mean(),
            SOFTMAX: exact.posterior.max(),
        }
        for name, value in expected.items():
            assert found[name][i].item() == pytest.approx(value, rel=1e-8), name


def test_a_density_knows_its_own_from_far_away_ones() -> None:
    mixture = GaussianMixture.random((2, 2), (1, 3, 3), seed=0)
    y = mixture.sample(np.full(200, SIGMA), seed=1)
    own, far = (
        {k: v.numpy() for k, v in scores(Oracle(mixture), pictures, pictures, SIGMA).items()}  # type: ignore[arg-type]
        for pictures in (y, (y + 0.5)[:150])
    )
    by = {s.score: s for s in separations(own, far, SIGMA)}
    assert by[LOG_P].auroc > 0.9 and by[SCORE_NORM].auroc > 0.9
    assert (by[LOG_P].pictures, by[LOG_P].others) == (200, 150)
    blind = {name: values for name, values in far.items() if name == SOFTMAX}
    assert [s.score for s in separations(own, blind, SIGMA)] == [SOFTMAX]


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("gradresnet", ALL), ("unet", {SCORE_NORM, ERROR}), ("classifier", {SOFTMAX})],
)
def test_networks_give_the_scores_that_they_can(
    tmp_path: Path, arch: str, expected: set[str]
) -> None:
    model = tiny(tmp_path, arch)
    pictures = [(str(i), picture(16, 16, top=10 * i)) for i in range(5)]
    counts: list[None] = []
    found = measure(model, pictures, SIGMA, advance=lambda: counts.append(None))
    assert found.keys() == expected and len(counts) == 5
    assert measure(model, pictures, 0.0).keys() == expected & {SOFTMAX}
    for i, (name, x) in enumerate(pictures):
        y = noisy_version(x, SIGMA, name, 0)
        clean, noisy = (torch.from_numpy(v.transpose(2, 0, 1).copy()) for v in (x, y))
        if ERROR in expected:
            error = (model.denoise(noisy, SIGMA) - clean).square().mean().item()
            assert found[ERROR][i] == pytest.approx(-error, rel=1e-4)
            length = SIGMA * model.score(noisy, SIGMA).norm().item()
            assert found[SCORE_NORM][i] == pytest.approx(-length, rel=1e-4)
        if SOFTMAX in expected:
            p = model.posterior(noisy, SIGMA).max().item()
            assert found[SOFTMAX][i] == pytest.approx(p, rel=1e-3)
        if LOG_P in expected:
            log_p = model.log_prob(noisy, SIGMA).item()
            assert found[LOG_P][i] == pytest.approx(log_p, rel=1e-5)


def test_fit_crops_the_centre_and_resizes() -> None:
    x = picture(40, 64)
    np.testing.assert_array_equal(fit(x, 40, 3), x[:, 12:52])
    small = fit(x, 10, 3)
    # Resizing without aliasing is close to a mean over squares.
    squares = x[:, 12:52].reshape(10, 4, 10, 4, 3).mean((1, 3))
    assert np.abs(small - squares).mean() < 0.02 < x.std()
    large = fit(picture(16, 16), 32, 3)
    assert large.shape == (32, 32, 3) and large.dtype == np.float32
    assert large.min() >= 0 and large.max() <= 1
    gray = fit(picture(16, 20, channels=1), 16, 3)
    np.testing.assert_array_equal(gray, np.repeat(picture(16, 20, channels=1)[:, 2:18], 3, 2))


def test_synthetic_pictures() -> None:
    found = list(synthetic(30, 16, seed=3))
    assert len({name for name, _ in found}) == 30
    stack = np.stack([pixels for _, pixels in found])
    assert stack.shape == (30, 16, 16, 3) and stack.dtype == np.float32
    assert stack.min() >= 0 and stack.max() <= 1
    assert len(np.unique(stack.reshape(30, -1), axis=0)) == 30
    again = np.stack([pixels for _, pixels in synthetic(30, 16, seed=3)])
    np.testing.assert_array_equal(stack, again)
    assert not np.array_equal(stack[0], next(synthetic(1, 16, seed=4))[1])
    # Two colours and what lies between: every picture is a line in colour space.
    for pixels in stack:
        flat = pixels.reshape(-1, 3) - pixels.reshape(-1, 3).mean(0)
        spread = np.linalg.svd(flat, compute_uv=False)
        assert spread[0] > 0.1 and spread[1] < 1e-4 * spread[0]
    for gradient, checks, blob in zip(stack[::3], stack[1::3], stack[2::3], strict=True):
        assert len(np.unique(checks.reshape(-1, 3), axis=0)) == 2
        for smooth in (gradient, blob):
            assert len(np.unique(smooth.reshape(-1, 3), axis=0)) > 20
        second = np.diff(gradient, 2, axis=0), np.diff(gradient, 2, axis=1)
        assert max(np.abs(d).max() for d in second) < 1e-6, "linear"
