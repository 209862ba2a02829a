"""A denoiser without biases: homogeneous of degree one, and hence its Jacobian times its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cdnctl.errors import ConfigError
from cdnctl.models.biasfree import EPS, BiasFree, BiasFreeConfig, Spread
from cdnctl.schema import build


def network(seed: int = 0) -> BiasFree:
    """In float64, with gains and remembered variances that are not 1."""
    torch.manual_seed(seed)
    net = BiasFree(BiasFreeConfig(width=8, depth=6)).double()
    for norm in net.norms:
        norm.gain.data.uniform_(0.5, 2)
        norm.variance.uniform_(0.2, 3)
    return net.eval()


def denoised(net: BiasFree, y: Tensor, sigma: float = 0.1) -> Tensor:
    return y + net.correction(y, sigma)[0]


Y = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("factor", [0.01, 0.5, 3.0, 1000.0])
def test_a_factor_goes_through(factor: float) -> None:
    net = network()
    torch.testing.assert_close(
        denoised(net, factor * Y), factor * denoised(net, Y), rtol=1e-9, atol=1e-12 * factor
    )
    assert not torch.allclose(denoised(net, -Y), -denoised(net, Y), rtol=1e-2), "not linear"


def test_it_is_its_jacobian_times_its_input() -> None:
    net = network()
    _, along = torch.func.jvp(lambda y: denoised(net, y), (Y,), (Y,))
    torch.testing.assert_close(along, denoised(net, Y), rtol=1e-6, atol=1e-9)


def test_with_biases_it_would_not_be() -> None:
    """The control: one bias, and both identities fail."""
    net = network()
    first = net.first
    moved = nn.Module()
    moved.forward = lambda x: (first(x)[0] + 0.3, None)  # type: ignore[assignment]
    moved.weight = first.weight
    net.first = moved  # type: ignore[assignment]
    _, along = torch.func.jvp(lambda y: denoised(net, y), (Y,), (Y,))
    assert (along - denoised(net, Y)).norm() > 1e-3 * Y.norm()
    assert (denoised(net, 2 * Y) - 2 * denoised(net, Y)).norm() > 1e-3 * Y.norm()


def test_it_is_blind() -> None:
    net = network()
    assert torch.equal(denoised(net, Y, 0.01), denoised(net, Y, 1.0))


def test_a_pixel_sees_as_far_as_the_margin_and_no_further() -> None:
    net = network()
    y = torch.rand(1, 3, 1, 31, dtype=torch.float64).requires_grad_()
    denoised(net, y)[0, 0, 0, 15].backward()
    seen = y.grad.abs().sum((0, 1, 2)).nonzero().flatten()  # type: ignore[union-attr]
    assert (int(seen.min()), int(seen.max())) == (15 - 6, 15 + 6) and net.needs.margin == 6


def test_the_norm_divides_and_takes_nothing_away() -> None:
    norm = Spread(3).double().train()
    x = 2 + 3 * torch.randn(8, 3, 20, 20, dtype=torch.float64)
    out = norm(x)
    torch.testing.assert_close(
        out, x / (x.var((0, 2, 3), correction=0) + EPS).sqrt()[:, None, None]
    )
    assert float(out.detach().mean()) > 0.5
    for _ in range(100):
        norm(x)
    torch.testing.assert_close(norm.eval()(x), out, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "shape,fault", [({"depth": 1}, "depth is 1"), ({"width": 0}, "width is 0")]
)
def test_shapes_that_cannot_be(shape: dict[str, int], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        build(BiasFreeConfig, shape, "model")
