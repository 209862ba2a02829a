"""Linear operators: what is measured of a picture.

A maps pictures (B, C, H, W), channel by channel, to measurements m; the adjoint A^T maps those
back, <A x, m> = <x, A^T m>. Both follow the dtype and device of what they are given and are
differentiable. Measurements that are pictures are in the unit of pictures: a mean of pixels in
[0, 1] is in [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from cdnctl.core.linear import conjugate_gradient, per_picture
from cdnctl.errors import UsageError

Shape = tuple[int, ...]


class Operator(ABC):
    """A linear map A with its adjoint."""

    # A A^T is this times the identity, or times a projection (a mask: of pixels that are zero
    # where nothing is known); None: neither.
    scale: float | None = None
    bound: float = 1.0  # no eigenvalue of A A^T is larger
    grid: int = 1  # a measurement belongs to a square cell of so many pixels
    # Pixels: a measurement depends on the picture so far beyond its cell; None: on all of it.
    reach: int | None = None
    closed: bool = False  # `solve` is exact, by a formula

    @abstractmethod
    def shape(self, picture: Shape) -> Shape:
        """The shape of the measurement of pictures of shape (B, C, H, W); UsageError if the
        operator does not suit them."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def adjoint(self, m: Tensor) -> Tensor:
        """A^T m."""

    def solve(self, m: Tensor, ridge: Tensor | float = 0.0) -> Tensor:
        """(A A^T + ridge)^-1 m, like m, up to what A^T maps to zero. ridge: a number >= 0, or
        one per picture, (B,). Without a formula by conjugate gradients, to single precision if
        100 steps suffice."""
        r = ridge_of(ridge, m)
        if self.scale is not None:
            return m / (self.scale + r)
        return conjugate_gradient(
            lambda v: self.apply(self.adjoint(v)) + r * v, m, steps=100, tolerance=1e-6
        )

    def meet(self, x: Tensor, m: Tensor, ridge: Tensor | float = 0.0) -> Tensor:
        """The picture nearest to x with A x = m, like x; with a ridge the one that minimises
        |A x' - m|^2 + ridge |x' - x|^2. x + A^T (A A^T + ridge)^-1 (m - A x)."""
        return x + self.adjoint(self.solve(m - self.apply(x), ridge))


def ridge_of(ridge: Tensor | float, m: Tensor) -> Tensor:
    """A number, or one per picture, with as many axes as m."""
    return per_picture(torch.as_tensor(ridge, dtype=m.dtype, device=m.device), m)


class Mask(Operator):
    """The pixels that are known; the others are measured as zero, whatever they are.

    known: boolean, (H, W), or (C, H, W) or (1, H, W).
    """

    scale = 1.0
    reach = 0
    closed = True

    def __init__(self, known: Tensor):
        if not known.any():
            raise UsageError("every pixel is missing: leave some from which the rest can follow")
        self.known = known.bool()

    def shape(self, picture: Shape) -> Shape:
        height, width = self.known.shape[-2:]
        if picture[-2:] != (height, width):
            raise UsageError(
                f"the mask has {width} x {height} pixels, the picture {picture[-1]} x "
                f"{picture[-2]}: give a mask of the picture's size"
            )
        return picture

    def apply(self, x: Tensor) -> Tensor:
        # Not a product: what is missing may be no number.
        return torch.where(self.known.to(x.device), x, 0.0)

    def adjoint(self, m: Tensor) -> Tensor:
        return self.apply(m)


class BlockMean(Operator):
    """Means over squares of ``factor`` pixels, (B, C, H / factor, W / factor)."""

    closed = True

    def __init__(self, factor: int):
        self.factor = self.grid = _whole_factor(factor)
        self.scale = self.bound = 1 / factor**2
        self.reach = 0

    def shape(self, picture: Shape) -> Shape:
        return _smaller(picture, self.factor)

    def apply(self, x: Tensor) -> Tensor:
        self.shape(x.shape)
        return avg_pool2d(x, self.factor)

    def adjoint(self, m: Tensor) -> Tensor:
        wide = m.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2)
        return wide / self.factor**2


class Bicubic(Operator):
    """A picture made smaller by a whole factor with the cubic kernel of Keys 1981 (a = -1/2),
    stretched by the factor against aliasing and normalised at the edges, as Pillow does it."""

    closed = True

    def __init__(self, factor: int):
        self.factor = self.grid = _whole_factor(factor)
        self.reach = 3 * factor // 2
        # |M|^2 <= |M|_1 |M|_inf on both axes; a picture of 16 outputs has all kinds of rows.
        weights = np.abs(_bicubic_rows(16 * factor, factor))
        self.bound = float((weights.sum(0).max() * weights.sum(1).max()) ** 2)

    def shape(self, picture: Shape) -> Shape:
        return _smaller(picture, self.factor)

    def apply(self, x: Tensor) -> Tensor:
        height, width = self.shape(x.shape)[-2:]
        return self._rows(height, x) @ x @ self._rows(width, x).mT

    def adjoint(self, m: Tensor) -> Tensor:
        height, width = m.shape[-2:]
        return self._rows(height, m).mT @ m @ self._rows(width, m)

    def solve(self, m: Tensor, ridge: Tensor | float = 0.0) -> Tensor:
        """In the eigenvectors of M M^T on both axes, of which A A^T is the product."""
        (p, u), (q, v) = (_spectrum(n, self.factor) for n in m.shape[-2:])
        power = torch.from_numpy(np.outer(p, q)).to(m)
        left, right = torch.from_numpy(u).to(m), torch.from_numpy(v).to(m)
        return left @ ((left.mT @ m @ right) / (power + ridge_of(ridge, m))) @ right.mT

    def _rows(self, count: int, like: Tensor) -> Tensor:
        """The matrix M of one axis, (count, count * factor)."""
        return torch.from_numpy(_bicubic_rows(count * self.factor, self.factor)).to(like)


class Convolution(Operator):
    """Convolution with a kernel (h, w): the picture of a point is the kernel, with its centre,
    pixel (h // 2, w // 2), where the point was.

    The picture is taken as periodic; with ``valid``, measurements that would look beyond its
    edge are left out, and m is smaller by h - 1 and w - 1. UsageError for a kernel that is no
    matrix of numbers with a positive sum.
    """

    def __init__(self, kernel: Tensor, valid: bool = False):
        if kernel.ndim != 2 or not kernel.isfinite().all():
            raise UsageError("a kernel is a picture of one channel, of finite numbers")
        if not kernel.sum() > 1e-6 * kernel.abs().sum():
            raise UsageError(
                f"the kernel sums to {float(kernel.sum()):.3g}, which leaves no mean "
                "brightness: give one with a positive sum"
            )
        self.kernel = kernel.double().cpu()
        self.valid = valid
        self.closed = not valid
        self.bound = float(self.kernel.abs().sum()) ** 2
        self.centre = tuple(n // 2 for n in kernel.shape)
        if valid:
            sides = zip(self.centre, kernel.shape, strict=True)
            self.reach = max(max(c, n - 1 - c) for c, n in sides)

    def shape(self, picture: Shape) -> Shape:
        (h, w), (height, width) = self.kernel.shape, picture[-2:]
        if h > height or w > width:
            raise UsageError(
                f"the kernel has {w} x {h} pixels, the picture {width} x {height}: give a "
                "smaller kernel"
            )
        return (*picture[:-2], height - h + 1, width - w + 1) if self.valid else picture

    def apply(self, x: Tensor) -> Tensor:
        self.shape(x.shape)
        out = _filtered(x, self._transfer(x))
        if not self.valid:
            return out
        (h, w), (c, d) = self.kernel.shape, self.centre
        return out[..., h - 1 - c : x.shape[-2] - c, w - 1 - d : x.shape[-1] - d]

    def adjoint(self, m: Tensor) -> Tensor:
        if self.valid:
            (h, w), (c, d) = self.kernel.shape, self.centre
            m = pad(m, (w - 1 - d, d, h - 1 - c, c))
        return _filtered(m, self._transfer(m).conj())

    def solve(self, m: Tensor, ridge: Tensor | float = 0.0) -> Tensor:
        """Of a periodic picture by Fourier transform. Frequencies that the kernel lets through
        no better than rounding does count as not measured."""
        if self.valid:
            return super().solve(m, ridge)
        power = self._transfer(m).abs().square() + ridge_of(ridge, m)
        least = 10 * torch.finfo(m.dtype).eps * self.bound
        return _filtered(m, torch.where(power > least, 1 / power, 0.0))

    def _transfer(self, like: Tensor) -> Tensor:
        """The Fourier transform of the kernel, (H, W / 2 + 1), with its centre at the origin."""
        h, w = self.kernel.shape
        whole = pad(self.kernel, (0, like.shape[-1] - w, 0, like.shape[-2] - h))
        whole = whole.roll([-c for c in self.centre], (0, 1))
        return torch.fft.rfft2(whole).to(like.device, like.dtype.to_complex())


class BandLimit(Operator):
    """A picture without the Fourier components that are not passed; a projection.

    passed: boolean, (H, W), in the order of `torch.fft.fft2`. It must pass with every frequency
    its opposite: the real part of anything else is no projection. UsageError otherwise.
    """

    scale = 1.0
    closed = True

    def __init__(self, passed: Tensor):
        opposite = passed.flip((-2, -1)).roll((1, 1), (-2, -1))
        if not torch.equal(passed, opposite):
            raise UsageError("a band limit must pass with every frequency k its opposite -k")
        if not passed.any():
            raise UsageError("the band limit passes no frequency at all")
        self.passed = passed.bool()

    @staticmethod
    def low(height: int, width: int, share: float) -> BandLimit:
        """Passes |frequency| <= share / 2 cycles per pixel on both axes: a square. share = 1:
        everything."""
        rows, columns = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
        return BandLimit((rows[:, None] <= share / 2) & (columns <= share / 2))

    def shape(self, picture: Shape) -> Shape:
        if picture[-2:] != self.passed.shape:
            height, width = self.passed.shape
            raise UsageError(
                f"the band limit is one for {width} x {height} pixels, the picture has "
                f"{picture[-1]} x {picture[-2]}"
            )
        return picture

    def apply(self, x: Tensor) -> Tensor:
        self.shape(x.shape)
        return _filtered(x, self.passed[:, : x.shape[-1] // 2 + 1].to(x))

    def adjoint(self, m: Tensor) -> Tensor:
        return self.apply(m)


class Rows(Operator):
    """Scalar products with orthonormal rows, (k, C * H * W); m is (B, k). For small pictures."""

    scale = 1.0
    closed = True

    def __init__(self, rows: Tensor, picture: Shape):
        """picture: (C, H, W)."""
        self.rows = rows
        self.picture = picture

    @staticmethod
    def random(count: int, picture: Shape, generator: torch.Generator | None = None) -> Rows:
        """The first ``count`` rows of a random basis, uniform among all (by QR)."""
        size = int(np.prod(picture))
        if not 0 < count <= size:
            raise UsageError(f"{count} measurements of {size} values: give 1 to {size}")
        q, r = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
        return Rows((q * r.diagonal().sign()).mT, picture)

    def shape(self, picture: Shape) -> Shape:
        if picture[1:] != self.picture:
            raise UsageError(f"rows for a picture of {self.picture}, not of {picture[1:]}")
        return picture[0], len(self.rows)

    def apply(self, x: Tensor) -> Tensor:
        self.shape(x.shape)
        return x.flatten(1) @ self.rows.to(x).mT

    def adjoint(self, m: Tensor) -> Tensor:
        return (m @ self.rows.to(m)).view(-1, *self.picture)


# -- kernels --------------------------------------------------------------------------


def gaussian(std: float) -> Tensor:
    """A Gaussian kernel of unit sum, float64, cut off at 4 standard deviations (in pixels)."""
    if not 0 < std < np.inf:
        raise UsageError(f"a Gaussian blur of {std:g} pixels: give a width above 0")
    radius = max(1, int(4 * std + 0.5))
    line = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * std**2))
    kernel = torch.outer(line, line)
    return kernel / kernel.sum()


def motion(length: float, degrees: float) -> Tensor:
    """The kernel of a uniform straight motion, float64, of unit sum.

    length: in pixels; 1 or less at a multiple of 90 degrees changes nothing. degrees: from the
    direction to the right, counterclockwise. A pixel's weight is the length of the path in it.
    """
    if not 0 < length < np.inf or not np.isfinite(degrees):
        raise UsageError(f"a motion of {length:g} pixels at {degrees:g} degrees: give a length > 0")
    angle = np.deg2rad(degrees)
    # Rows count downwards; what is next to an axis is on it.
    way = np.round(length * np.array([-np.sin(angle), np.cos(angle)]), 9)
    radius = np.ceil(np.abs(way) / 2 - 0.5 - 1e-9).astype(int)  # (rows, columns)
    # Where the path from -way / 2 to way / 2 crosses from a pixel to the next, as shares of it.
    cuts = [0.0, 1.0]
    for along, r in zip(way, radius, strict=True):
        if along:
            edges = (np.arange(-r, r) + 0.5) / along + 0.5
            cuts += [float(t) for t in edges if 0 < t < 1]
    stops = np.unique(cuts)
    kernel = np.zeros(2 * radius + 1)
    middles = ((stops[1:] + stops[:-1]) / 2 - 0.5)[:, None] * way
    np.add.at(kernel, tuple((np.rint(middles).astype(int) + radius).T), np.diff(stops))
    return torch.from_numpy(kernel)


# -- helpers --------------------------------------------------------------------------


def _whole_factor(factor: int) -> int:
    if factor < 1:
        raise UsageError(f"a factor of {factor}: give a whole number from 1 upwards")
    return factor


def _smaller(picture: Shape, factor: int) -> Shape:
    height, width = picture[-2:]
    if height % factor or width % factor:
        raise UsageError(f"{width} x {height} pixels cannot be divided by {factor} on both sides")
    return (*picture[:-2], height // factor, width // factor)


def _filtered(x: Tensor, transfer: Tensor) -> Tensor:
    """x times a transfer function, (..., H, W / 2 + 1), in Fourier space."""
    return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])


@lru_cache(maxsize=16)
def _bicubic_rows(size: int, factor: int) -> np.ndarray:
    """(size / factor, size), float64: the weights of the pixels in every smaller one."""
    centres = (np.arange(size // factor)[:, None] + 0.5) * factor - 0.5
    t = np.abs(np.arange(size) - centres) / factor
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


@lru_cache(maxsize=16)
def _spectrum(count: int, factor: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, (count,), and eigenvectors, in columns, of M M^T of one axis."""
    rows = _bicubic_rows(count * factor, factor)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    return values, vectors
