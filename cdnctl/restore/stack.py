"""Pictures in the network together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cdnctl.core.coloured import OCTAVES, Told
from cdnctl.core.joint import Mixture, Sigma
from cdnctl.restore.view import View


def batch_size(height: int, width: int) -> int:
    """How many pictures of one size go through the network together.

    It depends on the size alone, and smaller batches are filled up: kernels may round
    differently for another number of pictures, but not for other neighbours. So a picture
    comes out the same to the bit alone, in a folder, and in whatever order.
    """
    return max(1, min(32, 2**16 // (height * width)))


class Stack:
    """Pictures of one shape (H, W, C) in the network together.

    views: at most `batch_size` small pictures, which blanks fill up to a full batch; or a single
    one of any size, in tiles if it is large. size: how many make a full batch, if not so many.
    """

    def __init__(self, views: Sequence[View], size: int | None = None):
        self.views, self.first = views, views[0]
        self.size = size or batch_size(self.first.height, self.first.width)
        self.model = self.first.model
        self.tiled = len(self.first.tiles) > 1
        self._logits: Tensor | None = None
        if not self.tiled:
            self._box = self.first.tiles[0].read
            self._noisy = [view.read(self._box)[None] for view in views]
            y = [view.repeated(part) for view, part in zip(views, self._noisy, strict=True)]
            self._y = self._filled(torch.cat(y))
            self._sigma = self._filled(torch.tensor([view.told for view in views]), 1.0)
            self._told: Sigma = self._sigma
            if any(view.coloured for view in views):
                self._told = self._heard()

    def _heard(self) -> Told:
        """What the network hears of all pictures' noise; white noise is described as white."""
        said = []
        for view, y in zip(self.views, self._noisy, strict=True):
            heard = view.hears(y)
            if not isinstance(heard, Told):
                heard = Told(
                    y.new_full((1,), view.told), y.new_zeros(1, 2, OCTAVES), y[:, :1] * 0 + 1
                )
            said.append(heard)
        sigma, spectrum, relief = (torch.cat(parts) for parts in zip(*said, strict=True))
        return Told(self._filled(sigma, 1.0), self._filled(spectrum), self._filled(relief, 1.0))

    def _filled(self, values: Tensor, blank: float = 0.0) -> Tensor:
        """(n, ...) with blanks up to a full batch, on the device of the model."""
        blanks = self.size - len(values)
        return torch.cat([values, values.new_full((blanks, *values.shape[1:]), blank)]).to(
            self.model.device
        )

    @property
    @torch.no_grad()
    def logits(self) -> Tensor:
        """Class scores, (n, K), on the host; with the first `solve` they cost nothing."""
        if self.tiled:
            return self.first.logits()[None]
        if self._logits is None:
            logits = self.model.classifier().logits(self._y, self._sigma)
            self._logits = logits[: len(self.views)].cpu()
        return self._logits

    @torch.no_grad()
    def solve(self, mixture: Mixture = None) -> list[np.ndarray]:
        """What each picture changes by, (H, W, C), within what its noise allows.

        mixture: of classes, (n, K), or a function that gives them from the class scores, (n, K);
        None: the posterior.
        """
        choose = _chooser(mixture)
        if self.tiled:
            one = None if choose is None else lambda logits: choose(logits[None])[0]
            return [self.first.solve(one)[0]]
        correction = self._network(choose)
        return [
            view.placed(view.accepted(y, part[None].cpu())[0])
            for view, y, part in zip(self.views, self._noisy, correction, strict=True)
        ]

    @torch.no_grad()
    def corrections(self, mixture: Tensor) -> list[Tensor]:
        """sigma^2 sum_c w_c s_c of each picture, (1, C, H, W), for mixtures (n, K): linear in
        them, for nothing is held back."""
        height, width = self.first.height, self.first.width
        return [
            view.averaged(part[None])[..., :height, :width]
            for view, part in zip(self.views, self._network(_chooser(mixture)).cpu(), strict=True)
        ]

    def _network(self, choose: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The network's corrections, (n, C', H', W'), in its channels, extended to whole cells."""
        count = len(self.views)

        def filled(logits: Tensor) -> Tensor:
            assert choose is not None
            return self._filled(choose(logits[:count].cpu()))

        correction, logits = self.model.corrector().correction(
            self._y, self._told, None if choose is None else filled
        )
        if self._logits is None:
            self._logits = logits[:count].cpu()
        return correction[:count]


def _chooser(mixture: Mixture) -> Callable[[Tensor], Tensor] | None:
    """A mixture as a function of the class scores; None for the posterior."""
    return (lambda logits: mixture) if isinstance(mixture, Tensor) else mixture
