"""Comparing covariances of weights: twins, planted directions, and what nothing can be said of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from cdnctl.analysis.encoding import Likeness, Rows, compare, likeness, objection, rows
from cdnctl.analysis.rainbow import resample
from cdnctl.analysis.stages import Agreement, stages
from cdnctl.core import spectra
from cdnctl.models.scattering import Scattering, ScatteringConfig

INPUTS = 48


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def network(seed: int, spiked: bool = True, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Three maps; where spiked, eight directions of the first two rise above their noise."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(INPUTS, 96, bias=False), activation(), nn.Linear(96, 192, bias=False),
        activation(), nn.Linear(192, 3),
    ).double()  # fmt: skip
    if spiked:
        with torch.no_grad():
            for layer in (net[0], net[2]):
                n, d = layer.weight.shape
                along = randn(n, 8, seed=seed + 1) * 4 / math.sqrt(3 * d)
                layer.weight += along @ torch.linalg.qr(randn(d, 8, seed=5))[0].T
    return net.eval()


PICTURES = [randn(400, INPUTS, seed=s) for s in range(3)]


def compared(first: nn.Module, second: nn.Module) -> list[Likeness]:
    return compare(stages(first), stages(second), PICTURES, generator())


def test_a_permuted_twin_is_the_same_network() -> None:
    net = network(0)
    twin = resample(
        net, PICTURES, generator(), draw=lambda w, n, g: w[torch.randperm(n, generator=g)]
    ).network
    for found in compared(net, twin):
        assert found.explained == pytest.approx(1) and found.cosine == pytest.approx(1)
        assert found.similarity >= 1 and found.reason is None
        assert found.ranks[0] == pytest.approx(found.ranks[1])
    blind = resample(
        net, PICTURES, generator(), draw=lambda w, n, g: w.flip(0), aligned=False
    ).network
    assert compared(net, blind)[1].similarity < 0.5


def test_a_linear_network_may_turn_its_inside() -> None:
    """As far as activations reach: where they are 0 there is no frame."""
    net, twin = (
        nn.Sequential(
            nn.Linear(INPUTS, 40, bias=False), nn.Linear(40, 192, bias=False), nn.Linear(192, 3)
        ).double()
        for _ in range(2)
    )
    turn = spectra.rotation(40, generator())
    with torch.no_grad():
        for layer in (net[0], net[1]):
            n, d = layer.weight.shape
            layer.weight += 2 * randn(n, 8) @ torch.linalg.qr(randn(d, 8))[0].T / math.sqrt(d)
        twin[0].weight.copy_(turn @ net[0].weight)
        twin[1].weight.copy_(net[1].weight @ turn.T)
    for found in compared(net, twin):
        assert found.cosine == pytest.approx(1, abs=1e-6), found.reason


def test_nothing_is_said_of_networks_that_learnt_nothing() -> None:
    for found in compared(network(0, spiked=False), network(1, spiked=False)):
        assert found.reason is not None and "above their noise" in found.reason
        assert math.isnan(found.similarity) and found.ranks == (0, 0)


def planted(n: int, seed: int, turn: Tensor | None = None, spike: float = 12.0) -> Rows:
    """n rows of noise of variance .01 and eight directions above it, seen in a turned frame."""
    d = 64
    v = torch.linalg.qr(randn(d, 8, seed=7))[0]
    found = randn(n, d, seed=seed) + math.sqrt(spike) * randn(n, 8, seed=seed + 50) @ v.T
    return Rows(0.1 * (found if turn is None else found @ turn.T), 0.01)


def test_two_draws_of_one_law_are_as_like_as_they_can_be() -> None:
    turn = spectra.rotation(64, generator(3))
    seen = Agreement(turn, 1.0, 1000)
    blind = Agreement(torch.eye(64, dtype=torch.float64), 1.0, 1000)
    for n in (128, 512, 4096):
        pair = planted(n, 0), planted(n, 1, turn)
        found = likeness("layer", *pair, seen, generator())
        assert found.similarity == pytest.approx(1, abs=0.05)
        assert found.ranks[0] == pytest.approx(4.5, abs=1)
        assert abs(likeness("layer", *pair, blind, generator()).similarity) < 0.3
    assert found.cosine > 0.99 and found.ceiling > 0.99  # of many rows all is known
    assert found.least == pytest.approx(5 / 8)


def test_what_two_networks_share_counts_by_its_part() -> None:
    """Half of the directions in common: between chance and ceiling."""
    d, n = 64, 1024
    basis = torch.linalg.qr(randn(d, 12, seed=7))[0]
    pair = [
        Rows(randn(n, d, seed=s) + 4 * randn(n, 8, seed=s + 9) @ v.T, 1.0)
        for s, v in ((0, basis[:, :8]), (1, basis[:, 4:]))
    ]
    frame = Agreement(torch.eye(d, dtype=torch.float64), 1.0, 1000)
    found = likeness("layer", *pair, frame, generator())
    assert found.cosine == pytest.approx(0.5, abs=0.03)
    assert 0.2 < found.similarity < 0.6


def test_noise_that_is_not_as_it_started_is_refused() -> None:
    frame = Agreement(torch.eye(64, dtype=torch.float64), 1.0, 1000)
    one = planted(256, 0)
    for factor in (0.5, 2.0):
        other = Rows(factor * one.vectors, one.variance)
        found = likeness("layer", one, other, frame, generator())
        assert found.reason is not None and "second network's weights is" in found.reason
    assert one.bulk() == pytest.approx(1, abs=0.25)


def test_few_pictures_and_weak_directions_are_refused() -> None:
    pair = planted(256, 0), planted(256, 1)
    few = Agreement(torch.eye(64, dtype=torch.float64), 1.0, 100)
    found = likeness("layer", *pair, few, generator())
    assert found.reason == "100 activations are too few to align 64 channels"
    everywhere = Rows(math.sqrt(30) * randn(256, 64), 1.0), Rows(randn(256, 64), 1.0)
    frame = Agreement(few.turn, 1.0, 1000)
    assert likeness("layer", *everywhere, frame, generator()).reason is not None


def test_what_moves_the_noise_is_objected_to() -> None:
    assert objection("sgd", 0.0) is None
    assert objection("adamw", 0.0) is None
    muon, decay = objection("muon", 0.0), objection("sgd", 1e-4)
    assert muon is not None and "Muon" in muon
    assert decay is not None and "0.0001" in decay


def test_initial_variances_are_those_of_the_layers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 64, 5, bias=False), nn.Flatten(), nn.Linear(64 * 16, 3))
    for stage in stages(net):
        found = rows(stage)
        assert found.vectors.square().mean() == pytest.approx(found.variance, rel=0.05)
        assert found.vectors.shape[1] == stage.channels
    config = ScatteringConfig(
        widths=(32, 32), bank="spatial", rho="phases", maps="real", after="relu"
    )
    for stage in stages(Scattering(config))[:-1]:
        found = rows(stage)
        assert found.vectors.square().mean() == pytest.approx(found.variance, rel=0.1)
    with pytest.raises(ValueError, match="orthonormal"):
        rows(stages(Scattering(ScatteringConfig(maps="real")))[0])


def test_networks_of_other_depths_have_nothing_in_common() -> None:
    short = nn.Sequential(nn.Linear(INPUTS, 3)).double()
    with pytest.raises(ValueError, match="3 and 1 maps"):
        compared(network(0), short)
    orthonormal = Scattering(ScatteringConfig(widths=(4, 4), maps="real"))
    chain = stages(orthonormal.eval())
    found = compare(chain, chain, [torch.rand(4, 3, 16, 16)], generator())
    assert all("orthonormal" in (f.reason or "") for f in found) and len(found) == 2


# -- networks that learn ----------------------------------------------------------------------


def lesson(task: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six classes told apart by the sign of a product of two of eight directions, which are
    what all lessons of a task have in common."""
    x = randn(3000, INPUTS, seed=seed)
    basis = torch.linalg.qr(randn(INPUTS, 8, seed=1000 + task))[0]
    z = x @ basis
    labels = (z[:, 0] * z[:, 1] > 0).long() + 2 * (z[:, 2] * z[:, 3] > 0).long()
    return x, labels


def trained(task: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(INPUTS, 192, bias=False), nn.ReLU(), nn.Linear(192, 4, bias=False)
    ).double()
    x, labels = lesson(task, seed)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(25):
        for batch in torch.randperm(len(x)).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), labels[batch]).backward()
            optimiser.step()
    return net.eval()


@pytest.mark.slow
def test_networks_of_one_task_find_the_same_directions() -> None:
    first, second, other = trained(0, 0), trained(0, 1), trained(1, 2)
    (same,), (cross,) = compared(first, second), compared(first, other)
    assert same.reason is None and cross.reason is None
    assert same.similarity > 0.8
    assert cross.similarity < 0.4
