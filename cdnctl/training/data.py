"""Training pictures in memory, and batches drawn from them.

All pictures of a run lie in one flat uint8 buffer on the compute device. A batch
of random crops, flips and quarter turns is a single gather from it: the
augmentation is arithmetic on indices, so pictures of any size mix freely.

Randomness is counted, not carried: the batch of step t depends on (seed, t)
alone. A resumed run sees the data that the interrupted one would have seen, and
several processes agree on a batch without talking.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdnctl.core.coloured import OCTAVES, camera_knots, camera_levels, curve, local_tone, shaped
from cdnctl.core.noise import sample_sigma
from cdnctl.errors import ImageError, UsageError
from cdnctl.images import is_image_path, read
from cdnctl.training.config import DataConfig, LossConfig, NoiseConfig

NAMED = 20  # of the files that cannot be read, in a message
MAX_MEMBER = 2**30  # bytes: a larger picture file in a zip file is refused before it is unpacked


@dataclass(frozen=True)
class Source:
    """A picture file of a dataset: its place, inside ``archive`` where that is a zip file.

    label: its class; None where it has none. key: which it is among all files of all datasets,
    wherever these lie and whether packed or not (see `load_datasets`).
    """

    path: Path
    label: str | None
    archive: Path | None = None
    key: str = ""


@dataclass(frozen=True)
class Unread:
    """A picture file that cannot be read, and was passed over. reason: names the file."""

    key: str
    reason: str


def find_pictures(root: Path, split: str = "train") -> list[Source]:
    """Pictures under ``root``, an ImageFolder (root/class/*), a flat folder, or either below
    root/train and root/val; or a zip file of any of these. An absent split other than "train"
    gives an empty list.

    A zip file and the folder that it was made from give the same pictures in the same order.
    UsageError if there is no such folder or file, no picture in it, val without train, or no
    telling what is meant.
    """
    if root.is_dir():
        folders = {name for name in (split, "val") if (root / name).is_dir()}
    else:
        names = _names_in_zip(root)
        folders = {n.parts[0] for n in names if len(n.parts) > 1}
    if split not in folders:
        if split != "train":
            return []
        if "val" in folders:
            raise UsageError(
                f"no training pictures in {str(root)!r}: it has val/, but no train/ for them. "
                "To measure a model, 'cdnctl evaluate' takes such a folder"
                + ("" if root.is_dir() else ", unpacked")
            )
    base = root / split if split in folders else root
    if root.is_dir():
        plain = [Source(p, None) for p in sorted(base.iterdir()) if p.is_file()]
        classes = [
            Source(p, folder.name)
            for folder in sorted(p for p in base.iterdir() if p.is_dir())
            for p in sorted(folder.rglob("*"))
            if p.is_file()
        ]
    else:
        if split in folders:
            names = [n for n in names if n.parts[0] == split and len(n.parts) > 1]
        depth = 1 if split in folders else 0
        sources = [
            Source(Path(n), n.parts[depth] if len(n.parts) > depth + 1 else None, root)
            for n in names
        ]
        plain = [s for s in sources if s.label is None]
        classes = [s for s in sources if s.label is not None]
    plain = [s for s in plain if is_image_path(s.path)]
    classes = [s for s in classes if is_image_path(s.path)]
    if plain and classes:
        raise UsageError(
            f"{str(base)!r} holds both pictures ({plain[0].path.name!r}) and folders of pictures "
            f"({classes[0].label!r}): are its pictures labelled or not? Move one kind elsewhere"
        )
    if not plain and not classes:
        raise UsageError(
            f"no pictures in {str(base)!r}: expected {root}/CLASS/*.png, "
            f"{root}/train/CLASS/*.png or a flat folder of pictures"
        )
    return plain + classes


def _names_in_zip(path: Path) -> list[PurePosixPath]:
    """Names of the files in a zip file, sorted like those in a folder.

    Names are only read as labels and never become paths on the disk, but one that looks as if
    it wanted to is refused all the same: whoever made it meant something else by it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
    except FileNotFoundError:
        raise UsageError(f"{str(path)!r} is not a folder or zip file: it is not there") from None
    except Exception as error:  # damaged directories of zip files fail in every way there is
        raise UsageError(f"{str(path)!r} is not a folder or zip file: {error}") from None
    names = set()
    for member in members:
        name = PurePosixPath(member.filename)
        plain = str(name) == member.filename and "\\" not in member.filename
        if not plain or not name.parts or name.parts[0] == "/" or ".." in name.parts:
            raise UsageError(
                f"{str(path)!r} holds {member.filename!r}, which is no plain name of a file in a "
                "folder: pack the pictures anew, such as 'CLASS/1.png'"
            )
        if name.parts[0] == "__MACOSX":  # remarks of another system on the other files
            continue
        if name.suffix.lower() == ".zip":
            raise UsageError(
                f"{str(path)!r} holds another zip file, {member.filename!r}: "
                "unpack it and give the inner one"
            )
        if is_image_path(Path(name)):
            if member.flag_bits & 1:
                raise UsageError(
                    f"{member.filename!r} in {str(path)!r} is encrypted: unpack it yourself, and "
                    "give the folder"
                )
            if member.file_size > MAX_MEMBER:
                raise UsageError(
                    f"{member.filename!r} in {str(path)!r} claims {member.file_size} bytes, more "
                    f"than the limit of {MAX_MEMBER}: take it out"
                )
        names.add(name)
    return sorted(names)


def _load(source: Source, archives: Mapping[Path, zipfile.ZipFile]) -> Tensor:
    """One picture as uint8 (3, H, W)."""
    if source.archive is None:
        pixels = read(source.path).pixels
    else:
        place = f"{source.archive}:{source.path.as_posix()}"
        try:
            pixels = read(io.BytesIO(archives[source.archive].read(source.path.as_posix()))).pixels
        except ImageError as error:  # of the picture; it says 'standard input' where we know more
            reason = str(error).partition("standard input': ")[2] or error
            raise ImageError(f"cannot read {place!r}: {reason}") from None
        except Exception as error:  # of the zip file: as many kinds as there are ways to pack
            raise ImageError(
                f"cannot read {place!r}: the zip file is damaged ({error or type(error).__name__})"
            ) from None
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    levels = np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1)))


def _attempt(source: Source, archives: Mapping[Path, zipfile.ZipFile]) -> Tensor | Unread:
    """`_load`, or why not."""
    try:
        return _load(source, archives)
    except ImageError as error:
        return Unread(source.key, str(error))


def listed(unread: Sequence[Unread]) -> str:
    """Why the first of them could not be read, a line each, and how many more there are."""
    lines = [u.reason for u in unread[:NAMED]]
    if len(unread) > NAMED:
        lines.append(f"and {len(unread) - NAMED} more")
    return "".join(f"\n  {line}" for line in lines)


@dataclass(frozen=True)
class Pictures:
    """Many pictures of any sizes. ``labels`` index ``classes``; -1 means unlabelled.

    unread: files that were to be among them and could not be read.
    """

    buffer: Tensor  # uint8, all pictures one after the other, each (3, H, W)
    offsets: Tensor  # (N,) int64
    sizes: Tensor  # (N, 2) int64, H and W
    labels: Tensor  # (N,) int64
    classes: tuple[str, ...]
    unread: tuple[Unread, ...] = ()

    @staticmethod
    def load(sources: Sequence[Source], classes: Sequence[str], device: torch.device) -> Pictures:
        """Decode all files into memory, but for those that cannot be read.

        ImageError if these are more than a tenth (and more than one), or all.
        """
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            archives = {
                path: stack.enter_context(zipfile.ZipFile(path))
                for path in {s.archive for s in sources if s.archive is not None}
            }
            found = list(pool.map(lambda s: _attempt(s, archives), sources))
        unread = tuple(item for item in found if isinstance(item, Unread))
        pictures = [item for item in found if isinstance(item, Tensor)]
        read = [s for s, item in zip(sources, found, strict=True) if isinstance(item, Tensor)]
        if len(unread) > max(1, len(sources) // 10) or not read:
            raise ImageError(
                f"{len(unread)} of {len(sources)} pictures cannot be read, which is too many to go "
                f"on without them: mend or remove them{listed(unread)}"
            )
        index = {name: i for i, name in enumerate(classes)}
        lengths = torch.tensor([p.numel() for p in pictures])
        return Pictures(
            buffer=torch.cat([p.flatten() for p in pictures]).to(device),
            offsets=(lengths.cumsum(0) - lengths).to(device),
            sizes=torch.tensor([p.shape[1:] for p in pictures]).to(device),
            labels=torch.tensor([-1 if s.label is None else index[s.label] for s in read]).to(
                device
            ),
            classes=tuple(classes),
            unread=unread,
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def crops(self, which: Tensor, top: Tensor, left: Tensor, turn: Tensor, side: int) -> Tensor:
        """Square crops (B, 3, side, side) in [0, 1].

        which, top, left: (B,); pixels outside a picture are reflected. turn: (B,)
        in 0..7, one of the eight symmetries of the square (bit 0 flips columns,
        bit 1 rows, bit 2 transposes).
        """
        device = self.buffer.device
        which, top, left, turn = (t.to(device) for t in (which, top, left, turn))
        i, j = torch.meshgrid(
            torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij"
        )
        bit = [(turn >> k & 1).bool()[:, None, None] for k in range(3)]
        row, col = torch.where(bit[2], j, i), torch.where(bit[2], i, j)
        row = torch.where(bit[1], side - 1 - row, row) + top[:, None, None]
        col = torch.where(bit[0], side - 1 - col, col) + left[:, None, None]
        height, width = self.sizes[which, 0, None, None], self.sizes[which, 1, None, None]
        row, col = _reflect(row, height), _reflect(col, width)
        plane = (self.offsets[which, None, None] + row * width + col)[:, None]
        channel = torch.arange(3, device=device).view(1, 3, 1, 1)
        index = plane + channel * (height * width)[:, None]
        return self.buffer[index].to(torch.float32) / 255

    def subset(self, keep: Tensor) -> Pictures:
        """The pictures with these indices (the buffer is shared)."""
        keep = keep.to(self.offsets.device)
        return Pictures(
            self.buffer, self.offsets[keep], self.sizes[keep], self.labels[keep], self.classes
        )


def _reflect(index: Tensor, size: Tensor) -> Tensor:
    """Indices folded into 0..size-1 by reflection at the edges (edge pixel not repeated)."""
    period = (2 * size - 2).clamp_min(1)
    index = index % period
    return torch.minimum(index, (period - index).clamp_min(0)).clamp_max(size - 1)


@dataclass(frozen=True)
class Batch:
    """Clean crops, noise and labels; ``condition`` marks who is denoised given its class.

    ``told`` is what the network hears of sigma. Some pictures may be told less than the
    truth: such noise is all but impossible under p_told, so score matching at the right
    level says nothing about it, and without examples the gradient may be anything there.
    Others may be told more: so little noise is as improbable under p_told, and a network
    that has never met it makes a relief of it.
    """

    clean: Tensor  # (B, 3, p, p) in [0, 1]
    noise: Tensor  # like clean, unit variance, of camera noise on average over tones
    sigma: Tensor  # (B,) in [0, 1] pixel units
    told: Tensor  # (B,): sigma, or for some pictures a quarter of it to all of it, or more
    labels: Tensor  # (B,) int64, -1 unlabelled
    condition: Tensor  # (B,) bool
    spectrum: Tensor | None = None  # what else is told of camera noise, see `core.coloured.Told`
    relief: Tensor | None = None
    lesson: Batch | None = None  # pictures for the class loss alone
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
        if self.data.flats:
            batch = self._with_flats(batch, g, len(which), rows)
        if self.data.patterns:
            batch = self._with_patterns(batch, g, len(which), rows)
        if self.noise.camera:
            batch = self._with_camera_noise(batch, g, len(which), rows)
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
        sigma = sample_sigma(b, self.noise.low, self.noise.high, self.noise.power, g) / 255
        condition = labelled & (torch.rand(b, generator=g) < self.loss.conditional)
        if device.type == "cpu":
            noise = torch.randn(b, 3, p, p, generator=g)
        else:  # on the device itself: host normals would starve a GPU
            on_device = torch.Generator(device).manual_seed(g.initial_seed())
            noise = torch.randn(b, 3, p, p, generator=on_device, device=device)
        short = torch.rand(b, generator=g) < self.noise.mismatch
        told = torch.where(short, sigma * (0.25 + 0.75 * torch.rand(b, generator=g)), sigma)
        if most:
            sigma = told = most / 255 * (2 * torch.rand(b, generator=g) - 1).clamp_min(0)
        else:
            if self.noise.wide:
                low, high = math.log(self.noise.high / 255), math.log(self.noise.top / 255)
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
        colour = torch.rand(count, 3, 1, 1, generator=g)
        slopes = torch.rand(2, count, 3, 1, 1, generator=g) - 0.5
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
        colours = torch.rand(2, count, 3, 1, 1, generator=g)
        gray = torch.rand(count, 1, 1, 1, generator=g)
        colours = torch.where(gray < 0.5, colours[:, :, :1], colours)
        full = torch.arange(2.0).view(2, 1, 1, 1, 1).expand_as(colours)
        colours = torch.where(gray < 0.25, full, colours)
        pattern = torch.where(which[:, None].bool(), colours[1], colours[0])
        return _replaced(batch, chosen[rows], pattern[rows])


    def _with_camera_noise(
        self, batch: Batch, g: torch.Generator, count: int, rows: slice
    ) -> Batch:
        """The noise of some crops shaped as cameras do it; what is told of it errs a little."""
        device, side = batch.clean.device, batch.clean.shape[-1]
        chosen = torch.rand(count, generator=g) < self.noise.camera
        levels, knots = camera_levels(count, g), camera_knots(count, g)
        errors = 0.15 * torch.randn(count, 2, OCTAVES, generator=g)
        around = side + 16  # shaped noise is periodic
        white = torch.randn(count, 3, around, around, generator=g)
        levels, knots, errors = (_send(t[rows], device) for t in (levels, knots, errors))
        here = _send(chosen[rows], device)
        noise, spectrum = shaped(_send(white[rows], device), levels)
        noise = noise[..., :side, :side] * curve(batch.clean.mean(1, keepdim=True), knots)
        noise = torch.where(here.view(-1, 1, 1, 1), noise, batch.noise)
        y = batch.clean + batch.sigma.view(-1, 1, 1, 1) * noise
        relief = curve(local_tone(y), knots)
        return replace(
            batch,
            noise=noise,
            spectrum=torch.where(here.view(-1, 1, 1), spectrum + errors, 0),
            relief=torch.where(here.view(-1, 1, 1, 1), relief, 1),
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

    A GPU fetches by itself what lies in page-locked memory; of any other the host would have to
    wait until the GPU has done all that was asked of it before.
    """
    tensor = tensor.contiguous()
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def split_holdout(pictures: Pictures, count: int) -> tuple[Pictures, Pictures]:
    """(training, validation): evenly spaced pictures, at most a tenth, go to validation."""
    n = len(pictures)
    count = min(count, n // 10)
    if count == 0:
        return pictures, pictures.subset(torch.arange(0))
    held = (torch.arange(count, dtype=torch.float64) * n / count).long()
    keep = torch.ones(n, dtype=torch.bool)
    keep[held] = False
    training = replace(pictures.subset(keep.nonzero().flatten()), unread=pictures.unread)
    return training, pictures.subset(held)


def fingerprint(*parts: Pictures) -> dict[str, Any]:
    """What tells whether pictures are the same, wherever they lie: their number, pixels, and
    a SHA-256 of pixels, sizes and labels in order."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in (part.buffer, part.sizes, part.labels):
            digest.update(tensor.cpu().contiguous().numpy().data)
    return {
        "pictures": sum(len(p) for p in parts),
        "pixels": sum(int(p.sizes.prod(1).sum()) for p in parts),
        "sha256": digest.hexdigest(),
    }


def load_datasets(
    roots: Iterable[Path], data: DataConfig, device: torch.device, without: Collection[str] = ()
) -> tuple[Pictures, Pictures]:
    """All datasets of a run as (training, validation) pictures over the union of their classes.

    Validation is what lies in root/val; without any, ``data.holdout`` pictures are
    kept out of training. Files that cannot be read are passed over, see `Pictures.load`.
    without: keys of files to leave out unseen, as they were when the run began.
    """
    roots, left_out = list(roots), set(without)

    def sources(split: str) -> list[Source]:
        found = []
        for number, root in enumerate(roots):
            for s in find_pictures(root, split):
                name = s.path if s.archive is not None else s.path.relative_to(root)
                found.append(replace(s, key=f"{number}:{name.as_posix()}"))
        return [s for s in found if s.key not in left_out]

    train, val = sources("train"), sources("val")
    classes = sorted({s.label for s in train if s.label is not None})
    unknown = {s.label for s in val if s.label is not None} - set(classes)
    if unknown:
        raise UsageError(f"classes in val/ that train/ does not have: {sorted(unknown)}")
    pictures = Pictures.load(train, classes, device)
    found = set(pictures.labels.tolist())
    if lost := [name for i, name in enumerate(classes) if i not in found]:
        raise ImageError(
            f"no picture of {', '.join(map(repr, lost))} can be read: mend or remove them"
            f"{listed(pictures.unread)}"
        )
    if val:
        return pictures, Pictures.load(val, classes, device)
    return split_holdout(pictures, data.holdout)
