"""Energies of fields, linear in their parameters, and their fit by score matching.

E(x) = sum_f theta_f Phi_f(x) is the energy of a picture x, (L, L), as a function of some of its
bands z given the others, p(z | rest) = exp(-E(x)) / Z(rest). Score matching in z alone (Hyvarinen
2005; Guth, Lempereur, Bruna, Mallat 2023) is a quadratic problem, theta' H theta / 2 - g' theta,

    H = E[<grad Phi_f, grad Phi_g>],  g = E[Laplacian Phi_f],  gradient and Laplacian in z,

and needs no Z. As the law of a stationary field is that of its pixels and their products at every
shift, features are functions of the pixels of x, whatever the bands: with P the projection on
them, grad Phi becomes P times the gradient in the pixels, and the Laplacian the trace of P times
the Hessian in the pixels. Both are exact here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cdnctl.errors import UsageError
from cdnctl.fields.bands import Bands
from cdnctl.fields.simulate import filtered

Shift = tuple[int, int]


@dataclass(frozen=True)
class Features:
    """Phi, in this order: of each pixel x_i, and of products of pixels; sums over all i.

    - powers: sum x_i^p
    - centres: sum sigmoid(-(x_i - centre) / width)
    - shifts: sum over the shifts s of a group of sum x_i x_{i+s}; a shift of 0 is the power 2
    """

    powers: tuple[int, ...] = ()
    centres: tuple[float, ...] = ()
    width: float = 1.0
    shifts: tuple[tuple[Shift, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.powers) + len(self.centres) + len(self.shifts)

    @property
    def names(self) -> list[str]:
        """What each parameter belongs to, in words."""
        return [
            *(f"x^{p}" for p in self.powers),
            *(f"pixels below {c:.4g}" for c in self.centres),
            *("shifts " + " ".join(f"{a},{b}" for a, b in group) for group in self.shifts),
        ]

    def values(self, x: Tensor) -> Tensor:
        """Phi of pictures (B, L, L): (B, F)."""
        parts = [x**p for p in self.powers] + [s for s, _ in self._sigmoids(x)]
        parts += [x * sum(x.roll(s, (-2, -1)) for s in group) for group in self.shifts]
        return torch.stack([part.sum((-2, -1)) for part in parts], -1)

    def slopes(self, x: Tensor) -> Tensor:
        """Gradients in the pixels of pictures (B, L, L): (F, B, L, L)."""
        parts = [p * x ** (p - 1) for p in self.powers]
        parts += [-s * t / self.width for s, t in self._sigmoids(x)]
        for group in self.shifts:
            both = [x.roll(s, (-2, -1)) + x.roll((-s[0], -s[1]), (-2, -1)) for s in group]
            parts.append(torch.stack(both).sum(0))
        return torch.stack(parts)

    def laplacians(self, x: Tensor, bands: Bands) -> Tensor:
        """Laplacians in the bands of pictures (B, L, L): (F, B)."""
        side = x.shape[-1]
        weights = bands.weights(side).to(x)
        parts = [((p * (p - 1) * x ** (p - 2)) * weights).sum((-2, -1)) for p in self.powers]
        for s, t in self._sigmoids(x):
            parts.append((s * t * (t - s) / self.width**2 * weights).sum((-2, -1)))
        for group in self.shifts:
            trace = 2 * sum(bands.trace(side, shift) for shift in group)
            parts.append(x.new_full(x.shape[:1], trace))
        return torch.stack(parts)

    def _sigmoids(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each sigmoid and what it lacks to 1."""
        for centre in self.centres:
            s = torch.sigmoid((centre - x) / self.width)
            yield s, 1 - s


def window(side: int, reach: int) -> tuple[tuple[Shift, ...], ...]:
    """Every product of pixels at most ``reach`` apart along each axis, each once, the shift of 0
    first, for `Features.shifts`. On a small periodic side several shifts are one."""
    found = {}
    for a in range(-reach, reach + 1):
        for b in range(-reach, reach + 1):
            same = sorted([(a % side, b % side), (-a % side, -b % side)])
            found[same[0]] = ((same[0]),)
    return tuple(found[key] for key in sorted(found))


# Of a potential made of sigmoids: nodes in a width, and widths beyond the outermost centres, where
# it is flat to nine digits. Between nodes it is a cubic that is true to ten digits.
_NODES, _MARGIN = 64, 20


@dataclass(frozen=True, eq=False)
class Energy:
    """An energy with its parameters, theta (F,)."""

    features: Features
    theta: Tensor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energies (B,) of pictures (B, L, L), and their gradients in the pixels, like x."""
        gradient = filtered(x, self.transfer(x.shape[-1]).to(x))
        value = (x * gradient).sum((-2, -1)) / 2  # what is quadratic
        for power, theta in zip(self.features.powers, self.theta.tolist(), strict=False):
            below = theta * x ** (power - 1)
            value = value + (x * below).sum((-2, -1))
            gradient = gradient + power * below
        if self.features.centres:
            potential, slope = self._sigmoids(x)
            value, gradient = value + potential.sum((-2, -1)), gradient + slope
        return value, gradient

    def transfer(self, side: int) -> Tensor:
        """What the quadratic part multiplies each mode with in its gradient, (L, L)."""
        turns = torch.arange(side, dtype=torch.float64) * (2 * torch.pi / side)
        total = torch.zeros(side, side, dtype=torch.float64)
        for group, theta in zip(reversed(self.features.shifts), self.theta.flip(0), strict=False):
            for a, b in group:
                total = total + 2 * theta.double() * torch.cos(a * turns[:, None] + b * turns)
        return total

    def bends(self, x: Tensor) -> Tensor:
        """Second derivatives of the potential of each pixel, like x: the diagonal of the Hessian
        without its quadratic part, whose eigenvalues are `transfer`."""
        total, theta = torch.zeros_like(x), iter(self.theta.tolist())
        for p in self.features.powers:
            total = total + next(theta) * p * (p - 1) * x ** (p - 2)
        for s, t in self.features._sigmoids(x):
            total = total + next(theta) * s * t * (t - s) / self.features.width**2
        return total

    def _sigmoids(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The part of the potential that is made of sigmoids, and its slope, like x."""
        start, step, cubics = self._table
        u = ((x - start) / step).clamp_(0, cubics.shape[1] - 1e-9)
        cell = u.long()
        t = u - cell
        a, b, c, d = (column[cell] for column in cubics.to(x))
        return a + t * (b + t * (c + t * d)), (b + t * (2 * c + 3 * t * d)) / step

    @cached_property
    def _table(self) -> tuple[float, float, Tensor]:
        """First node, distance of nodes, and the cubic between each two, (4, cells). Thousands of
        moves evaluate dozens of sigmoids of every pixel: this is ten times faster."""
        features = self.features
        width, first, last = features.width, min(features.centres), max(features.centres)
        step, start = width / _NODES, first - _MARGIN * width
        count = round((last - first) / step) + 2 * _MARGIN * _NODES
        nodes = start + step * torch.arange(count + 1, dtype=torch.float64)
        value, slope = torch.zeros_like(nodes), torch.zeros_like(nodes)
        thetas = self.theta[len(features.powers) :].tolist()
        for theta, (s, t) in zip(thetas, features._sigmoids(nodes), strict=False):
            value += theta * s
            slope -= theta * s * t / width
        rise, left, right = value.diff(), step * slope[:-1], step * slope[1:]
        cubics = [value[:-1], left, 3 * rise - 2 * left - right, left + right - 2 * rise]
        return start, step, torch.stack(cubics)


@dataclass(frozen=True, eq=False)
class Fit:
    """Parameters found by score matching."""

    energy: Energy
    errors: Tensor  # (F,), standard errors, if the fields are independent
    condition: float  # of H with a diagonal of ones, in the directions that are solved for


AT_ONCE = 2**23  # numbers of gradients that are held at a time
# Directions of H weaker than this by the strongest tell nothing: sigmoids in the tails, say, are
# multiples of each other wherever there are pixels.
CUT = 1e-9


def score_matching(x: Tensor, features: Features, bands: Bands) -> Fit:
    """The energy whose conditional law of the bands of pictures (B, L, L) is nearest to theirs.

    UsageError if there are too few pictures, or they hold too little, for the features.
    """
    known = len(x) * len(bands.cells) * (x.shape[-1] >> bands.depth) ** 2
    if known < 10 * len(features):
        raise UsageError(
            f"{len(x)} fields of {x.shape[-1]} x {x.shape[-1]} do not determine {len(features)} "
            "parameters: give more fields"
        )
    batch = max(1, AT_ONCE // (len(features) * x[0].numel()))
    h = x.new_zeros(len(features), len(features))
    g = x.new_zeros(len(features))
    for part in x.split(batch):
        gradients = bands.take(features.slopes(part)).flatten(1)
        h += gradients @ gradients.T / len(x)
        g += features.laplacians(part, bands).sum(1) / len(x)
    scale = h.diagonal().sqrt()
    if not (scale > 0).all():
        missing = features.names[int((scale > 0).logical_not().nonzero()[0])]
        raise UsageError(f"the fields do not tell anything about one feature: {missing}")
    eigenvalues, vectors = torch.linalg.eigh(h / scale / scale[:, None])
    known = eigenvalues > CUT * eigenvalues[-1]
    eigenvalues, vectors = eigenvalues[known], vectors[:, known]
    inverse = vectors / eigenvalues @ vectors.T / scale / scale[:, None]
    theta = inverse @ g
    # The sandwich: how the equations of single pictures scatter around those of all.
    scatter = torch.zeros_like(h)
    for part in x.split(batch):
        slopes = features.slopes(part)
        force = torch.einsum("f,fbij->bij", theta, slopes)
        force = bands.give(bands.take(force))
        off = torch.einsum("fbij,bij->fb", slopes, force) - features.laplacians(part, bands)
        scatter += off @ off.T / len(x)
    errors = (inverse @ scatter @ inverse / len(x)).diagonal().sqrt()
    return Fit(Energy(features, theta), errors, float(eigenvalues[-1] / eigenvalues[0]))


def smallest_eigenvalues(energy: Energy, bands: Bands, x: Tensor) -> Tensor:
    """Of the Hessian in the bands, at each of pictures (B, L, L): (B,).

    Where it is positive for all values of the bands, their law is log-concave. Dense: for sides
    of 32 and less.
    """
    side = x.shape[-1]
    count = len(bands.cells) * (side >> bands.depth) ** 2
    eye = torch.eye(count, dtype=x.dtype)
    h = side >> bands.depth
    basis = bands.give(eye.reshape(count, len(bands.cells), h, h))
    smooth = filtered(basis, energy.transfer(side).to(x)).flatten(1)
    rows = basis.flatten(1)
    quadratic = smooth @ rows.T
    found = []
    for picture in x:
        bent = rows * energy.bends(picture).flatten()
        found.append(torch.linalg.eigvalsh(quadratic + bent @ rows.T)[0])
    return torch.stack(found)
