"""Big pictures in tiles: equal to the whole, at a fraction of the memory.

A tile is read with a margin and only its core is kept. If the margin is no less
than the network's receptive radius and tiles start at multiples of the
network's coarsest cell, a kept pixel has the value that the whole picture would
have given it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[slice, slice]


@dataclass(frozen=True)
class Tile:
    """``read``: rows and columns of the picture that go in. ``core``: which of them are
    kept, counted from the tile's own corner. ``place``: where they go in the picture."""

    read: Box
    core: Box
    place: Box


def plan(height: int, width: int, tile: int, margin: int, multiple: int) -> list[Tile]:
    """Tiles that cover a picture, all of one size (the last of a row or column overlaps more).

    height, width: multiples of ``multiple``. tile: no tile has more than tile x tile pixels
    with its margins, as far as that leaves a core. Of the sizes that do, the one with the
    fewest pixels in all tiles together is taken; without margins all have as many, and the one
    with the fewest tiles is.

    >>> for t in plan(8, 24, tile=12, margin=2, multiple=4):
    ...     print(t.read[1], "keeps", t.core[1], "for", t.place[1])
    slice(0, 16, None) keeps slice(0, 12, None) for slice(0, 12, None)
    slice(8, 24, None) keeps slice(4, 16, None) for slice(12, 24, None)
    """
    margin += -margin % multiple

    def lengths(size: int) -> Iterator[tuple[int, int]]:
        """Numbers of tiles along an axis, and how long they then must be."""
        yield 1, size
        count = 2
        while size > 2 * margin + multiple:
            core = -(-(size - 2 * margin) // count)
            length = 2 * margin + core + -core % multiple
            if length < size:
                yield count, length
            if core <= multiple:
                return
            count += 1

    least = min(2 * margin + multiple, height) * min(2 * margin + multiple, width)
    area = max(tile**2, least)
    columns = list(lengths(width))
    _, _, h, w = min(
        (rows * count * h * w, 0 if margin else rows * count, h, w)
        for rows, h in lengths(height)
        # Fewer columns are fewer pixels: the first that fit are the best for this height.
        for count, w in [next(((n, w) for n, w in columns if h * w <= area), (0, 0))]
        if count
    )
    return [
        Tile((r, c), (kr, kc), (pr, pc))
        for r, kr, pr in _spans(height, h, margin)
        for c, kc, pc in _spans(width, w, margin)
    ]


def _spans(size: int, length: int, margin: int) -> Iterator[tuple[slice, slice, slice]]:
    """Tiles along an axis: what is read, which part of it is kept, and where that goes."""
    done = 0
    while done < size:
        start = min(max(done - margin, 0), size - length)
        end = size if start + length == size else start + length - margin
        yield slice(start, start + length), slice(done - start, end - start), slice(done, end)
        done = end


def run(
    function: Callable[[Tensor], Tensor],
    read: Callable[[Box], Tensor],
    tiles: Sequence[Tile],
    device: torch.device,
) -> Iterator[tuple[Box, Tensor]]:
    """Apply ``function``, (B, C, h, w) to the same, tile by tile: places and what belongs there.

    read: rows and columns of the picture to (C, h, w), on the host. One tile at a time visits
    ``device``; a budget of memory is better spent on larger tiles, whose margins weigh less,
    than on more of them.
    """
    for tile in tiles:
        out = function(read(tile.read)[None].to(device))[0].cpu()
        yield tile.place, out[(..., *tile.core)]


def mean_of_cells(
    function: Callable[[Tensor], Tensor],
    read: Callable[[Box], Tensor],
    tiles: Sequence[Tile],
    device: torch.device,
    cell: int,
) -> Tensor:
    """Mean over a whole picture of a coarse map that is computed tile by tile: (F,), float64.

    function: (B, C, h, w) to (B, F, h / cell, w / cell). read: as for `run`.
    """
    total: Tensor | None = None
    cells = 0
    for tile in tiles:
        out = function(read(tile.read)[None].to(device))[0].cpu()
        rows, columns = (slice(s.start // cell, s.stop // cell) for s in tile.core)
        part = out[:, rows, columns].double()
        cells += part.shape[1] * part.shape[2]
        total = part.sum((1, 2)) + (0 if total is None else total)
    assert total is not None
    return total / cells
