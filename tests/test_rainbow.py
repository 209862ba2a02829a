"""Networks drawn from covariances: exact twins, limits of wide layers, a small trained network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cdnctl.analysis.rainbow import arc_cosine, gaussian, resample, white
from cdnctl.analysis.stages import recalibrate, run, stages
from cdnctl.core.metrics import accuracy
from cdnctl.models.scattering import Scattering, ScatteringConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 7, bias=False), nn.ReLU(),
        nn.Linear(7, 3),
    ).double()  # fmt: skip


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, bias=False), nn.BatchNorm2d(5, affine=False), nn.ReLU(),
        nn.Conv2d(5, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3),
    ).double()  # fmt: skip


def scattering(**shape: object) -> Scattering:
    torch.manual_seed(0)
    config = {"num_classes": 3, "channels": 2, "widths": (4, 6), "maps": "real"} | shape
    return Scattering(ScatteringConfig(**config)).double()  # type: ignore[arg-type]


class Told(nn.Module):
    """A scattering network as a function of pictures alone."""

    def __init__(self, net: Scattering):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.logits(x, 0.0)


NETS = {
    "mlp": (mlp, (6,)),
    "cnn": (cnn, (2, 11, 11)),
    "scattering": (scattering, (2, 8, 8)),
    "factorised": (
        lambda: scattering(bank="spatial", rho="phases", after="relu"),
        (2, 8, 8),
    ),
    "complex": (lambda: scattering(maps="complex", rho="skip"), (2, 8, 8)),
}


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.logits(x, 0.0) if isinstance(net, Scattering) else net(x)


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A network with its statistics, and batches."""
    build, shape = NETS[name]
    net = build()  # type: ignore[operator]
    batches = [randn(40, *shape, seed=s) for s in range(3)]
    chain = stages(net)
    for i in range(len(chain)):
        recalibrate(chain, i, batches)
    return net.eval(), batches


def turned(rows: Tensor, count: int, g: torch.Generator) -> Tensor:
    """The same rows in another order, complex ones with other phases: a twin."""
    rows = rows[torch.randperm(len(rows), generator=g)]
    if rows.is_complex():
        rows = rows * torch.exp(2j * torch.pi * torch.rand(len(rows), 1, generator=g))
    return rows


@pytest.mark.parametrize("name", NETS)
def test_a_chain_is_the_network(name: str) -> None:
    net, (x, *_) = made(name)
    chain = stages(net)
    last = len(chain) - 1
    torch.testing.assert_close(chain[last].linear(run(chain, x, last)), outputs(net, x))


@pytest.mark.parametrize("name", NETS)
def test_the_same_rows_give_the_same_network(name: str) -> None:
    net, batches = made(name)
    same = resample(net, batches, generator(), draw=lambda rows, n, g: rows)
    torch.testing.assert_close(outputs(same.network, batches[0]), outputs(net, batches[0]))
    assert same.explained == pytest.approx([1.0] * len(same.explained))


@pytest.mark.parametrize("name", NETS)
def test_a_permuted_twin_is_found_out(name: str) -> None:
    """Other rows, the same function: alignment undoes the order, as rectifiers mind no order."""
    net, batches = made(name)
    twin = resample(net, batches, generator(), draw=turned)
    torch.testing.assert_close(outputs(twin.network, batches[0]), outputs(net, batches[0]))
    assert twin.explained == pytest.approx([1.0] * len(twin.explained))
    blind = resample(net, batches, generator(), draw=turned, aligned=False)
    assert not torch.allclose(outputs(blind.network, batches[0]), outputs(net, batches[0]), 1e-2)


def test_flattened_channels_have_places() -> None:
    net, _ = made("cnn")
    assert [(s.name, s.channels, s.rows().shape[2]) for s in stages(net)] == [
        ("0", 2, 9),
        ("3", 5, 9),
        ("6", 4, 9),
    ]


def test_statistics_are_means_over_all_batches() -> None:
    net, batches = made("cnn")
    chain = stages(net)
    (norm,) = chain[1].norms
    x = torch.cat([chain[0].linear(b) for b in batches]).detach()
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))
    assert not norm.training and norm.momentum == 0.1


def test_the_old_network_is_left_alone() -> None:
    net, batches = made("cnn")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    resample(net, batches, generator())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("draw", [gaussian, white])
def test_draws_have_the_covariance_that_they_claim(draw: object, kind: str) -> None:
    rows = randn(5, 7) * torch.arange(1, 8)
    if kind == "complex":
        rows = rows + 1j * randn(5, 7, seed=1)
    want = rows.mH @ rows if draw is gaussian else rows.abs().square().sum() / 7 * torch.eye(7)
    for count in (20_000, 40_000):  # whatever the number of rows
        found = draw(rows, count, generator())  # type: ignore[operator]
        assert found.shape == (count, 7)
        assert (found.mH @ found - want).norm() < 0.04 * want.norm()


def test_a_wide_linear_network_comes_back_whole() -> None:
    """Alignment and covariance become exact as the hidden layer grows: 1 / sqrt(width)."""
    torch.manual_seed(0)
    x = [randn(300, 6)]
    first, last = randn(6, 6), randn(3, 6)
    errors, widths = [], (64, 256, 1024, 4096)
    for width in widths:
        net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Identity(), nn.Linear(6, 3, bias=False))
        net = net.double()
        net[0].weight.data, net[2].weight.data = first, last
        miss = [
            outputs(resample(net, x, generator(s), widen=width // 6).network, x[0])
            for s in range(8)
        ]
        errors.append(sum((m - outputs(net, x[0])).square().mean() for m in miss) / 8)
    slope = np.polyfit(np.log(widths), np.log(np.sqrt(errors)), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.08)


def test_random_layers_have_the_arc_cosine_kernel_in_the_limit() -> None:
    """The error falls as 1 / sqrt(width); on the diagonal its variance is known, 5/4 |x|^4 / width,
    as relu(z)^2 has a variance of 3/2 - 1/4."""
    x = randn(60, 6)
    want = arc_cosine(x, x, torch.eye(6, dtype=torch.float64))
    rows = torch.eye(6, dtype=torch.float64)  # of covariance 1 / 6
    widths, errors, on_diagonal = (64, 256, 1024, 4096), [], []
    for width in widths:
        square = diagonal = 0.0
        for seed in range(40):
            w = gaussian(rows, width, generator(seed))  # of covariance 1 / width
            features = (x @ w.T).relu()
            miss = (features @ features.T - want).square()
            square += miss.mean().item() / 40
            diagonal += (miss.diagonal() / x.square().sum(1).square()).mean().item() / 40
        errors.append(math.sqrt(square))
        on_diagonal.append(width * diagonal)
    assert np.polyfit(np.log(widths), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.05)
    assert np.mean(on_diagonal) == pytest.approx(1.25, rel=0.1)


def test_kernels_take_the_covariance_into_account() -> None:
    x, root = randn(4, 3), randn(3, 3, seed=1)
    w = randn(400_000, 3, seed=2) @ root
    features = (x @ w.T).relu()
    found = features @ features.T / len(w)
    torch.testing.assert_close(arc_cosine(x, x, root.T @ root), found, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Linear(3, 3), "Linear"),
        (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "layer 0 has a bias"),
        (nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU()), "last layer"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), "layer 0"),
        (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Linear(4, 3)), "2 groups"),
        (scattering(frames=2), "frames"),
    ],
)
def test_other_networks_are_refused(net: nn.Module, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        stages(net)


def test_norms_are_not_widened() -> None:
    net, batches = made("cnn")
    with pytest.raises(ValueError, match="2 times as wide"):
        resample(net, batches, generator(), widen=2)


# -- the published experiment, made small -----------------------------------------------------


CLASSES = 6


def lesson(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classes that no linear map tells apart: signs of products of a few hidden directions."""
    g = generator(seed)
    labels = torch.randint(CLASSES, (count,), generator=g)
    hidden = torch.randn(CLASSES, 2, 20, generator=generator(99))
    sign = torch.randint(0, 2, (count, 1), generator=g) * 2 - 1.0
    x = 0.8 * sign * hidden[labels, torch.randint(2, (count,), generator=g)]
    return x + 0.8 * torch.randn(count, 20, generator=g), labels


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(20, 192, bias=False), nn.ReLU(), nn.Linear(192, 96, bias=False), nn.ReLU(),
        nn.Linear(96, CLASSES, bias=False),
    )  # fmt: skip
    x, labels = lesson(4000, 1)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(12):
        for rows in torch.randperm(len(x)).split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimiser.step()
    return net.eval()


def test_a_resampled_network_classifies_and_its_controls_do_not(trained: nn.Sequential) -> None:
    batches = list(lesson(2000, 1)[0].split(500))
    x, labels = lesson(2000, 2)

    def share(**options: object) -> float:
        """Mean accuracy of three draws."""
        nets = [resample(trained, batches, generator(s), **options).network for s in range(3)]  # type: ignore[arg-type]
        return sum(accuracy(outputs(net, x), labels) for net in nets) / 3

    whole, drawn = accuracy(outputs(trained, x), labels), share()
    chance = 1 / CLASSES
    assert whole > 0.9
    assert drawn > chance + 0.6 * (whole - chance)
    assert abs(share(aligned=False) - chance) < 0.12
    assert share(draw=white) < drawn - 0.1
    assert share(widen=2) > drawn
