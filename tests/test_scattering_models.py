"""Fixed filters and learnt channels: each part against a closed form, networks by symmetries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdnctl.core.joint import Corrector, HasPosterior
from cdnctl.core.thresholds import relu_moments, soft_moments
from cdnctl.models.channels import ChannelMap, Channels, Standardise, channel_norm
from cdnctl.models.frames import TightFrame, bases, concentrate, parseval
from cdnctl.models.scattering import (
    FixedConfig,
    FixedScattering,
    Layer,
    Scattering,
    ScatteringConfig,
)
from cdnctl.transforms import scattering as waves

SMALL: dict[str, Any] = {"num_classes": 3, "widths": (4, 6), "angles": 4}
KINDS: dict[str, dict[str, Any]] = {
    "phase-collapse": {},
    "skip": {"rho": "skip"},
    "phase-threshold": {"rho": "soft"},
    "real maps": {"maps": "real", "bank": "octave"},
    "real maps, skip": {"maps": "real", "rho": "skip"},
    "phases, complex maps": {"rho": "phases"},
    "frames": {"rho": "phases", "maps": "real", "bank": "octave", "frames": 2},
    "factorised": {"bank": "spatial", "rho": "phases", "maps": "real", "after": "relu"},
    "parts": {"cells": 2},
}
FIXED = {
    "fixed": FixedConfig(num_classes=3, octaves=2, angles=4, cells=1),
    "fixed, mapped": FixedConfig(num_classes=3, octaves=2, angles=4, project=5, cells=2),
}


def network(kind: str, double: bool = True) -> Scattering | FixedScattering:
    """Random weights, statistics of random pictures."""
    torch.manual_seed(0)
    if kind in FIXED:
        net: Scattering | FixedScattering = FixedScattering(FIXED[kind])
    else:
        net = Scattering(ScatteringConfig(**SMALL | KINDS[kind]))
    net = net.double() if double else net
    net.train()
    for _ in range(60):
        net.logits(pictures(4, double=double), 0.1)
    return net.eval()


def pictures(count: int = 2, size: tuple[int, int] = (16, 24), double: bool = True) -> Tensor:
    dtype = torch.float64 if double else torch.float32
    return 0.5 + 0.3 * torch.randn(count, 3, *size, dtype=dtype)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def randn(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **{"dtype": torch.float64} | options)


# -- thresholds -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "soft"])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 2.0])
def test_moments_of_thresholds_are_integrals(name: str, threshold: float) -> None:
    mean = torch.tensor([-3.0, -0.5, 0.0, 0.5, 1.5, 4.0], dtype=torch.float64)[:, None]
    std = torch.tensor([0.05, 0.7, 2.0], dtype=torch.float64)
    u = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    z = mean[..., None] + std[:, None] * u
    if name == "relu":
        rho, found = (z - threshold).relu(), relu_moments(mean, std, threshold)
    else:
        rho, found = waves.soft_threshold(z, threshold), soft_moments(mean, std, threshold)
    density = torch.exp(-u.square() / 2) / math.sqrt(2 * math.pi)

    def integral(values: Tensor) -> Tensor:
        return torch.trapezoid(values * density, u)

    close(found.mean, integral(rho), 1e-6)
    close(found.variance, integral(rho.square()) - integral(rho).square(), 1e-6)


def test_a_rectifier_makes_means_of_amplitudes() -> None:
    """E relu(z) = rms / sqrt(2 pi) at mean 0: what tells classes of equal means apart."""
    std = torch.tensor([0.3, 1.0, 5.0], dtype=torch.float64)
    close(relu_moments(torch.zeros_like(std), std).mean, std / math.sqrt(2 * math.pi))


# -- tight frames ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_parseval_step_moves_each_singular_value_by_itself(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(randn(*shape, dtype=dtype), full_matrices=False)
    s = torch.linspace(0.5, 1.3, 5, dtype=torch.float64)
    atoms, beta = (u * s) @ vh, 5e-4
    for _ in range(4000):
        atoms = parseval(atoms, beta)
        s = (1 + beta) * s - beta * s**3
    close(torch.linalg.svdvals(atoms), s.flip(0).sort(descending=True)[0])
    assert s.min() == pytest.approx(0.974, abs=1e-3) and s.max() == pytest.approx(1.004, abs=1e-3)
    close(atoms, (u * s) @ vh)


def test_a_frame_starts_tight_with_atoms_of_one_norm() -> None:
    atoms = bases(3, 4).double()
    close(atoms.T @ atoms, torch.eye(4, dtype=torch.float64), 1e-6)
    close(atoms.norm(dim=1), torch.full((12,), 3**-0.5, dtype=torch.float64), 1e-6)
    frame = TightFrame(4, 3, strength=1.5)
    before = frame.atoms.detach().clone()
    frame.after_step()
    close(frame.atoms.detach(), before, 1e-6)  # where it should be, it stays
    with torch.no_grad():
        frame.atoms *= 1.1
    frame.after_step()
    assert torch.linalg.svdvals(frame.atoms.detach()).max() < 1.1


def test_frames_without_a_threshold_lose_nothing() -> None:
    x, atoms = randn(2, 4, 3, 5), bases(3, 4).double()
    close(concentrate(x, atoms, 0.0), x, 1e-6)
    both = torch.cat([atoms, -atoms]) / 2**0.5  # a tight frame that knows no signs
    close(concentrate(x, both, 0.0, rectify=True), x / 2, 1e-6)


@pytest.mark.parametrize("rectify", [False, True])
def test_the_threshold_is_the_published_one(rectify: bool) -> None:
    """For pixels of norm 1 it is 1.5 / sqrt(p) (or 1 / sqrt(p)); here their norm is sqrt(d)."""
    frame = TightFrame(4, 3, strength=1.5, rectify=rectify).double()
    x = channel_norm(randn(2, 4, 3, 5), Channels(4))
    atoms = math.sqrt(4 / 12) * torch.nn.functional.normalize(frame.atoms.detach(), dim=1)
    unit = concentrate(x / 2, atoms, 1.5 / math.sqrt(12), rectify)
    close(frame(x).detach(), 2 * unit, 1e-6)


# -- channels -------------------------------------------------------------------------------


def packed(z: Tensor, reals: Tensor | None = None) -> Tensor:
    return torch.cat([*([] if reals is None else [reals]), z.real, z.imag], 1)


def test_every_pixel_gets_one_norm() -> None:
    x = randn(2, 7, 3, 5)
    norms = channel_norm(x, Channels(3, 2)).square().sum(1)
    close(norms, torch.full_like(norms, 5.0), 1e-4)
    assert channel_norm(torch.zeros_like(x), Channels(7)).abs().max() == 0


def test_standardised_channels_have_mean_0_and_deviation_1() -> None:
    torch.manual_seed(0)
    channels = Channels(2, 3)
    x = randn(50, 8, 4, 4) * torch.arange(1, 9).view(1, -1, 1, 1) + 3
    standard = Standardise(channels, momentum=1.0).double()
    found = standard(x)
    close(found.mean((0, 2, 3)), torch.zeros(8, dtype=torch.float64))
    real, z = found[:, :2], torch.complex(*found[:, 2:].chunk(2, 1))
    close(real.square().mean((0, 2, 3)), torch.ones(2, dtype=torch.float64), 1e-4)
    close(z.abs().square().mean((0, 2, 3)), torch.full((3,), 2.0, dtype=torch.float64), 1e-4)
    close(standard.eval()(x), found, 2e-3)  # the remembered variance is the unbiased one


def test_standardisation_turns_with_the_phase() -> None:
    """Of zero-mean complex channels: the same turn before and after."""
    z = randn(5, 3, 4, 4, dtype=torch.complex128)
    turn = torch.exp(1j * torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)).view(1, 3, 1, 1)
    standard = Standardise(Channels(0, 3)).double()

    def through(z: Tensor) -> Tensor:
        return torch.complex(*standard(packed(z)).chunk(2, 1))

    close(through(turn * z), turn * through(z))


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize("width", [4, 30])
def test_a_complex_map_is_a_complex_matrix(gaussian: bool, width: int) -> None:
    torch.manual_seed(0)
    channels = Channels(3, 4)
    layer = ChannelMap(channels, width, complex_=True, gaussian=gaussian).double()
    reals, z = randn(2, 3, 2, 2), randn(2, 4, 2, 2, dtype=torch.complex128)
    whole = torch.cat([reals.to(z.dtype), z], 1)
    want = torch.einsum("oi,bihw->bohw", layer.matrix.detach(), whole)
    close(layer(packed(z, reals)).detach(), packed(want))
    square = layer.matrix.detach().abs().square().mean()
    assert square == pytest.approx(layer.initial_variance, rel=0.3 if gaussian else 1e-5)
    if not gaussian:
        values = torch.linalg.svdvals(layer.matrix.detach())
        assert values.max() == pytest.approx(values.min().item(), rel=1e-5)


def test_a_real_map_takes_parts_for_channels() -> None:
    layer = ChannelMap(Channels(3, 4), 5, complex_=False).double()
    x = randn(2, 11, 2, 2)
    close(layer(x).detach(), torch.einsum("oi,bihw->bohw", layer.matrix.detach(), x))
    close(layer.matrix.detach() @ layer.matrix.detach().T, torch.eye(5, dtype=torch.float64), 1e-6)


# -- layers ---------------------------------------------------------------------------------


def test_coefficients_are_those_of_the_bank() -> None:
    """Of real and of complex channels, in the order that the channels say."""
    x = randn(2, 3, 8, 8, dtype=torch.complex128)
    low, *bands = waves.bank("half", 8, 8, 4, torch.float64)
    lows, found = waves.convolve(x, low[None])[:, :, 0], waves.convolve(x, bands[0])
    shrunk = waves.soft_threshold(found, 0.1)
    for rho, reals, complexes in (
        ("modulus", [waves.modulus(found)], [lows]),
        ("skip", [waves.modulus(found)], [lows, found]),
        ("soft", [], [lows, shrunk]),
        ("phases", [waves.phases(found)], [lows]),
    ):
        layer = Layer(ScatteringConfig(**SMALL | {"rho": rho}), 0, Channels(0, 3))
        whole = [p.real for p in complexes], [p.imag for p in complexes]
        want = torch.cat([p.reshape(2, -1, 8, 8) for p in [*reals, *whole[0], *whole[1]]], 1)
        close(layer.coefficients(packed(x)), want)
        assert layer.map.channels.total == want.shape[1]


def test_layers_of_half_octaves_alternate() -> None:
    """The second one reads its own filters, at every other pixel."""
    x = randn(2, 4, 8, 8, dtype=torch.complex128)
    low, bands = waves.bank("second-half", 8, 8, 4, torch.float64)
    found = waves.convolve(x, torch.cat([low[None], bands]), 2)
    layer = Layer(ScatteringConfig(**SMALL), 1, Channels(0, 4))
    lows = found[:, :, 0]
    want = torch.cat([waves.modulus(found[:, :, 1:]).flatten(1, 2), lows.real, lows.imag], 1)
    close(layer.coefficients(packed(x)), want)


def test_factorised_filters_come_in_both_signs() -> None:
    layer = Layer(ScatteringConfig(**SMALL | KINDS["factorised"]), 0, Channels(3))
    found = layer.coefficients(randn(2, 3, 8, 8))
    assert found.shape == (2, 30, 4, 4) and found.min() == 0
    assert (found[:, :15] * found[:, 15:]).abs().max() == 0  # f and -f are never both on


# -- networks -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *FIXED])
def test_networks_keep_the_contract_of_a_classifier(kind: str) -> None:
    net = network(kind)
    assert isinstance(net, HasPosterior) and not isinstance(net, Corrector)
    y, sigma = pictures(), torch.tensor([0.1, 0.2])
    logits = net.logits(y, sigma)
    assert logits.shape == (2, 3) and logits.dtype == y.dtype
    assert (logits[0] - logits[1]).abs().max() > 1e-3, "pictures make a difference"
    *_, (last, features) = net.steps(y, sigma)
    assert last == "class features"
    close(net.head.scores(features.mean((2, 3))), logits)
    close(torch.cat([net.logits(a[None], s) for a, s in zip(y, sigma, strict=True)]), logits)
    names = [name for name, _ in net.steps(y, sigma)]
    assert len(set(names)) == len(names)
    # A picture is seen in the unit of its noise.
    there, here = ((s**2 + 1 / 16) ** 0.5 for s in (0.3, 0.1))
    close(net.logits(0.5 + there / here * (y - 0.5), 0.3), net.logits(y, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [k for k in (*KINDS, *FIXED) if k not in ("parts", "fixed, mapped")]
)
def test_scores_know_no_place(kind: str) -> None:
    net, y = network(kind), pictures()
    step = net.config.multiple
    close(net.logits(y.roll((step, -step), (2, 3)), 0.1), net.logits(y, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *FIXED])
def test_gradients_are_finite_where_nothing_is_seen(kind: str) -> None:
    net = network(kind, double=False)
    y = torch.full((1, 3, 16, 16), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(net.logits(y, 0.0).square().sum(), y)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["phase-collapse", "frames", "fixed"])
def test_scores_have_the_gradient_that_they_claim(kind: str) -> None:
    net = network(kind)
    y = pictures(1, (8, 8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: net.logits(t, 0.1), y, fast_mode=True)


def test_odd_sides_are_filled_up() -> None:
    for kind in ("phase-collapse", "fixed"):
        assert network(kind, double=False).logits(torch.rand(1, 3, 13, 7), 0.1).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, *FIXED])
def test_a_network_is_its_learnt_tensors(kind: str) -> None:
    """Filters are no weights; shapes are known before any memory is taken."""
    net = network(kind, double=False)
    with torch.device("meta"):
        shell = type(net)(net.config)  # type: ignore[arg-type]
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    assert {k: v.shape for k, v in shell.state_dict().items()} == shapes
    again = type(net)(net.config).eval()  # type: ignore[arg-type]
    again.load_state_dict(net.state_dict())
    y = pictures(double=False)
    close(again.logits(y, 0.1), net.logits(y, 0.1), 0)


def test_an_optimiser_step_is_followed_by_one_towards_tightness() -> None:
    net = network("frames")
    weights = {k: v.clone() for k, v in net.named_parameters()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    moved = {k: v.clone() for k, v in net.named_parameters()}
    net.after_step()
    changed = {k for k, v in net.named_parameters() if not torch.equal(v, moved[k])}
    assert changed == {k for k in weights if k.endswith(("atoms", "map.weight"))}
    other = network("phase-collapse")
    before = [p.clone() for p in other.parameters()]
    other.after_step()
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bank": "haar"}, "'haar'"),
        ({"rho": "sigmoid"}, "'sigmoid'"),
        ({"maps": "whole"}, "'whole'"),
        ({"after": "tanh"}, "'tanh'"),
        ({"widths": ()}, "()"),
        ({"widths": (0,)}, "0"),
        ({"widths": (8,) * 21}, "1 to 20 entries"),
        ({"angles": 2}, "2"),
        ({"frames": -1, "maps": "real"}, "-1"),
        ({"frames": 2}, "maps 'real', not 'complex'"),
        ({"after": "relu"}, "maps 'real', not 'complex'"),
        ({"threshold": math.nan}, "nan"),
        ({"shrink": -1.0}, "-1.0"),
        ({"bank": "spatial"}, "rho 'phases'"),
    ],
)
def test_impossible_shapes_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        ScatteringConfig(**wrong)
    assert said in str(error.value)


@pytest.mark.parametrize("wrong", [{"octaves": 0}, {"order": 3}, {"project": -1}, {"angles": 99}])
def test_impossible_coefficients_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}.*{next(iter(wrong.values()))}"):
        FixedConfig(**wrong)


def test_paths_are_counted_as_they_come() -> None:
    for config in (FixedConfig(octaves=2, angles=3), FixedConfig(octaves=3, angles=4, order=1)):
        found = waves.scattering(
            torch.rand(1, 1, 8, 8), config.octaves, config.angles, config.order
        )
        assert found.shape[2] == config.paths
    assert FixedConfig().paths == 1 + 24 + 3 * 64
    assert np.isfinite(FixedConfig().bytes_per_pixel)
