"""How far apart features hold the classes, and how much they vary within one.

Features are vectors, (n, d), of labelled pictures: here means over positions. Fisher's ratio,
tr(S_W^-1 S_B), is what a linear classifier gains from them for classes of one normal law each;
it does not change under linear maps that lose nothing (Zarka, Guth and Mallat 2021,
arXiv 2012.10424, follow it through the layers of a network).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.joint import HasSteps
from cdnctl.core.mirror import mirrored
from cdnctl.core.noise import noisy_version
from cdnctl.errors import UsageError
from cdnctl.grouping import batches
from cdnctl.restore import batch_size, check_channels
from cdnctl.restore.scale import Shrink

RIDGE = 1e-6  # of the mean within-class variance: features that hardly vary do not count

Picture = tuple[str, np.ndarray, str]
"""A name, on which its noise depends, float32 pixels (H, W, C) in [0, 1], and its class."""


@dataclass(frozen=True)
class Separation:
    """Classes as features hold them, as far as these pictures tell."""

    features: int  # d
    between: float  # trace of the covariance of the class means, S_B
    within: float  # trace of the mean covariance within a class, S_W
    fisher: float | None  # tr(S_W^-1 S_B); None where the pictures are too few to tell


def separation(features: Tensor, labels: Tensor) -> Separation:
    """Of features (n, d) of pictures with labels (n,), classes weighted by their pictures.

    All three are unbiased for normal classes of one covariance: of n pictures of K classes, the
    plain S_B has (K - 1) / n S_W too much, and S_W^-1 is (n - K) / (n - K - d - 1) times too
    large (Wishart's law). So layers of different widths can be compared, and features that know
    nothing of classes have a ratio about 0, which may come out negative. It takes more than
    d + K + 1 pictures, d without what is a linear map of the rest. ValueError where there are
    fewer than two classes, or no more pictures than classes.
    """
    x = features.double()
    classes, index, counts = labels.unique(return_inverse=True, return_counts=True)
    n, d = x.shape
    k = len(classes)
    if k < 2:
        raise ValueError(f"pictures of {k} class have nothing to be told apart")
    if n <= k:
        raise ValueError(f"{n} pictures of {k} classes do not tell how much a class varies")
    sums = torch.zeros(k, d, dtype=x.dtype, device=x.device).index_add_(0, index, x)
    means = sums / counts[:, None]
    inside = x - means[index]
    spread = (means - x.mean(0)) * (counts / n).sqrt()[:, None]
    within = inside.T @ inside / (n - k)
    chance = (k - 1) / n
    values, axes = torch.linalg.eigh(within)
    floor = RIDGE * values.mean().clamp_min(torch.finfo(x.dtype).tiny)
    dimensions = float((values / (values + floor)).sum())  # fewer than d where features repeat
    fisher, left = None, n - k - dimensions - 1
    if left > 0.5:
        plain = float(((spread @ axes).square() / (values + floor)).sum())
        fisher = plain * left / (n - k) - chance * dimensions
    variance = float(within.trace())
    return Separation(d, float(spread.square().sum()) - chance * variance, variance, fisher)


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


@torch.no_grad()
def measure(
    model: Model,
    pictures: Iterable[Picture],
    sigma: float,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[tuple[str, Separation]]:
    """Layer by layer, of pictures with noise of standard deviation sigma (in [0, 1]), at the scale
    of the training as `restore.classify` sees them.

    UsageError for a model that shows no layers, and for pictures that cannot be compared.
    """
    network = model.module
    if not isinstance(network, HasSteps):
        raise UsageError(f"model {model.name!r} ({model.header.arch}) does not show its layers")
    names: dict[str, int] = {}

    def seen() -> Iterator[tuple[Iterable[tuple[str, Tensor]], Tensor]]:
        for group in batches(pictures, lambda p: p[1].shape, batch_size):
            check_channels(model, group[0][1].shape[2])
            noisy = np.stack([noisy_version(x, sigma, name, seed) for name, x, _ in group])
            y = torch.from_numpy(noisy.transpose(0, 3, 1, 2)).to(model.device)
            y = y.expand(-1, model.needs.channels, -1, -1)
            shrink = Shrink(y.shape[2], y.shape[3], model.header.patch)
            y = mirrored(shrink(y), model.needs.multiple)
            labels = torch.tensor([names.setdefault(label, len(names)) for *_, label in group])
            yield network.steps(y, sigma * shrink.noise), labels
            for _ in group:
                advance()

    try:
        return list(layer_by_layer(seen()))
    except ValueError as error:
        raise UsageError(f"cannot tell how classes are separated: {error}") from None
