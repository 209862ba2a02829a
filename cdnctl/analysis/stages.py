"""Networks as a chain of learnt linear maps with fixed parts between them: what comparisons of
weights and resampling need to know of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cdnctl.core import spectra
from cdnctl.models.channels import ChannelMap, Standardise
from cdnctl.models.scattering import Layer, Scattering

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, Standardise)


class Stage(NamedTuple):
    """A learnt linear map, and what comes before it since the last one."""

    name: str
    before: Callable[[Tensor], Tensor]
    linear: nn.Module  # a Linear, Conv2d or ChannelMap
    weight: Tensor  # learnt, (outputs, inputs, ...)
    channels: int  # of the inputs; a row of weights has (channels, places)
    norms: tuple[nn.Module, ...]  # of the fixed parts, those that remember statistics

    def rows(self) -> Tensor:
        """The weights, a row for each output: (outputs, channels, places), complex for a complex
        map."""
        weight = self.linear.matrix if isinstance(self.linear, ChannelMap) else self.weight
        return weight.detach().reshape(len(weight), self.channels, -1)

    def vectors(self, x: Tensor) -> Tensor:
        """Inputs of the map, every place a vector of what its rows multiply: (n, channels)."""
        if isinstance(self.linear, ChannelMap) and self.linear.complex:
            reals = self.linear.channels.reals
            parts = x[:, reals:].chunk(2, 1)
            x = torch.cat([x[:, :reals].to(x.dtype.to_complex()), torch.complex(*parts)], 1)
        return spectra.samples(x, self.channels)


def stages(net: nn.Module) -> list[Stage]:
    """The stages of a Sequential of Linear, Conv2d and fixed layers, or of a scattering network.

    Inputs of the first are pictures: (B, ...) as a Sequential takes them, and (B, C, H, W) of
    noise 0 for a scattering network. ValueError where something else is learnt.
    """
    if isinstance(net, Scattering):
        return _of_scattering(net)
    if not isinstance(net, nn.Sequential):
        raise ValueError(f"weights of {type(net).__name__} are no chain of linear maps")
    return _of_sequential(net)


def _of_sequential(net: nn.Sequential) -> list[Stage]:
    found: list[Stage] = []
    fixed: list[nn.Module] = []
    for name, part in net.named_children():
        if not isinstance(part, nn.Linear | nn.Conv2d):
            if next(part.parameters(), None) is not None:
                raise ValueError(f"layer {name} ({type(part).__name__}) learns more than a map")
            fixed.append(part)
            continue
        if isinstance(part, nn.Conv2d) and part.groups != 1:
            raise ValueError(f"layer {name} has {part.groups} groups of channels instead of one")
        channels = part.weight.shape[1]
        if isinstance(part, nn.Linear) and found and isinstance(found[-1].linear, nn.Conv2d):
            channels = len(found[-1].weight)  # flattened: each channel has its places
        norms = tuple(m for m in fixed if isinstance(m, NORMS))
        before = nn.Sequential(*fixed)
        found.append(Stage(name, before, part, part.weight, channels, norms))
        fixed = []
    if not found or fixed:
        raise ValueError("the last layer must be a linear map: its outputs are class scores")
    for stage in found[:-1]:
        if getattr(stage.linear, "bias", None) is not None:
            raise ValueError(f"layer {stage.name} has a bias, which no covariance tells of")
    return found


def _of_scattering(net: Scattering) -> list[Stage]:
    layers = net.trunk.stack()
    if net.config.frames:
        raise ValueError("frames are maps there and back: only networks without them are chains")
    found: list[Stage] = []
    for i, layer in enumerate(layers):
        behind = layers[i - 1] if i else None

        def before(x: Tensor, layer: Layer = layer, behind: Layer | None = behind) -> Tensor:
            x = net.picture(x, 0.0) if behind is None else behind.normed(x)
            return layer.standard(layer.coefficients(x))

        norms = [layer.standard]
        if behind is not None and behind.after is not None:
            norms.insert(0, behind.after)
        weight = layer.map.weight
        found.append(
            Stage(f"{i + 1} map", before, layer.map, weight, weight.shape[-1], tuple(norms))
        )
    last, head = layers[-1], net.head

    def features(x: Tensor) -> Tensor:
        return head.features(last.normed(x)).mean((2, 3))

    norms = [n for n in (last.after, head.standard) if n is not None]
    return [
        *found,
        Stage("head", features, head.linear, head.linear.weight, last.outside.total, tuple(norms)),
    ]


def run(chain: list[Stage], x: Tensor, upto: int) -> Tensor:
    """Inputs of the map of stage ``upto``, from inputs of the network."""
    for stage in chain[:upto]:
        x = stage.linear(stage.before(x))
    return chain[upto].before(x)


@torch.no_grad()
def recalibrate(chain: list[Stage], upto: int, batches: Iterable[Tensor]) -> None:
    """Recompute the statistics in front of the map of stage ``upto`` for the network as it now is:
    the mean over all batches."""
    for norm in chain[upto].norms:
        norm.train()
    for k, x in enumerate(batches):
        for norm in chain[upto].norms:
            norm.momentum = 1 / (k + 1)  # type: ignore[assignment]
        run(chain, x, upto)
    for norm in chain[upto].norms:
        norm.momentum = 0.1  # type: ignore[assignment]
        norm.eval()


class Agreement(NamedTuple):
    """Activations of two networks at one place, aligned."""

    turn: Tensor  # (channels of b, channels of a), in double precision: turn @ a is like b
    explained: float  # share of the energy, 1 where alignment is perfect
    vectors: int  # that it is taken from


@torch.no_grad()
def agreement(a: list[Stage], b: list[Stage], upto: int, batches: Iterable[Tensor]) -> Agreement:
    """Alignment of the inputs of two networks' maps of stage ``upto``; places are samples."""
    k, energy, other, vectors = torch.zeros(()), 0.0, 0.0, 0
    for x in batches:
        first, second = (chain[upto].vectors(run(chain, x, upto)) for chain in (a, b))
        wide = torch.promote_types(first.dtype, torch.float64)
        first, second = first.to(wide), second.to(wide)
        k = k + second.T @ first.conj()
        energy += float(first.abs().square().sum())
        other += float(second.abs().square().sum())
        vectors += len(first)
    return Agreement(spectra.align(k), spectra.explained(k, energy, other), vectors)
