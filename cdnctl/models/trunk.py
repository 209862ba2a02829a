"""What all architectures share: the shape of a network, its trunk and its class head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.coloured import OCTAVES, Told
from cdnctl.core.joint import per_class, per_sample
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

PRIOR_STD = 0.25  # s0: about the standard deviation of the pixels of natural images
MIN_SIGMA = 1e-4  # below this (0.03 of 255) a noise level is treated as this one

MAX_STAGES, MAX_BLOCKS = 10, 100

HALF = (torch.float16, torch.bfloat16)

Mixture = Tensor | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class NetConfig:
    """Shape of a network.

    ``widths`` and ``blocks`` give one entry per stage; each later stage works at
    half the resolution of the one before. ``unshuffle`` folds squares of that
    many pixels into channels before the first stage (1: full resolution).
    ``down`` is the kernel of the strided convolution between stages: 2 or 4.
    ``side`` is the rank of a stage's quadratic side connection as a multiple of
    its width (0: only the last stage enters the energy). ``head`` is the width
    of the hidden layer in front of the class scores. ``decoder`` gives the blocks of a
    decoder with weights of its own, one entry per stage (none: as many as ``blocks``).
    ``constant`` gives the stem a channel of ones beside the noise level: without it all
    features vanish where the picture is mid-gray and the noise low, and the gradient of
    their norm has no bound there. ``coloured`` lets every stage hear by how much the noise
    of each octave and axis of colour differs from white noise, see `core.coloured.Told`.
    """

    num_classes: int = 10
    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    unshuffle: int = 1
    norm: str = "group"
    groups: int = 8
    activation: str = "gelu"
    down: int = 4
    side: float = 1.0
    head: int = 512
    decoder: tuple[int, ...] = ()
    constant: bool = False
    coloured: bool = False

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
    def whole(self) -> bool:
        """Whether a picture must be seen as a whole: group norm looks at all of it."""
        return self.norm == "group"

    @property
    def bytes_per_pixel(self) -> int:
        """About what a pass takes of memory per pixel of a tile, in float32.

        Two tensors of every block are kept for the adjoint; the features of a stage and what
        is in flight make up for three more. Measured within a quarter of it with pixel norm.
        """
        floats, cell = 0.0, self.unshuffle
        for i, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            cell *= 2 if i else 1
            floats += width * (3 + 2 * blocks) / cell**2
        return round(4 * (floats + 8 * self.channels))

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
    def margin(self) -> int:
        """Margin of tiles in pixels: the receptive radius, or ten of the coarsest cells.

        Influence falls with distance. For the bundled photo model at sigma 15 to 86 of 255,
        what lies beyond ten cells (160 pixels) moved no pixel by more than 6e-7, beyond
        eight 3e-6. For one that had never been told too little noise in training it was
        2e-5 and 2e-4: its gradient is steeper.
        """
        return min(self.receptive_radius, 10 * self.multiple)


class Normalised:
    """A noisy picture at unit scale, and the way back.

    z = (y - 1/2) / tau, (B, C, H', W'), padded with zeros to multiples of
    ``multiple``; sigma and tau are (B or 1, 1, 1, 1). Of noise that is not white, the spectrum
    (B, 2 OCTAVES) and the relief (B, 1, H', W') of `Told` come along.
    """

    def __init__(self, y: Tensor, sigma: Tensor | float | Told, multiple: int):
        self.y = y
        told = sigma if isinstance(sigma, Told) else None
        level = told.sigma if told is not None else sigma
        assert not isinstance(level, Told)
        self.sigma = per_sample(level, y).clamp_min(MIN_SIGMA)
        self.tau = (self.sigma.square() + PRIOR_STD**2).sqrt()
        z = (y - 0.5) / self.tau
        pad = [-n % multiple for n in y.shape[-2:]]
        pad = [0, pad[1], 0, pad[0]]
        self.z = F.pad(z, pad) if any(pad) else z
        self.spectrum = self.relief = None
        if told is not None:
            self.spectrum = told.spectrum.to(z).flatten(1)
            self.relief = told.relief.to(z)
            if any(pad):
                self.relief = F.pad(self.relief, pad, mode="replicate")

    def correction(self, g: Tensor, total: Tensor | float = 1.0) -> Tensor:
        """sigma^2 score, like y, where the score's learnt part is g = grad_z(...) at unit scale."""
        g = g[..., : self.y.shape[2], : self.y.shape[3]].to(self.y.dtype)
        prior = total * (self.sigma / self.tau).square() * (self.y - 0.5)
        return (self.sigma * PRIOR_STD / self.tau) * g - prior


class Whole(NamedTuple):
    """The picture that a tile is part of: a tile's own class scores are not those of it."""

    cells: int  # positions of the last stage
    posterior: Tensor  # p(c | picture), (K,)


def posterior_of(logits: Tensor, whole: Whole | None) -> Tensor:
    """p(c | picture), (B, K), by the class scores of it, or of the picture that these are from."""
    return logits.softmax(1) if whole is None else per_class(whole.posterior, logits)


def resolved(mixture: Mixture, logits: Tensor, whole: Whole | None) -> Tensor:
    """Class weights (B, K): given, computed from the class scores, or the posterior."""
    if mixture is None:
        return posterior_of(logits, whole)
    return per_class(mixture(logits) if callable(mixture) else mixture, logits)


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


def make_ears(config: NetConfig, widths: Sequence[int]) -> nn.ModuleList:
    """For each stage a linear map of the spectrum to its channels; none for deaf networks.

    They start at zero: a network that was trained on white noise stays what it is.
    """
    ears = [nn.Linear(2 * OCTAVES, width, bias=False) for width in widths if config.coloured]
    for ear in ears:
        nn.init.zeros_(ear.weight)
    return nn.ModuleList(ears)


def heard(ears: nn.ModuleList, stage: int, n: Normalised, h: Tensor) -> Tensor:
    """Features (B, C, h, w) of a stage moved by what it hears of the noise's spectrum: not at all
    if that is white. It does not depend on z, so the adjoint is the identity."""
    if n.spectrum is None or not len(ears):
        return h
    shift: Tensor = ears[stage](n.spectrum.to(ears[stage].weight.dtype))
    return h + shift.to(h.dtype)[:, :, None, None]


class Trunk(nn.Module):
    """Encoder: noisy picture and noise level to the features of every stage."""

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
        self.ears = make_ears(config, [config.widths[0], *config.widths[:-1]])

    def folded(self, n: Normalised, dtype: torch.dtype | None) -> Tensor:
        """What the stem reads: squares of z as channels, then the noise level, then the ones."""
        h = F.pixel_unshuffle(n.z, self.config.unshuffle)
        # The noise level in the unit of z: the standard deviation of z's noise.
        level = (n.sigma / n.tau).expand(h.shape[0], 1, *h.shape[-2:])
        if n.relief is not None:
            level = level * F.avg_pool2d(n.relief, self.config.unshuffle)
        weight = self.stem.weight.dtype
        dtype = dtype or (weight if weight in HALF else h.dtype)
        extra = [level, torch.ones_like(level)] if self.config.constant else [level]
        h = torch.cat([h, *extra], 1).to(dtype)
        return h.contiguous(memory_format=torch.channels_last)

    def encode(self, n: Normalised, dtype: torch.dtype | None) -> Iterator[Tensor]:
        """Features of one stage after the other: no adjoint, hence less memory."""
        h: Tensor = self.stem(self.folded(n, dtype))[0]
        for i, stage in enumerate(self.stages):
            h = stage(heard(self.ears, i, n, h))[0]
            yield h

    def forward(
        self, n: Normalised, dtype: torch.dtype | None
    ) -> tuple[list[Tensor], Callable[[list[Tensor | None]], Tensor]]:
        """Features of every stage, and the adjoint: a cotangent for each of them
        (None: zero) to the cotangent of z, (B, C, H', W'). It empties the list it is given."""
        h, stem_adjoint = self.stem(self.folded(n, dtype))
        features: list[Tensor] = []
        adjoints: list[Adjoint] = []
        for i, stage in enumerate(self.stages):
            h, adjoint = stage(heard(self.ears, i, n, h))
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
                    g = adjoints.pop()(g)
            assert g is not None, "the last stage always has a cotangent"
            pixels = self.config.channels * self.config.unshuffle**2
            folded = stem_adjoint(g)[:, :pixels]  # not the noise level, nor the ones
            return F.pixel_shuffle(folded.to(n.z.dtype), self.config.unshuffle)

        return features, run


class ClassHead(nn.Module):
    """Class scores: norm, 1x1 convolution, activation, mean over the picture, linear map.

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
        """(B, K) class scores, and the adjoint: (B, K) weights to a cotangent of h.

        whole: the picture, if h is of a part of it: a mean over the picture has a smaller
        gradient than one over the part.
        """
        top, adjoint = self.features(h)
        logits = self.scores(top.to(stat_dtype(top)).mean((2, 3)))

        def run(w: Tensor) -> Tensor:
            count = top.shape[2] * top.shape[3] if whole is None else whole.cells
            g = (w @ self.linear.weight.to(w.dtype))[:, :, None, None] / count
            return adjoint(g.to(top.dtype).expand_as(top))

        return logits, run

    def scores(self, mean: Tensor) -> Tensor:
        """(B, K) class scores of the mean features (B, F), as precise as the better of the
        mean and the weights."""
        weight, bias = self.linear.weight, self.linear.bias
        wide = torch.promote_types(mean.dtype, weight.dtype)
        return F.linear(mean.to(wide), weight.to(wide), bias.to(wide))


class Network(nn.Module):
    """What every architecture offers: a correction towards the clean picture, and class scores.

    ``compute_dtype`` is the precision of the trunk (None: that of weights in half
    precision, else that of the input); the input, the output, the class scores and
    energies stay at the input's.
    """

    denoises: ClassVar[bool] = True
    classifies: ClassVar[bool] = True
    # Whether the score of p(y) itself passes through p(c | y): then a tile needs the class
    # scores of its whole picture.
    mixes: ClassVar[bool] = True

    def __init__(self, config: NetConfig):
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.compute_dtype: torch.dtype | None = None
        self.trunk = Trunk(config)
        self.head = ClassHead(config)

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c s_c(y), like y, and the class scores l_c, (B, K), in one pass.

        y: (B, C, H, W) in [0, 1] plus noise. sigma: float or (B,), in [0, 1] pixel
        units. mixture: weights w of class-conditional scores, (B, K) or (K,), or a
        function that gives them from the class scores (None: the posterior, which
        gives the unconditional score). whole: for a tile, the picture that it is part of.
        """
        raise TypeError(f"{type(self).__name__} does not define its correction")

    def forward(
        self, y: Tensor, sigma: Tensor | float, mixture: Mixture = None
    ) -> tuple[Tensor, Tensor]:
        """y + sigma^2 sum_c w_c s_c(y) (Tweedie's formula), like y, and the class scores."""
        correction, logits = self.correction(y, sigma, mixture)
        return y + correction, logits

    def score(self, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None) -> Tensor:
        """sum_c w_c s_c(y), like y, without autograd."""
        variance = per_sample(sigma, y).clamp_min(MIN_SIGMA).square()
        return self.correction(y, sigma, mixture)[0] / variance

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """What the class scores are a linear map of, after a mean over positions: (B, F, h, w)."""
        n = Normalised(y, sigma, self.config.multiple)
        for features in self.trunk.encode(n, self.compute_dtype):
            last = features
        top: Tensor = self.head.features(last)[0]
        return top.to(y.dtype)

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Class scores l_c, (B, K): log p(c | y) up to a function of y.

        They are exact where the joint density is not: beside its energy, of the order of
        1 / sigma^2, the differences between classes drown in rounding.
        """
        return self.head.scores(self.class_features(y, sigma).mean((2, 3)))
