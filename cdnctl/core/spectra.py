"""Covariances of weights and activations: aligned, compared, freed of noise.

Matrices are 2-D tensors, real or complex; samples are rows, (n, d). Covariances are uncentred.
"""

from __future__ import annotations

import torch
from torch import Tensor


def samples(x: Tensor, channels: int | None = None) -> Tensor:
    """Activations (B, C, ...), every position a sample: (B * positions, C).

    channels: C where the axis of channels is longer, (B, C * S, ...): its S parts are positions.
    """
    x = x.flatten(1).unflatten(1, (channels or x.shape[1], -1))
    return x.transpose(1, 2).flatten(0, 1)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """E a b^H over samples (n, d) and (n, e): (d, e)."""
    return a.mT @ b.conj() / len(a)


def align(k: Tensor) -> Tensor:
    """The matrix A of orthonormal columns, or rows, that minimises E |A a - b|^2, for
    k = E b a^H, (e, d): its polar factor (orthogonal Procrustes), (e, d)."""
    u, _, vh = torch.linalg.svd(k, full_matrices=False)
    return u @ vh


def explained(k: Tensor, energy: float, other: float) -> float:
    """1 - E |A a - b|^2 / (E |a|^2 + E |b|^2) for the best A, with k = E b a^H, energy = E |a|^2
    and other = E |b|^2: 1 where alignment is perfect. Equal widths."""
    return float(2 * torch.linalg.svdvals(k).sum() / (energy + other))


def root(c: Tensor) -> Tensor:
    """The positive square root of a covariance; eigenvalues below 0 are rounding."""
    values, vectors = torch.linalg.eigh(c)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mH


def fidelity(a: Tensor, b: Tensor) -> float:
    """Sum of the singular values of a^(1/2) b^(1/2), for covariances a and b."""
    return float(torch.linalg.svdvals(root(a) @ root(b)).sum())


def trace(c: Tensor) -> float:
    """Of a covariance: real."""
    return float(c.diagonal().real.sum())


def bures_cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the Bures angle between covariances: 1 where they are proportional, 0 where
    their ranges are orthogonal; not a number where one of them is 0."""
    norm = (trace(a) * trace(b)) ** 0.5
    return fidelity(a, b) / norm if norm else float("nan")


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance between the centred normal laws of two covariances."""
    return trace(a) + trace(b) - 2 * fidelity(a, b)


def spread_spike(spike: Tensor, ratio: float) -> Tensor:
    """Where the sample eigenvalue of a planted variance 1 + l ends up, for l > sqrt(ratio):
    (1 + l)(1 + ratio / l), ratio = dimensions per sample (Baik and Silverstein 2006)."""
    return (1 + spike) * (1 + ratio / spike)


def edge(dimensions: int, count: int) -> float:
    """Above it no eigenvalue of the sample covariance of ``count`` white vectors is found, but
    in about one draw of a hundred: the limit of their spectrum, (1 + sqrt(ratio))^2, raised by
    twice the scale of the largest one's fluctuations (Tracy and Widom; Johnstone 2001). At
    the limit itself pure noise passes in about one draw of five."""
    n, d = count**0.5, dimensions**0.5
    return (1 + d / n) ** 2 + 2 * (n + d) * (1 / n + 1 / d) ** (1 / 3) / count


def shrunk_values(values: Tensor, dimensions: int, count: int) -> Tensor:
    """Planted variances l beyond white noise of variance 1, from eigenvalues of the sample
    covariance of ``count`` vectors: the inverse of ``spread_spike`` above ``edge``, else 0."""
    ratio = dimensions / count
    above = values > edge(dimensions, count)
    half = (values + 1 - ratio) / 2
    spike = (values - 1 - ratio) / 2 + (half.square() - values).clamp_min(0).sqrt()
    return torch.where(above, spike, torch.zeros_like(spike))


def shrunk(c: Tensor, count: int, noise: float = 1.0) -> Tensor:
    """The part of a sample covariance (d, d) of ``count`` vectors that is not their white noise
    of variance ``noise``, in c's unit: eigenvectors as they are, eigenvalues shrunk."""
    values, vectors = torch.linalg.eigh(c)
    kept = noise * shrunk_values(values / noise, len(c), count)
    return (vectors * kept) @ vectors.mH


def effective_rank(c: Tensor) -> float:
    """Mean rank k of the eigenvalues of a covariance, weighted by them, the largest being
    k = 1: (d + 1) / 2 for white, 1 for rank one, 0 for 0."""
    values = torch.linalg.eigvalsh(c).clamp_min(0).flip(0)
    total = float(values.sum())
    if total == 0:
        return 0.0
    ranks = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    return float((ranks * values).sum() / total)


def rotation(d: int, generator: torch.Generator | None = None) -> Tensor:
    """A random orthogonal matrix, (d, d), float64: of the uniform law (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()
