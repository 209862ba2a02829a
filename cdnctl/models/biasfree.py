"""A denoiser without biases, which is not told the noise level (Mohan, Kadkhodaie, Simoncelli and
Fernandez-Granda 2020).

Convolutions, ReLU, and norms that divide by a standard deviation and take nothing away: all of
them carry a factor of the picture through, so that D(t y) = t D(y) for t > 0 and, by Euler's
theorem, D(y) = J(y) y with the Jacobian J. A noise level that it has not seen is only another
scale of pictures that it has. That holds in evaluation; while training, norms take the standard
deviation of the batch.

It is homogeneous about black, and not about gray as the other networks are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.joint import Sigma
from cdnctl.models.adjoint import Conv, stat_dtype
from cdnctl.models.network import Mixture, Needs, Network, Whole

EPS = 1e-5
MOMENTUM = 0.1  # of the variances that are remembered


@dataclass(frozen=True)
class BiasFreeConfig:
    """depth: 3x3 convolutions, the first and the last included, each of which sees one pixel
    further. width: channels between them."""

    channels: int = 3
    width: int = 64
    depth: int = 20

    def __post_init__(self) -> None:
        for name, value, least in (
            ("channels", self.channels, 1),
            ("width", self.width, 1),
            ("depth", self.depth, 2),
        ):
            if not least <= value <= 4096:
                raise ValueError(f"{name} is {value}, but must lie between {least} and 4096")


class Spread(nn.Module):
    """Channels over their standard deviation, without taking their mean away; then a gain.

    While training the variance is that of the batch, over pictures and places, and is remembered.
    """

    variance: Tensor  # (C,)

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        if self.training:
            variance = x.to(stat_dtype(x)).var((0, 2, 3), correction=0)
            with torch.no_grad():
                # A new tensor: the one before may be needed for a gradient.
                self.variance = torch.lerp(self.variance, variance.to(self.variance), MOMENTUM)
        else:
            variance = self.variance
        factor = self.gain.to(variance) * (variance.clamp_min(0) + EPS).rsqrt()
        return x * factor.to(x.dtype).view(1, -1, 1, 1)


class BiasFree(Network):
    """D(y) = y - f(y), where f is a chain of convolutions that ends at the noise."""

    def __init__(self, config: BiasFreeConfig):
        channels, width, depth = config.channels, config.width, config.depth
        super().__init__(Needs(channels, 4 * (3 * width + 3 * channels), margin=depth))
        self.first = Conv(channels, width, 3, gain=2**0.5)
        self.inner = nn.ModuleList(Conv(width, width, 3, gain=2**0.5) for _ in range(depth - 2))
        self.norms = nn.ModuleList(Spread(width) for _ in range(depth - 2))
        self.last = Conv(width, channels, 3, gain=0.1)  # starts near D = y

    def correction(
        self, y: Tensor, sigma: Sigma, mixture: Mixture = None, whole: Whole | None = None
    ) -> tuple[Tensor, Tensor]:
        """-f(y), like y, whatever sigma is; and no logits, (B, 0)."""
        weight = self.first.weight.dtype
        half = weight if weight in (torch.float16, torch.bfloat16) else y.dtype
        h = F.relu(self.first(y.to(self.compute_dtype or half))[0])  # (B, width, H, W)
        for conv, norm in zip(self.inner, self.norms, strict=True):
            h = F.relu(norm(conv(h)[0]))
        return -self.last(h)[0].to(y.dtype), y.new_zeros(len(y), 0)
