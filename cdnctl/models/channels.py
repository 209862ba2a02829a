"""Real and complex channels side by side in one real tensor, and what works on them pixel by pixel:
learnt 1x1 maps, standardisation, division by the norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5  # of a variance


class Channels(NamedTuple):
    """Numbers of real and of complex channels. A tensor (B, total, H, W) holds the real ones,
    then the real parts, then the imaginary parts of the complex ones."""

    reals: int
    complexes: int = 0

    @property
    def total(self) -> int:
        """Channels of the tensor."""
        return self.reals + 2 * self.complexes

    def parts(self) -> Channels:
        """The same tensor as real channels."""
        return Channels(self.total)


def channel_norm(x: Tensor, channels: Channels) -> Tensor:
    """Every pixel over the root mean square of its channels, (B, total, H, W) to the same: it
    has norm sqrt(number of channels) then, and stays 0 where it is 0."""
    mean = x.square().sum(1, keepdim=True) / (channels.reals + channels.complexes)
    return x * (mean + EPS).rsqrt()


class Standardise(nn.Module):
    """Channels less their mean over pictures and positions, over their standard deviation: batch
    norm without learnt factors. The parts of a complex channel share one standard deviation,
    so that phases stay what they are.

    While training, statistics are those of the batch and are remembered with ``momentum``.
    """

    # Apart, as batch norm's statistics must not be seen to change before it has gone backward.
    mean: Tensor  # (reals,)
    variance: Tensor  # (reals,)
    centre: Tensor  # (2, complexes): real and imaginary parts
    spread: Tensor  # (complexes,): variance of each part

    def __init__(self, channels: Channels, momentum: float = 0.1):
        super().__init__()
        self.channels, self.momentum = channels, momentum
        self.register_buffer("mean", torch.zeros(channels.reals))
        self.register_buffer("variance", torch.ones(channels.reals))
        self.register_buffer("centre", torch.zeros(2, channels.complexes))
        self.register_buffer("spread", torch.ones(channels.complexes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, total, H, W) to the same."""
        reals = self.channels.reals
        found = []
        if reals:
            found.append(self._real(x[:, :reals]))
        if self.channels.complexes:
            found.append(self._complex(x[:, reals:].unflatten(1, (2, -1))).flatten(1, 2))
        return torch.cat(found, 1) if len(found) > 1 else found[0]

    def _real(self, x: Tensor) -> Tensor:
        mean, variance = self.mean, self.variance
        if not self.training:
            mean, variance = mean.to(x.dtype), variance.to(x.dtype)
        return F.batch_norm(
            x, mean, variance, training=self.training, momentum=self.momentum, eps=EPS
        )

    def _complex(self, z: Tensor) -> Tensor:
        """z: (B, 2, complexes, H, W)."""
        centre, spread = self.centre.to(z.dtype), self.spread.to(z.dtype)
        if self.training:
            centre = z.mean((0, 3, 4))
            spread = (z - centre[..., None, None]).square().mean((0, 1, 3, 4))
            with torch.no_grad():
                self.centre.lerp_(centre, self.momentum)
                self.spread.lerp_(spread, self.momentum)
        return (z - centre[..., None, None]) * (spread + EPS).rsqrt()[:, None, None]


class ChannelMap(nn.Module):
    """A learnt linear map of the channels of every pixel, without bias: a 1x1 convolution.

    It gives ``width`` complex channels, or real ones, which take the parts of complex channels
    for real channels of their own. Its entries start with a mean square of 1 / inputs: as
    orthonormal rows or columns, or, if ``gaussian``, as independent normal numbers.
    """

    def __init__(self, channels: Channels, width: int, complex_: bool, gaussian: bool = False):
        super().__init__()
        self.channels = channels if complex_ else channels.parts()
        self.complex = complex_
        inputs = sum(self.channels)
        self.gaussian = gaussian
        shape = (2, width, inputs) if complex_ else (width, inputs)
        self.weight = nn.Parameter(torch.empty(shape))
        if self.weight.is_meta:
            return
        dtype = torch.complex64 if complex_ else torch.float32
        drawn = torch.randn(width, inputs, dtype=dtype)
        if not gaussian:
            tall = drawn if width >= inputs else drawn.mH
            basis = torch.linalg.qr(tall)[0] * (max(1, width / inputs) ** 0.5)
            drawn = basis if width >= inputs else basis.mH
        else:
            drawn = drawn * inputs**-0.5
        self.weight.data.copy_(torch.stack([drawn.real, drawn.imag]) if complex_ else drawn)

    @property
    def initial_variance(self) -> float:
        """Mean square of an entry before training, for those who compare weights."""
        return 1 / sum(self.channels)

    @property
    def matrix(self) -> Tensor:
        """The map, (width, reals + complexes): complex or real."""
        return torch.complex(*self.weight) if self.complex else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, total, H, W) to (B, width, H, W), or (B, 2 width, H, W): real, imaginary parts."""
        weight = self.weight.to(x.dtype)
        if self.complex:
            real, imag = weight
            reals = self.channels.reals
            weight = torch.cat(
                [
                    torch.cat([real, -imag[:, reals:]], 1),
                    torch.cat([imag, real[:, reals:]], 1),
                ]
            )
        return F.conv2d(x, weight[:, :, None, None])
