"""Fisher's ratio against closed forms, and what shrinkage in a frame does to it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cdnctl.analysis.separation import layer_by_layer, separation
from cdnctl.core.thresholds import soft_moments
from cdnctl.models.frames import bases, concentrate


def randn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def classes(means: Tensor, std: float = 1.0, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Pictures of classes that are normal about their means (K, d)."""
    labels = torch.arange(count) % len(means)
    return means[labels] + std * randn(count, means.shape[1]), labels


def test_the_ratio_of_normal_classes_is_known() -> None:
    """Two classes at +-m, of covariance s^2: |m|^2 / s^2."""
    m = torch.tensor([[3.0, 0, 4, 0]], dtype=torch.float64)
    found = separation(*classes(torch.cat([m, -m]), std=2.0))
    assert found.between == pytest.approx(25, rel=0.02)
    assert found.within == pytest.approx(16, rel=0.02)
    assert found.fisher == pytest.approx(25 / 4, rel=0.02)


def test_classes_count_by_their_pictures() -> None:
    x = torch.tensor([[0.0], [2.0], [5.0], [7.0], [1.0], [1.0]], dtype=torch.float64)
    found = separation(x, torch.tensor([0, 0, 4, 4, 0, 0]))
    assert found.between == pytest.approx(4 / 6 * (1 - 16 / 6) ** 2 + 2 / 6 * (6 - 16 / 6) ** 2)
    assert found.within == pytest.approx((1 + 1 + 1 + 1) / 4)
    assert found.fisher == pytest.approx(found.between / found.within, rel=1e-5)


def test_the_ratio_minds_no_linear_map() -> None:
    x, labels = classes(randn(3, 5, seed=1))
    base = separation(x, labels)
    mapped = separation(x @ randn(5, 5, seed=2), labels)
    assert mapped.fisher == pytest.approx(base.fisher, rel=1e-3)
    assert mapped.within != pytest.approx(base.within, rel=0.1)
    constant = separation(torch.cat([x, torch.ones(len(x), 1)], 1), labels)
    assert constant.fisher == pytest.approx(base.fisher, rel=1e-3)


def test_labels_at_random_separate_hardly_anything() -> None:
    found = separation(randn(20_000, 10), torch.arange(20_000) % 4)
    assert found.fisher == pytest.approx(10 * 3 / 20_000, rel=0.6)


def test_refusals_say_how_many_pictures_there_are() -> None:
    with pytest.raises(ValueError, match="1 class"):
        separation(randn(20, 3), torch.zeros(20))
    with pytest.raises(ValueError, match="12 pictures are too few for 30 features"):
        separation(randn(12, 30), torch.arange(12) % 2)


def test_layers_are_means_over_positions() -> None:
    x, labels = classes(randn(3, 5, seed=1), count=300)
    maps = x[:, :, None, None] + torch.tensor([[-1.0, 1.0]])
    layers = [("first", maps), ("second", 2 * maps)]
    batches = [([(n, t[i : i + 100]) for n, t in layers], labels[i : i + 100])
               for i in (0, 100, 200)]  # fmt: skip
    found = dict(layer_by_layer(batches))
    assert list(found) == ["first", "second"]
    assert found["first"].fisher == pytest.approx(separation(x, labels).fisher)
    assert found["second"].within == pytest.approx(4 * found["first"].within)


# -- concentration --------------------------------------------------------------------------


def shrunk(x: Tensor, atoms: Tensor, threshold: float) -> Tensor:
    return concentrate(x[:, :, None, None], atoms, threshold)[:, :, 0, 0]


@pytest.mark.parametrize("sparse", [True, False])
def test_shrinkage_separates_where_means_are_sparse(sparse: bool) -> None:
    """Means on one atom of an orthonormal frame: the ratio rises. Spread over all: it falls."""
    d, threshold = 16, 1.5
    atoms = bases(1, d).double()
    coefficients = torch.zeros(4, d, dtype=torch.float64)
    for k in range(4):
        coefficients[k, k if sparse else slice(None)] = 4.0 if sparse else 1.0
    if not sparse:
        coefficients *= torch.sign(randn(4, d, seed=3))
    x, labels = classes(coefficients @ atoms)
    before, after = separation(x, labels), separation(shrunk(x, atoms, threshold), labels)
    assert after.within < before.within
    assert (after.fisher > before.fisher) == sparse


def test_variance_within_a_class_is_the_closed_form() -> None:
    """Of orthonormal atoms, which keep variances: coefficient by coefficient."""
    d, threshold = 8, 0.7
    atoms = bases(1, d).double()
    means = 2 * randn(2, d, seed=1)
    x, labels = classes(means, std=0.8, count=60_000)
    found = separation(shrunk(x, atoms, threshold), labels)
    exact = soft_moments(means @ atoms.T, torch.tensor(0.8, dtype=torch.float64), threshold)
    assert found.within == pytest.approx(exact.variance.sum(1).mean().item(), rel=0.02)
    centre = (exact.mean[0] - exact.mean[1]) / 2
    assert math.sqrt(found.between) == pytest.approx(centre.norm().item(), rel=0.02)
