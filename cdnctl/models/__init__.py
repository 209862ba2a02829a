"""Architectures: a frozen config dataclass and a network each, registered by name.

**To add one**, write a file in this folder with

- a config: a frozen dataclass of numbers, texts, tuples of them and other such dataclasses. It
  travels in the header of a weights file, and ``[model]`` of a training config gives its fields.
  ValueError in ``__post_init__`` for a shape that cannot be. ``num_classes`` is set by the
  training data; a network that knows no classes has no such field;
- a module: a `Network` that is built from the config alone, states its `Needs`, and has the
  methods of what it can do, which are written down in core/joint.py: ``correction`` to denoise,
  ``logits`` to classify (with ``class_features`` and ``logits_of`` also pictures in tiles),
  ``log_joint`` for the density;

and a line in ``REGISTRY`` with both, a config so small that tests are quick, and the name of what
it is trained to do, one of those in training/objectives.py. All commands then know it, and
tests/test_contract.py tries it. A residual encoder that knows its adjoint is in trunk.py, for
those that can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from cdnctl.errors import ConfigError
from cdnctl.models.baselines import Classifier, UNet
from cdnctl.models.biasfree import BiasFree, BiasFreeConfig
from cdnctl.models.gradresnet import GradResNet
from cdnctl.models.hybrid import Hybrid
from cdnctl.models.multiscale import LocalConfig, Multiscale, MultiscaleConfig
from cdnctl.models.network import Mixture, Needs, Network, Whole
from cdnctl.models.scattering import FixedConfig, FixedScattering, Scattering, ScatteringConfig
from cdnctl.models.trunk import NetConfig

__all__ = [
    "REGISTRY",
    "Architecture",
    "Mixture",
    "Needs",
    "NetConfig",
    "Network",
    "Whole",
    "architecture",
]


class Architecture(NamedTuple):
    """What is registered under the name of an architecture."""

    config: type[Any]  # a frozen dataclass
    module: type[Network]  # built from one of these
    example: Any  # a tiny config, for tests
    objective: str  # of the training, one of those in training/objectives.py

    @property
    def knows_classes(self) -> bool:
        """Whether the number of classes is part of the config."""
        return any(field.name == "num_classes" for field in fields(self.config))


_SMALL = LocalConfig(reach=3, width=4, blocks=1)
_TINY = NetConfig(num_classes=3, widths=(4, 8), blocks=(1, 1), norm="pixel", groups=2, head=8)

REGISTRY: Mapping[str, Architecture] = {
    "gradresnet": Architecture(NetConfig, GradResNet, _TINY, "joint"),
    "hybrid": Architecture(NetConfig, Hybrid, _TINY, "joint"),
    "classifier": Architecture(NetConfig, Classifier, _TINY, "classifying"),
    "unet": Architecture(NetConfig, UNet, _TINY, "denoising"),
    "multiscale": Architecture(
        MultiscaleConfig, Multiscale, MultiscaleConfig(3, 2, _SMALL, _SMALL), "scales"
    ),
    # So narrow, as nothing but training keeps it from changing a picture by more than its noise.
    "biasfree": Architecture(
        BiasFreeConfig, BiasFree, BiasFreeConfig(width=2, depth=4), "denoising"
    ),
    "scattering": Architecture(
        ScatteringConfig, Scattering, ScatteringConfig(3, widths=(4, 6)), "classifying"
    ),
    "fixed-scattering": Architecture(
        FixedConfig, FixedScattering, FixedConfig(3, octaves=2, angles=4, cells=2), "classifying"
    ),
}


def architecture(name: str) -> Architecture:
    """The registered architecture; ConfigError naming the known ones otherwise."""
    if not isinstance(name, str) or name not in REGISTRY:
        raise ConfigError(f"unknown architecture {name!r}; known: {', '.join(REGISTRY)}")
    return REGISTRY[name]
