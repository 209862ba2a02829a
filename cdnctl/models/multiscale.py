"""Pictures by scales: one local network per scale finds the details given the coarser picture.

p(x) = p(x_J) prod_j p(d_j given x_j), where x_j is the picture after j Haar splits and d_j are the
details of the last of them (Kadkhodaie, Guth, Mallat and Simoncelli 2023, arXiv 2303.02984). The
network of a scale reads the coarser picture, without noise, and the noisy details; it sees a square
of ``reach`` x ``reach`` cells of its grid and nothing else. One more network denoises the coarsest
picture. Haar's wavelets are orthonormal: noise of level sigma is white of level sigma in each band.

Each band is whitened by its own mean and standard deviation, as in Guth, Coste, De Bortoli and
Mallat 2022 (arXiv 2208.05003). Training measures them; they are saved with the weights.

With ``levels`` = 0 what is left is one network of the picture itself, to compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.joint import MIN_SIGMA, Mixture, Sigma, Whole, per_sample
from cdnctl.models.adjoint import Activation, Chain, Conv, PixelNorm, Residual
from cdnctl.models.network import Needs, Network
from cdnctl.models.trunk import HALF
from cdnctl.transforms.wavelet import merge, split

MAX_LEVELS, MAX_BLOCKS, MAX_WIDTH = 8, 100, 8192
LEAST_STD = 1e-3  # of a band: flat pictures have none
SLOWEST = 0.002  # share of the newest batch in the running statistics of the bands


@dataclass(frozen=True)
class LocalConfig:
    """Shape of a network of one scale: a convolution, then ``blocks`` of two with a shortcut."""

    reach: int = 13  # side of the square of cells that one output depends on; odd
    width: int = 32  # channels
    blocks: int = 4

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_WIDTH and 0 <= self.blocks <= MAX_BLOCKS):
            raise ValueError(
                f"width {self.width} and blocks {self.blocks} must lie between 1 and {MAX_WIDTH}, "
                f"and between 0 and {MAX_BLOCKS}"
            )
        most = 4 * self.blocks + 3
        if self.reach % 2 == 0 or not 1 <= self.reach <= most:
            raise ValueError(
                f"reach is {self.reach}, but must be an odd number from 1 to {most}, which is all "
                f"that the convolutions of {self.blocks} blocks can see"
            )

    @property
    def kernels(self) -> tuple[int, ...]:
        """Sides of all kernels: the 3x3 ones that the reach asks for, evenly among 1x1 ones."""
        count, wide = 1 + 2 * self.blocks, self.reach // 2
        return tuple(3 if i * wide % count < wide else 1 for i in range(count))

    def floats(self, inputs: int) -> int:
        """About what a pass has in flight for each cell, in numbers."""
        return 4 * self.width + 2 * inputs


@dataclass(frozen=True)
class MultiscaleConfig:
    """Shape of a model by scales: how many, the networks of their details, that of the rest."""

    channels: int = 3  # of the pictures
    levels: int = 3  # scales with details; 0: ``coarse`` alone, on the picture
    details: LocalConfig = LocalConfig()
    coarse: LocalConfig = LocalConfig(reach=21, width=64, blocks=5)

    def __post_init__(self) -> None:
        if self.channels < 1 or not 0 <= self.levels <= MAX_LEVELS:
            raise ValueError(
                f"channels {self.channels} and levels {self.levels} must be 1 or more, and from 0 "
                f"to {MAX_LEVELS}"
            )

    @property
    def margin(self) -> int:
        """Farthest distance in pixels at which one pixel moves another.

        A scale's estimate is the condition of the next, so reaches add up from the coarsest on.
        """
        radius = self.coarse.reach // 2
        for _ in range(self.levels):
            radius = 2 * (radius + self.details.reach // 2) + 1
        return radius

    @property
    def needs(self) -> Needs:
        """What networks of this shape ask for; their memory was measured, right within a quarter.

        Networks run one after the other: the largest counts, and the bands of the picture.
        """
        c = self.channels
        most = self.coarse.floats(c) / 4**self.levels
        if self.levels:
            most = max(most, self.details.floats(4 * c) / 4)
        return Needs(c, round(4 * (most + 12 * c)), 2**self.levels, self.margin)


class Local(nn.Module):
    """A residual network whose output depends on a square of ``reach`` x ``reach`` cells."""

    def __init__(self, config: LocalConfig, inputs: int, outputs: int):
        super().__init__()
        width, (first, *others) = config.width, config.kernels
        # Branches start small, so that a deep stack starts near the identity.
        small = config.blocks**-0.5 if config.blocks else 1.0
        self.stem = Conv(inputs + 2, width, first)
        self.blocks = nn.ModuleList(
            Residual(
                Chain(
                    PixelNorm(width),
                    Conv(width, width, a, gain=2**0.5),
                    Activation("gelu"),
                    Conv(width, width, b, gain=small),
                )
            )
            for a, b in zip(others[::2], others[1::2], strict=True)
        )
        self.head = Conv(width, outputs, 1, gain=0.1)

    def forward(self, x: Tensor, level: Tensor, dtype: torch.dtype | None) -> Tensor:
        """x: (B, inputs, h, w) at unit scale. level: of the noise in it, (B, 1, 1, 1). dtype: of
        the features; None for that of weights in half precision, else that of x."""
        weight = self.stem.weight.dtype
        level = level.expand(x.shape[0], 1, *x.shape[-2:])
        h = torch.cat([x, level, torch.ones_like(level)], 1)
        h = h.to(dtype or (weight if weight in HALF else x.dtype))
        h = self.stem(h.contiguous(memory_format=torch.channels_last))[0]
        for block in self.blocks:  # one after the other: their adjoints are not kept
            h = block(h)[0]
        found: Tensor = self.head(h)[0]
        return found.to(x.dtype)


class Whitening(nn.Module):
    """Means and standard deviations of the bands of clean pictures: running averages of training.

    Of the picture after 0..J splits: ``mean`` and ``low``, (J + 1, C); of the details: ``detail``,
    (J, C, 3), in the order of `cdnctl.transforms.wavelet.split`, whose means are 0 where pictures
    are as often mirrored as not. ``low`` and ``detail`` are logarithms; means are in the unit of
    the picture, of which coefficients after j splits are 2^j times as large.
    """

    mean: Tensor
    low: Tensor
    detail: Tensor
    seen: Tensor

    def __init__(self, channels: int, levels: int):
        super().__init__()
        # Until training has measured them: about what photographs have.
        scale = 2.0 ** torch.arange(levels + 1, device="cpu")[:, None]
        detail = 0.04 * scale[1:, :, None].expand(levels, channels, 3)
        self.register_buffer("mean", torch.full((levels + 1, channels), 0.5))
        self.register_buffer("low", (0.25 * scale).log().expand(-1, channels).clone())
        self.register_buffer("detail", detail.log().clone())
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def measure(self, lows: list[Tensor], details: list[Tensor]) -> None:
        """Fold a batch of clean pictures into the averages: the picture after 0..J splits,
        (B, C, h, w), and the details of each, (B, C, 3, h, w)."""
        share = (1 / (self.seen + 1)).clamp(SLOWEST, 1.0)

        def fold(average: Tensor, values: list[Tensor]) -> None:
            if values:
                average.lerp_(torch.stack(values).to(average), share)

        fold(self.mean, [x.mean((0, 2, 3)) / 2**j for j, x in enumerate(lows)])
        fold(self.low, [_log_std(x, (0, 2, 3)) for x in lows])
        fold(self.detail, [_log_std(d, (0, 3, 4)) for d in details])
        self.seen += 1

    def coarse(self, level: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the picture after so many splits, (1, C, 1, 1)."""
        mean, std = 2**level * self.mean[level], self.low[level].exp()
        return mean.to(like).view(1, -1, 1, 1), std.to(like).view(1, -1, 1, 1)

    def details(self, level: int, like: Tensor) -> Tensor:
        """Standard deviation of the details of the split number 1..J, (1, 3 C, 1, 1)."""
        return self.detail[level - 1].exp().to(like).view(1, -1, 1, 1)


def _log_std(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.std(axes, correction=0).clamp_min(LEAST_STD).log()


class Multiscale(Network):
    """A denoiser that goes from the coarsest picture to the finest."""

    def __init__(self, config: MultiscaleConfig):
        super().__init__(config.needs)
        self.config = config
        c = config.channels
        self.whitening = Whitening(c, config.levels)
        self.coarse = Local(config.coarse, c, c)
        # The finest first, as the levels are numbered: 1..J.
        self.scales = nn.ModuleList(
            Local(config.details, 4 * c, 3 * c) for _ in range(config.levels)
        )

    def correction(
        self,
        y: Tensor,
        sigma: Sigma,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 times the score, like y, and no logits, (B, 0): see `Corrector`.

        Details are found given the coarser picture as it was denoised, scale after scale.
        """
        return self._by_scales(y, sigma, None), y.new_zeros(len(y), 0)

    def taught(self, y: Tensor, sigma: Sigma, clean: Tensor) -> Tensor:
        """What every network makes of its own band, like y: details are found given the coarser
        picture of the clean one. The squared error is the sum of the errors of all bands.

        In training this also measures what the bands are whitened with.
        """
        return self._by_scales(y, sigma, clean)

    def coarse_correction(self, low: Tensor, sigma: Sigma) -> Tensor:
        """sigma^2 times the score of the coarsest picture, (B, C, h, w) after all splits."""
        mean, std = self.whitening.coarse(self.config.levels, low)
        return self._corrected(self.coarse, low - mean, std, sigma, [])

    def detail_correction(self, details: Tensor, sigma: Sigma, low: Tensor, level: int) -> Tensor:
        """sigma^2 times the score of the noisy details of the split number ``level``, 1..J,
        (B, C, 3, h, w), given the picture after it, (B, C, h, w), which has no noise."""
        mean, std = self.whitening.coarse(level, low)
        flat = details.flatten(1, 2)
        own = self.whitening.details(level, flat)
        network = self.scales[level - 1]
        found = self._corrected(network, flat, own, sigma, [(low - mean) / std])
        return found.view_as(details)

    def _corrected(
        self, network: nn.Module, y: Tensor, std: Tensor, sigma: Sigma, given: list[Tensor]
    ) -> Tensor:
        """As if the band were white of that standard deviation, and what the network adds."""
        noise = per_sample(sigma, y).clamp_min(MIN_SIGMA)
        tau = (noise.square() + std.square()).sqrt()
        level = noise / (noise.square() + std.square().mean(1, keepdim=True)).sqrt()
        g = network(torch.cat([y / tau, *given], 1), level, self.compute_dtype)
        return noise * std / tau * g - (noise / tau).square() * y

    def _by_scales(self, y: Tensor, sigma: Sigma, clean: Tensor | None) -> Tensor:
        lows, details = self._split(y)
        known = None
        if clean is not None:
            known, pure = self._split(clean)
            if self.training:
                self.whitening.measure(known, pure)
        found = self.coarse_correction(lows[-1], sigma)
        for level in range(self.config.levels, 0, -1):
            given = known[level] if known is not None else lows[level] + found
            own = self.detail_correction(details[level - 1], sigma, given, level)
            found = merge(found, own)
        return found[..., : y.shape[2], : y.shape[3]]

    def _split(self, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The picture after 0..J splits, and the details of each; sides are filled up by their
        last pixels."""
        down, right = (-n % self.needs.multiple for n in y.shape[-2:])
        lows, details = [F.pad(y, (0, right, 0, down), "replicate") if down or right else y], []
        for _ in range(self.config.levels):
            low, detail = split(lows[-1])
            lows.append(low)
            details.append(detail)
        return lows, details
