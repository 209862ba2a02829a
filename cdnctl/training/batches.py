"""Batches drawn from training pictures.

Randomness is counted, not carried: the batch of step t depends on (seed, t)
alone. A resumed run sees the data that the interrupted one would have seen, and
several processes agree on a batch without talking.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate as resize

from cdnctl.core.coloured import OCTAVES, curve, local_tone
from cdnctl.core.noise import sample_sigma
from cdnctl.errors import UsageError
from cdnctl.images import PEAK
from cdnctl.training.cameras import MARGIN, Cameras, described, photographs
from cdnctl.training.config import DataConfig, LossConfig, NoiseConfig
from cdnctl.training.datasets import Pictures

_BLOCK = 8  # pixels of a block of JPEG
_ZOOMS = 4  # sizes of scenes in a batch, between _LEAST and _MOST pixels of a picture a pixel
_LEAST, _MOST = 0.45, 2.0

# How `restore.measuring`, which looks at the flattest places, errs on simulated photographs, whose
# noise is less there than at edges that JPEG has coded: the logarithm of what it finds over what
# there is, in the mean and by chance, and by luma and chroma and octave. Some texture it takes for
# noise.
_SHORT, _UNSURE = -0.35, 0.45
_SHORTER = torch.tensor([[0.1, 0.1, 0.1, 0.1], [-0.9, -0.5, 0.0, 0.4]])
_TEXTURE = 0.1


@dataclass(frozen=True)
class Batch:
    """Clean crops, noise and labels; ``condition`` marks who is denoised given its class.

    ``told`` is what the network hears of sigma. Some pictures may be told less than the
    truth: such noise is all but impossible under p_told, so score matching at the right
    level says nothing about it, and without examples the gradient may be anything there.
    Others may be told more: so little noise is as improbable under p_told, and a network
    that has never met it makes a relief of it.
    """

    clean: Tensor  # (B, C, p, p) in [0, 1]
    noise: Tensor  # like clean, unit variance, of camera noise on average over tones
    sigma: Tensor  # (B,) in [0, 1] pixel units
    told: Tensor  # (B,): sigma, or for some pictures a quarter of it to all of it, or more
    labels: Tensor  # (B,) int64, -1 unlabelled
    condition: Tensor  # (B,) bool
    lesson: Batch | None = None  # pictures for the class loss alone
    spectrum: Tensor | None = None  # what else is told of camera noise, see `core.coloured.Told`
    relief: Tensor | None = None
    alone: bool = False  # whether classes are learnt from the lesson and from nothing else


class Batches:
    """Batch t as a function of (seed, t)."""

    def __init__(
        self, pictures: Pictures, data: DataConfig, noise: NoiseConfig, loss: LossConfig, seed: int
    ):
        self.pictures, self.data, self.noise, self.loss = pictures, data, noise, loss
        self.seed = seed
        # On the host: reading these back from a GPU at every step would stall it.
        self.labels, self.sizes = pictures.labels.cpu(), pictures.sizes.cpu()
        labelled = self.labels >= 0
        small = self.sizes.amin(1) < data.thumbnail
        lesson = labelled & small if data.thumbnail else labelled
        # Three pools: labelled and unlabelled pictures, and those for the class loss alone.
        self.pools = [
            pool.nonzero().flatten() for pool in (labelled & ~small, ~labelled & ~small, lesson)
        ]
        count = round(data.batch * data.labelled_share)
        if not len(self.pools[0]):
            count = 0
        if not len(self.pools[1]):
            count = data.batch
        if not len(self.pools[0]) + len(self.pools[1]):
            raise UsageError(
                f"no picture has a shorter side of data.thumbnail = {data.thumbnail} pixels: "
                "there is nothing to learn denoising from"
            )
        self.counts = [count, data.batch - count, data.class_batch if len(self.pools[2]) else 0]
        self._orders: dict[tuple[int, int], Tensor] = {}

    def _generator(self, *key: int) -> torch.Generator:
        seed = self.seed
        for k in key:  # a plain mixing of integers; neighbours get unrelated streams
            seed = (seed * 6364136223846793005 + k + 1442695040888963407) % 2**63
        return torch.Generator().manual_seed(seed)

    def _draw(self, pool: int, step: int) -> Tensor:
        """Every picture of a pool once per epoch, in an order of the epoch's own."""
        members, count = self.pools[pool], self.counts[pool]
        place, end, size = step * count, (step + 1) * count, len(members)
        chosen = [members[:0]]
        while place < end:
            epoch, slot = divmod(place, size)
            if (pool, epoch) not in self._orders:
                self._orders = {k: v for k, v in self._orders.items() if k[0] != pool}
                order = torch.randperm(size, generator=self._generator(1 + pool, epoch))
                self._orders[pool, epoch] = members[order]
            chosen.append(self._orders[pool, epoch][slot : slot + end - place])
            place += len(chosen[-1])
        return torch.cat(chosen)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Batch of a step; process ``rank`` of ``world`` gets its share of the rows."""
        rows = slice(rank, None, world)
        g = self._generator(0, step)
        which = torch.cat([self._draw(0, step), self._draw(1, step)])
        batch = self._rows(which, self.data.patch, g, rows)
        if self.noise.camera:
            batch = self._with_photographs(batch, which, g, rows)
        if self.data.flats:
            batch = self._with_flats(batch, g, len(which), rows)
        if self.data.patterns:
            batch = self._with_patterns(batch, g, len(which), rows)
        if self.counts[2]:
            g = self._generator(-1, step)
            which = self._draw(2, step)
            lesson = self._rows(which, self.data.class_patch, g, rows, self.noise.lessons)
            batch = replace(batch, lesson=lesson, alone=self.data.thumbnail > 0)
        return batch

    def _rows(
        self, which: Tensor, p: int, g: torch.Generator, rows: slice, most: float = 0.0
    ) -> Batch:
        """Random crops of p x p pixels, their noise and labels; some rows of all.

        most: the highest noise level, half of the crops having none (0: levels as configured).
        """
        b, device = len(which), self.pictures.buffer.device
        labels = self.labels[which]
        labelled = labels >= 0
        sizes = self.sizes[which]
        shift = torch.where(labelled, self.data.shift, 0)[:, None]
        room = (sizes - p).clamp_min(0) + 2 * shift
        u = torch.rand(b, 2, generator=g, dtype=torch.float64)
        corner = (u * (room + 1)).long() - shift
        turn = torch.randint(8, (b,), generator=g)
        turn = torch.where(labelled | (not self.data.rotate), turn & 1, turn)
        sigma = sample_sigma(b, self.noise.low, self.noise.high, self.noise.power, g) / PEAK
        condition = labelled & (torch.rand(b, generator=g) < self.loss.conditional)
        if device.type == "cpu":
            noise = torch.randn(b, self.pictures.channels, p, p, generator=g)
        else:  # on the device itself: host normals would starve a GPU
            on_device = torch.Generator(device).manual_seed(g.initial_seed())
            noise = torch.randn(b, self.pictures.channels, p, p, generator=on_device, device=device)
        short = torch.rand(b, generator=g) < self.noise.mismatch
        told = torch.where(short, sigma * (0.25 + 0.75 * torch.rand(b, generator=g)), sigma)
        if most:
            sigma = told = most / PEAK * (2 * torch.rand(b, generator=g) - 1).clamp_min(0)
        else:
            if self.noise.wide:
                low, high = math.log(self.noise.high / PEAK), math.log(self.noise.top / PEAK)
                level = torch.exp(low + (high - low) * torch.rand(b, generator=g))
                far = torch.rand(b, generator=g) < self.noise.wide
                sigma, told = torch.where(far, level, sigma), torch.where(far, level, told)
            if self.noise.excess:
                less = (torch.rand(b, generator=g) < self.noise.excess) & ~short
                sigma = torch.where(less, sigma * torch.rand(b, generator=g), sigma)
        whole = torch.stack([which, *corner.unbind(1), turn, labels, condition.long()])
        which, top, left, turn, labels, on = _send(whole[:, rows], device).unbind()
        sigma, told = _send(torch.stack([sigma, told])[:, rows], device).unbind()
        return Batch(
            clean=self.pictures.crops(which, top, left, turn, p),
            noise=noise[rows],
            sigma=sigma,
            told=told,
            labels=labels,
            condition=on.bool(),
        )

    def _with_flats(self, batch: Batch, g: torch.Generator, count: int, rows: slice) -> Batch:
        """Some crops replaced by a flat colour or a linear gradient of colours, of no class."""
        chosen = torch.rand(count, generator=g) < self.data.flats
        channels = self.pictures.channels
        colour = torch.rand(count, channels, 1, 1, generator=g)
        slopes = torch.rand(2, count, channels, 1, 1, generator=g) - 0.5
        slopes *= torch.rand(count, 1, 1, 1, generator=g) < 0.5  # the others are flat
        ramp = torch.linspace(-1, 1, batch.clean.shape[-1])
        flat = colour + slopes[0] * ramp + slopes[1] * ramp[:, None]
        return _replaced(batch, chosen[rows], flat.clamp(0, 1)[rows])

    def _with_patterns(self, batch: Batch, g: torch.Generator, count: int, rows: slice) -> Batch:
        """Some crops replaced by stripes or checks of two colours, half of them black and white
        or gray, 1 to 8 pixels wide, of no class."""
        chosen = torch.rand(count, generator=g) < self.data.patterns
        side = batch.clean.shape[-1]
        width = 2 ** torch.randint(4, (count, 2), generator=g)
        width = torch.where(torch.rand(count, 1, generator=g) < 0.5, width[:, :1], width)
        phase = torch.randint(16, (count, 2), generator=g)
        place = torch.arange(side)
        bands = (place + phase[..., None]) // width[..., None] % 2  # (count, 2, side)
        kind = torch.randint(3, (count,), generator=g)  # stripes across, stripes down, checks
        bands[:, 0] *= (kind != 1)[:, None]
        bands[:, 1] *= (kind != 0)[:, None]
        which = (bands[:, 0, :, None] + bands[:, 1, None, :]) % 2
        colours = torch.rand(2, count, self.pictures.channels, 1, 1, generator=g)
        gray = torch.rand(count, 1, 1, 1, generator=g)
        colours = torch.where(gray < 0.5, colours[:, :, :1], colours)
        full = torch.arange(2.0).view(2, 1, 1, 1, 1).expand_as(colours)
        colours = torch.where(gray < 0.25, full, colours)
        pattern = torch.where(which[:, None].bool(), colours[1], colours[0])
        return _replaced(batch, chosen[rows], pattern[rows])

    def _with_photographs(
        self, batch: Batch, which: Tensor, g: torch.Generator, rows: slice
    ) -> Batch:
        """Some crops replaced by what simulated cameras make of others of the same pictures; what
        is told of their noise errs a little. It is computed on the host."""
        count, side = len(which), self.data.patch
        chosen = torch.rand(count, generator=g) < self.noise.camera
        # Blocks of JPEG begin anywhere in a crop, and so does the mosaic.
        shown = side + _BLOCK * 2
        scenes = self._scenes(which, shown + 2 * MARGIN, g)
        clean, noisy = photographs(scenes, Cameras.random(count, g), g)
        sigma, spectrum, knots = described(clean, noisy)
        top, left = (int(torch.randint(2 * _BLOCK + 1, (1,), generator=g)) for _ in range(2))
        clean, noisy = (x[..., top : top + side, left : left + side] for x in (clean, noisy))
        sigma = sigma.clamp_min(0.25 / PEAK)
        noise = (noisy - clean) / sigma.view(-1, 1, 1, 1)
        told, spectrum, knots = _mistaken(sigma, spectrum, knots, g)
        relief = curve(local_tone(noisy), knots)
        device = batch.clean.device
        here = _send(chosen[rows], device)

        def instead(value: Tensor, before: Tensor) -> Tensor:
            where = here.view(-1, *[1] * (value.ndim - 1))
            return torch.where(where, _send(value[rows], device), before)

        return replace(
            batch,
            clean=instead(clean, batch.clean),
            noise=instead(noise, batch.noise),
            sigma=instead(sigma, batch.sigma),
            told=instead(told, batch.told),
            spectrum=instead(spectrum, torch.zeros_like(_send(spectrum[rows], device))),
            relief=instead(relief, torch.ones_like(_send(relief[rows], device))),
        )

    def _scenes(self, which: Tensor, side: int, g: torch.Generator) -> Tensor:
        """Crops (B, 3, side, side) of pictures, smaller and larger than they are: a camera's lens
        does not resolve its pixels, and those of the web are made smaller. On the host."""
        count = len(which)
        order = torch.randperm(count, generator=g)
        scenes = torch.empty(count, self.pictures.channels, side, side)
        for k, rows in enumerate(order.chunk(_ZOOMS)):
            # Stratified: a batch has all sizes.
            u = (k + float(torch.rand((), generator=g))) / _ZOOMS
            reach = round(side * _LEAST * (_MOST / _LEAST) ** u)
            room = (self.sizes[which[rows]] - reach).clamp_min(0)
            at = (torch.rand(len(rows), 2, generator=g, dtype=torch.float64) * (room + 1)).long()
            turn = torch.randint(8, (len(rows),), generator=g)
            crops = self.pictures.crops(which[rows], at[:, 0], at[:, 1], turn, reach).cpu()
            scenes[rows] = resize(crops, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return scenes


def _mistaken(
    sigma: Tensor, spectrum: Tensor, knots: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A level (B,), spectrum (B, 2, OCTAVES) and curve (B, K) of noise, as far from the truth as
    what is measured of a photograph."""
    count = len(sigma)

    def chance(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=g)

    told = sigma * (_SHORT + _UNSURE * chance()).exp()
    texture = torch.rand(count, generator=g) < _TEXTURE
    taken = (2 * torch.rand(count, generator=g)).exp()
    return (
        torch.where(texture, told * taken, told),
        spectrum + _SHORTER + 0.4 * chance(2, OCTAVES),
        knots * (0.15 * chance(knots.shape[1])).exp(),
    )


def _replaced(batch: Batch, here: Tensor, pictures: Tensor) -> Batch:
    """A batch with other clean pictures in some rows, which then have no class."""
    pictures, here = _send(pictures, batch.clean.device), _send(here, batch.clean.device)
    return replace(
        batch,
        clean=torch.where(here.view(-1, 1, 1, 1), pictures, batch.clean),
        labels=torch.where(here, -1, batch.labels),
        condition=batch.condition & ~here,
    )


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for.

    A GPU copies page-locked memory on its own. To copy any other memory, the host would first have
    to wait for all the work that the GPU was given before.
    """
    tensor = tensor.contiguous()
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
