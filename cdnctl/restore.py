"""Restoring pictures: one Image to another, in tiles if it is large."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cdnctl import images, tiles
from cdnctl.api import Model
from cdnctl.core.guard import held_back, held_to
from cdnctl.core.noise import ends, unclipped
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import Image
from cdnctl.models import Mixture, Whole
from cdnctl.noise import Noise, measure, sampled
from cdnctl.runtime import available_memory
from cdnctl.scale import Shrink

AUTO = "auto"

# A tile of this many pixels a side needs 0.8 GB with the photo model, so that 100 megapixels,
# which need 0.6 GB themselves, stay below 2. Larger ones overlap less and take less time.
DEFAULT_TILE = 1344
MIN_TILE = 256
END_WINDOW = 9  # pixels, see `core.noise.ends`
MEASURABLE = 64  # shorter side of a picture from which its noise is told apart from texture
EXCESS = 1.25  # most by which a change may exceed the noise that was measured
TOLD = 0.001  # share of a picture from which it is said that the model was held back
# Side of the tile that stands for a large picture when what the class changes is measured:
# half a second at most, where a second pass over all of it would nearly double the time.
CLASS_TILE = 512


@dataclass(frozen=True)
class Settings:
    """How to restore a picture."""

    sigma: float | None = None  # in [0, 1] pixel units; None: estimated
    target: str | Mapping[str, float] | None = None  # "auto", a mixture of classes, or none
    strength: float = 1.0  # 0 gives the input back, 1 the denoised picture
    guidance: float = 1.0  # D + guidance (D_c - D)
    tile: int | None = None  # of at most tile x tile pixels; None: as large as ``memory`` allows
    memory: int | None = None  # bytes for the network's work; None: half of what is free
    range: tuple[float, float] | None = None  # black and white of float samples; None: 0 and 1

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UsageError(f"strength is {self.strength:g}, but must lie between 0 and 1")
        if not math.isfinite(self.guidance):
            raise UsageError(f"guidance is {self.guidance:g}, but must be a finite number")
        if self.sigma is not None and not 0 <= self.sigma <= 1:
            raise UsageError(f"sigma is {self.sigma:g}, but must lie in [0, 1] pixel units")


def on_unit_scale(image: Image, scale: tuple[float, float] | None, name: str) -> Image:
    """The picture of that name with float samples from black at 0 to white at 1.

    scale: what is black and white. ImageError if it is given for samples that are no floats or
    do not go with it, or is not for floats that are mostly beyond white.
    """
    floats = image.dtype.kind == "f"
    low, high = float(image.samples.min()), float(image.samples.max())
    if scale is None:
        if floats and np.count_nonzero(image.samples > 1) > image.samples.size // 2:
            raise ImageError(
                f"{name!r}: most float samples are above 1, which is white, and reach {high:.6g}: "
                "say what is black and white, such as --range 0:255"
            )
        return image
    if not floats:
        raise ImageError(
            f"{name!r}: --range is for float samples, but these are {image.dtype.name}, whose "
            "range is known"
        )
    black, white = scale
    if high - low < 0.02 * (white - black):
        raise ImageError(
            f"{name!r}: its samples go from {low:.6g} to {high:.6g}, next to nothing of the range "
            f"from {black:g} to {white:g}: give another --range, or none for 0:1"
        )
    return image.with_samples(((image.samples - black) / (white - black)).astype(image.dtype))


def on_own_scale(image: Image, scale: tuple[float, float] | None) -> Image:
    """What `on_unit_scale` was given, of what was made of it."""
    if scale is None:
        return image
    black, white = scale
    samples = image.samples * (white - black) + black
    return image.with_samples(samples.astype(image.dtype))


@dataclass(frozen=True)
class Level:
    """How strong the noise of a picture is: told, or measured."""

    sigma: float  # of white noise, as the network is told it, in [0, 1] pixel units
    noise: Noise | None = None  # what was measured: a change is held to it


@dataclass(frozen=True)
class Restored:
    """A restored picture and what was found on the way."""

    image: Image
    sigma: float  # noise level used, in [0, 1] pixel units
    told: float  # what the network was told: more than sigma for gray pictures
    posterior: Mapping[str, float]  # p(c | picture), most probable class first
    held: float = 0.0  # share of the pixels where the model was held back, see core.guard
    class_change: float | None = None  # see the function of that name; None: no class was told

    def __repr__(self) -> str:
        best = [f"{name} {p:.1%}" for name, p in list(self.posterior.items())[:1]]
        return f"Restored({', '.join([repr(self.image), f'sigma {self.sigma:.4g}', *best])})"


@dataclass(frozen=True)
class Classified:
    """What a picture shows, and how it was looked at."""

    posterior: Mapping[str, float]  # p(c | picture), most probable class first
    sigma: float  # noise level of the picture, in [0, 1] pixel units
    factor: float  # how many of its pixels became one along an axis, at least 1
    size: tuple[int, int]  # height and width that the network saw


class View:
    """A picture as the network sees it: in planned tiles, made from samples as they are needed.

    pixels: (H, W, C) samples of any dtype, which stay on the host as they are.

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
        pixels: np.ndarray,
        level: Level | float,
        tile: int | None = None,
        watch: Callable[[float], None] = lambda share: None,
        logits: Tensor | None = None,  # class scores of the whole picture, if they are known
    ):
        config = model.module.config
        self.model = model
        self.level = level if isinstance(level, Level) else Level(level)
        self.sigma = self.level.sigma
        self.height, self.width, self.channels = pixels.shape
        gray = _is_gray(pixels)
        self.pixels = pixels[:, :, :1] if gray else pixels
        self.repeat = config.channels if gray else 1
        self.told = self.sigma * self.repeat**0.5
        # Extended by mirroring to what the network works on: whole cells.
        height, width = (n + -n % config.multiple for n in (self.height, self.width))
        side = max(height, width) if config.whole else (tile or DEFAULT_TILE)
        self.tiles = tiles.plan(height, width, side, config.margin, config.multiple)
        self.cells = height * width // config.multiple**2
        self._watch, self._done, self._passes = watch, 0, 1
        self._logits = logits
        self._held = self._covered = 0  # pixels of tiles: held back, and all

    @property
    def area(self) -> int:
        """Pixels of a tile with its margins."""
        rows, columns = self.tiles[0].read
        area: int = (rows.stop - rows.start) * (columns.stop - columns.start)
        return area

    def read(self, box: tiles.Box) -> Tensor:
        """Rows and columns of the extended picture: (C, h, w), float32 on the host."""
        block = self.pixels
        for axis, (part, size) in enumerate(zip(box, (self.height, self.width), strict=True)):
            if part.stop > size:
                index = tiles.reflected(part.start, part.stop, size)
                block = np.take(block, index, axis)
            else:
                block = block[part] if axis == 0 else block[:, part]
        return torch.from_numpy(np.ascontiguousarray(images.to_unit(block).transpose(2, 0, 1)))

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Class scores of the whole picture, (K,)."""
        module = self.model.module
        if not module.classifies:
            return torch.zeros(module.num_classes)
        if self._logits is None:
            self._passes = 2 if len(self.tiles) > 1 else 1  # this one, and that of the pixels
            mean = tiles.mean_of_cells(
                self._counted(lambda y: module.class_features(self.repeated(y), self.told)),
                self.read,
                self.tiles,
                self.model.device,
                module.config.multiple,
            )
            weight = module.head.linear.weight
            self._logits = module.head.linear(mean.to(weight)).cpu()
        return self._logits

    def whole(self, mixture: Mixture) -> Whole | None:
        """What the network must know of the picture to work on a tile of it."""
        if len(self.tiles) == 1 or (mixture is None and not self.model.module.mixes):
            return None
        return Whole(self.cells, self.logits().softmax(0).to(self.model.device))

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
            strength = EXCESS * noise.confidence * noise.sigma
            correction = held_to(correction, strength * _relative(noise, tone))
        correction, factor = held_back(correction, self.sigma, _sample_step(self.pixels.dtype))
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
        correction: Tensor = self.model.module.correction(
            self.repeated(y), self.told, mixture, self.whole(mixture)
        )[0]
        return correction

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

            correction, logits = self.model.module.correction(
                self.repeated(y), self.told, None if choose is None else chosen
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
        """The function, with the share of the work that is done told to who watches."""

        def run(y: Tensor) -> Tensor:
            out = function(y)
            self._done += len(y)
            self._watch(min(1.0, self._done / (self._passes * len(self.tiles))))
            return out

        return run


def _is_gray(pixels: np.ndarray) -> bool:
    """Whether the channels of (H, W, C) are equal up to 1/255: WebP and JPEG round as much."""
    white = np.iinfo(pixels.dtype).max if pixels.dtype.kind == "u" else 1
    # In blocks: of most pictures the first says no, and none is copied as a whole.
    blocks = (pixels[row : row + 64] for row in range(0, len(pixels), 64))
    return all((np.ptp(b, axis=2) <= 1.01 * white / images.PEAK).all() for b in blocks)


def _clipped(part: slice, size: int) -> slice:
    return slice(part.start, min(part.stop, size))


def estimate_sigma(pixels: np.ndarray, alpha: np.ndarray | None = None) -> float:
    """Standard deviation of the noise in pixels (H, W, C), in [0, 1] pixel units, by
    scikit-image's wavelet estimator (Donoho and Johnstone 1994), averaged over channels.

    Any dtype, see `images.to_unit`. Large pictures are judged by a sample of them, and not by
    what alpha (H, W) hides. 0 for pictures too small or too flat to tell; at most 1, which
    patterns of single pixels exceed.
    """
    from skimage.restoration import estimate_sigma as estimate

    pixels = images.to_unit(_sample(pixels))
    if alpha is not None:
        pixels[_sample(alpha) == 0] = 0  # the estimator leaves out coefficients that are zero
    if min(pixels.shape[:2]) < 4:
        return 0.0
    with images.quiet:  # flat pictures: the mean of nothing
        sigma = float(estimate(pixels, channel_axis=-1, average_sigmas=True))
    return min(sigma, 1.0) if math.isfinite(sigma) else 0.0


def noise_level(
    samples: np.ndarray, alpha: np.ndarray | None = None, sigma: float | None = None
) -> Level:
    """The noise of samples (H, W, C) of any dtype: as told, or measured, see `noise.measure`.

    What alpha (H, W) hides has no say. Pictures too small for that, or with too little in them
    that is not clipped, are judged by `estimate_sigma`.
    """
    if sigma is not None:
        return Level(sigma)
    if min(samples.shape[:2]) >= MEASURABLE:
        part = sampled(samples[:, :, :1] if _is_gray(samples) else samples)
        noise = measure(images.to_unit(part), None if alpha is None else sampled(alpha))
        if noise.told > 0 and samples.dtype.kind == "u" and _few_values(samples, noise.told):
            noise = replace(noise, confidence=0.0)
        if noise.measured:
            return Level(noise.safe, noise)
    sigma = estimate_sigma(samples, alpha)
    inks = samples.dtype.kind == "u" and _few_values(samples, sigma)
    return Level(0.0 if inks else sigma)


def _few_values(samples: np.ndarray, sigma: float) -> bool:
    """Whether samples have fewer values than noise of sigma would spread over: a picture of a few
    inks, dithered or striped."""
    width = 2 * sigma * float(np.iinfo(samples.dtype).max)
    parts = sampled(samples)
    return max(len(np.unique(parts[..., c])) for c in range(parts.shape[2])) < width


def _relative(noise: Noise, tone: Tensor) -> Tensor:
    """`Noise.curve` of tones in a tensor, like it."""
    tones, shape = (torch.tensor(part).to(tone) for part in (noise.tones, noise.shape))
    right = torch.bucketize(tone.contiguous(), tones).clamp(1, len(tones) - 1)
    share = ((tone - tones[right - 1]) / (tones[right] - tones[right - 1])).clamp(0, 1)
    return torch.lerp(shape[right - 1], shape[right], share)


def _sample(pixels: np.ndarray, side: int = 256, count: int = 8) -> np.ndarray:
    """At most count x count evenly spaced squares of a picture, (H, W, ...), as a mosaic.

    Each starts at even rows and columns, so that wavelets of two pixels see the same pairs.
    """
    for axis in (0, 1):
        size = pixels.shape[axis]
        if size > side * count:
            starts = np.linspace(0, size - side, count).astype(int) // 2 * 2
            index = (starts[:, None] + np.arange(side)).ravel()
            pixels = np.take(pixels, index, axis)
    return pixels


def class_mixture(model: Model, settings: Settings, logits: Tensor) -> Tensor:
    """Mixture w with D_w = D + guidance (D_target - D), (K,): the whole choice of classes
    is one mixture, because D = sum_c p(c | y) D_c."""
    p = logits.softmax(0)
    if settings.target is None:
        return p
    if settings.target == AUTO:
        target: Tensor | None = torch.nn.functional.one_hot(p.argmax(), len(p)).to(p.dtype)
    else:
        target = model.mixture(settings.target)
    assert target is not None
    return p + settings.guidance * (target - p)


def at_class_scale(view: View, tile: int | None = None) -> View:
    """The picture at the size at which its class scores are taken: itself, or a smaller copy
    with the noise that is left in it, if it is larger than the crops of the training."""
    shrink = Shrink(view.height, view.width, view.model.header.patch)
    if shrink.factor == 1:
        return view
    # A gray picture has one channel here. Averages of coloured noise may look gray, too, but
    # only where so little of it is left that the factor of sqrt(3) does not matter.
    small = shrink.samples(view.pixels)
    return View(view.model, small, view.sigma * shrink.noise, tile)


def choose_class(view: View, settings: Settings) -> tuple[Settings, Tensor | None]:
    """Settings with the most probable class in the place of "auto", and the class scores that
    say so; the settings as they are, and None, if those come with the view's correction."""
    small = at_class_scale(view)
    if not view.model.module.classifies or (small is view and len(view.tiles) == 1):
        return settings, None
    logits = small.logits()
    if settings.target == AUTO:
        best = view.model.classes[int(logits.argmax())]
        settings = replace(settings, target={best: 1.0})
    return settings, logits


def ranked(model: Model, logits: Tensor) -> dict[str, float]:
    """Posterior by class name, most probable first; empty if the model does not classify."""
    if not model.module.classifies:
        return {}
    p = logits.double().softmax(0)
    return {model.classes[i]: float(p[i]) for i in p.argsort(descending=True).tolist()}


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


def default_tile(model: Model, memory: int | None = None) -> int:
    """Side of tiles: DEFAULT_TILE, or as much less as fits into ``memory`` bytes, or without a
    number into half of what is free.

    No less than three margins, of which eight ninths are margin: smaller tiles take hours.
    """
    budget = available_memory(model.device) // 2 if memory is None else memory
    config = model.module.config
    least = max(MIN_TILE, 3 * config.margin)
    side = DEFAULT_TILE
    while side > least and side**2 * config.bytes_per_pixel > budget:
        side = max(least, side * 3 // 4)
    return side


def batch_size(height: int, width: int) -> int:
    """How many pictures of one size go through the network together.

    It depends on the size alone, and smaller batches are filled up: kernels may round
    differently for another number of pictures, but not for other neighbours. So a picture
    comes out the same to the bit alone, in a folder, and in whatever order.
    """
    return max(1, min(32, 2**16 // (height * width)))


def _is_bilevel(samples: np.ndarray) -> bool:
    """Whether whole numbers are all black or white: no noise can be told from that."""
    if samples.dtype.kind != "u":
        return False
    white = np.iinfo(samples.dtype).max
    blocks = (samples[row : row + 64] for row in range(0, len(samples), 64))
    return all(((b == 0) | (b == white)).all() for b in blocks)


def _left_alone(image: Image) -> Restored:
    note = "every sample is black or white: left as it is"
    return Restored(replace(image, notes=(*image.notes, note)), 0.0, 0.0, {})


@torch.no_grad()
def restore(
    image: Image,
    model: Model,
    settings: Settings,
    watch: Callable[[float], None] = lambda share: None,
    level: Level | None = None,
) -> Restored:
    """Denoise one picture. Size, depth, alpha and metadata are those of ``image``.

    level: of its noise, if it was measured before. watch: told the share of the work that is
    done, now and then. ImageError if memory does not suffice; without a ``settings.tile``
    smaller tiles are tried first.
    """
    _check_model(model, settings)
    if batch_size(*image.samples.shape[:2]) > 1:
        return restore_batch([image], model, settings, None if level is None else [level])[0]
    if _is_bilevel(image.samples):
        return _left_alone(image)
    level = level or noise_level(image.samples, image.alpha, settings.sigma)
    tile = settings.tile or default_tile(model, settings.memory)
    view = View(model, image.samples, level, tile, watch)
    need = view.area * model.module.config.bytes_per_pixel
    if settings.memory is not None and not settings.tile and need > settings.memory:
        raise ImageError(
            f"--memory allows {settings.memory / 1e6:.0f} MB, but the smallest tiles that are "
            f"worth while take {need / 1e6:.0f} MB: allow more, or give --tile"
        )
    while True:
        try:
            with memory_errors(view):
                settings, shrunk = choose_class(view, settings)
                samples = _blend(image, view, settings)
            break
        except OutOfMemory:
            if settings.tile:
                raise
            smaller = View(model, image.samples, level, math.isqrt(view.area) * 3 // 4, watch)
            if smaller.area == view.area:
                raise
            view = smaller
    held, change = view.held, None
    found = ranked(model, view.logits() if shrunk is None else shrunk)
    if settings.target is not None:
        logits = view.logits()
        if view.area > CLASS_TILE**2:
            view = View(model, image.samples, level, CLASS_TILE, logits=logits)
        with memory_errors(view):
            change = class_change(view, logits, settings)
    result = _noted(image.with_samples(samples), level, held, settings.sigma is not None)
    return Restored(result, level.sigma, view.told, found, held, change)


def _noted(image: Image, level: Level, held: float, told: bool) -> Image:
    """A restored picture with remarks on what should not go unsaid. told: of its sigma."""
    notes = []
    if held > TOLD:
        share = f"{held:.0%}" if held >= 0.01 else "less than 1%"
        why = "sigma may be too low, or " if told else ""
        notes.append(
            f"held back on {share} of the picture, where the model would change more than such "
            f"noise can: {why}it does not know such pictures"
        )
    noise = level.noise
    if noise is not None and noise.confidence < 0.5 and noise.told > 1 / images.PEAK:
        notes.append("unsure what is noise and what texture: give --sigma to take out more")
    return replace(image, notes=(*image.notes, *notes)) if notes else image


def class_change(view: View, logits: Tensor, settings: Settings) -> float:
    """Root mean square, in [0, 1] pixel units, of what the told class changes in a restored
    picture before it is clipped and rounded: strength guidance (D_target - D).

    Of a view of several tiles that in the one in the middle. logits: of the whole picture, (K,).
    """
    shift = _class_shift(view.model, logits, settings)
    middle = next(
        tile
        for tile in view.tiles
        if tile.place[0].stop > view.height // 2 and tile.place[1].stop > view.width // 2
    )
    results = tiles.run(lambda y: view.correct(y, shift), view.read, [middle], view.model.device)
    ((rows, columns), change), *_ = results
    inside = change[:, : view.height - rows.start, : view.width - columns.start]
    return settings.strength * _rms(inside)


def _class_shift(model: Model, logits: Tensor, settings: Settings) -> Tensor:
    """The mixture, (K,), that gives what the told class changes. The correction is linear in
    it: with one that sums to zero, one pass gives the difference of two."""
    return class_mixture(model, settings, logits) - logits.softmax(0)


def _rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item()


def _blend(image: Image, view: View, settings: Settings) -> np.ndarray:
    """Samples of the restored picture."""
    choose = partial(class_mixture, view.model, settings) if settings.target else None
    places, _ = view.stream(choose)
    result = np.empty_like(image.samples)
    for place, correction in places:
        result[place] = _step(image.samples, place, correction, view.sigma, settings.strength)
    return result


def moved(
    samples: np.ndarray,
    place: tiles.Box,
    correction: np.ndarray,
    sigma: float,
    strength: float = 1.0,
) -> np.ndarray:
    """A place of samples (H, W, C) of any dtype, moved along its correction (h, w, C) as far as
    ``strength`` says: float32 in [0, 1] pixel units, not clipped.

    Whole numbers hold clipped noise, whose effect on blacks and whites is undone.
    """
    if not np.isfinite(correction).all():
        raise ImageError("the network gave numbers that are not finite; check --sigma and --model")
    y = images.to_unit(samples[place])
    x = y + correction
    if samples.dtype.kind == "u" and sigma > 0:
        # A place of a picture is treated as the picture is: its surroundings are looked at.
        around, inside = _with_halo(place, samples.shape[:2])
        low, high = ends(images.to_unit(samples[around]), END_WINDOW)
        step = _sample_step(samples.dtype)
        # What was held back altogether is no mean of anything.
        changed = (correction != 0).any(-1, keepdims=True)
        x = np.where(changed, unclipped(x, sigma, (low[inside], high[inside]), step), y)
    return y + np.float32(strength) * (x - y)


def _step(
    samples: np.ndarray, place: tiles.Box, correction: np.ndarray, sigma: float, strength: float
) -> np.ndarray:
    """What `moved` gives, in the dtype of the samples."""
    if strength == 0:
        return samples[place]
    return images.from_unit(moved(samples, place, correction, sigma, strength), samples.dtype)


def _sample_step(dtype: np.dtype) -> float:
    """The distance of two values that a sample can have, in [0, 1] pixel units."""
    return 1 / float(np.iinfo(dtype).max) if dtype.kind == "u" else 0.0


def whole_place(samples: np.ndarray) -> tiles.Box:
    """The place that is the whole of (H, W, C)."""
    return slice(0, samples.shape[0]), slice(0, samples.shape[1])


def _with_halo(place: tiles.Box, size: tuple[int, ...]) -> tuple[tiles.Box, tiles.Box]:
    """A place with what `ends` looks at around it, and the place within that."""
    halo = END_WINDOW // 2
    around, inside = [], []
    for part, length in zip(place, size, strict=True):
        start, stop = max(0, part.start - halo), min(length, part.stop + halo)
        around.append(slice(start, stop))
        inside.append(slice(part.start - start, part.stop - start))
    return (around[0], around[1]), (inside[0], inside[1])


def _check_model(model: Model, settings: Settings) -> None:
    """UsageError for what the model cannot do."""
    if not model.module.denoises:
        raise UsageError(f"model {model.name!r} ({model.header.arch}) cannot denoise")
    if settings.target is not None and not model.module.classifies:
        raise UsageError(
            f"model {model.name!r} ({model.header.arch}) knows no classes: leave --class out"
        )


@torch.no_grad()
def restore_batch(
    pictures: Sequence[Image],
    model: Model,
    settings: Settings,
    levels: Sequence[Level] | None = None,
) -> list[Restored]:
    """Denoise small pictures of one shape (H, W, C) together; each as `restore` does.

    At most `batch_size` of them. levels: of their noise, if it was measured before.
    """
    _check_model(model, settings)
    levels = levels or [noise_level(p.samples, p.alpha, settings.sigma) for p in pictures]
    views = [View(model, p.samples, level) for p, level in zip(pictures, levels, strict=True)]
    first = views[0]
    count = batch_size(first.height, first.width)
    box = first.tiles[0].read
    y = torch.zeros(count, model.module.config.channels, box[0].stop, box[1].stop)
    told = torch.ones(count)
    for i, view in enumerate(views):
        y[i], told[i] = view.repeated(view.read(box)[None])[0], view.told

    def chosen(logits: Tensor) -> Tensor:
        chosen = [
            class_mixture(model, choice, scores)
            for scores, (choice, _) in zip(logits.cpu(), choices, strict=True)
        ]
        return torch.stack(chosen).to(logits.device)

    with memory_errors(first):
        choices = [choose_class(view, settings) for view in views]
        choices += [(settings, None)] * (count - len(views))  # for what fills the batch up
        correction, found = model.module.correction(
            y.to(model.device), told.to(model.device), chosen if settings.target else None
        )
    found = found.cpu()
    steps = [
        view.placed(view.accepted(view.read(box)[None], part[None].cpu())[0])
        for view, part in zip(views, correction, strict=False)
    ]
    shares = [view.held for view in views]
    changes: list[float | None] = [None] * len(views)
    if settings.target is not None:
        shifts = torch.stack(
            [_class_shift(model, scores, c) for scores, (c, _) in zip(found, choices, strict=True)]
        )
        with memory_errors(first):
            shifted, _ = model.module.correction(
                y.to(model.device), told.to(model.device), shifts.to(model.device)
            )
        changes = [
            settings.strength * _rms(view.averaged(part[None])[..., : first.height, : first.width])
            for view, part in zip(views, shifted.cpu(), strict=False)
        ]
    everything = whole_place(first.pixels)
    return [
        _left_alone(picture)
        if _is_bilevel(picture.samples)
        else Restored(
            _noted(
                picture.with_samples(
                    _step(picture.samples, everything, step, view.sigma, settings.strength)
                ),
                view.level,
                held,
                settings.sigma is not None,
            ),
            view.sigma,
            view.told,
            ranked(model, scores if shrunk is None else shrunk),
            held,
            change,
        )
        for picture, view, step, scores, (_, shrunk), held, change in zip(
            pictures, views, steps, found, choices, shares, changes, strict=False
        )
    ]


@torch.no_grad()
def classify(image: Image, model: Model, sigma: float | None = None) -> Classified:
    """Posterior over classes of one picture, at the scale of the training."""
    if not model.module.classifies:
        raise UsageError(f"model {model.name!r} ({model.header.arch}) cannot classify")
    sigma = noise_level(image.samples, image.alpha, sigma).sigma
    tile = default_tile(model, None)
    view = View(model, image.samples, sigma, tile)
    small = at_class_scale(view, tile)
    with memory_errors(small):
        posterior = ranked(model, small.logits())
    factor = min(view.height, view.width) / min(small.height, small.width)
    return Classified(posterior, sigma, factor, (small.height, small.width))
