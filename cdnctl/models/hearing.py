"""How the stages of a network hear what noise is like that is not white."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.coloured import OCTAVES


def make_ears(widths: Sequence[int], coloured: bool) -> nn.ModuleList:
    """For each stage a linear map of the noise's spectrum to its channels; none for a network
    that does not hear.

    They start at zero: a network that was trained on white noise stays what it is.
    """
    ears = [nn.Linear(2 * OCTAVES, width, bias=False) for width in widths if coloured]
    for ear in ears:
        nn.init.zeros_(ear.weight)
    return nn.ModuleList(ears)


def heard(ears: nn.ModuleList, stage: int, spectrum: Tensor | None, h: Tensor) -> Tensor:
    """Features (B, C, h, w) of a stage moved by what it hears of a spectrum, (B, 2 OCTAVES): not
    at all if that is white, or none. It does not depend on h, so the adjoint is the identity."""
    if spectrum is None or not len(ears):
        return h
    weight = ears[stage].weight
    assert isinstance(weight, Tensor)
    shift = F.linear(spectrum.to(weight.dtype), weight)  # (B, C)
    return h + shift.to(h.dtype)[:, :, None, None]
