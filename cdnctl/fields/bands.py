"""Which part of a picture is drawn given the rest: some cells of its wavelet packets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from cdnctl.transforms.wavelet import from_packets, packets

Cells = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Bands:
    """An orthonormal map from pictures (..., L, L) to coefficients (..., K, h, w) of K cells.

    It is the upper part of an orthogonal matrix: take(give(z)) = z, and give(take(x)) is the
    projection of x. L is a multiple of 2^depth. Coefficients of all cells of depth 0 are the
    pixels.
    """

    wavelet: str
    depth: int
    cells: Cells  # (row, column) by frequency, see `transforms.wavelet.packets`

    @cached_property
    def _places(self) -> Tensor:
        return torch.tensor([(row << self.depth) + column for row, column in self.cells])

    def take(self, x: Tensor) -> Tensor:
        """The coefficients of pictures."""
        cells = packets(x, self.depth, self.wavelet).flatten(-4, -3)
        return cells.index_select(-3, self._places.to(x.device))

    def give(self, z: Tensor) -> Tensor:
        """Pictures of the coefficients, with nothing in the other cells: the adjoint of `take`."""
        side = 1 << self.depth
        cells = z.new_zeros((*z.shape[:-3], side * side, *z.shape[-2:]))
        cells = cells.index_copy(-3, self._places.to(z.device), z)
        return from_packets(cells.unflatten(-3, (side, side)), self.wavelet)

    def rest(self, x: Tensor) -> Tensor:
        """Pictures without these bands."""
        return x - self.give(self.take(x))

    def overlaps(self, side: int) -> Tensor:
        """P[i, i + s] of the projection P on pictures of that side, (2^depth, 2^depth, L, L): by
        the place of pixel i in a block of that size, then by the shift s. It is periodic in i."""
        return _overlaps(self, side)

    def weights(self, side: int) -> Tensor:
        """The diagonal of the projection, (L, L): the share of each pixel in the bands."""
        blocks = side >> self.depth
        return self.overlaps(side)[:, :, 0, 0].repeat(blocks, blocks)

    def trace(self, side: int, shift: tuple[int, int]) -> float:
        """Sum of P[i, i + shift] over all pixels i."""
        per_block = self.overlaps(side)[:, :, shift[0] % side, shift[1] % side].sum()
        return float(per_block) * (side >> self.depth) ** 2


@lru_cache(maxsize=64)
def _overlaps(bands: Bands, side: int) -> Tensor:
    period = 1 << bands.depth
    rows = []
    for i in range(period):
        for j in range(period):
            point = torch.zeros(side, side, dtype=torch.float64)
            point[i, j] = 1
            rows.append(bands.give(bands.take(point)).roll((-i, -j), (0, 1)))
    return torch.stack(rows).unflatten(0, (period, period))


def whole(wavelet: str = "haar") -> Bands:
    """The picture itself."""
    return Bands(wavelet, 0, ((0, 0),))


def octave(wavelet: str) -> tuple[Bands]:
    """What the picture of half the side lacks, at once."""
    return (Bands(wavelet, 1, ((0, 1), (1, 0), (1, 1))),)


def half_octaves(wavelet: str) -> tuple[Bands, Bands]:
    """The same in two parts, the finer one first: a conditional law of each is nearer to a
    log-concave one (Guth, Lempereur, Bruna, Mallat 2023)."""
    rings = ([(r, c) for r in range(4) for c in range(4) if max(r, c) == k] for k in (3, 2))
    fine, coarse = (Bands(wavelet, 2, tuple(ring)) for ring in rings)
    return fine, coarse
