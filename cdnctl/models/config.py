"""The shape of residual networks on a trunk."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from cdnctl.models.network import Needs

MAX_STAGES, MAX_BLOCKS = 10, 100


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
        return Needs(self.channels, self._bytes_per_pixel, self.multiple, self._margin)

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
