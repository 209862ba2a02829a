"""A network averaged over symmetries of the square: it knows that noise looks the same in a mirror.

For a group of flips and turns g, of the pictures y and of what comes out:

    sum_c w_c s_c = mean_g g^-1 sum_c m_c s_c(g y),    l = mean_f l(f y)

f is left and right exchanged, or not: what a picture shows is the same in a mirror, but not
upside down. So the part of the classes is taken of these views alone. With the weights
m = v + (number of g / number of f) (w - v) for them and m = v for the others, v neutral and of the
sum of w, the mean has that part once and the rest of every view. v is uniform for a joint density,

    log p(y, c) = mean_g mean_k f_k(g y) + l_c - mean_k l_k,

and the posterior for a network whose score does without it. What holds for the network holds for
the mean: scores are gradients of the density, the class part of s_c is the gradient of
log p(c | y), D = sum_c p(c | y) D_c, and a tile has what the whole picture has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cdnctl.core.coloured import Told
from cdnctl.core.joint import Corrector, HasClassFeatures, HasPosterior, Joint, Sigma, per_class
from cdnctl.errors import UsageError
from cdnctl.models.network import Mixture, Network, Whole

Symmetry = tuple[int, bool]  # quarter turns, then whether left and right are exchanged
SYMMETRIES: Mapping[int, tuple[Symmetry, ...]] = {
    1: ((0, False),),
    2: ((0, False), (0, True)),
    8: tuple((turns, flip) for turns in range(4) for flip in (False, True)),
}
FLIPS = SYMMETRIES[2]  # under which a picture shows the same


def turned(y: Tensor, symmetry: Symmetry) -> Tensor:
    """g y: (..., H, W) to the same, or to (..., W, H)."""
    turns, flip = symmetry
    y = y.rot90(turns, (-2, -1))
    return y.flip(-1) if flip else y


def turned_back(y: Tensor, symmetry: Symmetry) -> Tensor:
    """g^-1 y."""
    turns, flip = symmetry
    return (y.flip(-1) if flip else y).rot90(-turns, (-2, -1))


def mean_over(
    symmetries: Iterable[Symmetry], function: Callable[[Tensor], Tensor], y: Tensor
) -> Tensor:
    """The mean of function(g y)."""
    return torch.stack([function(turned(y, g)) for g in symmetries]).mean(0)


def ensemble(network: Network, count: int) -> Network:
    """The mean over ``count`` symmetries, 2 (left and right) or 8 (of the square), of a network;
    with 1 the network itself. It can do what the network can, ``count`` times as slowly.

    UsageError for another number.
    """
    if count not in SYMMETRIES:
        raise UsageError(f"an ensemble of {count}: give 2 (flips) or 8 (flips and quarter turns)")
    if count == 1:
        return network
    kinds: list[type[Ensemble]] = [
        kind for protocol, kind in _KINDS.items() if isinstance(network, protocol)
    ]
    # A network is known by what it has: the mean must have no more and no less.
    made: type[Ensemble] = type("Ensemble", (*kinds, Ensemble), {})
    return made(network, count)


class Ensemble(Network):
    """What all such means have in common."""

    def __init__(self, network: Network, count: int):
        super().__init__(replace(network.needs, passes=count), network.num_classes)
        self.network = network
        self.symmetries = SYMMETRIES[count]

    def views(self, y: Tensor, sigma: Sigma) -> Iterator[tuple[Symmetry, Tensor, Sigma]]:
        """Each g, with g y and what is then told of its noise."""
        for g in self.symmetries:
            told = sigma
            if isinstance(sigma, Told):
                told = sigma._replace(relief=turned(sigma.relief, g))
            yield g, turned(y, g), told


class _Correcting(Ensemble):
    def correction(
        self,
        y: Tensor,
        sigma: Sigma,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c s_c(y), like y, and the logits, (B, K): see `Corrector`."""
        network = self.network
        assert isinstance(network, Corrector)
        told = [mixture] * len(self.symmetries)
        if isinstance(network, HasPosterior) and (mixture is not None or self.needs.posterior):
            if whole is None or callable(mixture):
                logits = self._logits(y, sigma)
                mixture = mixture(logits) if callable(mixture) else mixture
            if whole is None:
                rows, columns = (-(-n // self.needs.multiple) for n in y.shape[-2:])
                whole = Whole(rows * columns, logits.softmax(1))
            told = list(self._weights(mixture, whole, y))
        total, every = torch.zeros_like(y), []
        for (g, view, heard), weights in zip(self.views(y, sigma), told, strict=True):
            correction, logits = network.correction(view, heard, weights, whole)
            total = total + turned_back(correction, g)
            every += [logits] if g in FLIPS else []
        return total / len(self.symmetries), torch.stack(every).mean(0)

    def _weights(self, mixture: Tensor | None, whole: Whole, y: Tensor) -> Iterator[Tensor]:
        """m of each view, (B, K)."""
        like = y.new_empty(len(y), self.num_classes)
        posterior = per_class(whole.posterior, like)
        w = posterior if mixture is None else per_class(mixture, like)
        neutral = posterior if not self.needs.posterior else torch.ones_like(w) / w.shape[1]
        neutral = w.sum(1, keepdim=True) * neutral
        for g in self.symmetries:
            share = len(self.symmetries) / len(FLIPS) if g in FLIPS else 0.0
            yield neutral + share * (w - neutral)

    def _logits(self, y: Tensor, sigma: Sigma) -> Tensor:
        """(B, K), as the correction of this noise has them."""
        network = self.network
        if isinstance(network, HasPosterior) and not isinstance(sigma, Told):
            return mean_over(FLIPS, lambda view: network.logits(view, sigma), y)
        assert isinstance(network, Corrector)
        views = (v for v in self.views(y, sigma) if v[0] in FLIPS)
        every = [network.correction(view, told)[1] for _, view, told in views]
        return torch.stack(every).mean(0)


class _Classifying(Ensemble):
    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """l_c, (B, K)."""
        network = self.network
        assert isinstance(network, HasPosterior)
        return mean_over(FLIPS, lambda view: network.logits(view, sigma), y)


class _Local(Ensemble):
    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Those of the picture and in a mirror, (B, 2 F, H / multiple, W / multiple)."""
        network = self.network
        assert isinstance(network, HasClassFeatures)
        return torch.cat(
            [turned_back(network.class_features(turned(y, g), sigma), g) for g in FLIPS], 1
        )

    def logits_of(self, mean_features: Tensor) -> Tensor:
        """Logits, (..., K), from means of the class features, (..., 2 F)."""
        network = self.network
        assert isinstance(network, HasClassFeatures)
        parts = mean_features.chunk(len(FLIPS), -1)
        return torch.stack([network.logits_of(part) for part in parts]).mean(0)


class _Density(Ensemble):
    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """log p(y, c) up to a constant, (B, K): see above."""
        network = self.network
        assert isinstance(network, Joint)

        def f(view: Tensor) -> Tensor:
            return network.log_joint(view, sigma)

        classes = mean_over(FLIPS, f, y)
        rest = mean_over(self.symmetries, lambda view: f(view).mean(1, keepdim=True), y)
        return rest + classes - classes.mean(1, keepdim=True)


_KINDS: Mapping[type, type[Ensemble]] = {
    Corrector: _Correcting,
    HasPosterior: _Classifying,
    HasClassFeatures: _Local,
    Joint: _Density,
}
