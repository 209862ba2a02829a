"""Residual networks on one trunk: their config, the encoder, the class head."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.coloured import Told
from cdnctl.core.joint import MIN_SIGMA, Sigma, per_sample
from cdnctl.models.adjoint import (
    Activation,
    Adjoint,
    Chain,
    Conv,
    GroupNorm,
    NoNorm,
    PixelNorm,
    Residual,
    init_normal,
    stat_dtype,
)
from cdnctl.models.hearing import heard, make_ears
from cdnctl.models.network import Mixture, Needs, Network, Whole

PRIOR_STD = 0.25  # s0: about the standard deviation of the pixels of natural images

MAX_STAGES, MAX_BLOCKS = 10, 100

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class NetConfig:
    """Shape of a network. Each stage after the first has half the resolution of the one before."""

    num_classes: int = 10
    channels: int = 3  # of the pictures
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of every stage
    blocks: tuple[int, ...] = (2, 2, 2, 2)  # residual blocks of every stage
    unshuffle: int = 1  # side of the squares of pixels that become channels before the first stage
    norm: str = "group"  # group, pixel or none
    groups: int = 8  # of a group norm
    activation: str = "gelu"  # or silu
    down: int = 4  # kernel of the strided convolutions between stages: 2 or 4
    side: float = 1.0  # rank of a stage's quadratic form, in widths (0: only the last has one)
    head: int = 512  # width of the hidden layer before the logits
    decoder: tuple[int, ...] = ()  # blocks of every stage of a separate decoder (none: ``blocks``)
    # A channel of ones beside the noise level: without it all features vanish where the picture
    # is mid-gray and the noise low, and the gradient of their norm has no bound there.
    constant: bool = False
    coloured: bool = False  # every stage hears how the noise differs from white, see `Told`

    def __post_init__(self) -> None:
        if not self.widths or len(self.widths) != len(self.blocks):
            raise ValueError(
                f"widths {self.widths} and blocks {self.blocks} need one entry per stage each"
            )
        if self.decoder and len(self.decoder) != len(self.widths):
            raise ValueError(
                f"decoder {self.decoder} needs one entry per stage, of which there are "
                f"{len(self.widths)}, or none at all"
            )
        # Modules cost time and memory even before their tensors do.
        most = max((*self.blocks, *self.decoder))
        if len(self.widths) > MAX_STAGES or most > MAX_BLOCKS:
            raise ValueError(
                f"{len(self.widths)} widths with up to {most} blocks each, but "
                f"{MAX_STAGES} widths and {MAX_BLOCKS} blocks are the most that is supported"
            )
        for name, value, known in (
            ("norm", self.norm, ("group", "pixel", "none")),
            ("activation", self.activation, ("gelu", "silu")),
            ("down", self.down, (2, 4)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, but must be one of {known}")
        sizes = (self.num_classes, self.channels, self.unshuffle, self.groups, self.head)
        if (
            min(*sizes, *self.widths) < 1
            or min((*self.blocks, *self.decoder)) < 0
            or not 0 <= self.side < inf
        ):
            raise ValueError(f"sizes must be positive: {self}")
        if self.norm == "group" and any(w % self.groups for w in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of groups {self.groups}")

    @property
    def multiple(self) -> int:
        """Sides that are multiples of this number need no padding."""
        return int(self.unshuffle * 2 ** (len(self.widths) - 1))

    @property
    def receptive_radius(self) -> int:
        """Farthest distance in pixels at which an input pixel moves a denoised one.

        The encoder reaches as far as its blocks do, and so does its adjoint, or the decoder.
        Class scores, means over the whole picture, are not counted; nor is group norm.
        """
        ways = [self._reach(self.blocks), self._reach(self.decoder or self.blocks)]
        return ways[0] + max(ways)

    def _reach(self, blocks: tuple[int, ...]) -> int:
        cell = self.unshuffle
        reach = 2 * cell - 1
        for i, count in enumerate(blocks):
            if i > 0:
                reach += (self.down // 2) * cell
                cell *= 2
            reach += 2 * count * cell
        return reach

    @property
    def needs(self) -> Needs:
        """What networks of this shape ask for."""
        return Needs(
            self.channels, self._bytes_per_pixel, self.multiple, self._margin, self.coloured
        )

    @property
    def _bytes_per_pixel(self) -> int:
        """Memory of a pass, measured to be right within a quarter with pixel norm.

        Two tensors of every block are kept for the adjoint; the features of a stage and what
        is in flight make up for three more.
        """
        floats, cell = 0.0, self.unshuffle
        for i, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            cell *= 2 if i else 1
            floats += width * (3 + 2 * blocks) / cell**2
        return round(4 * (floats + 8 * self.channels))

    @property
    def _margin(self) -> int | None:
        """The receptive radius, or ten of the coarsest cells; none with group norm, which looks
        at the whole picture.

        Influence falls with distance. For the bundled photo model at sigma 15 to 86 of 255,
        pixels beyond ten cells (160 pixels) moved no other by more than 6e-7, beyond eight 3e-6.
        For a model that never heard too low a sigma in training it was 2e-5 and 2e-4: its
        gradient is steeper.
        """
        return None if self.norm == "group" else min(self.receptive_radius, 10 * self.multiple)


class Normalised:
    """A noisy picture at unit scale, and the way back.

    z = (y - 1/2) / tau, (B, C, H', W'), padded with zeros to multiples of
    ``multiple``; sigma and tau are (B or 1, 1, 1, 1), tau^2 = sigma^2 + s0^2. Of noise that is
    not white, spectrum (B, 2 OCTAVES) and relief (B, 1, H', W') are those of `Told`.
    """

    def __init__(self, y: Tensor, sigma: Sigma, multiple: int):
        self.y = y
        self.sigma = per_sample(sigma, y).clamp_min(MIN_SIGMA)
        self.tau = (self.sigma.square() + PRIOR_STD**2).sqrt()
        z = (y - 0.5) / self.tau
        rows, columns = (-n % multiple for n in y.shape[-2:])
        pad = (0, columns, 0, rows)
        self.z = F.pad(z, pad) if any(pad) else z
        self.spectrum: Tensor | None = None
        self.relief: Tensor | None = None
        if isinstance(sigma, Told):
            self.spectrum = sigma.spectrum.to(z).flatten(1)
            self.relief = sigma.relief.to(z)
            if any(pad):
                self.relief = F.pad(self.relief, pad, mode="replicate")

    def cropped(self, g: Tensor) -> Tensor:
        """(B, C, H', W') without the padding, in the dtype of y: (B, C, H, W)."""
        return g[..., : self.y.shape[2], : self.y.shape[3]].to(self.y.dtype)

    def correction(self, g: Tensor, total: Tensor | float = 1.0) -> Tensor:
        """D_w - y = (sigma s0 / tau) g - W (sigma / tau)^2 (y - 1/2), like y.

        That is sigma^2 times the score. g: the learnt part G of it, a gradient by z,
        (B, C, H', W'). total: W = sum_c w_c, (B, 1, 1, 1).
        """
        c_learnt = self.sigma * PRIOR_STD / self.tau
        c_prior = total * (self.sigma / self.tau).square()
        return c_learnt * self.cropped(g) - c_prior * (self.y - 0.5)


def make_norm(config: NetConfig, width: int) -> nn.Module:
    """The normalisation layer that the config names."""
    if config.norm == "group":
        return GroupNorm(width, config.groups)
    return PixelNorm(width) if config.norm == "pixel" else NoNorm()


def make_blocks(config: NetConfig, width: int, count: int) -> list[nn.Module]:
    """Residual blocks: one norm, two 3x3 convolutions, one activation between them."""
    # Branches start small, so that a deep stack starts near the identity.
    small = sum(config.blocks) ** -0.5 if count else 1.0
    return [
        Residual(
            Chain(
                make_norm(config, width),
                Conv(width, width, 3, gain=2**0.5),
                Activation(config.activation),
                Conv(width, width, 3, gain=small),
            )
        )
        for _ in range(count)
    ]


class Trunk(nn.Module):
    """Encoder: noisy picture and noise level to the features of every stage.

    Below, s is the side of the folded squares, h and w are those of z over s.
    """

    def __init__(self, config: NetConfig):
        super().__init__()
        self.config = config
        extra = 2 if config.constant else 1
        self.stem = Conv(config.channels * config.unshuffle**2 + extra, config.widths[0], 3)
        stages = []
        for i, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True)):
            down = [Conv(config.widths[i - 1], width, config.down, stride=2)] if i else []
            stages.append(Chain(*down, *make_blocks(config, width, count)))
        self.stages = nn.ModuleList(stages)
        self.ears = make_ears([config.widths[0], *config.widths[:-1]], config.coloured)

    def folded(self, n: Normalised, dtype: torch.dtype | None) -> Tensor:
        """What the stem reads: squares of z as channels, then the noise level, then the ones."""
        h = F.pixel_unshuffle(n.z, self.config.unshuffle)  # (B, C s^2, h, w)
        # The noise level in the unit of z: the standard deviation of z's noise.
        level = (n.sigma / n.tau).expand(h.shape[0], 1, *h.shape[-2:])  # (B, 1, h, w)
        if n.relief is not None:
            level = level * F.avg_pool2d(n.relief, self.config.unshuffle)
        weight = self.stem.weight.dtype
        dtype = dtype or (weight if weight in HALF else h.dtype)
        extra = [level, torch.ones_like(level)] if self.config.constant else [level]
        h = torch.cat([h, *extra], 1).to(dtype)  # (B, C s^2 + 1 or 2, h, w)
        return h.contiguous(memory_format=torch.channels_last)

    def encode(self, n: Normalised, dtype: torch.dtype | None) -> Iterator[Tensor]:
        """Features of one stage after the other: no adjoint, hence less memory."""
        h: Tensor = self.stem(self.folded(n, dtype))[0]  # (B, widths[0], h, w)
        for i, stage in enumerate(self.stages):
            h = stage(heard(self.ears, i, n.spectrum, h))[0]  # (B, widths[i], h / 2^i, w / 2^i)
            yield h

    def forward(
        self, n: Normalised, dtype: torch.dtype | None
    ) -> tuple[list[Tensor], Callable[[list[Tensor | None]], Tensor]]:
        """Features of every stage, and the adjoint: a cotangent for each of them
        (None: zero) to the cotangent of z, (B, C, H', W'). It empties the list it is given."""
        h, stem_adjoint = self.stem(self.folded(n, dtype))  # (B, widths[0], h, w)
        features: list[Tensor] = []
        adjoints: list[Adjoint] = []
        for i, stage in enumerate(self.stages):
            h = heard(self.ears, i, n.spectrum, h)
            h, adjoint = stage(h)  # (B, widths[i], h / 2^i, w / 2^i)
            features.append(h)
            adjoints.append(adjoint)

        def run(cotangents: list[Tensor | None]) -> Tensor:
            g: Tensor | None = None
            while cotangents:
                cotangent = cotangents.pop()
                if g is None:
                    g = cotangent
                elif cotangent is not None:
                    g = g + cotangent
                if g is not None:
                    g = adjoints.pop()(g)  # from (B, widths[i], ...) to (B, widths[i - 1], ...)
            assert g is not None, "the last stage always has a cotangent"
            pixels = self.config.channels * self.config.unshuffle**2
            folded = stem_adjoint(g)[:, :pixels]  # (B, C s^2, h, w): no noise level, no ones
            return F.pixel_shuffle(folded.to(n.z.dtype), self.config.unshuffle)

        return features, run


class ClassHead(nn.Module):
    """Logits: norm, 1x1 convolution, activation, mean over the picture, linear map.

    The mean is taken in float32 or better, whatever the precision of the trunk.
    """

    def __init__(self, config: NetConfig):
        super().__init__()
        width = config.widths[-1]
        self.features = Chain(
            make_norm(config, width), Conv(width, config.head, 1), Activation(config.activation)
        )
        self.linear = nn.Linear(config.head, config.num_classes)
        init_normal(self.linear.weight, config.head**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h: Tensor, whole: Whole | None = None) -> tuple[Tensor, Adjoint]:
        """(B, K) logits, and the adjoint: (B, K) weights to a cotangent of h.

        whole: the picture, if h is of a part of it: a mean over the picture has a smaller
        gradient than one over the part.
        """
        top, adjoint = self.features(h)  # (B, F, h', w')
        logits = self.logits_of(top.to(stat_dtype(top)).mean((2, 3)))

        def run(w: Tensor) -> Tensor:
            count = top.shape[2] * top.shape[3] if whole is None else whole.cells
            g = (w @ self.linear.weight.to(w.dtype))[:, :, None, None] / count  # (B, F, 1, 1)
            return adjoint(g.to(top.dtype).expand_as(top))

        return logits, run

    def logits_of(self, mean: Tensor) -> Tensor:
        """(..., K) logits from mean features (..., F), as precise as the better of the mean and
        the weights."""
        weight, bias = self.linear.weight, self.linear.bias
        wide = torch.promote_types(mean.dtype, weight.dtype)
        return F.linear(mean.to(wide), weight.to(wide), bias.to(wide))


class TrunkNetwork(Network):
    """A network on a trunk."""

    def __init__(self, config: NetConfig):
        super().__init__(config.needs, config.num_classes)
        self.config = config
        self.trunk = Trunk(config)

    def normalised(self, y: Tensor, sigma: Sigma) -> Normalised:
        """What the trunk reads of a picture."""
        return Normalised(y, sigma, self.config.multiple)

    def steps(self, y: Tensor, sigma: Tensor | float) -> Iterator[tuple[str, Tensor]]:
        """The picture at unit scale, then the features of every stage: (B, C', h, w)."""
        n = self.normalised(y, sigma)
        yield "picture", n.z
        for i, h in enumerate(self.trunk.encode(n, self.compute_dtype), 1):
            yield f"stage {i}", h

    def adopted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a network whose stem lacks the channel of ones, or that has no ears, fit too:
        the new parts start at zero."""
        adopted, key = dict(weights), "trunk.stem.weight"
        if self.config.constant and key in adopted:
            stem = adopted[key]  # (widths[0], C s^2 and noise level, 3, 3)
            if stem.shape[1] == self.trunk.stem.weight.shape[1] - 1:
                adopted[key] = torch.cat([stem, torch.zeros_like(stem[:, :1])], 1)
        new = {k: v for k, v in self.state_dict().items() if ".ears." in k}
        return new | adopted


class Classifying(TrunkNetwork):
    """A network with a class head on its trunk."""

    def __init__(self, config: NetConfig):
        super().__init__(config)
        self.head = ClassHead(config)

    def steps(self, y: Tensor, sigma: Tensor | float) -> Iterator[tuple[str, Tensor]]:
        """The same, and the hidden layer of the head."""
        for name, made in super().steps(y, sigma):
            yield name, made
        yield "class features", self.head.features(made)[0]

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Hidden layer of the head, (B, F, H' / multiple, W' / multiple), like y."""
        last = deque(self.steps(y, sigma), maxlen=1)  # the others are let go
        return last.pop()[1].to(y.dtype)

    def logits_of(self, mean_features: Tensor) -> Tensor:
        """Logits, (..., K), from means of the class features, (..., F)."""
        return self.head.logits_of(mean_features)

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """l_c, (B, K)."""
        return self.logits_of(self.class_features(y, sigma).mean((2, 3)))


class Correcting(TrunkNetwork, ABC):
    """A network that denoises."""

    def correction(
        self,
        y: Tensor,
        sigma: Sigma,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c s_c(y), like y, and the logits, (B, K): see `Corrector`."""
        return self.corrected(self.normalised(y, sigma), mixture, whole)

    @abstractmethod
    def corrected(
        self, n: Normalised, mixture: Mixture, whole: Whole | None
    ) -> tuple[Tensor, Tensor]:
        """What ``correction`` gives."""
