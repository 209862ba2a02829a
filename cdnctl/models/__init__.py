"""Architectures: a frozen config dataclass and a module each, registered by name.

Every module maps ``forward(y, sigma, weights=None) -> (denoised, class scores)``
and has ``num_classes`` and ``compute_dtype``; what it can do is told by
``denoises`` and ``classifies``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from cdnctl.errors import ConfigError
from cdnctl.models.baselines import Classifier, UNet
from cdnctl.models.gradresnet import GradResNet
from cdnctl.models.trunk import NetConfig


class Architecture(NamedTuple):
    """A config dataclass and the module that is built from it."""

    config: type[Any]
    module: type[nn.Module]


REGISTRY: Mapping[str, Architecture] = {
    "gradresnet": Architecture(NetConfig, GradResNet),
    "classifier": Architecture(NetConfig, Classifier),
    "unet": Architecture(NetConfig, UNet),
}


def architecture(name: str) -> Architecture:
    """The registered architecture; ConfigError naming the known ones otherwise."""
    if not isinstance(name, str) or name not in REGISTRY:
        raise ConfigError(f"unknown architecture {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name]
