"""What telling the class gains, against closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Component, GaussianMixture
from tiny import noisy_picture, tiny
from torch import Tensor

from cdnctl.analysis.information import class_gain, entropy, information
from cdnctl.errors import UsageError

SHAPE = (1, 2, 2)


def made(count: int, seed: int = 0) -> tuple[GaussianMixture, Tensor, Tensor]:
    """Three classes, one of two Gaussians, with pictures of them and their labels."""
    rng = np.random.default_rng(seed)

    def part(share: float, level: float) -> Component:
        root = 0.06 * rng.normal(size=(4, 4))
        return Component(share, level + 0.05 * rng.normal(size=4), root @ root.T)

    classes = [[part(0.3, 0.2)], [part(0.25, 0.8), part(0.15, 0.5)], [part(0.3, 0.45)]]
    parts = [(c, p) for c, members in enumerate(classes) for p in members]
    chosen = rng.choice(len(parts), count, p=[p.share for _, p in parts])
    x = np.stack([rng.multivariate_normal(parts[i][1].mean, parts[i][1].cov) for i in chosen])
    labels = torch.tensor([parts[i][0] for i in chosen])
    return GaussianMixture(classes, SHAPE), torch.from_numpy(x).view(-1, *SHAPE), labels


def known(oracle: GaussianMixture, x: Tensor, labels: Tensor, sigma: float) -> float:
    """I(c; y) by its definition: the mean of log p(c | y) / p(c)."""
    shares = torch.tensor([sum(p.share for p in m) for m in oracle.classes], dtype=torch.float64)
    y = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    log_p = oracle.log_joint(y, sigma).log_softmax(1)
    return float((log_p.gather(1, labels[:, None])[:, 0] - shares.log()[labels]).mean())


def test_the_gains_add_up_to_the_information() -> None:
    oracle, x, labels = made(4000)
    sigmas = np.geomspace(8.0, 0.004, 60).tolist()
    g = torch.Generator().manual_seed(0)
    found = [class_gain(oracle, x, labels, s, g) for s in sigmas]
    for one in found:  # orthogonality: both are the gain of an exact model
        assert abs(one.gain - one.shift) < 4.5 * one.error + 1e-12
    for values in ([one.gain for one in found], [one.shift for one in found]):
        nats = information(sigmas, values)
        for i in (20, 30, 40, 59):
            assert nats[i] == pytest.approx(known(oracle, x, labels, sigmas[i]), abs=0.03)
        assert nats[0] == 0 and max(nats) < math.log(3)
    # Without noise all of it is known, as far as pictures of the classes differ.
    assert information(sigmas, [one.shift for one in found])[-1] < entropy(labels) + 0.03


def test_two_points_in_closed_form() -> None:
    """Classes x = 1/2 -+ a: the shift is a^2 (1 - m)^2 for D = 1/2 + m a, m = tanh(...)."""
    a, sigma = 0.1, 0.15
    classes = [[Component(0.5, np.array([0.5 + side * a]), np.zeros((1, 1)))] for side in (-1, 1)]
    oracle = GaussianMixture(classes, (1, 1, 1))
    x = torch.full((1, 1, 1, 1), 0.5 + a, dtype=torch.float64)
    found = class_gain(oracle, x, torch.tensor([1]), sigma, torch.Generator().manual_seed(3))
    n = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    m = math.tanh(a * float(a + sigma * n) / sigma**2)
    assert found.shift == pytest.approx(a**2 * (1 - m) ** 2)
    assert found.gain == pytest.approx(a**2 * (1 - m) ** 2) and found.error == math.inf


def test_the_integral_of_a_power() -> None:
    """A gain of sigma^3 gives the integral of sigma d ln sigma: the levels' difference."""
    sigmas = np.geomspace(0.1, 2.0, 400)[::-1].tolist()
    nats = information(sigmas, [s**3 for s in sigmas])
    np.testing.assert_allclose(nats, [2.0 - s for s in sigmas], atol=1e-4)
    mixed = information(sigmas[::-1], [s**3 for s in sigmas[::-1]])
    np.testing.assert_allclose(mixed, nats[::-1], atol=1e-12)
    for levels, gains in (([1.0], [1.0]), ([1.0, 0.0], [1.0, 1.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(UsageError, match="give two above 0"):
            information(levels, gains)


def test_of_a_network(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    x = torch.from_numpy(noisy_picture(16, 16)).permute(2, 0, 1).repeat(3, 1, 1, 1)
    found = class_gain(model.module, x, torch.tensor([0, 1, 2]), 0.2)  # type: ignore[arg-type]
    assert found.shift > 0 and math.isfinite(found.gain)


def test_entropy() -> None:
    assert entropy(torch.tensor([0, 1, 3, 2])) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([2, 2])) == 0
