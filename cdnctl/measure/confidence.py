"""Whether a denoiser errs by as much as it says: sigma^2 tr J against the true squared error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdnctl.analysis.basis import Calibration, calibration
from cdnctl.api import Model
from cdnctl.errors import UsageError
from cdnctl.restore.prior import Prior

TOGETHER = 20  # pictures that go through the network at a time


@dataclass(frozen=True)
class Confidence:
    """Of a denoiser at one noise level, over pictures."""

    sigma: float  # in [0, 1] pixel units
    pictures: int
    expected: float  # root mean square error that the Jacobian tells, in [0, 1] pixel units
    made: float  # that there is
    ratio: float  # squared error made over that expected: 1 is calibrated, more is too sure
    error: float  # standard error of the ratio, over pictures


def confidence(
    pictures: Sequence[Tensor],
    model: Model,
    sigmas: Sequence[float],
    *,
    probes: int = 4,
    seed: int = 0,
    watch: Callable[[], None] = lambda: None,
) -> Iterator[Confidence]:
    """One for each level. pictures: clean, (1, C, H, W) of one size, gray or with the model's
    channels, at least two. probes: of random signs, for the trace, each a pass back. watch: called
    after every picture."""
    if len(pictures) < 2:
        raise UsageError("one picture has no standard error: give two or more")
    channels = model.needs.channels
    # Gray is repeated, as in training.
    clean = torch.cat([x.expand(-1, channels, -1, -1) if x.shape[1] == 1 else x for x in pictures])
    prior = Prior(model, (clean.shape[1], clean.shape[2], clean.shape[3]))
    if len(prior.tiles) > 1:
        raise UsageError("pictures that do not fit into memory as a whole: give smaller ones")
    for sigma in sigmas:
        generator = torch.Generator(model.device).manual_seed(seed)
        parts = []
        for batch in clean.split(TOGETHER):
            batch = batch.to(model.device)
            parts.append(calibration(prior, batch, sigma, probes, generator))
            for _ in batch:
                watch()
        found = Calibration(
            torch.cat([p.expected for p in parts]), torch.cat([p.made for p in parts])
        )
        ratio, error = found.ratio()
        expected, made = (math.sqrt(v.double().mean().item()) for v in (found.expected, found.made))
        yield Confidence(sigma, len(clean), expected, made, ratio, error)
