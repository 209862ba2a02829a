"""The rainbow model inside residual networks: their blocks drawn anew, one after the other.

A residual stream has a frame of its own, which all layers write into and read from; it stays. What
is drawn are the rows of the first map of every residual block, x + W_2 rho(W_1 x): normal ones of
the covariance of W_1 (see rainbow.py), and W_2 is turned into the frame of the new hidden channels
by aligning these with the old ones on the same pictures. W_1 has places here, 3x3 of them, whose
learnt weights are not expected to be normal (Guth, Menard, Rochette and Mallat 2023, arXiv
2305.18512).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cdnctl.analysis.rainbow import Draw, Resampled, check_count, gaussian, turned
from cdnctl.core import spectra
from cdnctl.core.joint import Corrector, HasPosterior
from cdnctl.models.adjoint import Activation, Conv, Residual

Noisy = tuple[Tensor, Tensor]
"""Pictures (B, C, H, W) in [0, 1] plus noise, and the noise's standard deviations (B,)."""


class Block(NamedTuple):
    """A residual block: two maps with an activation between them."""

    name: str
    first: Conv
    second: Conv


def blocks(net: nn.Module) -> Iterator[Block]:
    """The residual blocks of a network, as its modules are listed."""
    for name, part in net.named_modules():
        if isinstance(part, Residual):
            *_, first, between, second = part.branch.layers
            if (
                isinstance(first, Conv)
                and isinstance(between, Activation)
                and isinstance(second, Conv)
            ):
                yield Block(name, first, second)


@torch.no_grad()
def hidden(net: nn.Module, names: Sequence[str], noisy: Noisy) -> dict[str, Tensor]:
    """What the second maps of named blocks read, (B, C, h, w), in the order in which they do."""
    found: dict[str, Tensor] = {}
    chosen = [b for b in blocks(net) if b.name in names]

    def keep(name: str, x: Tensor) -> None:
        found[name] = x

    hooks = [
        block.second.register_forward_pre_hook(lambda _, read, name=block.name: keep(name, read[0]))
        for block in chosen
    ]
    try:
        if isinstance(net, Corrector):
            net.correction(*noisy)
        elif isinstance(net, HasPosterior):
            net.logits(*noisy)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def resample_blocks(
    net: nn.Module,
    batches: Sequence[Noisy],
    generator: torch.Generator,
    *,
    draw: Draw = gaussian,
    aligned: bool = True,
) -> Resampled:
    """A network whose blocks have new first maps, see above.

    net: in evaluation mode. draw, aligned: as in `rainbow.resample`. ``explained`` has an entry a
    block, in the order in which they are gone through. ValueError where there is no block.
    """
    new = deepcopy(net)
    parts = {block.name: block for block in blocks(new)}
    order = list(hidden(net, list(parts), batches[0])) if parts else []
    if not order:
        raise ValueError(f"{type(net).__name__} has no residual blocks of two maps to draw anew")
    explained: list[float] = []
    for name in order:
        block = parts[name]
        rows = block.first.weight.detach()
        block.first.weight.copy_(draw(rows.flatten(1), len(rows), generator).view_as(rows))
        k, energy, other, vectors = torch.zeros(()), 0.0, 0.0, 0
        for noisy in batches:
            a, b = (
                spectra.samples(hidden(one, [name], noisy)[name]).double() for one in (net, new)
            )
            k = k + b.T @ a
            energy += float(a.square().sum())
            other += float(b.square().sum())
            vectors += len(a)
        check_count(vectors, len(k), name)
        explained.append(spectra.explained(k, energy, other))
        if aligned:
            rows = block.second.weight.detach()
            following = turned(rows.flatten(2), spectra.align(k))
            block.second.weight.copy_(following.view_as(rows))
    return Resampled(new, tuple(explained))
