"""Orthonormal wavelets of periodic pictures: one level, pyramids, and packets by frequency.

Every transform here is an orthogonal matrix, for every even side: its adjoint is its inverse, and
white noise of level sigma stays white of level sigma in every band. All are differentiable.

Pictures are (..., H, W) with any leading axes and period H and W; they are transformed in their
own dtype and on their own device. Wavelets are the orthogonal ones of PyWavelets, by name: haar,
db2, db4, sym5, coif1 and so on. The result equals that of pywt with mode="periodization", without
any shift (Mallat, A Wavelet Tour of Signal Processing, 3rd edition, sections 7.3, 7.7, 8.1).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv_transpose1d

from cdnctl.errors import UsageError

# Up to this side an axis is multiplied by its orthogonal matrix: for small sides, of which
# thousands are transformed at a time, that is 2 (haar) to 40 (db4) times faster than filters.
DENSE = 128


@lru_cache
def _bank(wavelet: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Low and high filter, (2, K), to be correlated with a signal."""
    import pywt  # on first use: it takes a while to load

    try:
        taps = pywt.Wavelet(wavelet)
        # torch correlates where the definition convolves: the filters of the synthesis, which are
        # those of the analysis backwards.
        filters = [taps.rec_lo, taps.rec_hi]
    except (ValueError, AttributeError):  # not a name, or of a continuous wavelet
        filters = []
    # Kept for later calls, which may need gradients even if this one does not.
    with torch.inference_mode(False):
        bank = torch.tensor(filters, dtype=torch.float64, device="cpu")
        if not (filters and _is_orthogonal(bank)):
            raise UsageError(
                f"{wavelet!r} is not an orthogonal wavelet: give one such as haar, db2, db4 or sym5"
            )
        return bank.to(device, dtype)


def _is_orthogonal(bank: Tensor) -> bool:
    """Whether it is to six digits; those called so by name may have been cut off ('dmey')."""
    eye = torch.eye(bank.shape[1], dtype=bank.dtype, device="cpu")
    matrix = _filter(eye, bank)
    return torch.allclose(matrix @ matrix.T, eye, rtol=0, atol=1e-6)


def _wrapped(side: int, taps: int, device: torch.device) -> Tensor:
    """Indices of a signal with the margins that filters of an even length need, modulo its side:
    they may be longer than the signal."""
    before = (taps - 2) // 2
    return torch.arange(-before, side + taps - 2 - before, device=device) % side


def _filter(x: Tensor, bank: Tensor) -> Tensor:
    """The last axis in its low and its high half: (..., n) -> (..., n)."""
    n, taps = x.shape[-1], bank.shape[1]
    signal = x.index_select(-1, _wrapped(n, taps, x.device))
    halves = conv1d(signal.reshape(-1, 1, signal.shape[-1]), bank[:, None], stride=2)
    return halves.reshape(x.shape)  # both halves of a row, one after the other


def _unfilter(z: Tensor, bank: Tensor) -> Tensor:
    """The adjoint of `_filter`: what falls on the margins is added where it came from."""
    n, taps = z.shape[-1], bank.shape[1]
    signal = conv_transpose1d(z.reshape(-1, 2, n // 2), bank[:, None], stride=2)
    margins = _wrapped(n, taps, z.device)
    return z.new_zeros(z.shape).index_add(-1, margins, signal.reshape(*z.shape[:-1], -1))


@lru_cache(maxsize=64)
def _matrix(wavelet: str, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthogonal matrix, (n, n), that does what `_filter` does."""
    with torch.inference_mode(False):
        eye = torch.eye(side, dtype=torch.float64, device="cpu")
        bank = _bank(wavelet, torch.float64, torch.device("cpu"))
        return _filter(eye, bank).T.contiguous().to(device, dtype)


def _along(x: Tensor, wavelet: str, inverse: bool) -> Tensor:
    """One level along the last axis, or its inverse: (..., n) -> (..., n)."""
    n = x.shape[-1]
    if n <= DENSE:
        matrix = _matrix(wavelet, n, x.dtype, x.device)
        return x @ (matrix if inverse else matrix.T)
    bank = _bank(wavelet, x.dtype, x.device)
    return _unfilter(x, bank) if inverse else _filter(x, bank)


def quarters(x: Tensor, wavelet: str = "haar") -> Tensor:
    """One level: (..., H, W) -> (..., 2, 2, H/2, W/2); low and high by height, then by width.

    UsageError if a side is odd, or the wavelet is none of the orthogonal ones.
    """
    *lead, h, w = x.shape
    if h % 2 or w % 2 or not h * w:
        raise UsageError(f"a picture of {w} x {h} has no halves: wavelets need even sides")
    z = _along(_along(x, wavelet, False).mT, wavelet, False).mT
    return z.reshape(*lead, 2, h // 2, 2, w // 2).transpose(-3, -2)


def from_quarters(z: Tensor, wavelet: str = "haar") -> Tensor:
    """The inverse and adjoint of `quarters`."""
    *lead, _, _, h, w = z.shape
    x = z.transpose(-3, -2).reshape(*lead, 2 * h, 2 * w)
    return _along(_along(x, wavelet, True).mT, wavelet, True).mT


def split(x: Tensor, wavelet: str = "haar") -> tuple[Tensor, Tensor]:
    """A coarser picture, (..., H/2, W/2), and the details that it lacks, (..., 3, H/2, W/2).

    Details by where they are high: by width (pywt's cV), by height (cH), by both (cD). The coarser
    picture has twice the mean of the finer one.
    """
    z = quarters(x, wavelet).flatten(-4, -3)
    return z[..., 0, :, :], z[..., 1:, :, :]


def merge(low: Tensor, details: Tensor, wavelet: str = "haar") -> Tensor:
    """The inverse and adjoint of `split`."""
    z = torch.cat([low.unsqueeze(-3), details], -3)
    return from_quarters(z.unflatten(-3, (2, 2)), wavelet)


def pyramid(x: Tensor, levels: int, wavelet: str = "haar") -> tuple[Tensor, list[Tensor]]:
    """The picture after ``levels`` splits, and the details of all of them, the finest first."""
    details = []
    for _ in range(levels):
        x, detail = split(x, wavelet)
        details.append(detail)
    return x, details


def from_pyramid(low: Tensor, details: list[Tensor], wavelet: str = "haar") -> Tensor:
    """The inverse and adjoint of `pyramid`."""
    for detail in reversed(details):
        low = merge(low, detail, wavelet)
    return low


def packets(x: Tensor, depth: int, wavelet: str = "haar") -> Tensor:
    """Every band split ``depth`` times: (..., H, W) -> (..., 2^depth, 2^depth, h, w).

    Cells come by frequency, from low to high, along the height and then along the width.
    """
    cells = x[..., None, None, :, :]
    for _ in range(depth):
        z = quarters(cells, wavelet).movedim(-4, -5)  # (..., rows, 2, columns, 2, h, w)
        cells = _by_frequency(z.flatten(-6, -5).flatten(-4, -3))
    return cells


def from_packets(cells: Tensor, wavelet: str = "haar") -> Tensor:
    """The inverse and adjoint of `packets`; the depth is that of the cells."""
    while cells.shape[-3] > 1:
        rows = cells.shape[-3] // 2
        z = _by_frequency(cells).unflatten(-3, (rows, 2)).unflatten(-5, (rows, 2))
        cells = from_quarters(z.movedim(-5, -4), wavelet)
    return cells[..., 0, 0, :, :]


def _by_frequency(cells: Tensor) -> Tensor:
    """Halves of bands in the order of frequency, or back: the same exchange.

    Taking every other sample mirrors a band of an odd number, so that its low half holds the
    higher of its frequencies (a Gray code)."""
    if cells.shape[-3] == 2:
        return cells  # halves of the one band of number 0
    count = torch.arange(cells.shape[-3], device=cells.device)
    order = count // 2 * 2 + (count + count // 2) % 2
    return cells.index_select(-3, order).index_select(-4, order)


class BandStatistics(NamedTuple):
    """Of the coefficients of one level over pictures and places. Channels C."""

    low_mean: Tensor  # (C,)
    low_std: Tensor  # (C,)
    mean: Tensor  # (C, 3), of the details in the order of `split`
    std: Tensor  # (C, 3)


def band_statistics(x: Tensor, levels: int, wavelet: str = "haar") -> list[BandStatistics]:
    """Mean and standard deviation of the bands of pictures (B, C, H, W), the finest level first.

    What sampling band by band whitens with (Guth, Coste, De Bortoli, Mallat 2022)."""
    found = []
    for _ in range(levels):
        x, details = split(x, wavelet)
        found.append(
            BandStatistics(
                x.mean((0, 2, 3)),
                x.std((0, 2, 3), correction=0),
                details.mean((0, 3, 4)),
                details.std((0, 3, 4), correction=0),
            )
        )
    return found
