"""Which way to run the training step is the fastest on this machine, found by trying them.

A way counts only if it computes what float32 computes, see `Trial.sound`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cdnctl.checkpoints import Header
from cdnctl.errors import SetupError
from cdnctl.training.batches import Batches
from cdnctl.training.config import TrainConfig, needs
from cdnctl.training.datasets import Unread, load_datasets
from cdnctl.training.halves import chosen
from cdnctl.training.runs import class_names, make_header, make_model
from cdnctl.training.state import TrainState
from cdnctl.training.step import loss_and_gradients, make_objective, numerics, train_step

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.01, 0.05  # relative to float32


@dataclass(frozen=True)
class Trial:
    """One way to run the training step, as `probe` found it."""

    precision: str  # as in the config, like the next two
    channels_last: bool
    compile: bool
    rate: float = math.nan  # pictures per second
    first: float = math.nan  # seconds until the first gradient: what compiling takes
    memory: float = math.nan  # GB of GPU memory at most; not a number elsewhere
    loss_error: float = math.nan  # relative to the loss in float32, same batch and weights
    gradient_error: float = math.nan  # |g - g32| / |g32|
    error: str | None = None  # why there are no numbers

    @property
    def sound(self) -> bool:
        """Whether it computes what float32 computes, within the tolerances."""
        return self.loss_error <= LOSS_TOLERANCE and self.gradient_error <= GRADIENT_TOLERANCE


def probe(
    config: TrainConfig,
    datasets: Sequence[Path],
    *,
    device: torch.device,
    max_seconds: float = 90.0,
    each: float = 2.0,
    loaded: Callable[[Sequence[Unread]], None] = lambda unread: None,
    watch: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Measure the training step in every precision, memory order, and compiled or not.

    Each trial is compared with float32 on the same batch and weights, then timed for at least
    ``each`` seconds, data included. Compiling takes a minute or so on a GPU, therefore compiled
    ways come last, the most promising first, and none is begun after ``max_seconds``.
    loaded: told of the picture files that cannot be read, as by `train`.
    """
    deadline = time.monotonic() + max_seconds
    pictures, held = load_datasets(datasets, config.data, device, channels=needs(config).channels)
    pictures = chosen(pictures, config.data)
    loaded((*pictures.unread, *held.unread))
    batches = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)
    header = make_header(config, class_names(pictures), datasets)
    precisions = ["float32", *(["tf32"] if device.type == "cuda" else []), "bfloat16"]
    reference: list[tuple[Tensor, list[Tensor]]] = []
    trials: list[Trial] = []

    def attempt(precision: str, channels_last: bool, compiled: bool) -> None:
        trial = Trial(precision, channels_last, compiled)
        run = replace(
            config.run, precision=precision, channels_last=channels_last, compile=compiled
        )
        try:
            trial = _measure(trial, replace(config, run=run), header, batches, reference, each)
        except (RuntimeError, SetupError) as error:  # too little memory, or no compiler
            lines = str(error).strip().splitlines() or [type(error).__name__]
            trial = replace(trial, error=lines[0])
        trials.append(trial)
        watch(trial)

    for precision in precisions:
        for channels_last in (False, True):
            attempt(precision, channels_last, False)
    for plain in sorted((t for t in trials if t.sound), key=lambda t: -t.rate):
        if time.monotonic() < deadline:
            attempt(plain.precision, plain.channels_last, True)
    return trials


def best_trial(trials: Sequence[Trial]) -> Trial:
    """The fastest of those that compute what float32 computes; SetupError if there is none."""
    sound = [t for t in trials if t.sound]
    if not sound:
        reasons = {t.error for t in trials if t.error}
        raise SetupError(
            f"no way to run the training step works here: {'; '.join(sorted(reasons))}"
        )
    return max(sound, key=lambda t: t.rate)


def _measure(
    trial: Trial,
    config: TrainConfig,
    header: Header,
    batches: Batches,
    reference: list[tuple[Tensor, list[Tensor]]],
    each: float,
) -> Trial:
    """The trial with its numbers. reference: loss and gradients of the first one, kept here."""
    device = batches.pictures.buffer.device
    model = make_model(header, config, device)
    if trial.compile:
        torch.compiler.reset()  # forget the one before: its guards would be tried in vain
    objective = make_objective(config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with numerics(config.run.precision, device) as model.compute_dtype:
        began = time.monotonic()
        parts, gradients = loss_and_gradients(objective, model, batches(0), config)
        _finish(device)
        first = time.monotonic() - began
        if not reference:
            reference.append((parts, gradients))
        (loss, *_), want = reference[0]
        off = torch.stack([(a - b).norm() for a, b in zip(gradients, want, strict=True)]).norm()
        scale = torch.stack(torch._foreach_norm(want)).norm()
        state = TrainState(model, config)

        def train(steps: int) -> None:
            for _ in range(steps):
                train_step(state, objective, batches(state.step + 1), config)
            _finish(device)

        train(2)  # lets buffers be made and, on a GPU, convolutions be chosen
        count, began, seconds = 0, time.monotonic(), 0.0
        while not count or seconds < each:
            more = max(1, count)
            train(more)
            count += more
            seconds = time.monotonic() - began
    return replace(
        trial,
        rate=count * config.data.batch / seconds,
        first=first,
        memory=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else math.nan,
        loss_error=float((parts[0] - loss).abs() / loss.abs()),
        gradient_error=float(off / scale),
    )


def _finish(device: torch.device) -> None:
    """Wait until the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
