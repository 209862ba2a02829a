"""Sets of pictures to train on: as files, packed or not, and in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from cdnctl.training.datasets import Pictures


def picture(path: Path, size: tuple[int, int] = (4, 4), level: int | Any = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)
    return path


BROKEN = b"\x89PNG\r\n\x1a\n nothing more"


def labelled(root: Path, count: int, broken: Collection[str] = ()) -> Path:
    """Pictures of two classes, told apart by their levels; some of them broken."""
    for i in range(count):
        path = picture(root / "ab"[i % 2] / f"{i}.png", level=i)
        if path.relative_to(root).as_posix() in broken:
            path.write_bytes(BROKEN)
    return root


def pack(target: Path, folder: Path) -> Path:
    """A zip file of all files in a folder, in no good order."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True):
            archive.write(path, path.relative_to(folder))
    return target


def same_pictures(a: Pictures, b: Pictures) -> bool:
    tensors = ("buffer", "offsets", "sizes", "labels")
    return a.classes == b.classes and all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in tensors
    )


def collection(
    sizes: list[tuple[int, int]], labels: list[int], classes: tuple[str, ...] = ("a", "b", "c")
) -> tuple[Pictures, list[np.ndarray]]:
    """Random pictures, as ``Pictures`` and as arrays (H, W, 3) in [0, 1]."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    flat = [torch.from_numpy(a.transpose(2, 0, 1).copy()).flatten() for a in arrays]
    lengths = torch.tensor([len(f) for f in flat])
    pictures = Pictures(
        torch.cat(flat),
        lengths.cumsum(0) - lengths,
        torch.tensor(sizes),
        torch.tensor(labels),
        classes,
    )
    return pictures, [np.float32(a) / 255 for a in arrays]


def flat_pictures(labels: list[int]) -> Pictures:
    """Pictures of one level each, which tell which one a crop came from."""
    n = len(labels)
    buffer = torch.arange(n, dtype=torch.uint8).repeat_interleave(3 * 4 * 4)
    size = torch.full((n, 2), 4)
    return Pictures(buffer, torch.arange(n) * 48, size, torch.tensor(labels), ("a", "b"))
