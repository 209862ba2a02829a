"""Residual networks on one trunk: the encoder, the class head, what they denoise with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.coloured import OCTAVES, Told
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
from cdnctl.models.config import NetConfig
from cdnctl.models.network import Mixture, Network, Whole

PRIOR_STD = 0.25  # s0: about the standard deviation of the pixels of natural images

HALF = (torch.float16, torch.bfloat16)


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


def make_ears(config: NetConfig, widths: Sequence[int]) -> nn.ModuleList:
    """For each stage a linear map of the noise's spectrum to its channels; none for networks that
    are not ``coloured``.

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
    weight = ears[stage].weight
    assert isinstance(weight, Tensor)
    shift = F.linear(n.spectrum.to(weight.dtype), weight)  # (B, C)
    return h + shift.to(h.dtype)[:, :, None, None]


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
        self.ears = make_ears(config, [config.widths[0], *config.widths[:-1]])

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
            h = stage(heard(self.ears, i, n, h))[0]  # (B, widths[i], h / 2^i, w / 2^i)
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
            h, adjoint = stage(heard(self.ears, i, n, h))  # (B, widths[i], h / 2^i, w / 2^i)
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

    def adopted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a network without a channel of ones in its stem, or without ears, too: what is new
        has no weight at first."""
        adopted, key = dict(weights), "trunk.stem.weight"
        if self.config.constant and key in adopted:
            stem = adopted[key]  # (widths[0], C s^2 and noise level, 3, 3)
            if stem.shape[1] == self.trunk.stem.weight.shape[1] - 1:
                adopted[key] = torch.cat([stem, torch.zeros_like(stem[:, :1])], 1)
        new = {k: v for k, v in self.state_dict().items() if ".ears." in k}
        adopted = new | adopted
        return adopted


class Classifying(TrunkNetwork):
    """A network with a class head on its trunk."""

    def __init__(self, config: NetConfig):
        super().__init__(config)
        self.head = ClassHead(config)

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Hidden layer of the head, (B, F, H' / multiple, W' / multiple), like y."""
        for features in self.trunk.encode(self.normalised(y, sigma), self.compute_dtype):
            last = features  # the others are let go
        top: Tensor = self.head.features(last)[0]
        return top.to(y.dtype)

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
