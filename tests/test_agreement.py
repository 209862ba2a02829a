"""Two denoisers beside each other: those that remember, those that have learnt a law, and sums
that can be done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from cdnctl.analysis.agreement import accord, likeness, nearest, pairs, verdict
from cdnctl.core.joint import Denoiser

SIDE = 8
# Variances of independent components, falling as 1/k, with mean 0.05.
VARIANCES = 1 / torch.arange(1, SIDE**2 + 1, dtype=torch.float64)
VARIANCES *= 0.05 / VARIANCES.mean()
PICTURES = 600


def drawn(count: int, seed: int) -> Tensor:
    """Pictures whose pixels are independent Gaussians of these variances, (count, 1, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, SIDE**2, generator=generator, dtype=torch.float64) * VARIANCES.sqrt()
    return x.view(-1, 1, SIDE, SIDE)


def noisy_pairs(sigma: float, seed: int = 99) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1)
    for x in drawn(PICTURES, seed).split(100):
        yield x, x + sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)


def memoriser(training: Tensor) -> Denoiser:
    """The posterior mean where the training pictures are all that there is."""

    def denoise(y: Tensor, sigma: Tensor | float) -> Tensor:
        squares = torch.cdist(y.flatten(1), training.flatten(1)).square()
        weights = (-squares / (2 * float(sigma) ** 2)).softmax(1)
        return (weights @ training.flatten(1)).view_as(y)

    return denoise


def wiener(training: Tensor) -> Denoiser:
    """The posterior mean of a Gaussian law with the mean and covariance of training pictures."""
    flat = training.flatten(1)
    mean, cov = flat.mean(0), torch.cov(flat.T)

    def denoise(y: Tensor, sigma: Tensor | float) -> Tensor:
        total = cov + float(sigma) ** 2 * torch.eye(len(cov), dtype=cov.dtype)
        gain = torch.linalg.solve(total, cov)
        return (mean + (y.flatten(1) - mean) @ gain).view_as(y)

    return denoise


def share(kind: Callable[[Tensor], Denoiser], count: int, sigma: float) -> float:
    """Of two denoisers fitted to disjoint sets of so many pictures."""
    first, second = drawn(2 * count, seed=1).split(count)
    return accord(kind(first), kind(second), noisy_pairs(sigma), sigma).share


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_memorisers_never_agree_on_details(count: int) -> None:
    """Where noise is low either errs by its own nearest pictures, however many it has; where it
    is high, all that is left of them is their mean."""
    for sigma in (0.02, 0.1):
        assert 0.4 < share(memoriser, count, sigma) < 0.7
        assert verdict(share(memoriser, count, sigma)) == "remembers"
    assert share(memoriser, count, 2.0) < 0.2


def test_those_that_fit_a_law_agree_the_more_they_have_seen() -> None:
    found = [share(wiener, count, 0.1) for count in (10, 100, 1000, 5000)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.2 and found[1] > 0.05 and 0.0005 < found[2] < 0.03 and found[3] < 0.005
    assert verdict(found[0]) == "more" and verdict(found[2]) == "enough"


def test_all_of_it_by_hand() -> None:
    """Denoisers of pixels of variance v that shrink by g: E(x - D)^2 = (1 - g)^2 v + g^2 sigma^2,
    E(D1 - D2)^2 = (g1 - g2)^2 (v + sigma^2), and the cosine of y - D is 1."""
    v, sigma, gains = 0.05, 0.2, (0.3, 0.6)
    generator = torch.Generator().manual_seed(0)
    x = v**0.5 * torch.randn(40, 1, 64, 64, generator=generator, dtype=torch.float64)
    y = x + sigma * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    one, two = (lambda y, s, g=g: g * y for g in gains)
    found = accord(one, two, [(x, y)], sigma)
    errors = [(1 - g) ** 2 * v + g**2 * sigma**2 for g in gains]
    apart = (gains[0] - gains[1]) ** 2 * (v + sigma**2)
    assert found.errors == pytest.approx(errors, rel=0.02)
    assert found.apart == pytest.approx(apart, rel=0.02)
    assert found.share == pytest.approx(apart / sum(errors), rel=0.02)
    assert found.cosine == pytest.approx(1) and found.pictures == 40
    assert found.psnrs[0] == pytest.approx(-10 * math.log10(found.errors[0]))
    # The mean over training sets has the error without its variance.
    error = sum(found.errors) / 2
    assert found.gain == pytest.approx(10 * math.log10(error / (error - found.apart / 2)))


def test_variance_is_what_a_mean_over_training_sets_gains() -> None:
    """Denoisers that differ by noise of their own: the mean of many has its variance less."""
    generator = torch.Generator().manual_seed(3)
    x = drawn(2000, 5)
    own = [0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(42)]
    wrong = 0.05  # what all do wrong alike
    found = accord(lambda y, s: x + wrong + own[0], lambda y, s: x + wrong + own[1], [(x, x)], 0.1)
    mean = x + wrong + torch.stack(own[2:]).mean(0)
    left = float((mean - x).square().mean()) - 0.1**2 / 40
    assert left == pytest.approx(sum(found.errors) / 2 * (1 - found.share), rel=0.06)


def test_the_uncertainty_is_that_of_other_pictures() -> None:
    """Over many sets of pictures the share spreads by what one of them says."""
    first, second = (wiener(part) for part in drawn(60, seed=1).split(30))
    sets = (list(noisy_pairs(0.1, seed))[:1] for seed in range(200, 240))
    many = [accord(first, second, some, 0.1) for some in sets]
    spread = float(np.std([one.share for one in many], ddof=1))
    assert np.mean([one.uncertain for one in many]) == pytest.approx(spread, rel=0.35)


def test_the_same_denoiser_twice_and_none_at_all() -> None:
    one = wiener(drawn(30, seed=1))
    found = accord(one, one, noisy_pairs(0.1), 0.1)
    assert found.share == 0 and found.gain == 0 and found.cosine == pytest.approx(1)
    x = drawn(3, 2)
    perfect = accord(lambda y, s: x, lambda y, s: x, [(x, x + 1)], 0.1)
    assert math.isnan(perfect.share) and perfect.psnrs == (math.inf, math.inf)
    with pytest.raises(ValueError, match="there are none"):
        accord(one, one, [], 0.1)


def test_noise_depends_on_names_and_not_on_company() -> None:
    rng = np.random.default_rng(0)
    pictures = [(f"{i}.png", rng.random((4, 4, 3), np.float32)) for i in range(40)]
    device = torch.device("cpu")
    clean, noisy = (torch.cat(p) for p in zip(*pairs(pictures, 0.2, 1, device), strict=True))
    assert clean.shape == (40, 3, 4, 4)
    np.testing.assert_array_equal(clean[35].permute(1, 2, 0).numpy(), pictures[35][1])
    ((_, alone),) = pairs(pictures[35:36], 0.2, 1, device)
    assert torch.equal(alone[0], noisy[35])
    assert float((noisy - clean).std()) == pytest.approx(0.2, rel=0.1)


def test_the_nearest_picture_is_found_turned_and_brighter() -> None:
    among = torch.rand(50, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([0.2 + 0.5 * among[31].rot90(1, (1, 2)), among[7].flip(2), among[0] * 0])
    value, index = nearest(wanted, among.split(20))
    assert index[:2].tolist() == [31, 7] and value[:2].tolist() == pytest.approx([1, 1])
    assert float(value[2]) == pytest.approx(0)
    assert likeness(wanted[:2], wanted[:2]).tolist() == pytest.approx([1, 1])
    assert float(likeness(among[:1], 1 - among[:1])) == pytest.approx(-1)
    with pytest.raises(ValueError, match="no pictures"):
        nearest(wanted, [])
