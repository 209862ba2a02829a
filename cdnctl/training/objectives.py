"""What networks are trained to do. An architecture names one of these in its registry line.

An objective gives two losses per picture of a batch, (B,) each: score matching, and cross-entropy,
either of them 0 where it does not apply. The cross-entropy of a batch's lesson comes behind that
of the batch, or alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cdnctl.core.coloured import Told
from cdnctl.core.joint import Corrector, HasPosterior, Mixture, Sigma
from cdnctl.core.losses import cross_entropy, score_matching
from cdnctl.images import PEAK
from cdnctl.models import architecture
from cdnctl.training.batches import Batch
from cdnctl.training.config import LossConfig, TrainConfig

QUIETEST = 1 / PEAK  # a noise level of zero has no score to match: this bounds the weight

Objective = Callable[[Any, Batch, LossConfig], tuple[Tensor, Tensor]]


class Both(Corrector, HasPosterior, Protocol):
    """What denoises and classifies."""


class ByScales(Corrector, Protocol):
    """What denoises scale after scale, and can be given the clean picture's coarser ones."""

    def taught(self, y: Tensor, sigma: Sigma, clean: Tensor) -> Tensor: ...


def joint(model: Both, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Denoise, some pictures given their class, and classify in the same pass."""
    noisy = _noisy(batch)
    correction, logits = model.correction(noisy, _told(batch), _mixture(batch, config))
    matching = _matching(noisy + correction, batch, config)
    entropy = [] if batch.alone else [cross_entropy(logits, batch.labels, config.smoothing)]
    if batch.lesson is not None:
        entropy.append(_entropy(model, batch.lesson, config))
    return matching, torch.cat(entropy)


def denoising(model: Corrector, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Denoise; classes have no part in it."""
    noisy = _noisy(batch)
    matching = _matching(noisy + model.correction(noisy, _told(batch))[0], batch, config)
    return matching, torch.zeros_like(matching)


def scales(model: ByScales, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Denoise each band of a picture, given the clean coarser picture."""
    noisy = _noisy(batch)
    correction = model.taught(noisy, _told(batch), batch.clean)
    matching = _matching(noisy + correction, batch, config)
    return matching, torch.zeros_like(matching)


def classifying(model: HasPosterior, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Classify; noise is there, but nothing to be matched."""
    parts = [] if batch.alone else [batch]
    parts += [] if batch.lesson is None else [batch.lesson]
    entropy = torch.cat([_entropy(model, part, config) for part in parts])
    return torch.zeros_like(batch.sigma), entropy


OBJECTIVES: Mapping[str, Objective] = {
    "joint": joint,
    "denoising": denoising,
    "scales": scales,
    "classifying": classifying,
}


def objective_of(config: TrainConfig) -> Objective:
    """The objective that the config's architecture names."""
    return OBJECTIVES[architecture(config.model["arch"]).objective]


def _noisy(batch: Batch) -> Tensor:
    return batch.clean + batch.sigma.view(-1, 1, 1, 1) * batch.noise


def _told(batch: Batch) -> Sigma:
    if batch.spectrum is None or batch.relief is None:
        return batch.told
    return Told(batch.told, batch.spectrum, batch.relief)


def _mixture(batch: Batch, config: LossConfig) -> Mixture:
    """The true class of those pictures that are denoised given it, else the posterior."""
    if not config.conditional:
        return None

    def mixture(logits: Tensor) -> Tensor:
        p = logits.softmax(1)
        one_hot = F.one_hot(batch.labels.clamp_min(0), p.shape[1])
        return torch.where(batch.condition[:, None], one_hot.to(p.dtype), p)

    return mixture


def _matching(denoised: Tensor, batch: Batch, config: LossConfig) -> Tensor:
    # A network that hears too high a level cannot come as close as the true level would allow.
    sigma = torch.maximum(batch.sigma, batch.told).clamp_min(QUIETEST)
    return score_matching(denoised, batch.clean, sigma, config.score_power)


def _entropy(model: HasPosterior, batch: Batch, config: LossConfig) -> Tensor:
    logits = model.logits(_noisy(batch), batch.told)
    return cross_entropy(logits, batch.labels, config.smoothing)
