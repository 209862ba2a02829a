"""How far apart features hold the classes, and how much they vary within one.

Features are vectors, (n, d), of labelled pictures: here means over positions. Fisher's ratio,
tr(S_W^-1 S_B), is what a linear classifier gains from them for classes of one normal law each;
it does not change under linear maps that lose nothing (Zarka, Guth and Mallat 2021,
arXiv 2012.10424, follow it through the layers of a network).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-6  # of the mean within-class variance: features that hardly vary do not count


@dataclass(frozen=True)
class Separation:
    """Classes as features hold them."""

    between: float  # trace of the covariance of the class means, S_B
    within: float  # trace of the mean covariance within a class, S_W
    fisher: float  # tr(S_W^-1 S_B)


def separation(features: Tensor, labels: Tensor) -> Separation:
    """Of features (n, d) of pictures with labels (n,), classes weighted by their pictures.

    Covariances within classes are unbiased. The ratio of noise features alone would be about
    d (K - 1) / n: compare it for equal n, and for n far above d. ValueError where there are
    fewer than two classes, or fewer than d + K pictures.
    """
    x = features.double()
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    n, d = x.shape
    if len(classes) < 2:
        raise ValueError(f"pictures of {len(classes)} class have nothing to be told apart")
    if n < d + len(classes):
        raise ValueError(
            f"{n} pictures are too few for {d} features: the ratio needs at least "
            f"{d + len(classes)}"
        )
    sums = torch.zeros(len(classes), d, dtype=x.dtype, device=x.device).index_add_(0, index, x)
    means = sums / counts[:, None]
    inside = x - means[index]
    spread = (means - x.mean(0)) * (counts / n).sqrt()[:, None]
    within = inside.T @ inside / (n - len(classes))
    floor = RIDGE * within.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny)
    solved = torch.linalg.solve(within + floor * torch.eye(d).to(within), spread.T)
    return Separation(
        between=float(spread.square().sum()),
        within=float(within.trace()),
        fisher=float((spread.T * solved).sum()),
    )


def layer_by_layer(
    batches: Iterable[tuple[Iterable[tuple[str, Tensor]], Tensor]],
) -> Iterator[tuple[str, Separation]]:
    """The same of every layer's features, means over positions, from batches of (name, tensor
    (B, C, h, w)) and labels (B,)."""
    kept: dict[str, list[Tensor]] = {}
    labels = []
    for layers, truth in batches:
        labels.append(truth)
        for name, x in layers:
            kept.setdefault(name, []).append(x.flatten(2).mean(2).double().cpu())
    for name, parts in kept.items():
        yield name, separation(torch.cat(parts), torch.cat(labels).cpu())
