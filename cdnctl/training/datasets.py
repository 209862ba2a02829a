"""Datasets: picture files in folders and zip files, and all of them in memory.

All pictures of a run lie in one flat uint8 buffer on the compute device. Random crops, flips
and quarter turns of many are a single gather from it: the augmentation is arithmetic on
indices, so pictures of any size mix freely.
"""

from __future__ import annotations

import hashlib
import io
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

from cdnctl.errors import ImageError, UsageError
from cdnctl.images import PEAK, from_unit, is_image_path, read
from cdnctl.training.config import DataConfig

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


def _load(source: Source, archives: Mapping[Path, zipfile.ZipFile], channels: int) -> Tensor:
    """One picture as uint8 (channels, H, W). Gray is repeated, or colour averaged."""
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
    if pixels.shape[2] < channels:
        pixels = pixels.repeat(channels, axis=2)
    elif pixels.shape[2] > channels:
        pixels = pixels.mean(2, keepdims=True)
    levels = from_unit(pixels, np.dtype(np.uint8))
    return torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1)))


def _attempt(
    source: Source, archives: Mapping[Path, zipfile.ZipFile], channels: int
) -> Tensor | Unread:
    """`_load`, or why not."""
    try:
        return _load(source, archives, channels)
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

    buffer: Tensor  # uint8, all pictures one after the other, each (C, H, W)
    offsets: Tensor  # (N,) int64
    sizes: Tensor  # (N, 2) int64, H and W
    labels: Tensor  # (N,) int64
    classes: tuple[str, ...]
    unread: tuple[Unread, ...] = ()
    channels: int = 3  # C

    @staticmethod
    def load(
        sources: Sequence[Source], classes: Sequence[str], device: torch.device, channels: int = 3
    ) -> Pictures:
        """Decode all files into memory, but for those that cannot be read.

        ImageError if these are more than a tenth (and more than one), or all.
        """
        with ExitStack() as stack, ThreadPoolExecutor() as pool:
            archives = {
                path: stack.enter_context(zipfile.ZipFile(path))
                for path in {s.archive for s in sources if s.archive is not None}
            }
            found = list(pool.map(lambda s: _attempt(s, archives, channels), sources))
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
            channels=channels,
        )

    def __len__(self) -> int:
        return len(self.offsets)

    def crops(self, which: Tensor, top: Tensor, left: Tensor, turn: Tensor, side: int) -> Tensor:
        """Square crops (B, C, side, side) in [0, 1].

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
        channel = torch.arange(self.channels, device=device).view(1, -1, 1, 1)
        index = plane + channel * (height * width)[:, None]
        return self.buffer[index].to(torch.float32) / PEAK

    def subset(self, keep: Tensor) -> Pictures:
        """The pictures with these indices (the buffer is shared)."""
        keep = keep.to(self.offsets.device)
        return replace(
            self,
            offsets=self.offsets[keep],
            sizes=self.sizes[keep],
            labels=self.labels[keep],
            unread=(),
        )


def _reflect(index: Tensor, size: Tensor) -> Tensor:
    """Indices folded into 0..size-1 by reflection at the edges (edge pixel not repeated)."""
    period = (2 * size - 2).clamp_min(1)
    index = index % period
    return torch.minimum(index, (period - index).clamp_min(0)).clamp_max(size - 1)


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
    roots: Iterable[Path],
    data: DataConfig,
    device: torch.device,
    without: Collection[str] = (),
    channels: int = 3,
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
    pictures = Pictures.load(train, classes, device, channels)
    found = set(pictures.labels.tolist())
    if lost := [name for i, name in enumerate(classes) if i not in found]:
        raise ImageError(
            f"no picture of {', '.join(map(repr, lost))} can be read: mend or remove them"
            f"{listed(pictures.unread)}"
        )
    if val:
        return pictures, Pictures.load(val, classes, device, channels)
    return split_holdout(pictures, data.holdout)
