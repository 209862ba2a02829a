"""Classifiers with fixed filters in space: what is learnt mixes channels, pixel by pixel.

A layer: x -> W x, with fixed wavelets or other filters -> rho, which collapses phases or keeps
them -> standardised channels -> a learnt 1x1 map P -> division of every pixel by the norm of its
channels, or a rectifier -> where wanted, shrinkage in a learnt tight frame.

- ``rho`` = modulus or skip: phase collapse networks (Guth, Zarka and Mallat 2022,
  arXiv 2110.05283); soft instead keeps the phase, and hardly classifies.
- ``rho`` = phases, ``frames`` > 0: separation and concentration (Zarka, Guth and Mallat 2021,
  arXiv 2012.10424).
- ``bank`` = spatial, ``after`` = relu: networks of factorised convolutions (Guth and Menard 2024).
- ``FixedScattering``: scattering coefficients, with hardly anything learnt but the linear map.

The noise level only sets the unit: z = (y - 1/2) / sqrt(sigma^2 + 1/16).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.joint import per_sample
from cdnctl.models.channels import ChannelMap, Channels, Standardise, channel_norm
from cdnctl.models.frames import TightFrame, parseval
from cdnctl.models.network import Needs, Network
from cdnctl.transforms import scattering as waves

PIXEL_STD = 0.25  # about the standard deviation of the pixels of natural images
MAX_LAYERS, MAX_WIDTH, MAX_ANGLES, MAX_OCTAVES = 20, 8192, 16, 6


def _check_counts(name: str, values: tuple[int, ...], least: int, most: int) -> None:
    if min(values) < least or max(values) > most:
        raise ValueError(f"{name} must be from {least} to {most}, not {values}")


@dataclass(frozen=True)
class ScatteringConfig:
    """Shape of a network of fixed filters and learnt channels.

    ``widths``: channels behind each layer; complex ones if ``maps`` is complex. ``bank``:
    octave (Morlet wavelets, every layer halves the resolution), half (every second one does,
    with filters half an octave apart) or spatial (3x3 filters, every layer halves).
    ``angles``: wavelets per layer. ``rho``: modulus, skip (the modulus, and the coefficients as
    they are), soft (a soft threshold of amplitudes, ``threshold`` in units of the root mean
    square of the layer's input), or phases (rectified real and imaginary parts, of both signs).
    All but a spatial bank's low-pass go by rho. ``after``: norm (division by the norm of the
    channels) or relu (a rectifier, then standardised channels). ``frames``: atoms per channel
    of the tight frame at the end of each layer (0: none), ``shrink`` its threshold in units of
    a coefficient's root mean square, ``rectify`` the sign of rho there. ``cells``: the class
    scores look at means over so many times so many parts of the picture.
    """

    num_classes: int = 10
    channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128, 128)
    bank: str = "half"
    angles: int = 4
    rho: str = "modulus"
    threshold: float = 0.1
    maps: str = "complex"
    after: str = "norm"
    frames: int = 0
    shrink: float = 1.5
    rectify: bool = False
    cells: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (
            ("bank", self.bank, ("octave", "half", "spatial")),
            ("rho", self.rho, ("modulus", "skip", "soft", "phases")),
            ("maps", self.maps, ("complex", "real")),
            ("after", self.after, ("norm", "relu")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, but must be one of {known}")
        if not 1 <= len(self.widths) <= MAX_LAYERS:
            raise ValueError(f"widths {self.widths} need 1 to {MAX_LAYERS} entries, one per layer")
        sizes = (self.num_classes, self.channels, self.cells, *self.widths)
        _check_counts("num_classes, channels, cells and widths", sizes, 1, MAX_WIDTH)
        _check_counts("angles", (self.angles,), 3, MAX_ANGLES)
        _check_counts("frames", (self.frames,), 0, 64)
        for name, number in (("threshold", self.threshold), ("shrink", self.shrink)):
            if not 0 <= number < inf:
                raise ValueError(f"{name} must be a number from 0 upwards, not {number!r}")
        if self.bank == "spatial" and (self.rho, self.maps) != ("phases", "real"):
            raise ValueError(
                f"bank 'spatial' needs rho 'phases' and maps 'real', not {self.rho!r} and "
                f"{self.maps!r}: its coefficients are real"
            )
        for name, wanted in (("frames", self.frames > 0), ("after 'relu'", self.after == "relu")):
            if wanted and self.maps == "complex":
                raise ValueError(f"{name} needs maps 'real', not {self.maps!r}")

    @property
    def multiple(self) -> int:
        """Sides that are multiples of this number need no padding."""
        halved = len(self.widths) // 2 if self.bank == "half" else len(self.widths)
        return 2**halved

    @property
    def bytes_per_pixel(self) -> int:
        """About what a pass takes of memory per pixel of the picture, in float32: the widest
        layer, whose coefficients are there as spectra, as complex numbers and after rho."""
        most, width, cell = 0.0, self.channels, 1
        for i, following in enumerate(self.widths):
            coefficients = width * (1 + self.angles) / cell**2
            cell *= 1 if self.bank == "half" and i % 2 == 0 else 2
            behind = following * (2 + 2 * self.frames) + 4 * width * (1 + self.angles)
            most, width = max(most, 2 * coefficients + behind / cell**2), following
        return round(4 * (2 * most + 8 * self.channels))


@dataclass(frozen=True)
class FixedConfig:
    """Shape of a linear classifier on scattering coefficients.

    ``octaves`` J: the coefficients are means over 2^J pixels; ``angles`` per octave; ``order``
    1 or 2; ``project``: channels that a learnt 1x1 map leaves of the coefficients (0: all,
    without a map). ``cells``: as in ``ScatteringConfig``.
    """

    num_classes: int = 10
    channels: int = 3
    octaves: int = 3
    angles: int = 8
    order: int = 2
    project: int = 0
    cells: int = 4

    def __post_init__(self) -> None:
        sizes = (self.num_classes, self.channels, self.cells)
        _check_counts("num_classes, channels and cells", sizes, 1, MAX_WIDTH)
        _check_counts("angles", (self.angles,), 3, MAX_ANGLES)
        _check_counts("octaves", (self.octaves,), 1, MAX_OCTAVES)
        _check_counts("order", (self.order,), 1, 2)
        _check_counts("project", (self.project,), 0, MAX_WIDTH)

    @property
    def paths(self) -> int:
        """Coefficients per channel and position."""
        j, angles = self.octaves, self.angles
        second = j * (j - 1) // 2 * angles**2 if self.order == 2 else 0
        return 1 + j * angles + second

    @property
    def multiple(self) -> int:
        """Sides that are multiples of this number need no padding."""
        return int(2**self.octaves)

    @property
    def bytes_per_pixel(self) -> int:
        """About what a pass takes of memory per pixel of the picture, in float32."""
        return round(4 * self.channels * (8 + 6 * self.angles * (1 + self.angles / 4)))


class Layer(nn.Module):
    """Fixed filters, rho, standardisation, a learnt map, and what comes after it."""

    def __init__(self, config: ScatteringConfig, index: int, inside: Channels):
        super().__init__()
        width = config.widths[index]
        self.config, self.inside = config, inside
        self.kind, self.stride = config.bank, 2
        if config.bank == "half":
            self.kind, self.stride = ("half", 1) if index % 2 == 0 else ("second-half", 2)
        complex_ = config.maps == "complex"
        self.outside = Channels(0, width) if complex_ else Channels(width)
        found = self._found()
        self.standard = Standardise(found if complex_ else found.parts())
        self.map = ChannelMap(found, width, complex_, gaussian=config.after == "relu")
        self.after = Standardise(self.outside) if config.after == "relu" else None
        self.frame = (
            TightFrame(width, config.frames, config.shrink, config.rectify)
            if config.frames
            else None
        )

    def _found(self) -> Channels:
        """What rho gives."""
        config = self.config
        width = sum(self.inside)  # at once real or complex
        low = Channels(0, width) if self.inside.complexes else Channels(width)
        if config.bank == "spatial":
            return Channels(2 * len(waves.SPATIAL) * width)
        bands = width * config.angles
        reals = {"modulus": bands, "skip": bands, "soft": 0, "phases": 4 * bands}[config.rho]
        kept = bands if config.rho in ("skip", "soft") else 0
        return Channels(low.reals + reals, low.complexes + kept)

    def coefficients(self, x: Tensor) -> Tensor:
        """rho of the filtered channels: (B, C, H, W) to (B, C', H / stride, W / stride)."""
        config = self.config
        z = torch.complex(*x.chunk(2, 1)) if self.inside.complexes else x
        bank = waves.bank(self.kind, *x.shape[-2:], config.angles, x.dtype, x.device)
        filters = torch.cat([bank.low[None].to(bank.bands.dtype), bank.bands])
        found = waves.convolve(z, filters, self.stride)
        if config.bank == "spatial":
            real = found.real.flatten(1, 2)
            return torch.cat([real, -real], 1).relu()
        low, bands = found[:, :, 0], found[:, :, 1:]
        reals, complexes = ([], [low]) if self.inside.complexes else ([low.real], [])
        if config.rho in ("modulus", "skip"):
            reals.append(waves.modulus(bands).flatten(1, 2))
        if config.rho == "skip":
            complexes.append(bands.flatten(1, 2))
        if config.rho == "soft":
            complexes.append(waves.soft_threshold(bands, config.threshold).flatten(1, 2))
        if config.rho == "phases":
            reals.append(waves.phases(bands).flatten(1, 3))
        return torch.cat([*reals, *(c.real for c in complexes), *(c.imag for c in complexes)], 1)

    def steps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What comes out of each part, by its name; the last one is the layer's output."""
        x = self.standard(self.coefficients(x))
        yield "filters", x
        x = self.map(x)
        yield "map", x
        x = self.normed(x)
        yield "norm", x
        if self.frame is not None:
            yield "frame", self.frame(x)

    def normed(self, x: Tensor) -> Tensor:
        """Behind the map, (B, C, H, W) to the same: every pixel over its norm, or rectified."""
        if self.after is None:
            return channel_norm(x, self.outside)
        found: Tensor = self.after(x.relu())
        return found

    @torch.no_grad()
    def after_step(self) -> None:
        """Frame and map back towards tight ones, as published for them together."""
        if self.frame is not None:
            self.frame.after_step()
            self.map.weight.copy_(parseval(self.map.weight))


class Layers(nn.Module):
    """One layer after the other."""

    def __init__(self, config: ScatteringConfig):
        super().__init__()
        self.outside = Channels(config.channels)
        layers = []
        for i in range(len(config.widths)):
            layers.append(Layer(config, i, self.outside))
            self.outside = layers[-1].outside
        self.layers = nn.ModuleList(layers)

    def steps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What comes out of every part of every layer, as '1 filters', '1 map' and so on."""
        for i, layer in enumerate(self.stack(), 1):
            for name, made in layer.steps(x):
                yield f"{i} {name}", made
            x = made

    def stack(self) -> list[Layer]:
        """The layers, from the picture upwards."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def after_step(self) -> None:
        """To be called after every step of the optimiser."""
        for layer in self.stack():
            layer.after_step()


class Coefficients(nn.Module):
    """Scattering coefficients, standardised, and a learnt map where one is wanted."""

    def __init__(self, config: FixedConfig):
        super().__init__()
        self.config = config
        self.outside = Channels(config.channels * config.paths)
        self.standard = Standardise(self.outside)
        self.map = None
        if config.project:
            self.map = ChannelMap(self.outside, config.project, complex_=False)
            self.outside = Channels(config.project)

    def steps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The coefficients, then the map of them."""
        config = self.config
        x = waves.scattering(x, config.octaves, config.angles, config.order).flatten(1, 2)
        x = self.standard(x)
        yield "scattering", x
        if self.map is not None:
            x = self.map(x)
            yield "map", x

    def after_step(self) -> None:
        """Nothing: there is no frame."""


class LinearHead(nn.Module):
    """Standardised channels, their means over the picture or parts of it, and a linear map."""

    def __init__(self, channels: Channels, cells: int, num_classes: int):
        super().__init__()
        self.cells = cells
        self.standard = Standardise(channels)
        self.linear = nn.Linear(channels.total * cells**2, num_classes)
        if not self.linear.weight.is_meta:
            nn.init.normal_(self.linear.weight, std=self.linear.in_features**-0.5)
        nn.init.zeros_(self.linear.bias)

    def features(self, x: Tensor) -> Tensor:
        """What the scores are a linear map of, after a mean over positions: (B, F, h, w), or
        (B, F, 1, 1) where the means over the parts of the picture are channels."""
        x = self.standard(x)
        return (
            x
            if self.cells == 1
            else F.adaptive_avg_pool2d(x, self.cells).flatten(1)[..., None, None]
        )

    def scores(self, mean: Tensor) -> Tensor:
        """(B, K) class scores of the mean features (B, F)."""
        return F.linear(mean, self.linear.weight.to(mean), self.linear.bias.to(mean))


class FixedFilters(Network):
    """A classifier on what comes out of ``trunk``; it knows nothing of densities.

    It sees pictures as a whole: convolutions go round them.
    """

    def __init__(self, config: ScatteringConfig | FixedConfig, trunk: Layers | Coefficients):
        needs = Needs(config.channels, config.bytes_per_pixel, config.multiple)
        super().__init__(needs, config.num_classes)
        self.config, self.trunk = config, trunk
        self.head = LinearHead(trunk.outside, config.cells, config.num_classes)

    def picture(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """What the first layer reads: y in the unit of its spread, filled up to whole cells."""
        wide = y.to(torch.promote_types(y.dtype, torch.float32))  # FFTs know no half precision
        tau = (per_sample(sigma, wide).square() + PIXEL_STD**2).sqrt()
        x = (wide - 0.5) / tau
        down, right = (-n % self.config.multiple for n in y.shape[-2:])
        return F.pad(x, (0, right, 0, down)) if down or right else x

    def steps(self, y: Tensor, sigma: Tensor | float) -> Iterator[tuple[str, Tensor]]:
        """Pictures (B, C, H, W) in [0, 1] plus noise of standard deviation sigma, in the same
        unit, layer by layer: names and tensors (B, C', h, w), the class features last."""
        x = self.picture(y, sigma)
        yield "picture", x
        for name, made in self.trunk.steps(x):
            yield name, made
        yield "class features", self.head.features(made)

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Class scores, (B, K): log p(c | y) up to a function of y."""
        *_, (_, features) = self.steps(y, sigma)
        return self.head.scores(features.mean((2, 3))).to(y.dtype)

    @property
    def undecayed(self) -> frozenset[str]:
        """Frames, and the maps in front of them: Parseval steps keep their size."""
        layers = [(f"{k}.", m) for k, m in self.named_modules() if isinstance(m, Layer)]
        return frozenset(
            name + part
            for name, layer in layers
            if layer.frame is not None
            for part in ("frame.atoms", "map.weight")
        )

    def after_step(self) -> None:
        """A Parseval step of frames."""
        self.trunk.after_step()


class Scattering(FixedFilters):
    """Layers of fixed filters and learnt channels."""

    config: ScatteringConfig
    trunk: Layers

    def __init__(self, config: ScatteringConfig):
        super().__init__(config, Layers(config))


class FixedScattering(FixedFilters):
    """A linear classifier on scattering coefficients."""

    def __init__(self, config: FixedConfig):
        super().__init__(config, Coefficients(config))
