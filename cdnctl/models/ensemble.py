"""A network averaged over symmetries of the square: as good as one that knows them.

For a group of flips and turns g, of the pictures y and of what comes out:

    sum_c w_c s_c = mean_g g^-1 sum_c w_c s_c(g y),    l = mean_g l(g y),    f = mean_g f(g y)

each by the network itself, with one posterior p = softmax(l) for all g. So what holds for the
network holds for the mean: the scores are gradients of f, the class part of s_c is the gradient of
log p(c | y), D = sum_c p(c | y) D_c, and a tile has what the whole picture has. And
D(g y) = g D(y), which the network has only learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cdnctl.core.coloured import Told
from cdnctl.core.joint import Corrector, HasClassFeatures, HasPosterior, Joint, Sigma
from cdnctl.errors import UsageError
from cdnctl.models.network import Mixture, Network, Whole

Symmetry = tuple[int, bool]  # quarter turns, then whether left and right are exchanged
SYMMETRIES: Mapping[int, tuple[Symmetry, ...]] = {
    1: ((0, False),),
    2: ((0, False), (0, True)),
    8: tuple((turns, flip) for turns in range(4) for flip in (False, True)),
}


def turned(y: Tensor, symmetry: Symmetry) -> Tensor:
    """g y: (..., H, W) to the same, or to (..., W, H)."""
    turns, flip = symmetry
    y = y.rot90(turns, (-2, -1))
    return y.flip(-1) if flip else y


def turned_back(y: Tensor, symmetry: Symmetry) -> Tensor:
    """g^-1 y."""
    turns, flip = symmetry
    return (y.flip(-1) if flip else y).rot90(-turns, (-2, -1))


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

    def mean(self, function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """The mean of function(g y)."""
        return torch.stack([function(turned(y, g)) for g in self.symmetries]).mean(0)


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
        knows_posterior = whole is not None or (mixture is None and not self.needs.posterior)
        if isinstance(network, HasPosterior) and (callable(mixture) or not knows_posterior):
            logits = self._logits(y, sigma)
            if callable(mixture):
                mixture = mixture(logits)
            if whole is None:
                rows, columns = (-(-n // self.needs.multiple) for n in y.shape[-2:])
                whole = Whole(rows * columns, logits.softmax(1))
        total, every = torch.zeros_like(y), []
        for g, view, told in self.views(y, sigma):
            correction, logits = network.correction(view, told, mixture, whole)
            total = total + turned_back(correction, g)
            every.append(logits)
        return total / len(every), torch.stack(every).mean(0)

    def _logits(self, y: Tensor, sigma: Sigma) -> Tensor:
        """(B, K), as the correction of this noise has them."""
        network = self.network
        if isinstance(network, HasPosterior) and not isinstance(sigma, Told):
            return self.mean(lambda view: network.logits(view, sigma), y)
        assert isinstance(network, Corrector)
        every = [network.correction(view, told)[1] for _, view, told in self.views(y, sigma)]
        return torch.stack(every).mean(0)


class _Classifying(Ensemble):
    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """l_c, (B, K)."""
        network = self.network
        assert isinstance(network, HasPosterior)
        return self.mean(lambda view: network.logits(view, sigma), y)


class _Local(Ensemble):
    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Those of all views, side by side: (B, count F, H / multiple, W / multiple)."""
        network = self.network
        assert isinstance(network, HasClassFeatures)
        every = [
            turned_back(network.class_features(view, sigma), g)
            for g, view, _ in self.views(y, sigma)
        ]
        return torch.cat(every, 1)

    def logits_of(self, mean_features: Tensor) -> Tensor:
        """Logits, (..., K), from means of the class features, (..., count F)."""
        network = self.network
        assert isinstance(network, HasClassFeatures)
        parts = mean_features.chunk(len(self.symmetries), -1)
        return torch.stack([network.logits_of(part) for part in parts]).mean(0)


class _Density(Ensemble):
    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """f_c(y, sigma), (B, K): up to a constant the log of the geometric mean of densities."""
        network = self.network
        assert isinstance(network, Joint)
        return self.mean(lambda view: network.log_joint(view, sigma), y)


_KINDS: Mapping[type, type[Ensemble]] = {
    Corrector: _Correcting,
    HasPosterior: _Classifying,
    HasClassFeatures: _Local,
    Joint: _Density,
}
