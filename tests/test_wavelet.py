"""Wavelets: orthogonal, those of pywt, and in the order of frequency."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.transforms import wavelet as wavelets
from cdnctl.transforms.wavelet import (
    band_statistics,
    from_packets,
    from_pyramid,
    from_quarters,
    merge,
    packets,
    pyramid,
    quarters,
    split,
)

NAMES = ["haar", "db2", "db3", "db4", "sym5", "coif2"]


@pytest.fixture(params=["matrices", "filters"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute a level."""
    if request.param == "filters":
        monkeypatch.setattr(wavelets, "DENSE", 0)


def picture(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 2), (4, 2), (6, 10), (8, 8), (32, 14)])
def test_one_level_is_that_of_pywt_without_any_shift(name: str, shape: tuple[int, int]) -> None:
    x = picture(2, 3, *shape)
    low, details = split(x, name)
    approximation, (horizontal, vertical, diagonal) = pywt.dwt2(x.numpy(), name, "periodization")
    expected = np.stack([vertical, horizontal, diagonal], -3)
    np.testing.assert_allclose(low.numpy(), approximation, atol=1e-10)
    np.testing.assert_allclose(details.numpy(), expected, atol=1e-10)
    torch.testing.assert_close(merge(low, details, name), x, atol=1e-10, rtol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_is_the_inverse(name: str) -> None:
    x, z = picture(12, 6), picture(2, 2, 6, 3)
    forward = (quarters(x, name) * z).sum()
    torch.testing.assert_close(forward, (x * from_quarters(z, name)).sum())
    torch.testing.assert_close(quarters(from_quarters(z, name), name), z, atol=1e-10, rtol=0)
    torch.testing.assert_close(quarters(x, name).square().sum(), x.square().sum())


@pytest.mark.usefixtures("way")
def test_autograd_finds_the_adjoint() -> None:
    x, z = picture(2, 8, 12).requires_grad_(), picture(2, 2, 2, 4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad((quarters(x, "db3") * z).sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, from_quarters(z, "db3"))
    (back,) = torch.autograd.grad((gradient * x).sum(), z)
    torch.testing.assert_close(back, quarters(x, "db3"))


@pytest.mark.filterwarnings("ignore:Level value")
def test_pyramids_are_those_of_pywt() -> None:
    x = picture(32, 16)
    low, details = pyramid(x, 3, "db2")
    expected = pywt.wavedec2(x.numpy(), "db2", "periodization", level=3)
    np.testing.assert_allclose(low.numpy(), expected[0], atol=1e-10)
    for found, (horizontal, vertical, diagonal) in zip(
        details, reversed(expected[1:]), strict=True
    ):
        bands = np.stack([vertical, horizontal, diagonal])
        np.testing.assert_allclose(found.numpy(), bands, atol=1e-10)
    torch.testing.assert_close(from_pyramid(low, details, "db2"), x, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["haar", "db4"])
@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_packets_are_those_of_pywt_in_the_order_of_frequency(name: str, depth: int) -> None:
    x = picture(16, 24)
    cells = packets(x, depth, name)
    assert cells.shape == (2**depth, 2**depth, 16 >> depth, 24 >> depth)
    if depth:
        tree = pywt.WaveletPacket2D(x.numpy(), name, "periodization", maxlevel=depth)
        for row, nodes in enumerate(tree.get_level(depth, order="freq")):
            for column, node in enumerate(nodes):
                np.testing.assert_allclose(cells[row, column].numpy(), node.data, atol=1e-10)
    torch.testing.assert_close(from_packets(cells, name), x, atol=1e-10, rtol=0)


def test_cells_hold_their_frequencies() -> None:
    """Long filters tell waves apart: each lies in the cell of its frequencies."""
    places = torch.arange(128, dtype=torch.float64)
    for row in range(4):
        for column in range(4):
            down, across = (16 * cell + 8 for cell in (row, column))
            wave = torch.cos(2 * torch.pi * (down * places[:, None] + across * places) / 128)
            energy = packets(wave, 2, "sym20").square().sum((-2, -1))
            assert energy[row, column] > 0.98 * energy.sum()


@pytest.mark.parametrize("name", ["haar", "db4"])
def test_white_noise_stays_white_at_its_level(name: str) -> None:
    """The covariance of all coefficients is that of the noise, as the matrix is orthogonal."""
    basis = torch.eye(64, dtype=torch.float64).reshape(64, 8, 8)
    low, (fine, coarse) = pyramid(basis, 2, name)
    parts = [packets(basis, 2, name)], [low, fine, coarse]
    for bands in parts:
        matrix = torch.cat([band.reshape(64, -1) for band in bands], 1)
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(64, dtype=torch.float64))


def test_pictures_keep_their_dtype_and_large_ones_are_as_small_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = picture(1, 20, 36).float()
    small = quarters(x, "db4")
    monkeypatch.setattr(wavelets, "DENSE", 24)  # one side of each way
    assert quarters(x, "db4").dtype == torch.float32
    torch.testing.assert_close(quarters(x, "db4"), small)


def test_statistics_of_bands_in_closed_form() -> None:
    """A wave a_c (-1)^column + b (-1)^row with mean m_c: haar makes it three constant bands."""
    mean, across, down = torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.3]), 0.7
    sign = 1.0 - 2 * (torch.arange(8) % 2)
    x = mean[:, None, None] + across[:, None, None] * sign + down * sign[:, None]
    x = torch.stack([x, x.flip(-1).flip(-2)])  # in the second picture both waves are turned over
    fine, coarse = band_statistics(x, 2)
    turned = torch.stack([2 * across, torch.full((2,), 2 * down), torch.zeros(2)], 1)
    torch.testing.assert_close(fine.std, turned)
    torch.testing.assert_close(fine.mean, torch.zeros(2, 3))
    torch.testing.assert_close(fine.low_mean, 2 * mean)
    torch.testing.assert_close(coarse.low_mean, 4 * mean)
    for still in (coarse.std, coarse.mean, fine.low_std[:, None]):
        torch.testing.assert_close(still, torch.zeros_like(still), atol=1e-6, rtol=0)


def test_what_is_kept_from_one_call_serves_the_next() -> None:
    """A first call without gradients, on whatever device, must not spoil later ones."""
    wavelets._bank.cache_clear()
    wavelets._matrix.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        quarters(torch.zeros(4, 4, device="cpu"), "db2")
    x = torch.ones(4, 4, requires_grad=True)
    quarters(x, "db2").square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(4, 4))


@pytest.mark.parametrize("shape", [(3, 4), (4, 5), (0, 4), (1, 1)])
def test_odd_sides_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=f"{shape[1]} x {shape[0]}"):
        split(torch.zeros(shape))


@pytest.mark.parametrize("name", ["bior2.2", "morl", "nonsense", "dmey"])
def test_wavelets_that_are_not_orthogonal_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        split(torch.zeros(4, 4), name)
