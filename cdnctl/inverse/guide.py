"""A denoiser that knows a measurement, from one that does not.

For m = A x + noise of level tau, with J = dD/dy:

    D_m(y, sigma) = D + J A^T (A J A^T + (tau^2 / sigma^2) I)^-1 (m - A D)

It is E[x | y, m] for a Gaussian prior, and for any other if p(x | y) is replaced by the Gaussian
with its mean D and covariance sigma^2 J. The system is solved by conjugate gradients, each product
one pass back through the denoiser. Without it, J is taken as the identity, which for tau = 0 is
the constrained step of Kadkhodaie and Simoncelli 2021: cheaper, and exact in the limit of small
steps with much new noise only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cdnctl.core.joint import Denoiser
from cdnctl.core.linear import Jacobian, conjugate_gradient
from cdnctl.core.noise import add_noise
from cdnctl.errors import UsageError
from cdnctl.inverse.operators import Operator, ridge_of
from cdnctl.sampling import Watch, sample, settle, stir

# The least noise of a measurement in units of sigma, for conjugate gradients: a trained J has
# some eigenvalues below zero.
FLOOR = 0.03
GRAY = 0.5  # the starting value of pixels about which nothing was measured


class Guided:
    """The denoiser of pictures of which a measurement is known, too."""

    def __init__(
        self,
        denoise: Denoiser,
        operator: Operator,
        measured: Tensor,
        noise: float = 0.0,
        exact: int = 0,
        floor: float = FLOOR,
    ):
        """measured: m of the pictures, one for each, or one for all. noise: its standard
        deviation, tau, in the unit of m. exact: products with the Jacobian per call, at most;
        with 0 it is taken as the identity.

        A backward pass gives J^T v. Where J is symmetric, that is J v; for a denoiser with a
        decoder of its own, the outer J^T is right by the chain rule for log p(m | y), the inner
        A J^T A^T is used as if it was symmetric, and more than 3 steps lead nowhere.
        """
        if not 0 <= noise < float("inf"):
            raise UsageError(f"a measurement with noise {noise:g}: give a number of 0 or more")
        self.denoise = denoise
        self.operator = operator
        if operator.scale is not None:  # leave out what no picture can give, as in holes
            measured = operator.apply(operator.adjoint(measured)) / operator.scale
        self.measured = measured
        self.noise = noise
        self.exact = exact
        self.floor = floor

    def __call__(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        level = torch.as_tensor(sigma, dtype=y.dtype, device=y.device)
        ridge = (self.noise / level) ** 2
        if not self.exact:
            return self.operator.meet(self.denoise(y, sigma), self.measured, ridge)
        jacobian = Jacobian(lambda t: self.denoise(t, sigma), y)
        apply, adjoint = self.operator.apply, self.operator.adjoint
        missed = self.measured - apply(jacobian.value)
        r = ridge_of(ridge.clamp_min(self.floor**2 * self.operator.bound), missed)
        u = conjugate_gradient(
            lambda v: apply(jacobian.transposed(adjoint(v))) + r * v, missed, self.exact
        )
        return jacobian.value + jacobian.transposed(adjoint(u))

    def start(self, sigma: float) -> Tensor:
        """A picture from the measurement alone: the one nearest to gray, or for a measurement
        with noise that of the least squares with a prior of standard deviation sigma."""
        gray = torch.full_like(self.operator.adjoint(self.measured), GRAY)
        return self.operator.meet(gray, self.measured, (self.noise / sigma) ** 2)

    def finished(self, x: Tensor) -> Tensor:
        """x with exactly the measurement, where that has no noise."""
        return x if self.noise else self.operator.meet(x, self.measured)


def reconstruct(
    guided: Guided,
    sigmas: Sequence[float],
    start: Tensor | None = None,
    watch: Watch | None = None,
    pull: float = 1.0,
    drive: float = 0.0,
) -> Tensor:
    """The picture, (B, C, H, W), that the measurement and the denoiser agree on at the last
    level; nothing is random. Not clipped.

    sigmas: descending, a denoising each. start: None for `Guided.start`. pull, drive: see
    `settle`. For a Gaussian prior it is the posterior mean. For any other it is one of its likely
    pictures, which the descent finds from the start.
    """
    with torch.no_grad():
        y = guided.start(sigmas[0]) if start is None else start
        return guided.finished(settle(guided, y, sigmas, watch, pull, drive))


def draw(
    guided: Guided,
    sigmas: Sequence[float],
    count: int = 1,
    start: Tensor | None = None,
    beta: float = 0.5,
    stirs: int = 0,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Draws from the posterior of one picture, (count, C, H, W), or one for each of several,
    (B, C, H, W) with ``count`` 1. Not clipped.

    The start with noise of the level sigmas[0], ``stirs`` steps at that level, then `sample`.
    Draws of one picture are a batch: memory is that of ``count`` pictures. UsageError for several
    draws of several pictures.
    """
    with torch.no_grad():
        y = guided.start(sigmas[0]) if start is None else start
        if count != 1 and len(y) != 1:
            raise UsageError(f"{count} draws of {len(y)} pictures: take them one by one")
        y = y.expand(max(count, len(y)), *y.shape[1:])
        y = stir(guided, add_noise(y, sigmas[0], generator), sigmas[0], stirs, generator=generator)
        return guided.finished(sample(guided, y, sigmas, beta, generator, watch))
