"""Pictures by scales: who sees what, what is learnt from what, and what bands are whitened with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import close
from torch import Tensor

from cdnctl.models.multiscale import LocalConfig, Multiscale, MultiscaleConfig
from cdnctl.training.batches import Batch
from cdnctl.training.config import LossConfig, load, needs, override
from cdnctl.training.objectives import scales
from cdnctl.transforms.wavelet import band_statistics, from_pyramid, merge, pyramid, split

CONFIGS = Path(__file__).parent.parent / "cdnctl" / "configs"
SMALL = LocalConfig(reach=5, width=6, blocks=2)
CONFIG = MultiscaleConfig(channels=2, levels=2, details=SMALL, coarse=replace(SMALL, reach=7))
SIGMA = torch.tensor([0.1, 0.35], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def make(config: MultiscaleConfig = CONFIG, seed: int = 0) -> Multiscale:
    """A network whose weights, means and spreads are random throughout."""
    torch.manual_seed(seed)
    net = Multiscale(config).double().eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor += 0.1 * torch.randn_like(tensor)
    return net.requires_grad_(False)


def pictures(*size: int, seed: int = 1) -> Tensor:
    return 0.5 + 0.2 * randn(2, CONFIG.channels, *size, seed=seed)


def seen(derivative: Tensor) -> list[tuple[int, int, int, int]]:
    """Rows and columns, first and last, where a derivative (..., h, w) is not zero."""
    h, w = derivative.shape[-2:]
    rows, columns = (derivative.reshape(-1, h, w) != 0).any(0).nonzero().unbind(1)
    return [int(t) for t in (rows.min(), rows.max(), columns.min(), columns.max())]  # type: ignore


# -- who sees what --------------------------------------------------------------------------------


@pytest.mark.parametrize("reach", [1, 3, 5, 7, 9, 11])
@pytest.mark.parametrize("level", [1, 2])
def test_details_see_a_square_and_nothing_else(level: int, reach: int) -> None:
    """The derivative outside is exactly zero, and it reaches every side of the square."""
    net = make(replace(CONFIG, details=replace(SMALL, reach=reach)))
    low = randn(1, 2, 17, 19).requires_grad_()
    details = randn(1, 2, 3, 17, 19, seed=1).requires_grad_()
    found = net.detail_correction(details, 0.3, low, level)[..., 8, 9].sum()
    r = reach // 2
    for slope in torch.autograd.grad(found, (details, low)):
        assert seen(slope) == [8 - r, 8 + r, 9 - r, 9 + r]


def test_the_coarsest_picture_is_seen_by_its_own_reach() -> None:
    low = randn(1, 2, 17, 19).requires_grad_()
    found = make().coarse_correction(low, 0.3)[..., 8, 9].sum()
    assert seen(torch.autograd.grad(found, low)[0]) == [5, 11, 6, 12]


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_the_margin_is_how_far_a_pixel_reaches(levels: int) -> None:
    net = make(replace(CONFIG, levels=levels))
    margin, side = net.needs.margin, net.needs.multiple
    assert margin is not None
    middle, n = (margin // side + 1) * side, 2 * (margin // side + 2) * side
    farthest = 0
    for phase in range(side):
        y = pictures(n, n)[:1].requires_grad_()
        at = middle + phase
        slope = torch.autograd.grad(net.correction(y, 0.3)[0][..., at, at].sum(), y)[0]
        first, last, left, right = seen(slope)
        farthest = max(farthest, at - first, last - at, at - left, right - at)
    assert farthest == margin


@pytest.mark.parametrize("blocks", range(5))
def test_kernels_are_as_many_as_the_reach_asks_for(blocks: int) -> None:
    for reach in range(1, 4 * blocks + 4, 2):
        kernels = LocalConfig(reach, 4, blocks).kernels
        assert len(kernels) == 1 + 2 * blocks and 1 + sum(k - 1 for k in kernels) == reach


# -- what is made of what -------------------------------------------------------------------------


def test_one_scale_after_the_other() -> None:
    """The details of each scale are found given the coarser picture as it was denoised."""
    net, y = make(), pictures(8, 12)
    low, (fine, middle) = pyramid(y, 2)
    found = low + net.coarse_correction(low, SIGMA)
    found = merge(found, middle + net.detail_correction(middle, SIGMA, found, 2))
    found = merge(found, fine + net.detail_correction(fine, SIGMA, found, 1))
    close(y + net.correction(y, SIGMA)[0], found, 1e-12)


def test_what_is_taught_is_given_the_clean_coarser_pictures() -> None:
    net, clean = make(), pictures(8, 12)
    y = clean + SIGMA.view(-1, 1, 1, 1) * randn(*clean.shape, seed=5)
    low, (fine, middle) = pyramid(y, 2)
    half, _ = split(clean)
    quarter, _ = split(half)
    parts = [
        net.detail_correction(fine, SIGMA, half, 1),
        net.detail_correction(middle, SIGMA, quarter, 2),
    ]
    want = from_pyramid(net.coarse_correction(low, SIGMA), parts)
    close(net.taught(y, SIGMA, clean), want, 1e-12)
    assert (net.correction(y, SIGMA)[0] - want).abs().max() > 1e-3


def test_no_network_is_given_what_it_is_to_find() -> None:
    """Other clean details of a scale change nothing at that scale or at coarser ones."""
    net, clean, y = make(), pictures(16, 16), pictures(16, 16, seed=2)
    before = pyramid(net.taught(y, SIGMA, clean), 2)
    low, details = pyramid(clean, 2)
    for level in (0, 1):
        others = list(details)
        others[level] = others[level] + randn(*others[level].shape, seed=3)
        after = pyramid(net.taught(y, SIGMA, from_pyramid(low, others)), 2)
        close(after[0], before[0], 1e-12)
        for i in (0, 1):
            change = (after[1][i] - before[1][i]).abs().max()
            assert change < 1e-12 if i >= level else change > 1e-3


def test_the_loss_is_the_sum_over_the_bands() -> None:
    net, clean = make(), pictures(8, 12)
    noise, labels = randn(*clean.shape, seed=4), torch.full((2,), -1)
    batch = Batch(clean, noise, SIGMA, SIGMA, labels, labels >= 0)
    matching, entropy = scales(net, batch, LossConfig())
    y = clean + SIGMA.view(-1, 1, 1, 1) * noise
    low, details = pyramid(y + net.taught(y, SIGMA, clean) - clean, 2)
    errors = sum(b.square().flatten(1).sum(1) for b in (low, *details))
    close(matching, 0.5 * errors / clean[0].numel() / SIGMA**2, 1e-10)
    assert (entropy == 0).all()


# -- whitening ------------------------------------------------------------------------------------


def without_networks(net: Multiscale) -> Multiscale:
    for part in (net.coarse, *net.scales):
        part.head.weight.zero_()  # type: ignore[union-attr]
    return net


def test_without_its_networks_a_model_is_a_filter_of_the_bands() -> None:
    """D = m + s^2 / (s^2 + sigma^2) (y - m), by the mean and the spread of each band."""
    net, y = without_networks(make()), pictures(8, 12)
    white = net.whitening
    variance = SIGMA.view(-1, 1, 1, 1) ** 2
    low, details = pyramid(y, 2)
    mean, spread = 4 * white.mean[2].view(-1, 1, 1), white.low[2].exp().view(-1, 1, 1) ** 2
    want = mean + spread / (spread + variance) * (low - mean)
    parts = []
    for number, detail in enumerate(details):
        spread = white.detail[number].exp()[..., None, None] ** 2
        parts.append(spread / (spread + variance[:, None]) * detail)
    close(y + net.correction(y, SIGMA)[0], from_pyramid(want, parts), 1e-12)


def test_training_measures_the_bands() -> None:
    net = make().train()
    net.whitening.seen.zero_()
    clean = pictures(16, 24)
    for batch, share in ((clean, 1.0), (0.5 * clean, 0.5)):
        before = {k: v.clone() for k, v in net.whitening.state_dict().items()}
        net.taught(pictures(16, 24, seed=3), 0.2, batch)
        for level, found in enumerate(band_statistics(batch, 2), 1):
            for name, at, want in (
                ("mean", level, found.low_mean / 2**level),
                ("low", level, found.low_std.log()),
                ("detail", level - 1, found.std.log()),
            ):
                old = before[name][at]
                close(getattr(net.whitening, name)[at], old + share * (want - old), 1e-10)
    assert net.whitening.seen == 2
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    net.correction(clean, 0.2)  # knows no clean picture
    net.eval().taught(clean, 0.2, clean)
    assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())


def test_the_unit_of_the_bands_does_not_matter() -> None:
    """Pictures of half the contrast and half the noise are denoised alike, once whitened."""
    net, other = make(), make()
    white = other.whitening
    white.low -= torch.log(torch.tensor(2.0))
    white.detail -= torch.log(torch.tensor(2.0))
    mean = net.whitening.mean[2].view(-1, 1, 1)
    y = pictures(8, 12)
    whole = net.correction(y, 0.2)[0]
    # The means of the coarser pictures stay: only what is coarsest is compared.
    half = other.correction(mean + (y - mean) / 2, 0.1)[0]
    close(pyramid(half, 2)[0], pyramid(whole, 2)[0] / 2, 1e-10)


def test_flat_training_pictures_have_a_spread() -> None:
    net = make().train()
    net.taught(pictures(8, 8), 0.2, torch.full((2, 2, 8, 8), 0.4).double())
    assert net.correction(pictures(8, 8), 0.2)[0].isfinite().all()


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,message",
    [
        ({"reach": 4}, "reach is 4, but must be an odd number from 1 to 11"),
        ({"reach": 13}, "reach is 13, but must be an odd number from 1 to 11"),
        ({"reach": -1}, "reach is -1"),
        ({"width": 0}, "width 0"),
        ({"blocks": 101}, "blocks 101"),
    ],
)
def test_networks_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("change", [{"channels": 0}, {"levels": -1}, {"levels": 9}])
def test_models_that_cannot_be(change: dict[str, int]) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name} {value}"):
        replace(CONFIG, **change)


def test_the_configs_that_are_compared_have_about_as_many_weights() -> None:
    """Also with a reach of 5, as their first lines say."""
    sizes = []
    for name in ("local", "flat"):
        path = CONFIGS / f"multiscale-{name}.toml"
        settings = next(line for line in path.read_text().splitlines() if "... --set" in line)
        config = load(path)
        small = override(config, [s for s in settings.split() if "=" in s])
        assert needs(small).margin < needs(config).margin  # type: ignore[operator]
        for c in (config, small):
            shape = {k: v for k, v in c.model.items() if k != "arch"}
            for part in ("details", "coarse"):
                if part in shape:
                    shape[part] = LocalConfig(**shape[part])
            sizes.append(sum(p.numel() for p in Multiscale(MultiscaleConfig(**shape)).parameters()))
        assert (config.optim, config.noise) == (small.optim, small.noise)
    assert max(sizes) < 1.08 * min(sizes)  # widths are whole numbers
