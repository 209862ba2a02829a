"""Validation: the averaged weights of a run on pictures that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cdnctl.core.joint import Corrector, HasPosterior
from cdnctl.core.metrics import accuracy, psnr
from cdnctl.core.noise import add_noise
from cdnctl.images import PEAK
from cdnctl.training.batches import Batches
from cdnctl.training.config import TrainConfig
from cdnctl.training.datasets import Pictures
from cdnctl.training.objectives import objective_of
from cdnctl.training.state import TrainState, copy_into, tensors_of

VALIDATION_PIXELS = 2**22  # that a GPU works on at once
VALIDATION_PATCH = 128  # side of the crops of pictures that are no thumbnails
SHOWN = 4  # held-out pictures in `Samples`


@dataclass(frozen=True)
class Samples:
    """A few held-out pictures at a validation, on the host."""

    clean: Tensor  # (N, 3, p, p) in [0, 1]
    noisy: Tensor  # (S, N, 3, p, p), of each noise level; not clipped, nor is the next
    denoised: Tensor  # like noisy
    sigmas: tuple[float, ...]  # S of them, 0..255


@torch.no_grad()
def validate(state: TrainState, held: Pictures, config: TrainConfig) -> dict[str, float]:
    """Averaged weights on held-out pictures: the training loss, and PSNR and accuracy per sigma.

    Centre crops, the same noise each time, outputs clipped; PSNR in dB without
    classes, accuracy in [0, 1] over the labelled pictures.
    """
    model, trained = state.model, {k: v.clone() for k, v in tensors_of(state.model).items()}
    copy_into(model, state.ema)
    model.eval()
    try:
        result: dict[str, float] = {}
        size = config.data.batch
        count = max(1, len(held) // size)
        draw = Batches(held, config.data, config.noise, config.loss, seed=1)
        objective = objective_of(config)
        parts = [objective(model, draw(i), config.loss) for i in range(count)]
        matching, entropy = (torch.cat(p).mean().item() for p in zip(*parts, strict=True))
        result["loss"] = config.loss.score * matching + config.loss.classes * entropy

        # Thumbnails tell classes and nothing of denoising, large pictures the reverse.
        labelled, small = held.labels >= 0, held.sizes.amin(1) < config.data.thumbnail
        pupils = (labelled & small if config.data.thumbnail else labelled).nonzero().flatten()
        targets, patch = _targets(held, config)
        lesson = config.data.class_patch if config.data.class_batch else config.data.patch
        for level in config.run.validate_sigmas:
            if isinstance(model, Corrector):
                scores = [
                    # On the host: MPS knows no float64.
                    psnr(_denoised(model, noisy, level).clamp(0, 1).cpu(), clean.cpu())
                    for clean, noisy in _looked_at(held, targets, patch, level, size)
                ]
                result[f"psnr_{level:g}"] = torch.cat(scores).mean().item()
            if isinstance(model, HasPosterior) and len(pupils):
                logits = [
                    model.logits(noisy, level / PEAK).cpu()
                    for _, noisy in _looked_at(held, pupils, lesson, level, size)
                ]
                labels = held.labels[pupils].cpu()
                result[f"accuracy_{level:g}"] = accuracy(torch.cat(logits), labels)
        return result
    finally:
        copy_into(model, trained)
        model.train()


def _targets(held: Pictures, config: TrainConfig) -> tuple[Tensor, int]:
    """Indices of the held-out pictures that are clean enough to denoise, and the side of their
    crops."""
    if not config.data.thumbnail:
        return torch.arange(len(held), device=held.buffer.device), config.data.patch
    large = held.sizes.amin(1) >= config.data.thumbnail
    return large.nonzero().flatten(), VALIDATION_PATCH


def _denoised(model: Corrector, noisy: Tensor, level: float) -> Tensor:
    return noisy + model.correction(noisy, level / PEAK)[0]


def _looked_at(
    held: Pictures, which: Tensor, patch: int, level: float, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Centre crops of pictures, clean and with noise, in batches; it is the same each time."""
    generator = torch.Generator(held.buffer.device).manual_seed(0)
    if held.buffer.device.type != "cpu":
        size = max(size, VALIDATION_PIXELS // patch**2)
    for part in which.split(size):
        sizes = held.sizes[part]
        corner = (sizes - patch) // 2
        clean = held.crops(part, corner[:, 0], corner[:, 1], torch.zeros_like(part), patch)
        yield clean, add_noise(clean, level / PEAK, generator)


@torch.no_grad()
def take_samples(state: TrainState, held: Pictures, config: TrainConfig) -> Samples | None:
    """A few held-out pictures, evenly spaced, at the noise levels of validation, denoised by the
    averaged weights. The same ones with the same noise each time. None if there is nothing to
    denoise, or no network that does."""
    model, levels = state.model, config.run.validate_sigmas
    targets, patch = _targets(held, config)
    if not isinstance(model, Corrector) or not levels or not len(targets):
        return None
    device, count = held.buffer.device, min(SHOWN, len(targets))
    which = targets[torch.arange(count, device=device) * len(targets) // count]
    corner = (held.sizes[which] - patch) // 2
    clean = held.crops(which, corner[:, 0], corner[:, 1], torch.zeros_like(which), patch)
    trained = {k: v.clone() for k, v in tensors_of(model).items()}
    copy_into(model, state.ema)
    model.eval()
    try:
        noisy, denoised = [], []
        for level in levels:
            generator = torch.Generator(device).manual_seed(0)
            noisy.append(add_noise(clean, level / PEAK, generator))
            denoised.append(_denoised(model, noisy[-1], level))
    finally:
        copy_into(model, trained)
        model.train()
    return Samples(clean.cpu(), torch.stack(noisy).cpu(), torch.stack(denoised).cpu(), levels)
