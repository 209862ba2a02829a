"""The training loop: one function, a run folder, and a callback for whoever watches.

The host looks at numbers of the device when it has to anyway: at a report, a validation or a
checkpoint, see `step`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cdnctl.checkpoints import MODEL, save_model
from cdnctl.errors import TrainingError, UsageError
from cdnctl.training.batches import Batches
from cdnctl.training.config import TrainConfig, needs
from cdnctl.training.datasets import Unread, load_datasets
from cdnctl.training.halves import chosen
from cdnctl.training.runs import (
    RESULTS,
    Outcome,
    Progress,
    Run,
    append_row,
    forget_rows,
    make_model,
    start_from,
    write_beginnings,
)
from cdnctl.training.state import STATE, TrainState
from cdnctl.training.step import learning_rate, make_objective, numerics, train_step
from cdnctl.training.validation import take_samples, validate


def train(
    run: Path | Callable[[], Path],
    *,
    config: TrainConfig | None = None,
    datasets: Sequence[Path] = (),
    settings: Sequence[str] = (),
    init_from: Path | None = None,
    device: torch.device,
    max_seconds: float = math.inf,
    should_stop: Callable[[], bool] = lambda: False,
    loaded: Callable[[Sequence[Unread]], None] = lambda unread: None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Start a run in the folder ``run`` with a config, or continue the one that is there without.

    ``run`` may be a function that makes the folder; it is called once all else is ready, so that a
    run that cannot begin leaves no folder. Picture files that cannot be read are passed over, also
    when the run goes on; ``loaded`` gets the list of them when all others are in memory.
    Saves and returns when all steps are done, ``max_seconds`` have passed or
    ``should_stop`` says so; in a group of processes all of them stop together.
    A continued run ends at the same weights as one that was never stopped (on a CPU to
    the bit, with the same number of threads; a GPU adds up in no fixed order). It takes its
    datasets from where they were, or from ``datasets`` if these hold the same pictures.
    settings: single keys of the config to set anew, ``section.key=value``; of a continued
    run, only those of `runs.CHANGEABLE`.
    TrainingError if the loss is not a number; the last saved state is kept.
    """
    deadline = time.monotonic() + max_seconds
    resumed = config is None
    if config is None:
        folder = _made(run)
        known = Run.resume(folder, datasets, settings)
    else:
        known = Run.begin(config, datasets, settings)
    config = known.config
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    _check_shares(config, world)

    pictures, held = load_datasets(
        known.datasets, config.data, device, known.passed_over, needs(config).channels
    )
    pictures = chosen(pictures, config.data)
    unread = (*pictures.unread, *held.unread)
    loaded(unread)
    this = known.with_pictures(pictures, held)
    if world > 1:
        _check_processes(this, world)
    if resumed:
        known.check_pictures(folder, this)
    model = make_model(this.header(0, 0), config, device)
    if init_from is not None:
        this = replace(this, started_from=start_from(init_from, model))
    state = TrainState(model, config)
    if resumed:
        state.load(folder / STATE)
        if rank == 0:
            forget_rows(folder / RESULTS, state.step)
    else:
        folder = _made(run)
    batches = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)
    objective = make_objective(config)
    saved = state.step if resumed else None

    def export(name: str) -> None:
        save_model(folder / name / MODEL, state.ema, this.header(state.step, state.seconds))

    def checkpoint() -> None:
        nonlocal saved
        state.look(folder, config.optim)
        if rank == 0:
            if state.step != saved:  # its files would be written over, one after the other
                state.save(folder / STATE, this.to_dict())
                saved = state.step
            export("last")

    if rank == 0:
        write_beginnings(folder, this, unread)
    started = time.monotonic() - state.seconds
    totals = torch.zeros(3, device=device)  # loss parts since the last report
    logged = state.step
    with numerics(config.run.precision, device) as model.compute_dtype:
        while state.step < config.optim.steps:
            totals += train_step(state, objective, batches(state.step, rank, world), config, world)
            state.seconds = time.monotonic() - started
            done = state.step == config.optim.steps
            validate_now = done or state.step % config.run.validate_every == 0
            if validate_now or state.step % config.run.log_every == 0:
                norm = state.look(folder, config.optim)
                if world > 1:
                    dist.all_reduce(totals)
                mean = (totals / (state.step - logged)).tolist()
                totals.zero_()
                logged = state.step
                if rank == 0:
                    validation, samples = {}, None
                    if validate_now and len(held):
                        validation = validate(state, held, config)
                        samples = take_samples(state, held, config)
                        if -validation["loss"] > state.best:
                            state.best = -validation["loss"]
                            export("best")
                    progress = Progress(
                        step=state.step,
                        steps=config.optim.steps,
                        seconds=state.seconds,
                        pictures=state.step * config.data.batch,
                        loss=mean[0],
                        score_loss=mean[1],
                        class_loss=mean[2],
                        grad_norm=norm,
                        lr=learning_rate(state.step - 1, config),
                        validation=validation,
                        samples=samples,
                    )
                    append_row(folder / RESULTS, progress, config)
                    watch(progress)
            if _agree(should_stop() or time.monotonic() > deadline, world):
                break
            if state.step % config.run.checkpoint_every == 0:
                checkpoint()
        checkpoint()
    return Outcome(folder, state.step, state.step >= config.optim.steps)


def _made(run: Path | Callable[[], Path]) -> Path:
    return run if isinstance(run, Path) else run()


def _check_shares(config: TrainConfig, world: int) -> None:
    """UsageError if the processes of the group cannot have equal shares of a batch."""
    for key in ("batch", "class_batch"):
        rows = getattr(config.data, key)
        if rows % world:
            raise UsageError(f"data.{key} {rows} is no multiple of {world} processes")


def _check_processes(run: Run, world: int) -> None:
    """TrainingError if the processes of the group have not read the same pictures."""
    all_of_them: list[Any] = [None] * world
    dist.all_gather_object(all_of_them, run.fingerprint)
    if any(other != all_of_them[0] for other in all_of_them):
        counts = ", ".join(str(other["pictures"]) for other in all_of_them)
        raise TrainingError(
            f"the {world} processes read different pictures ({counts} of them): give all the same "
            "files, readable to all"
        )


def _agree(stop: bool, world: int) -> bool:
    """Whether any process of the group wants to stop. The hosts talk, and no device is waited
    for."""
    if world == 1:
        return stop
    flag = torch.tensor(float(stop))
    dist.all_reduce(flag)
    return flag.item() > 0
