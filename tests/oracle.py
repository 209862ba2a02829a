"""A Gaussian-mixture model of pictures and classes, whose every quantity has a closed form.

The model itself gives ``log_joint`` and nothing else, in torch. ``closed_form`` never
differentiates anything: it conditions Gaussians, in numpy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import multivariate_normal
from torch import Tensor

Array = NDArray[np.float64]


class Component(NamedTuple):
    """A Gaussian of flat pictures of n pixels, and the share of all pictures that it holds."""

    share: float
    mean: Array  # (n,)
    cov: Array  # (n, n)


class ClosedForm(NamedTuple):
    """Exact quantities at one noisy picture. Leading axis K: given the class."""

    log_joint: Array  # (K,)
    posterior: Array  # (K,)
    score: Array  # (n,)
    class_scores: Array  # (K, n)
    mean: Array  # (n,) of the clean picture
    class_means: Array  # (K, n)
    cov: Array  # (n, n) of the clean picture
    class_covs: Array  # (K, n, n)


class GaussianMixture:
    """p(x, c) = sum over the components of class c; noisy pictures are x + sigma * noise."""

    def __init__(self, classes: list[list[Component]], shape: tuple[int, int, int]):
        self.classes = classes
        self.shape = shape
        self.num_classes = len(classes)

    @staticmethod
    def random(sizes: tuple[int, ...], shape: tuple[int, int, int], seed: int) -> GaussianMixture:
        """Classes of ``sizes`` components each, near mid-gray, with full covariances."""
        rng = np.random.default_rng(seed)
        n = int(np.prod(shape))
        shares = iter(rng.dirichlet(np.full(sum(sizes), 3.0)))
        classes = []
        for size in sizes:
            # Ranks from 1 to n: some components are degenerate, as natural pictures are.
            roots = [rng.normal(size=(n, rng.integers(1, n + 1))) for _ in range(size)]
            classes.append(
                [
                    Component(
                        next(shares), 0.5 + 0.1 * rng.normal(size=n), 0.04 * a @ a.T / a.shape[1]
                    )
                    for a in roots
                ]
            )
        return GaussianMixture(classes, shape)

    def sample(self, sigmas: Array, seed: int) -> Tensor:
        """One noisy picture for every noise level, (B, C, H, W), float64."""
        rng = np.random.default_rng(seed)
        parts = [part for members in self.classes for part in members]
        shares = np.array([part.share for part in parts])
        chosen = [parts[i] for i in rng.choice(len(parts), len(sigmas), p=shares)]
        y = [
            rng.multivariate_normal(part.mean, part.cov) + s * rng.normal(size=part.mean.shape)
            for part, s in zip(chosen, sigmas, strict=True)
        ]
        return torch.from_numpy(np.stack(y)).view(-1, *self.shape)

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """log p_sigma(y, c), (B, K)."""
        flat = y.flatten(1)
        n = flat.shape[1]
        var = torch.as_tensor(sigma, dtype=y.dtype).reshape(-1, 1, 1).square().expand(len(y), 1, 1)
        f = []
        for members in self.classes:
            logs = []
            for part in members:
                mean, cov = torch.from_numpy(part.mean).to(y), torch.from_numpy(part.cov).to(y)
                total = cov + var * torch.eye(n).to(y)  # (B, n, n)
                r = flat - mean
                quadratic = (r * torch.linalg.solve(total, r)).sum(1)
                constant = n * np.log(2 * np.pi) - 2 * np.log(part.share)
                logs.append(-0.5 * (quadratic + torch.logdet(total) + constant))
            f.append(torch.stack(logs, 1).logsumexp(1))
        return torch.stack(f, 1)

    def closed_form(self, y: Array, sigma: float) -> ClosedForm:
        """Everything that is known of one flat noisy picture, (n,)."""
        n = len(y)
        densities, scores, means, covs = [], [], [], []  # per class, per component
        for members in self.classes:
            totals = [part.cov + sigma**2 * np.eye(n) for part in members]
            pairs = list(zip(members, totals, strict=True))
            densities.append(
                np.array([p.share * multivariate_normal(p.mean, t).pdf(y) for p, t in pairs])
            )
            scores.append(np.stack([np.linalg.solve(t, p.mean - y) for p, t in pairs]))
            gains = [np.linalg.solve(t, p.cov).T for p, t in pairs]  # cov total^-1
            means.append(
                np.stack([p.mean + k @ (y - p.mean) for p, k in zip(members, gains, strict=True)])
            )
            covs.append(np.stack([p.cov - k @ p.cov for p, k in zip(members, gains, strict=True)]))
        joint = np.array([d.sum() for d in densities])
        posterior = joint / joint.sum()
        within = [d / d.sum() for d in densities]
        class_means = np.stack([w @ m for w, m in zip(within, means, strict=True)])
        class_scores = np.stack([w @ s for w, s in zip(within, scores, strict=True)])
        class_covs = np.stack(
            [_total_cov(w, m, c) for w, m, c in zip(within, means, covs, strict=True)]
        )
        return ClosedForm(
            log_joint=np.log(joint),
            posterior=posterior,
            score=posterior @ class_scores,
            class_scores=class_scores,
            mean=posterior @ class_means,
            class_means=class_means,
            cov=_total_cov(posterior, class_means, class_covs),
            class_covs=class_covs,
        )


def _total_cov(shares: Array, means: Array, covs: Array) -> Array:
    """Covariance of a mixture: the mean of the covariances plus the covariance of the means."""
    off = means - shares @ means
    return np.einsum("k,kij->ij", shares, covs) + np.einsum("k,ki,kj->ij", shares, off, off)
