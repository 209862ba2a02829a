"""Whether two networks found the same covariances of weights, layer by layer.

After Guth and Menard (2024, "On the universality of neural encodings in CNNs"): weights move
from white noise by what they learn, so that a layer's covariance is noise and a few directions
above it. Freed of the noise and in one frame, those of two networks are compared by the cosine
of their Bures angle, between what a random frame gives (0) and what a second draw of the same
law would give (1). Two copies of one network are above 1: no second draw is as like.

It says nothing where the noise is not that of the initial weights: see ``objection`` and
``Likeness.reason``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from cdnctl.analysis.stages import Agreement, Stage, agreement
from cdnctl.core import spectra
from cdnctl.models.channels import ChannelMap

DRAWS = 8  # of random frames and of second draws, over which cosines are averaged
BULK = (0.75, 1.5)  # of the initial variance: the noise is taken as known between these
GAP = 0.1  # least distance between chance and ceiling


@dataclass(frozen=True)
class Likeness:
    """One layer of two networks. Cosines are 0 to 1."""

    layer: str
    ranks: tuple[float, float]  # effective ranks of the shrunk covariances, 0: all noise
    explained: float  # share of the activations' energy that alignment explains
    cosine: float
    chance: float  # the cosine with the same covariance in a random frame
    ceiling: float  # the cosine with a second draw of the same law
    similarity: float  # 0: chance, 1: ceiling; not a number where there is a reason
    least: float  # a similarity below this one is no sign of anything: 5 / sqrt(inputs)
    reason: str | None = None  # why nothing can be said


@dataclass(frozen=True)
class Rows:
    """Weight vectors of a layer, as many as it has outputs and places, and their noise."""

    vectors: Tensor  # (n, d), float64
    variance: float  # of an entry before training

    @property
    def covariance(self) -> Tensor:
        """(d, d), in units of the initial variance."""
        return spectra.cross(self.vectors, self.vectors) / self.variance

    def signal(self) -> Tensor:
        """The covariance without its noise."""
        return spectra.shrunk(self.covariance, len(self.vectors))

    def bulk(self) -> float:
        """Mean of the eigenvalues that noise alone could have given: about 1."""
        values = torch.linalg.eigvalsh(self.covariance)
        n, d = self.vectors.shape
        return float(values[values <= spectra.edge(d, n)].mean())


def objection(optimiser: str, weight_decay: float) -> str | None:
    """Why weights trained so cannot be compared, or None.

    optimiser: its name, as in a training config.
    """
    if optimiser.lower() == "muon":
        return "Muon makes all directions of an update as large: no few of them rise above noise"
    if weight_decay:
        return (
            f"weight decay ({weight_decay:g}) shrinks the noise that the weights started with, "
            "and how much of it is left is not known"
        )
    return None


def rows(stage: Stage) -> Rows:
    """The weight vectors of a stage: each place of an output is a vector of its own.

    ValueError where the noise that they started with is not white.
    """
    linear, weight = stage.linear, stage.rows()
    if isinstance(linear, ChannelMap):
        if not linear.gaussian:
            raise ValueError("its weights started as orthonormal rows, not as white noise")
        variance = linear.initial_variance
    elif isinstance(linear, nn.Linear | nn.Conv2d):
        # What torch draws: uniform within 1 / sqrt(inputs).
        variance = 1 / (3 * weight[0].numel())
    else:
        raise ValueError(f"nothing is known of the noise that {type(linear).__name__} starts with")
    return Rows(weight.transpose(1, 2).flatten(0, 1).double(), variance)


def compare(
    first: list[Stage],
    second: list[Stage],
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> list[Likeness]:
    """Every map but the last of two networks of the same number of stages, see ``stages``.

    batches: pictures that both see, to find one frame from; more of them than a map has inputs.
    Networks are in evaluation mode.
    """
    if len(first) != len(second):
        raise ValueError(f"networks of {len(first)} and {len(second)} maps have no common layers")
    batches = list(batches)
    found = []
    for i, (a, b) in enumerate(zip(first[:-1], second[:-1], strict=True)):
        frame = agreement(first, second, i, batches)
        try:
            pair = rows(a), rows(b)
        except ValueError as error:
            found.append(_unknown(a.name, frame.explained, a.channels, str(error)))
            continue
        found.append(likeness(a.name, *pair, frame, generator))
    return found


def likeness(
    layer: str, first: Rows, second: Rows, frame: Agreement, generator: torch.Generator
) -> Likeness:
    """The covariances of two layers; ``frame.turn`` takes inputs of the first to the second's."""
    d = first.vectors.shape[1]
    signals = first.signal(), second.signal()
    ranks = spectra.effective_rank(signals[0]), spectra.effective_rank(signals[1])
    reason = _reason((first, second), ranks, frame)
    if reason is not None:
        return _unknown(layer, frame.explained, d, reason, ranks)
    turn = frame.turn
    cosine = spectra.bures_cosine(signals[0], turn.T @ signals[1] @ turn)
    chance = ceiling = 0.0
    scale = spectra.root(signals[0] + torch.eye(d, dtype=signals[0].dtype))
    for _ in range(DRAWS):
        o = spectra.rotation(d, generator)
        chance += spectra.bures_cosine(signals[0], o @ signals[0] @ o.T) / DRAWS
        drawn = torch.randn(first.vectors.shape, generator=generator, dtype=torch.float64)
        again = Rows(drawn @ scale, 1.0).signal()
        # A draw whose signal drowns is at a right angle to it.
        ceiling += (spectra.bures_cosine(signals[0], again) if again.any() else 0.0) / DRAWS
    if ceiling - chance < GAP:
        return _unknown(
            layer,
            frame.explained,
            d,
            f"a second draw of its law (cosine {ceiling:.2f}) is hardly more like it than a "
            f"random frame ({chance:.2f})",
            ranks,
        )
    similarity = (cosine - chance) / (ceiling - chance)
    return Likeness(layer, ranks, frame.explained, cosine, chance, ceiling, similarity, 5 / d**0.5)


def _reason(pair: tuple[Rows, Rows], ranks: tuple[float, float], frame: Agreement) -> str | None:
    """Why two layers cannot be compared, or None."""
    d = max(r.vectors.shape[1] for r in pair)
    if frame.vectors < 2 * d:
        return f"{frame.vectors} activations are too few to align {d} channels"
    for which, one in zip(("first", "second"), pair, strict=True):
        bulk = one.bulk()
        if not BULK[0] <= bulk <= BULK[1]:
            return (
                f"the noise of the {which} network's weights is {bulk:.2f} times what they "
                "started with: weight decay, another start, or learnt in all directions"
            )
    for which, rank in zip(("first", "second"), ranks, strict=True):
        if rank == 0:
            return f"no direction of the {which} network's weights is above their noise"
    return None


def _unknown(
    layer: str, explained: float, d: int, reason: str, ranks: tuple[float, float] = (nan, nan)
) -> Likeness:
    return Likeness(layer, ranks, explained, nan, nan, nan, nan, 5 / d**0.5, reason)
