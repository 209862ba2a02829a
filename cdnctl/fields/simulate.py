"""Fields with a known law: Gaussian ones, log-normal ones, and phi^4 on a lattice.

Fields are (B, L, L) in float64, periodic, in a unit of their own. The same arguments and the same
seed give the same fields.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from cdnctl.errors import UsageError

CHAINS = 128  # of one Monte Carlo run, side by side; more fields are later states of them


def frequencies(side: int) -> Tensor:
    """Lengths of the wave vectors, (L, L), in waves per side, in the order of an FFT."""
    k = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    return torch.hypot(k[:, None], k)


def gaussian(
    count: int, side: int, spectrum: Callable[[Tensor], Tensor], seed: int, std: float | None = None
) -> Tensor:
    """Gaussian fields of mean 0, (count, L, L), whose mode k has the power S(|k|).

    spectrum: of `frequencies`; with white noise of variance v it would be v everywhere, and the
    variance of a pixel is its mean. std: scale it to this standard deviation of a pixel.
    """
    power = scaled(spectrum(frequencies(side)), std)
    white = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, side, side)))
    return filtered(white, power.sqrt())


def scaled(power: Tensor, std: float | None) -> Tensor:
    """A spectrum, (L, L), scaled to a standard deviation of a pixel, if any is given.

    UsageError if it is no spectrum.
    """
    if not (power.isfinite().all() and (power >= 0).all() and power.sum() > 0):
        raise UsageError("a spectrum must be finite, nowhere negative and somewhere positive")
    return power if std is None else power * (std**2 / power.mean())


def filtered(x: Tensor, factor: Tensor) -> Tensor:
    """x, (..., L, L), with its mode k multiplied by ``factor``, (L, L), which is real and even."""
    half = factor[:, : factor.shape[-1] // 2 + 1]
    return torch.fft.irfft2(torch.fft.rfft2(x) * half, s=x.shape[-2:])


def spectrum(x: Tensor) -> Tensor:
    """Mean power of the modes of fields (B, L, L), (L, L): of white noise its variance."""
    return torch.fft.fft2(x).abs().square().mean(0) / x[0].numel()


def radial(power: Tensor) -> Tensor:
    """Mean of a spectrum, (L, L), over rings of |k| = 0, 1, ..., L/2, rounded: (L/2 + 1,)."""
    side = power.shape[-1]
    ring = frequencies(side).round().long().flatten()
    count = torch.bincount(ring)
    return (torch.bincount(ring, weights=power.flatten().double()) / count)[: side // 2 + 1]


def log_normal(
    count: int, side: int, spectrum: Callable[[Tensor], Tensor], seed: int, std: float = 0.5
) -> Tensor:
    """exp(g - std^2/2) - 1, (count, L, L), of Gaussian fields g of that standard deviation.

    Mean 0, correlations exp(xi_g(r)) - 1, skewness (exp(std^2) + 2) sqrt(exp(std^2) - 1): a
    surrogate of maps of the convergence of weak lensing, with the one-point law that they nearly
    have, and no more (Coles and Jones 1991).
    """
    return (gaussian(count, side, spectrum, seed, std) - std**2 / 2).exp() - 1


def phi4(
    count: int, side: int, beta: float, seed: int, burn: int | None = None, spacing: int = 10
) -> Tensor:
    """Fields, (count, L, L), of density exp(-E), E = sum phi^4 - phi^2 - beta sum_<ij> phi_i phi_j.

    The second sum is over nearest neighbours of a periodic square lattice; it is critical near
    beta = 0.68. Up to 128 Markov chains run side by side; each gives a field after ``burn`` rounds
    (2 L, at least 60, if None) and then every ``spacing`` rounds. A round is two checkerboard
    Metropolis sweeps, which move the amplitudes, and a Swendsen-Wang move of the signs given the
    amplitudes, an Ising model of couplings beta |phi_i phi_j|, which moves whole domains at once
    (Brower and Tamayo 1989). Both leave the density as it is.
    """
    if side < 2 or side % 2:
        raise UsageError(f"the side is {side}, but a checkerboard needs an even one")
    if not 0 <= beta < np.inf:
        raise UsageError(f"beta is {beta!r}, but must be a number from 0 up")
    if count < 1:
        raise UsageError(f"{count} fields are asked for: ask for one or more")
    rng = np.random.default_rng(seed)
    rounds = max(2 * side, 60) if burn is None else burn
    # As many states of each chain as there must be, and no more chains than that takes.
    states = -(-count // CHAINS)
    chains = -(-count // states)
    phi = rng.normal(size=(chains, side, side))
    found = []
    for state in range(states):
        for _ in range(spacing if state else rounds):
            phi = _metropolis(_metropolis(phi, beta, rng), beta, rng)
            phi = _swendsen_wang(phi, beta, rng)
        found.append(phi)
    return torch.from_numpy(np.concatenate(found)[:count])


def neighbours(x: Tensor) -> Tensor:
    """Sum of the four nearest neighbours of each pixel, like x, (..., L, L), periodic."""
    return sum((x.roll(step, axis) for axis in (-2, -1) for step in (-1, 1)), torch.zeros_like(x))


STEP = 1.5  # half the width of the proposals of the amplitudes: about half of them are accepted


def _metropolis(phi: np.ndarray, beta: float, rng: np.random.Generator) -> np.ndarray:
    """One sweep: white squares of the checkerboard, whose neighbours are black, then the black."""
    phi = phi.copy()
    rows, columns = np.indices(phi.shape[1:])
    for colour in (0, 1):
        around = np.zeros_like(phi)
        for axis in (1, 2):
            around += np.roll(phi, 1, axis) + np.roll(phi, -1, axis)
        here = (rows + columns) % 2 == colour
        old, field = phi[:, here], beta * around[:, here]
        new = old + STEP * (2 * rng.random(old.shape) - 1)
        a, b = old * old, new * new
        rise = (b - a) * (a + b - 1) - field * (new - old)
        accepted = -rng.standard_exponential(old.shape) < -rise
        phi[:, here] = np.where(accepted, new, old)
    return phi


def _swendsen_wang(phi: np.ndarray, beta: float, rng: np.random.Generator) -> np.ndarray:
    """New signs of clusters, each at random, given the amplitudes. The chains are one graph of
    separate parts."""
    place = np.arange(phi.size).reshape(phi.shape)
    ends = []
    for axis in (1, 2):
        product = phi * np.roll(phi, -1, axis)
        # A bond of equal signs is closed with probability 1 - exp(-2 beta |phi_i phi_j|).
        closed = rng.standard_exponential(phi.shape) < 2 * beta * product
        ends.append((place[closed], np.roll(place, -1, axis)[closed]))
    start, end = (np.concatenate(part) for part in zip(*ends, strict=True))
    graph = coo_matrix((np.ones(len(start), np.int8), (start, end)), shape=(phi.size, phi.size))
    clusters, label = connected_components(graph, directed=False)
    sign = rng.integers(0, 2, clusters) * 2 - 1
    return phi * sign[label].reshape(phi.shape)
