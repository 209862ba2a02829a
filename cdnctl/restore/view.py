"""A picture as the network sees it, in tiles that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.coloured import Told, local_tone, said
from cdnctl.core.guard import held_back, held_to
from cdnctl.core.joint import HasClassFeatures, HasPosterior, Mixture, Sigma, Whole
from cdnctl.core.mirror import reflected
from cdnctl.errors import ImageError
from cdnctl.restore import tiles
from cdnctl.restore.levels import Level
from cdnctl.restore.noise import Noise
from cdnctl.restore.samples import is_gray, sample_step
from cdnctl.runtime import available_memory

# A tile of this many pixels a side needs 0.8 GB with the photo model, so that 100 megapixels,
# which need 0.6 GB themselves, stay below 2. Larger ones overlap less and take less time.
DEFAULT_TILE = 1344
MIN_TILE = 256
# A gradient multiplies the memory by this factor, because the network keeps its features for it:
# measured 3.3 to 5.5 with the bundled models.
GRADIENT = 6
EXCESS = 1.25  # most by which a change may exceed the noise that was measured

T = TypeVar("T")


class View:
    """A picture as the network sees it: in planned tiles, made from samples as they are needed.

    samples: (H, W, C) of any dtype, which stay on the host as they are.
    tile: no tile has more than tile x tile pixels; None: as large as ``memory``, in bytes,
    allows, see `default_tile`. gradient: whether gradients through the network are wanted,
    which take more. watch: called now and then with the share of the work that is done. logits:
    class scores of the whole picture, (K,), if they are known.

    ImageError if ``memory`` is too small for the smallest useful tiles, unless ``tile`` sets their
    size.

    Grayscale pictures are repeated over the network's channels. Their noise is then
    the same in all of them, so it lies on the gray axis alone, where it is sqrt(C)
    times as strong as in one channel: the network hears ``told``, which is sigma
    times that factor, the noise level at which it would see as much noise on that axis.
    A picture whose channels are all equal, but for rounding, is grayscale, too: many files
    hold gray as RGB.
    """

    def __init__(
        self,
        model: Model,
        samples: np.ndarray,
        level: Level | float,
        tile: int | None = None,
        *,
        memory: int | None = None,
        gradient: bool = False,
        watch: Callable[[float], None] = lambda share: None,
        logits: Tensor | None = None,
    ):
        needs = model.needs
        self.model = model
        self.level = level if isinstance(level, Level) else Level(level)
        self.sigma = self.level.sigma
        self.samples, self.tile, self.memory = samples, tile, memory
        self.height, self.width, self.channels = samples.shape
        gray = is_gray(samples)
        self.pixels = samples[:, :, :1] if gray else samples
        if not gray:
            check_channels(model, self.channels)
        self.repeat = needs.channels if gray else 1
        self.told = self.sigma * self.repeat**0.5
        # Told of its octaves, colours and tones, the level is that of a pixel, not of an octave.
        noise = self.level.noise
        self.coloured = needs.coloured and noise is not None and noise.camera and not gray
        if self.coloured and noise is not None:
            self.sigma = self.told = noise.heard
        # Extended by mirroring to what the network works on: whole cells.
        height, width = (n + -n % needs.multiple for n in (self.height, self.width))
        self.tiles = plan_tiles(model, height, width, tile, memory, gradient)
        self.cells = height * width // needs.multiple**2
        self.watch, self._done, self._passes = watch, 0, 1
        self._logits = logits
        self._held = self._covered = 0  # pixels of tiles: held back, and all

    @property
    def area(self) -> int:
        """Pixels of a tile with its margins."""
        return _area(self.tiles[0])

    def read(self, box: tiles.Box) -> Tensor:
        """Rows and columns of the extended picture: (C, h, w), float32 on the host."""
        block = self.pixels
        for axis, (part, size) in enumerate(zip(box, (self.height, self.width), strict=True)):
            if part.stop > size:
                index = reflected(part.start, part.stop, size)
                block = np.take(block, index, axis)
            else:
                block = block[part] if axis == 0 else block[:, part]
        return torch.from_numpy(np.ascontiguousarray(images.to_unit(block).transpose(2, 0, 1)))

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Class scores of the whole picture, (K,); zeros if the model does not classify."""
        network = self.model.module
        if not isinstance(network, HasPosterior):
            return torch.zeros(network.num_classes)
        if self._logits is None:
            self._passes = 2 if len(self.tiles) > 1 else 1  # this one, and that of the pixels
            if isinstance(network, HasClassFeatures):
                self._logits = self._by_features(network)
            else:
                y = self.read(self.tiles[0].read)[None].to(self.model.device)
                found = self._counted(lambda y: network.logits(self.repeated(y), self.told))(y)
                self._logits = found[0].cpu()
        return self._logits

    def _by_features(self, network: HasClassFeatures) -> Tensor:
        """Class scores, (K,), from the mean of the class features over all tiles."""
        mean = tiles.mean_of_cells(
            self._counted(lambda y: network.class_features(self.repeated(y), self.told)),
            self.read,
            self.tiles,
            self.model.device,
            self.model.needs.multiple,
        )
        return network.logits_of(mean.float().to(self.model.device)).cpu()

    def whole(self, mixture: Mixture) -> Whole | None:
        """What the network must know of the picture to work on a tile of it."""
        if len(self.tiles) == 1 or (mixture is None and not self.model.needs.posterior):
            return None
        return Whole(self.cells, self.logits().softmax(0).to(self.model.device))

    def hears(self, y: Tensor) -> Sigma:
        """What the network is told of the noise of tiles y, (B, C, h, w)."""
        noise = self.level.noise
        if not self.coloured or noise is None:
            return self.told
        levels = torch.tensor(noise.octaves / noise.sigma, dtype=torch.float32)
        chroma = levels[1:].square().mean(0).sqrt()
        spectrum = said(torch.stack([levels[0], chroma])).to(y)
        relief = _relative(noise, local_tone(y.detach()))
        return Told(y.new_full((len(y),), self.sigma), spectrum.expand(len(y), -1, -1), relief)

    def repeated(self, y: Tensor) -> Tensor:
        """(B, C, h, w) of the picture with the network's number of channels."""
        return y.repeat(1, self.repeat, 1, 1)

    def averaged(self, correction: Tensor) -> Tensor:
        """(B, C, h, w) from the network with the picture's number of channels."""
        return correction.mean(1, keepdim=True) if self.repeat > 1 else correction

    def accepted(self, y: Tensor, correction: Tensor) -> Tensor:
        """What the network says of tiles y, (B, C, h, w), within what their noise allows."""
        correction = self.averaged(correction)
        noise = self.level.noise
        if noise is not None:
            tone = (y + correction).mean(1, keepdim=True)
            strength = EXCESS * (self.sigma if self.coloured else noise.share * noise.sigma)
            correction = held_to(correction, strength * _relative(noise, tone))
        most = self.sigma
        if self.coloured and noise is not None:
            # Grains are few to a window, whose mean square then differs by chance.
            most *= max(noise.shape) * max(1, noise.grain)
        correction, factor = held_back(correction, most, sample_step(self.pixels.dtype))
        self._held += int((factor < 1).sum())
        self._covered += factor.numel()
        return correction

    @property
    def held(self) -> float:
        """Share of the pixels where corrections were more than sigma allows, until now."""
        return self._held / max(1, self._covered)

    def placed(self, values: Tensor) -> np.ndarray:
        """(C, h, w) as (h, w, C) with the channels that the picture is stored with, and without
        what it was extended by."""
        array = values[:, : self.height, : self.width].permute(1, 2, 0).cpu().numpy()
        return np.broadcast_to(array, (*array.shape[:2], self.channels))

    def network(self, y: Tensor, mixture: Mixture) -> Tensor:
        """sigma^2 sum_c w_c s_c(y) for tiles (B, C, h, w), in the network's channels."""
        if isinstance(mixture, Tensor):
            mixture = mixture.to(y.device)
        network = self.model.corrector()
        whole = self.whole(mixture)
        return network.correction(self.repeated(y), self.hears(y), mixture, whole)[0]

    def correct(self, y: Tensor, mixture: Mixture) -> Tensor:
        """sigma^2 sum_c w_c s_c(y) for tiles (B, C, h, w) of the picture, differentiable."""
        return self.averaged(self.network(y, mixture))

    def each(self, function: Callable[[Tensor], Tensor]) -> Iterator[tuple[tiles.Box, np.ndarray]]:
        """Apply a function of tiles, (B, C, h, w) to the same: places in the picture, and the
        (h, w, C) that belongs there."""
        results = tiles.run(self._counted(function), self.read, self.tiles, self.model.device)
        for (rows, columns), out in results:
            rows, columns = _clipped(rows, self.height), _clipped(columns, self.width)
            h, w = rows.stop - rows.start, columns.stop - columns.start
            if h > 0 and w > 0:
                yield (rows, columns), self.placed(out[:, :h, :w])

    def over_tiles(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Apply a function of tiles, (B, C, h, w) to the same, to the picture: (H, W, C)."""
        result = np.empty((self.height, self.width, self.channels), np.float32)
        for place, values in self.each(function):
            result[place] = values
        return result

    def stream(
        self, choose: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Iterator[tuple[tiles.Box, np.ndarray]], Callable[[], Tensor]]:
        """Correction, place by place as from `each`, for the class weights that ``choose``
        makes of the class scores, (K,) to (K,), or for the posterior; and the scores, to be
        had when the places are done.

        A picture of one tile takes a single pass.
        """
        if len(self.tiles) > 1:
            mixture = None if choose is None else choose(self.logits())
            return self.each(lambda y: self.accepted(y, self.network(y, mixture))), self.logits

        def correct(y: Tensor) -> Tensor:
            def chosen(logits: Tensor) -> Tensor:
                assert choose is not None
                return choose(logits[0].cpu()).to(logits.device)

            correction, logits = self.model.corrector().correction(
                self.repeated(y), self.hears(y), None if choose is None else chosen
            )
            self._logits = logits[0].cpu()
            return self.accepted(y, correction)

        return self.each(correct), self.logits

    def solve(self, choose: Callable[[Tensor], Tensor] | None = None) -> tuple[np.ndarray, Tensor]:
        """What `stream` gives, at once: the correction, (H, W, C), and the class scores."""
        result = np.empty((self.height, self.width, self.channels), np.float32)
        places, scores = self.stream(choose)
        for place, values in places:
            result[place] = values
        return result, scores()

    def correction(self, mixture: Tensor | None = None) -> np.ndarray:
        """sigma^2 sum_c w_c s_c(y) as float32 (H, W, C); without a mixture, of the posterior."""
        return self.over_tiles(lambda y: self.correct(y, mixture))

    def _counted(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function, which then also reports progress to ``watch``: the share of work done."""

        def run(y: Tensor) -> Tensor:
            out = function(y)
            self._done += len(y)
            self.watch(min(1.0, self._done / (self._passes * len(self.tiles))))
            return out

        return run


def plan_tiles(
    model: Model,
    height: int,
    width: int,
    tile: int | None = None,
    memory: int | None = None,
    gradient: bool = False,
) -> list[tiles.Tile]:
    """Tiles of a picture of whole cells; the arguments, and the error, are those of `View`."""
    needs = model.needs
    if needs.margin is None:
        side = max(height, width)
    elif height * width <= MIN_TILE**2:  # no larger than any tile
        side = tile or MIN_TILE
    else:
        side = tile or default_tile(model, memory, gradient)
    planned = tiles.plan(height, width, side, needs.margin or 0, needs.multiple)
    need = _area(planned[0]) * _bytes_per_pixel(model, gradient)
    if memory is not None and not tile and need > memory:
        raise ImageError(
            f"--memory allows {memory / 1e6:.0f} MB, but the smallest tiles that are "
            f"worth while take {need / 1e6:.0f} MB: allow more, or give --tile"
        )
    return planned


def _area(tile: tiles.Tile) -> int:
    """Pixels of a tile with its margins."""
    rows, columns = tile.read
    area: int = (rows.stop - rows.start) * (columns.stop - columns.start)
    return area


def check_channels(model: Model, channels: int) -> None:
    """ImageError if pictures of so many channels are none that the network can see."""
    own = model.needs.channels
    if channels not in (1, own):
        kind = "gray pictures" if own == 1 else f"pictures of {own} channels"
        raise ImageError(
            f"model {model.name!r} is for {kind}, but this one has {channels} channels: "
            "convert it, or give another --model"
        )


def _clipped(part: slice, size: int) -> slice:
    return slice(part.start, min(part.stop, size))


def _relative(noise: Noise, tone: Tensor) -> Tensor:
    """`Noise.curve` of tones in a tensor, like it."""
    tones, shape = (torch.tensor(part).to(tone) for part in (noise.tones, noise.shape))
    right = torch.bucketize(tone.contiguous(), tones).clamp(1, len(tones) - 1)
    share = ((tone - tones[right - 1]) / (tones[right] - tones[right - 1])).clamp(0, 1)
    return torch.lerp(shape[right - 1], shape[right], share)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of any device has run out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED")  # CPU; MPS; cuDNN and cuBLAS
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


class OutOfMemory(ImageError):
    """A picture, or a tile of it, for which memory does not suffice."""


@contextmanager
def memory_errors(view: View) -> Iterator[None]:
    """Turn running out of memory, of any device, into an OutOfMemory that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        tile = view.tiles[0].read
        raise OutOfMemory(
            f"not enough memory for {view.width} x {view.height} pixels in tiles of "
            f"{tile[1].stop - tile[1].start} x {tile[0].stop - tile[0].start}: "
            "give a smaller --tile (or --model photo, if the model needs the whole picture)"
        ) from None


def in_tiles_that_fit(view: View, work: Callable[[View], T]) -> tuple[View, T]:
    """The view that was used, and the result of ``work`` on it: in smaller tiles each time that
    memory runs out.

    OutOfMemory if tiles cannot be smaller, or if the view was given their size.
    """
    asked = view.tile
    while True:
        try:
            with memory_errors(view):
                return view, work(view)
        except OutOfMemory:
            if asked:
                raise
            side = math.isqrt(view.area) * 3 // 4
            smaller = View(view.model, view.samples, view.level, side, watch=view.watch)
            if smaller.area == view.area:
                raise
            view = smaller


def default_tile(model: Model, memory: int | None = None, gradient: bool = False) -> int:
    """Side of tiles: DEFAULT_TILE, or as much less as fits into ``memory`` bytes, or without a
    number into half of what is free.

    At least three margins: eight ninths of such a tile are margin, and smaller ones take hours.
    """
    budget = available_memory(model.device) // 2 if memory is None else memory
    least = max(MIN_TILE, 3 * (model.needs.margin or 0))
    side = DEFAULT_TILE
    while side > least and side**2 * _bytes_per_pixel(model, gradient) > budget:
        side = max(least, side * 3 // 4)
    return side


def _bytes_per_pixel(model: Model, gradient: bool) -> int:
    """About what the network takes of memory for a pixel of a tile."""
    needs = model.needs
    return needs.bytes_per_pixel * (GRADIENT * needs.passes if gradient else 1)
