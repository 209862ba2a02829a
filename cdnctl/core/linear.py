"""Linear maps that are known by their products only, above all the Jacobian of a denoiser.

For the posterior mean D(y) = E[x | y], sigma^2 dD/dy is the posterior covariance of the clean
picture (Miyasawa 1961; Manor and Michaeli 2024): symmetric, with eigenvalues of dD/dy that are
posterior variances in units of sigma^2. A denoiser that is the gradient of a function has a
symmetric Jacobian J by construction, so that one backward pass gives J v. One with a decoder of
its own (a UNet, a hybrid) need not: a backward pass gives J^T v, and J v costs a second graph.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cdnctl.errors import UsageError

Map = Callable[[Tensor], Tensor]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product per picture: two (B, ...) to (B,)."""
    return (a * b).flatten(1).sum(1)


def per_picture(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) with as many axes as ``like``, (B, ...)."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


class Jacobian:
    """J = d function / dy at y, (B, C, H, W), as products with vectors of that shape.

    The function must treat the pictures of a batch independently, so that J is a block per
    picture. The graph of one evaluation is kept as long as this object is. Works inside a
    surrounding ``no_grad``; what comes out carries no graph.
    """

    def __init__(self, function: Map, y: Tensor):
        with torch.enable_grad():
            self._y = y.detach().requires_grad_()
            self._out = function(self._y)
        self._pulled: tuple[Tensor, Tensor] | None = None
        self.value = self._out.detach()  # function(y)

    def transposed(self, v: Tensor) -> Tensor:
        """J^T v by one backward pass; it is J v where the function is a gradient."""
        return torch.autograd.grad(self._out, self._y, v, retain_graph=True)[0]

    def times(self, v: Tensor) -> Tensor:
        """J v for a J that need not be symmetric: J^T u is linear in u, and J v is the backward
        pass through that. The graph of J^T u, built at the first call, takes memory like two."""
        if self._pulled is None:
            with torch.enable_grad():
                u = torch.zeros_like(self._out, requires_grad=True)
                pulled = torch.autograd.grad(self._out, self._y, u, create_graph=True)[0]
            self._pulled = u, pulled
        u, pulled = self._pulled
        return torch.autograd.grad(pulled, u, v, retain_graph=True)[0]

    def symmetric(self, v: Tensor) -> Tensor:
        """(J + J^T) v / 2: of a J that is not symmetric the part that can be a covariance."""
        return (self.times(v) + self.transposed(v)) / 2


def dense(product: Map, like: Tensor) -> Tensor:
    """The matrix, (n, n), of a map of one picture ``like``, (1, C, H, W); n products."""
    basis = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    return torch.stack([product(e.view_as(like)).flatten() for e in basis], 1)


def conjugate_gradient(product: Map, b: Tensor, steps: int, tolerance: float = 0.0) -> Tensor:
    """x with product(x) = b, like b, (B, ...): a system per picture.

    product: symmetric and positive definite. At most ``steps`` products; a picture is done when
    |b - product(x)| <= tolerance |b|, or no better than rounding allows. Where the curvature
    v . product(v) of a direction is not positive, the map is not as it should be and the
    picture keeps what it has by then (Hestenes and Stiefel 1952; Steihaug 1983 for that stop).
    """
    x = torch.zeros_like(b)
    residual, direction = b, b
    size = dot(b, b)
    enough = max(tolerance, torch.finfo(b.dtype).eps) ** 2 * size
    for _ in range(steps):
        moved = product(direction)
        curvature = dot(direction, moved)
        going = (curvature > 0) & (size > enough)
        if not going.any():
            break
        step = per_picture(torch.where(going, size / curvature, 0.0), b)
        x = x + step * direction
        residual = residual - step * moved
        size, before = dot(residual, residual), size
        again = per_picture(torch.where(going, size / before, 0.0), b)
        direction = torch.where(per_picture(going, b), residual + again * direction, direction)
    return x


def eigenpairs(
    product: Map,
    like: Tensor,
    count: int,
    largest: bool = True,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Extreme eigenvalues, (count,), and eigenvectors of unit norm, (count, C, H, W).

    product: symmetric, of one picture ``like``, (1, C, H, W). The most extreme comes first.
    By Lanczos' method, as scipy has it from ARPACK. tolerance: of the residual
    |product(v) - value v|, relative to the value, or for the smallest to 1 minus it. Of several
    that are equal, only 0 (what rounding allows, for up to three times as many products) finds all.
    UsageError if there are not more than ``count`` pixels.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = like.numel()
    if not 0 < count < n:
        raise UsageError(f"{count} eigenvectors of a picture with {n} values: give 1 to {n - 1}")

    def multiply(v: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(v, np.float64)).to(like).view_as(like)
        out = product(given).double().cpu().flatten().numpy()
        # The smallest ones of a denoiser are next to 0, where no relative error is small: those
        # of the identity minus it are next to 1.
        return out if largest else v.ravel() - out

    start = np.random.default_rng(seed).standard_normal(n)
    matrix = LinearOperator((n, n), matvec=multiply, dtype=np.float64)
    values, vectors = eigsh(matrix, count, which="LA", v0=start, tol=tolerance)
    order = np.argsort(-values)
    values = values[order] if largest else 1 - values[order]
    shaped = torch.from_numpy(vectors.T[order].copy()).to(like)
    return torch.from_numpy(values).to(like), shaped.view(count, *like.shape[1:])


def hutchinson(
    product: Map, like: Tensor, probes: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates of a map's diagonal, like ``like`` (B, ...), and trace, (B,), with the standard
    error of the trace, (B,), infinite for a single probe (Hutchinson 1990).

    Each probe of random signs, drawn on the host, costs one product. The transpose has the same
    diagonal, so J^T v does as well as J v.
    """
    diagonal = torch.zeros_like(like)
    traces = []
    for _ in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
        v = signs.to(like)
        part = v * product(v)
        diagonal += part / probes
        traces.append(part.flatten(1).sum(1))
    drawn = torch.stack(traces)
    if probes == 1:
        return diagonal, drawn[0], torch.full_like(drawn[0], torch.inf)
    return diagonal, drawn.mean(0), drawn.std(0) / probes**0.5
