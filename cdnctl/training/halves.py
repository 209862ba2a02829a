"""Disjoint halves of the pictures of a run, and fewer of them: what networks are compared on.

The order in which pictures are taken is random and the same for every run on the same pictures,
so that fewer are the first of more. A picture that is nearly one before it in that order is left
out: a copy of it in the other half would be seen by both networks, and they would agree on it
without having learnt anything.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cdnctl.errors import UsageError
from cdnctl.training.config import DataConfig
from cdnctl.training.datasets import Pictures

SEED = 0  # of the order
THUMBNAIL = 20  # side at which pictures are compared, in pixels
ALIKE = 0.95  # correlation above which two are taken for one
CHUNK = 2048  # pictures that are compared with all before them at once


def chosen(pictures: Pictures, data: DataConfig) -> Pictures:
    """The part of the pictures that a config asks for, with a buffer of its own: ``data.half`` of
    them, at most ``data.limit`` (0: all). The pictures themselves where neither is asked for.

    UsageError if there is none.
    """
    if data.half == "all" and not data.limit:
        return pictures
    n = len(pictures)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))
    step = 1 if data.half == "all" else 2
    wanted = min(n, data.limit * step) if data.limit else n
    if data.distinct:
        order = distinct(pictures, order, wanted)
    start = int(data.half == "second")
    keep = order[:wanted][start::step]
    if not len(keep):
        raise UsageError(
            f"data.half is {data.half!r}, but of {n} pictures {len(order)} differ from all others: "
            "give more of them, or train on all"
        )
    return _copied(pictures, keep.sort().values)


def distinct(pictures: Pictures, order: Tensor, wanted: int) -> Tensor:
    """The first ``wanted`` of an order of pictures, (n,) indices, that are unlike all before them;
    fewer where there are no more.

    Pictures are alike whose gray thumbnails correlate by more than ALIKE. Flat ones, whose
    correlation is not defined, are alike.
    """
    kept: list[Tensor] = []
    found = 0
    before = torch.zeros(0, THUMBNAIL**2)
    for part in order.split(CHUNK):
        if found >= wanted:
            break
        fresh = thumbnails(pictures, part)
        new = _unlike(fresh, before)
        # Within the part each is compared with those before it, kept or not.
        new &= ~((fresh @ fresh.T) > ALIKE).tril(-1).any(1)
        before = torch.cat([before, fresh])
        kept.append(part[new])
        found += int(new.sum())
    return torch.cat(kept)[:wanted] if kept else order


def _unlike(fresh: Tensor, before: Tensor) -> Tensor:
    """Which of the fresh vectors are unlike all of those before, (B,) of bool."""
    new = torch.ones(len(fresh), dtype=torch.bool)
    for part in before.split(CHUNK):
        new &= ~((fresh @ part.T) > ALIKE).any(1)
    return new


def thumbnails(pictures: Pictures, which: Tensor) -> Tensor:
    """Gray pictures of THUMBNAIL squared pixels, as vectors of mean 0 and length 1, (B, n). All
    flat pictures are one constant vector."""
    rows = []
    for i in which.tolist():
        height, width = pictures.sizes[i].tolist()
        start, count = int(pictures.offsets[i]), pictures.channels * height * width
        pixels = pictures.buffer[start : start + count].view(pictures.channels, height, width)
        gray = pixels.cpu().float().mean(0)[None, None]
        rows.append(interpolate(gray, (THUMBNAIL, THUMBNAIL), mode="area").flatten())
    flat = torch.stack(rows)
    flat = flat - flat.mean(1, keepdim=True)
    length = flat.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-3, flat / length.clamp_min(1e-3), THUMBNAIL**-1.0)


def _copied(pictures: Pictures, keep: Tensor) -> Pictures:
    """These pictures, without the others in the buffer."""
    part = pictures.subset(keep)
    lengths = part.sizes.prod(1) * pictures.channels
    pieces = [
        part.buffer[start : start + count]
        for start, count in zip(part.offsets.tolist(), lengths.tolist(), strict=True)
    ]
    return replace(
        part,
        buffer=torch.cat(pieces) if pieces else part.buffer[:0],
        offsets=lengths.cumsum(0) - lengths,
        unread=pictures.unread,
    )
