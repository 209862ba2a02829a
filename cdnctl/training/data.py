"""Training pictures in memory, and batches drawn from them.

All pictures of a run lie in one flat uint8 buffer on the compute device. A batch
of random crops, flips and quarter turns is a single gather from it: the
augmentation is arithmetic on indices, so pictures of any size mix freely.

Randomness is counted, not carried: the batch of step t depends on (seed, t)
alone. A resumed run sees the data that the interrupted one would have seen, and
several processes agree on a batch without talking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdnctl.core.noise import sample_sigma
from cdnctl.errors import UsageError
from cdnctl.images import is_image_path, read
from cdnctl.training.config import DataConfig, LossConfig, NoiseConfig


@dataclass(frozen=True)
class Source:
    """Picture files of a dataset; label None where it is a flat folder."""

    path: Path
    label: str | None


def find_pictures(root: Path, split: str = "train") -> list[Source]:
    """Pictures under ``root``, an ImageFolder (root/class/*), a flat folder, or either below
    root/train and root/val. An absent split other than "train" gives an empty list.

    UsageError if there is no such folder or no picture in it.
    """
    if not root.is_dir():
        raise UsageError(f"{str(root)!r} is not a folder")
    base = root / split
    if not base.is_dir():
        if split != "train":
            return []
        base = root
    found = [Source(p, None) for p in sorted(base.iterdir()) if p.is_file() and is_image_path(p)]
    classes = [
        Source(p, folder.name)
        for folder in sorted(p for p in base.iterdir() if p.is_dir())
        for p in sorted(folder.rglob("*"))
        if p.is_file() and is_image_path(p)
    ]
    if found and classes:
        raise UsageError(
            f"{str(base)!r} holds both pictures ({found[0].path.name!r}) and folders of pictures "
            f"({classes[0].label!r}): are its pictures labelled or not? Move one kind elsewhere"
        )
    found += classes
    if not found:
        raise UsageError(
            f"no pictures in {str(base)!r}: expected {root}/CLASS/*.png, "
            f"{root}/train/CLASS/*.png or a flat folder of pictures"
        )
    return found


def _load(source: Source) -> Tensor:
    """One picture as uint8 (3, H, W)."""
    pixels = read(source.path).pixels
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    levels = np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1)))


@dataclass(frozen=True)
class Pictures:
    """Many pictures of any sizes. ``labels`` index ``classes``; -1 means unlabelled."""

    buffer: Tensor  # uint8, all pictures one after the other, each (3, H, W)
    offsets: Tensor  # (N,) int64
    sizes: Tensor  # (N, 2) int64, H and W
    labels: Tensor  # (N,) int64
    classes: tuple[str, ...]

    @staticmethod
    def load(sources: Sequence[Source], classes: Sequence[str], device: torch.device) -> Pictures:
        """Decode all files into memory. ImageError names the first that cannot be read."""
        with ThreadPoolExecutor() as pool:
            pictures = list(pool.map(_load, sources))
        index = {name: i for i, name in enumerate(classes)}
        lengths = torch.tensor([p.numel() for p in pictures])
        return Pictures(
            buffer=torch.cat([p.flatten() for p in pictures]).to(device),
            offsets=(lengths.cumsum(0) - lengths).to(device),
            sizes=torch.tensor([p.shape[1:] for p in pictures]).to(device),
            labels=torch.tensor([-1 if s.label is None else index[s.label] for s in sources]).to(
                device
            ),
            classes=tuple(classes),
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
    """

    clean: Tensor  # (B, 3, p, p) in [0, 1]
    noise: Tensor  # like clean, unit variance
    sigma: Tensor  # (B,) in [0, 1] pixel units
    told: Tensor  # (B,): sigma, or for some pictures a quarter of it to all of it
    labels: Tensor  # (B,) int64, -1 unlabelled
    condition: Tensor  # (B,) bool


class Batches:
    """Batch t as a function of (seed, t)."""

    def __init__(
        self, pictures: Pictures, data: DataConfig, noise: NoiseConfig, loss: LossConfig, seed: int
    ):
        self.pictures, self.data, self.noise, self.loss = pictures, data, noise, loss
        self.seed = seed
        # Host copies: reading these back from a GPU at every step would stall it.
        self.labels, self.sizes = pictures.labels.cpu(), pictures.sizes.cpu()
        labelled = self.labels >= 0
        self.pools = [labelled.nonzero().flatten(), (~labelled).nonzero().flatten()]
        share = data.labelled_share
        count = round(data.batch * share)
        if not len(self.pools[0]):
            count = 0
        if not len(self.pools[1]):
            count = data.batch
        self.counts = [count, data.batch - count]
        self._orders: dict[tuple[int, int], Tensor] = {}

    def _generator(self, *key: int) -> torch.Generator:
        seed = self.seed
        for k in key:  # a plain mixing of integers; neighbours get unrelated streams
            seed = (seed * 6364136223846793005 + k + 1442695040888963407) % 2**63
        return torch.Generator().manual_seed(seed)

    def _draw(self, pool: int, step: int) -> Tensor:
        """Every picture of a pool once per epoch, in an order of the epoch's own."""
        members, count = self.pools[pool], self.counts[pool]
        places = torch.arange(step * count, (step + 1) * count)
        epochs, slots = places // max(len(members), 1), places % max(len(members), 1)
        chosen = torch.empty(count, dtype=torch.int64)
        for epoch in epochs.unique().tolist():
            if (pool, epoch) not in self._orders:
                self._orders = {k: v for k, v in self._orders.items() if k[0] != pool}
                order = torch.randperm(len(members), generator=self._generator(1 + pool, epoch))
                self._orders[pool, epoch] = members[order]
            here = epochs == epoch
            chosen[here] = self._orders[pool, epoch][slots[here]]
        return chosen

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Batch of a step; process ``rank`` of ``world`` gets its share of the rows."""
        g = self._generator(0, step)
        which = torch.cat([self._draw(0, step), self._draw(1, step)])
        b, p, device = len(which), self.data.patch, self.pictures.buffer.device
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
        rows = slice(rank, None, world)
        which, corner, turn = which[rows], corner[rows], turn[rows]
        return Batch(
            clean=self.pictures.crops(which, corner[:, 0], corner[:, 1], turn, p),
            noise=noise[rows],
            sigma=sigma[rows].to(device),
            told=told[rows].to(device),
            labels=labels[rows].to(device),
            condition=condition[rows].to(device),
        )


def split_holdout(pictures: Pictures, count: int) -> tuple[Pictures, Pictures]:
    """(training, validation): evenly spaced pictures, at most a tenth, go to validation."""
    n = len(pictures)
    count = min(count, n // 10)
    if count == 0:
        return pictures, pictures.subset(torch.arange(0))
    held = (torch.arange(count, dtype=torch.float64) * n / count).long()
    keep = torch.ones(n, dtype=torch.bool)
    keep[held] = False
    return pictures.subset(keep.nonzero().flatten()), pictures.subset(held)


def load_datasets(
    roots: Iterable[Path], data: DataConfig, device: torch.device
) -> tuple[Pictures, Pictures]:
    """All datasets of a run as (training, validation) pictures over the union of their classes.

    Validation is what lies in root/val; without any, ``data.holdout`` pictures are
    kept out of training.
    """
    roots = list(roots)
    train = [s for root in roots for s in find_pictures(root)]
    val = [s for root in roots for s in find_pictures(root, "val")]
    classes = sorted({s.label for s in train if s.label is not None})
    unknown = {s.label for s in val if s.label is not None} - set(classes)
    if unknown:
        raise UsageError(f"classes in val/ that train/ does not have: {sorted(unknown)}")
    pictures = Pictures.load(train, classes, device)
    if val:
        return pictures, Pictures.load(val, classes, device)
    return split_holdout(pictures, data.holdout)
