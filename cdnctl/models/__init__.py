"""Architectures: a frozen config dataclass and a network each, registered by name.

What a network can do is told by its ``denoises`` and ``classifies``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from cdnctl.errors import ConfigError
from cdnctl.models.baselines import Classifier, UNet
from cdnctl.models.gradresnet import GradResNet
from cdnctl.models.hybrid import Hybrid
from cdnctl.models.trunk import Mixture, NetConfig, Network, Whole

__all__ = ["REGISTRY", "Architecture", "Mixture", "NetConfig", "Network", "Whole", "architecture"]


class Architecture(NamedTuple):
    """A config dataclass and the network that is built from it."""

    config: type[NetConfig]
    module: type[Network]


REGISTRY: Mapping[str, Architecture] = {
    "gradresnet": Architecture(NetConfig, GradResNet),
    "hybrid": Architecture(NetConfig, Hybrid),
    "classifier": Architecture(NetConfig, Classifier),
    "unet": Architecture(NetConfig, UNet),
}


def architecture(name: str) -> Architecture:
    """The registered architecture; ConfigError naming the known ones otherwise."""
    if not isinstance(name, str) or name not in REGISTRY:
        raise ConfigError(f"unknown architecture {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name]
