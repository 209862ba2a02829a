"""How much of a network is the covariances of its weights: networks drawn from them.

In the rainbow model (Guth, Menard, Rochette and Mallat 2023, arXiv 2305.18512) the rows of a
layer's weights are independent normal vectors. Training finds their covariance, up to a rotation
of the layer's inputs that differs from network to network. A new network is drawn layer by layer;
aligning its activations with those of the old one on the same pictures gives the rotation. It is a
model of maps that mix channels; learnt filters in space are not normal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cdnctl.analysis.stages import Agreement, Stage, agreement, recalibrate, stages

Draw = Callable[[Tensor, int, torch.Generator], Tensor]
"""New rows (count, d) from those of a trained layer, (n, d)."""


def gaussian(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Normal rows W', real or complex like the old ones, with their covariance. The mean of W'^H W'
    is W^H W for any number of rows, so the scale of the following layers stays the same."""
    return _normal(count, len(rows), rows, generator) @ rows / count**0.5


def white(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Normal rows of the same energy and no preference: a control."""
    scale = rows.norm() / (count * rows.shape[1]) ** 0.5
    return scale * _normal(count, rows.shape[1], rows, generator)


def _normal(count: int, d: int, like: Tensor, generator: torch.Generator) -> Tensor:
    wide = torch.promote_types(like.dtype, torch.float64)
    return torch.randn(count, d, generator=generator, dtype=wide).to(like)


class Resampled(NamedTuple):
    """A network drawn from another one's covariances."""

    network: nn.Module
    explained: tuple[float, ...]
    """Share of the energy of activations that alignment explains, in front of every map but the
    first."""


@torch.no_grad()
def resample(
    net: nn.Module,
    batches: Sequence[Tensor],
    generator: torch.Generator,
    *,
    draw: Draw = gaussian,
    aligned: bool = True,
    widen: int = 1,
) -> Resampled:
    """A network with new rows in every map but the last, which is turned into the new frame.

    net: as in ``stages``, trained, in evaluation mode. batches: inputs, of the training set,
    that frames and statistics are taken from. draw: the law of rows. aligned: or every frame
    is taken for that of the old network (a control). widen: factor of the hidden widths, for a
    Sequential without norms. ValueError for pictures that give fewer activations than channels.
    """
    old, new = stages(net), deepcopy(net)
    chain = stages(new)
    if widen != 1 and (not isinstance(net, nn.Sequential) or any(s.norms for s in old)):
        raise ValueError(f"only a Sequential without norms can be {widen} times as wide")
    explained: list[float] = []
    for i, stage in enumerate(old):
        turn = None
        if i:
            recalibrate(chain, i, batches)
            found = agreement(old, chain, i, batches)
            check_count(found.vectors, found.turn.shape[1], stage.name)
            explained.append(found.explained)
            turn = _turn(found, stage, aligned)
        rows = stage.rows()
        if i < len(old) - 1:
            rows = draw(rows.flatten(1), widen * len(rows), generator).unflatten(1, rows.shape[1:])
        if turn is not None:
            rows = turned(rows, turn)
        _set(chain[i], rows)
        if widen != 1 and i + 1 < len(old):  # the next map has as many inputs; its rows follow
            following = old[i + 1].rows()
            _set(chain[i + 1], following.repeat(1, widen, 1))
        chain = stages(new)
    return Resampled(new, tuple(explained))


def check_count(vectors: int, channels: int, name: str) -> None:
    """ValueError if so few activations leave the frame of channels open."""
    if vectors < channels:
        raise ValueError(
            f"{vectors} activations are too few to align the {channels} channels of {name!r}: "
            "look at more pictures"
        )


def turned(rows: Tensor, turn: Tensor) -> Tensor:
    """Rows (outputs, channels, places) for inputs that a ``turn`` (new channels, channels) was
    applied to."""
    return torch.einsum("dc,ocs->ods", turn.conj().to(rows), rows)


def _turn(found: Agreement, stage: Stage, aligned: bool) -> Tensor:
    """(channels of the new network, channels of the old one)."""
    if aligned:
        return found.turn
    return torch.eye(*found.turn.shape, dtype=found.turn.dtype)


def _set(stage: Stage, rows: Tensor) -> None:
    """Weights (outputs, channels, places) for a map whose widths may change."""
    linear = stage.linear
    if rows.is_complex():
        rows = rows.flatten(1)
        linear.weight = nn.Parameter(torch.stack([rows.real, rows.imag]))
        return
    kernel = stage.weight.shape[2:]
    linear.weight = nn.Parameter(rows.reshape(len(rows), -1, *kernel).contiguous())
    outputs, inputs = linear.weight.shape[:2]
    names = ("out_channels", "in_channels")
    if isinstance(linear, nn.Linear):
        names = ("out_features", "in_features")
    if isinstance(linear, nn.Linear | nn.Conv2d):
        setattr(linear, names[0], outputs)
        setattr(linear, names[1], inputs)


def arc_cosine(x: Tensor, y: Tensor, covariance: Tensor) -> Tensor:
    """Limit of the kernel of a random rectified layer, E relu(w x) relu(w y) for w of a normal law
    of that covariance (Cho and Saul 2009): (n, d), (m, d), (d, d) -> (n, m)."""
    inner = x @ covariance @ y.T
    a, b = (torch.einsum("nd,de,ne->n", t, covariance, t) for t in (x, y))
    norm = (a[:, None] * b).sqrt()
    angle = (inner / norm).clamp(-1, 1).arccos()
    return norm * (angle.sin() + (torch.pi - angle) * angle.cos()) / (2 * torch.pi)
