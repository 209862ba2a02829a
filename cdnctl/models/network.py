"""What all architectures have in common: a module that says what it needs.

What a network can do is told by what it has: a `Corrector` denoises, one that `HasPosterior`
classifies, a `Joint` gives the density. Those protocols are in core/joint.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from cdnctl.core.joint import Mixture, Whole, per_class

__all__ = ["Mixture", "Needs", "Network", "Whole", "posterior_of", "resolved"]


@dataclass(frozen=True)
class Needs:
    """What a network asks of whoever gives it pictures."""

    channels: int  # of a picture
    bytes_per_pixel: int  # about what a pass takes of memory per pixel of a tile, in float32
    multiple: int = 1  # of which the sides of a picture should be multiples: its coarsest cell
    # How many pixels around a tile must be seen with it; None: only whole pictures can be seen.
    margin: int | None = None
    coloured: bool = False  # whether it hears what noise is like that is not white, see `Told`
    passes: int = 1  # whose features are all kept for a gradient
    # Whether a tile always needs the posterior of the whole picture, even without a mixture.
    posterior: bool = False
    sigma_range: tuple[float, float] = (0.0, inf)  # noise levels that it knows, in [0, 1] units
    value_range: tuple[float, float] = (0.0, 1.0)  # of black and white in the pictures


class Network(nn.Module):
    """A network of any architecture.

    num_classes: K, 0 for one that knows no classes. compute_dtype: the precision of what takes
    the time (None: that of weights in half precision, else that of the input); input, output,
    logits and energies keep the input's.
    """

    def __init__(self, needs: Needs, num_classes: int = 0):
        super().__init__()
        self.needs = needs
        self.num_classes = num_classes
        self.compute_dtype: torch.dtype | None = None

    @property
    def undecayed(self) -> frozenset[str]:
        """Names of parameters that weight decay must leave alone."""
        return frozenset()

    def after_step(self) -> None:
        """To be called after every step of the optimiser; most networks have nothing to do."""

    def adopted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of another network, in a form from which this one can start."""
        return dict(weights)


def posterior_of(logits: Tensor, whole: Whole | None) -> Tensor:
    """p(c | picture), (B, K), by its logits, or by those of the whole that it is part of."""
    return logits.softmax(1) if whole is None else per_class(whole.posterior, logits)


def resolved(mixture: Mixture, logits: Tensor, whole: Whole | None) -> Tensor:
    """The weights of a mixture, (B, K): as given, computed from the logits, or the posterior."""
    if mixture is None:
        return posterior_of(logits, whole)
    return per_class(mixture(logits) if callable(mixture) else mixture, logits)
