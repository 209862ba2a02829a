"""Means over symmetries: they have them, and everything else that the network has, exactly."""

from __future__ import annotations

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from processes import Run
from test_contract import each, outputs, pictures, registered, save_example  # noqa: F401
from tiny import noisy_picture, tiny, write
from torch import Tensor

from cdnctl.api import Model, load
from cdnctl.core import joint
from cdnctl.core.coloured import OCTAVES, Told
from cdnctl.core.joint import Corrector, HasClassFeatures, HasPosterior, Joint
from cdnctl.errors import UsageError
from cdnctl.models.ensemble import SYMMETRIES, ensemble, turned, turned_back
from cdnctl.models.network import Network
from cdnctl.restore import View

PROTOCOLS = (Corrector, HasPosterior, HasClassFeatures, Joint)
both = pytest.mark.parametrize("count", [2, 8])


@pytest.fixture
def net(arch: str, tmp_path: Path) -> Network:
    return load(save_example(tmp_path / "tiny.safetensors", arch)).module.double()


def test_the_symmetries_are_groups() -> None:
    y = torch.arange(6.0).view(1, 2, 3)
    for count, group in SYMMETRIES.items():
        made = {
            (tuple(v.shape), tuple(v.flatten().tolist())) for v in (turned(y, g) for g in group)
        }
        assert len(made) == len(group) == count
        for g in group:
            assert torch.equal(turned_back(turned(y, g), g), y)
            again = [turned(turned(y, g), h) for h in group]
            assert {(tuple(v.shape), tuple(v.flatten().tolist())) for v in again} == made


@each
@both
def test_it_can_do_what_the_network_can(net: Network, count: int) -> None:
    mean = ensemble(net, count)
    assert isinstance(mean, Network) and ensemble(net, 1) is net
    for protocol in PROTOCOLS:
        assert isinstance(mean, protocol) == isinstance(net, protocol)  # type: ignore[arg-type]
    assert mean.num_classes == net.num_classes and mean.needs.margin == net.needs.margin
    y = pictures(net).double()
    for name, out in outputs(mean, y, 0.2).items():
        assert out.shape == outputs(net, y, 0.2)[name].shape and out.dtype is torch.float64


@each
@both
def test_it_has_the_symmetries(net: Network, count: int) -> None:
    """Flips, and all of them where no classes are known, which are not the same upside down.
    Also of sides that are no whole cells, and for mixtures of every kind."""
    mean = ensemble(net, count)
    group = SYMMETRIES[2 if isinstance(net, HasPosterior) else count]
    for size in ((16, 24), (9, 11)):
        y = pictures(net, 2, size).double()
        first = outputs(mean, y, 0.2)
        for g in group:
            for name, out in outputs(mean, turned(y, g), 0.2).items():
                expected = turned(first[name], g) if name == "correction" else first[name]
                torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
        if isinstance(mean, Corrector) and isinstance(mean, HasPosterior):
            w = torch.eye(mean.num_classes, dtype=torch.float64)[0]
            one = mean.correction(y, 0.2, w)[0]
            for g in group:
                other = mean.correction(turned(y, g), 0.2, w)[0]
                torch.testing.assert_close(other, turned(one, g), atol=1e-9, rtol=1e-9)


@each
def test_classes_are_those_of_the_upright_picture(net: Network) -> None:
    """The whole square tells no other classes, and all of its views add to the rest."""
    two, eight = ensemble(net, 2), ensemble(net, 8)
    y = pictures(net, 2, (8, 8)).double()
    if isinstance(two, HasPosterior) and isinstance(eight, HasPosterior):
        torch.testing.assert_close(two.logits(y, 0.2), eight.logits(y, 0.2))
    if isinstance(two, Corrector) and isinstance(eight, Corrector):
        k = net.num_classes if isinstance(two, HasPosterior) else 1
        shift = torch.linspace(-1, 1, k, dtype=torch.float64) if k > 1 else None
        if shift is not None:  # weights that sum to zero: the part of the classes alone
            parts = (m.correction(y, 0.2, shift)[0] for m in (two, eight))
            torch.testing.assert_close(*parts, atol=1e-9, rtol=1e-9)
        # Less a part of the classes that all views have, the rest is the mean of rests.
        if not eight.needs.posterior:
            pairs = [
                turned_back(net.correction(turned(y, g), 0.2)[0], g)  # type: ignore[operator]
                for g in SYMMETRIES[8]
            ]
            mean = torch.stack(pairs).mean(0)
            torch.testing.assert_close(eight.correction(y, 0.2)[0], mean, atol=1e-9, rtol=1e-9)


@each
@both
def test_the_posterior_mixes_the_classes(net: Network, count: int) -> None:
    """D = sum_c p(c | y) D_c, and what a class adds is the gradient of its log-probability."""
    mean = ensemble(net, count)
    if not isinstance(mean, Corrector) or not isinstance(mean, HasPosterior):
        return
    k = mean.num_classes
    y, sigma = pictures(net, 2, (16, 8)).double(), torch.tensor([0.1, 0.35], dtype=torch.float64)
    parts = torch.stack(
        [joint.denoise(mean, y, sigma, e) for e in torch.eye(k, dtype=torch.float64)], 1
    )
    p = joint.posterior(mean, y, sigma)
    mixed = (p[:, :, None, None, None] * parts).sum(1)
    torch.testing.assert_close(joint.denoise(mean, y, sigma), mixed, atol=1e-10, rtol=1e-10)
    by_function = mean.correction(y, sigma, lambda logits: logits.softmax(1))[0]
    torch.testing.assert_close(y + by_function, mixed, atol=1e-10, rtol=1e-10)
    leaf = y.clone().requires_grad_()
    for c in range(k):
        said = mean.logits(leaf, sigma).log_softmax(1)[:, c].sum()
        (gradient,) = torch.autograd.grad(said, leaf)
        added = joint.score(mean, y, sigma, torch.eye(k, dtype=y.dtype)[c])
        added = added - joint.score(mean, y, sigma)
        torch.testing.assert_close(added, gradient, atol=1e-8, rtol=1e-6)


@both
def test_the_density_is_exact(tmp_path: Path, count: int) -> None:
    model = tiny(tmp_path).double().ensemble(count)
    assert isinstance(model.module, Joint)
    y = pictures(model.module, 2, (8, 16)).double()
    leaf = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(leaf, 0.2).sum(), leaf)
    torch.testing.assert_close(model.score(y, 0.2), gradient, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(
        model.module.log_joint(y, 0.2).softmax(1), model.posterior(y, 0.2), atol=1e-8, rtol=1e-8
    )


@pytest.mark.parametrize("arch", ["gradresnet", "hybrid", "unet"])
@pytest.mark.parametrize("target", [None, "cat"])
def test_tiles_equal_the_whole(tmp_path: Path, arch: str, target: str | None) -> None:
    if arch == "unet" and target:
        return
    model = tiny(tmp_path, arch).ensemble(8)
    pixels = noisy_picture(200, 280)
    whole, tiled = (View(model, pixels, 0.2, tile=tile) for tile in (400, 150))
    assert len(tiled.tiles) > 3 > len(whole.tiles)
    mixture = model.mixture(target)
    np.testing.assert_allclose(
        tiled.correction(mixture), whole.correction(mixture), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(tiled.logits(), whole.logits(), atol=1e-4, rtol=1e-4)


def test_noise_in_places_turns_with_the_picture(tmp_path: Path) -> None:
    model = tiny(tmp_path, "hybrid", coloured=True).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():  # ears start deaf
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    mean = ensemble(model.module, 8)
    assert isinstance(mean, Corrector)
    y = pictures(mean, 2, (8, 12)).double()
    relief = 1 + torch.rand(2, 1, 8, 12, generator=g, dtype=torch.float64)
    spectrum = torch.randn(2, 2, OCTAVES, generator=g, dtype=torch.float64)

    def said(y: Tensor, relief: Tensor, w: Tensor | None) -> Tensor:
        told = Told(torch.full((2,), 0.2, dtype=torch.float64), spectrum, relief)
        return mean.correction(y, told, w)[0]

    for w in (None, torch.tensor([1.0, 0, 0], dtype=torch.float64)):
        for h in SYMMETRIES[8 if w is None else 2]:
            out = said(turned(y, h), turned(relief, h), w)
            torch.testing.assert_close(out, turned(said(y, relief, w), h), atol=1e-9, rtol=1e-9)
    assert not torch.allclose(said(y, relief, None), said(y, relief.flip(-1), None))


def test_of_a_loaded_model(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    mean = model.ensemble(8)
    assert isinstance(mean, Model) and mean.needs.passes == 8 and model.ensemble(1) is model
    assert (mean.hash, mean.classes, mean.name) == (model.hash, model.classes, model.name)
    pixels = noisy_picture(24, 32)
    expected = mean.denoise(pixels, 0.2, "cat")[:, ::-1]
    out = mean.denoise(np.ascontiguousarray(pixels[:, ::-1]), 0.2, "cat")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    with pytest.raises(UsageError, match="an ensemble of 3"):
        model.ensemble(3)


def test_the_command(cdnctl: Run, weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "shots" / "a.png", noisy_picture(16, 24))
    write(tmp_path / "shots" / "b.png", noisy_picture(16, 24)[:, ::-1].copy())
    common = ("denoise", "shots", "-o", "out", "--model", weights, "--sigma", 50)
    assert cdnctl(*common, "--ensemble", 8).code == 0
    a, b = (iio.imread(tmp_path / "out" / f"{name}.png").astype(int) for name in "ab")
    assert abs(a[:, ::-1] - b).max() <= 1
    done = cdnctl(*common, "--ensemble", 8, "--resume", "--json")
    assert [r["event"] for r in done.records[:-1]] == ["skipped"] * 2
    done = cdnctl(*common, "--resume", "--json")
    assert [r["event"] for r in done.records[:-1]] == ["restored"] * 2, "not what is asked for now"
    done = cdnctl(*common, "--ensemble", 3, "--overwrite")
    assert done.code == 2 and "--ensemble is 3, but must be 2" in done.err
    assert done.err.count("\n") == 1


def test_evaluate_says_so(cdnctl: Run, weights: Path, tmp_path: Path) -> None:
    write(tmp_path / "clean" / "a.png")
    run = ("evaluate", "clean", "--model", weights, "--sigma", 25, "--json")
    plain, mean = (json.loads(cdnctl(*run, *more).out) for more in ((), ("--ensemble", 2)))
    assert mean["protocol"]["ensemble"] == 2 and "ensemble" not in plain["protocol"]
    assert mean["scores"][0]["psnr"] != plain["scores"][0]["psnr"]
