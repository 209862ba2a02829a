"""A model as the denoiser of whole pictures, for what denoises one again and again.

The picture and what is computed of it stay in memory as a whole; only the network, which takes
most, sees tiles. As tiles equal the whole, nothing that is built on it knows of them: an operator
may look as far as it likes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.joint import HasClassFeatures, HasPosterior, Whole
from cdnctl.core.mirror import mirrored
from cdnctl.errors import ImageError
from cdnctl.restore import tiles
from cdnctl.restore.view import check_channels, plan_tiles
from cdnctl.runtime import available_memory

# Float32 numbers per value of a picture that a solver keeps at a time: the picture, its
# measurement, the vectors of conjugate gradients, and their Fourier transforms.
HELD = 24
FLOAT_BYTES = 4


class Prior:
    """The denoiser D(y, sigma) of pictures (B, C, height, width), a `core.joint.Denoiser`.

    C is that of the model, or 1: gray noise is one channel's, repeated, see `View`. mixture: of
    classes, (K,), for E[x | y, c]; None: all. tile, memory: as of `View`. ImageError where
    memory does not suffice.
    """

    def __init__(
        self,
        model: Model,
        shape: tuple[int, int, int],
        mixture: Tensor | None = None,
        *,
        tile: int | None = None,
        memory: int | None = None,
    ):
        """shape: C, height, width."""
        channels, self.height, self.width = shape
        needs = model.needs
        model.corrector()
        check_channels(model, channels)
        self.model = model
        self.repeat = needs.channels if channels == 1 else 1
        self.mixture = None if mixture is None else mixture.to(model.device)
        held = HELD * FLOAT_BYTES * channels * self.height * self.width
        limit = available_memory(model.device) // 2 if memory is None else memory
        if held > limit:
            given = "half of what is free" if memory is None else "--memory"
            raise ImageError(
                f"{self.width} x {self.height} pixels, which are worked on as a whole, take "
                f"{held / 1e6:.0f} MB, but {given} is {limit / 1e6:.0f} MB: allow more with "
                "--memory, or cut the picture into parts"
            )
        rest = None if memory is None else memory - held
        extended = tuple(n + -n % needs.multiple for n in (self.height, self.width))
        self.tiles = plan_tiles(model, extended[0], extended[1], tile, rest)
        self.cells = extended[0] * extended[1] // needs.multiple**2

    @property
    def highest(self) -> float:
        """The highest noise level that the model knows, in the unit of pixels."""
        return self.model.sigma_range[1] / self.repeat**0.5

    def __call__(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """E[x | y], like y; differentiable, if it is one tile."""
        told = sigma * self.repeat**0.5
        extended = mirrored(y, self.model.needs.multiple)
        if len(self.tiles) == 1:
            out = self._pass(extended, told, None)
        else:
            whole = self._whole(extended, told)
            out = torch.empty_like(extended)
            for tile in self.tiles:
                part = self._pass(extended[(..., *tile.read)], told, whole)
                out[(..., *tile.place)] = part[(..., *tile.core)]
        return out[..., : self.height, : self.width]

    def _pass(self, y: Tensor, told: Tensor | float, whole: Whole | None) -> Tensor:
        wide = y.repeat(1, self.repeat, 1, 1)
        correction, _ = self.model.corrector().correction(wide, told, self.mixture, whole)
        return y + (correction.mean(1, keepdim=True) if self.repeat > 1 else correction)

    @torch.no_grad()
    def _whole(self, y: Tensor, told: Tensor | float) -> Whole | None:
        """What the network must know of the picture to work on a tile of it."""
        network, needs = self.model.module, self.model.needs
        if not isinstance(network, HasPosterior) or (self.mixture is None and not needs.posterior):
            return None
        assert isinstance(network, HasClassFeatures), "others see whole pictures only"
        mean = tiles.mean_of_cells(
            lambda t: network.class_features(t.repeat(1, self.repeat, 1, 1), told),
            lambda box: y[(0, slice(None), *box)],
            self.tiles,
            y.device,
            needs.multiple,
        )
        logits = network.logits_of(mean.float().to(y.device))
        return Whole(self.cells, logits.softmax(0))
