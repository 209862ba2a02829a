"""The training loop: one function, a run folder, and a callback for whoever watches.

**A step never waits for the GPU.** The host asks for steps well ahead of the device, which is
only idle if the host stops to look at a number. So what depends on numbers in a normal step
(clipping, undoing a bad step) is arithmetic on the device, see `state.Guard`; the host looks
when it has to anyway, at a report, a validation or a checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from cdnctl.checkpoints import (
    MODEL,
    Header,
    build_module,
    load_model,
    save_model,
    weights_hash,
    write_atomically,
)
from cdnctl.core.coloured import Told
from cdnctl.core.losses import cross_entropy, score_matching
from cdnctl.core.metrics import accuracy, psnr
from cdnctl.core.noise import add_noise
from cdnctl.errors import SetupError, TrainingError, UsageError
from cdnctl.models import Mixture, Network
from cdnctl.training.config import LossConfig, TrainConfig, override, parse
from cdnctl.training.data import Batch, Batches, Pictures, Unread, fingerprint, load_datasets
from cdnctl.training.report import CONFIG, PASSED_OVER, RESULTS, Samples
from cdnctl.training.state import STATE, TrainState, read_run
from cdnctl.version import VERSION

CHANGEABLE = (  # keys of the config that may be set anew when a run goes on
    "run.precision",
    "run.compile",
    "run.channels_last",
    "run.log_every",
    "run.validate_every",
    "run.checkpoint_every",
)
EXTENDABLE = ("optim.steps", "optim.decay")  # too, while a linear schedule is still constant
VALIDATION_PIXELS = 2**22  # that a GPU works on at once
VALIDATION_PATCH = 128  # side of the crops of pictures that are no thumbnails
SHOWN = 4  # held-out pictures in `Samples`

Objective = Callable[[Network, Batch, LossConfig], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Progress:
    """What a watcher is told now and then; the rows of results.csv."""

    step: int
    steps: int
    seconds: float  # of training, over all sessions of the run
    pictures: int  # seen so far
    loss: float
    score_loss: float
    class_loss: float
    grad_norm: float
    lr: float
    validation: dict[str, float]  # psnr_15, accuracy_15, ...; empty between validations
    samples: Samples | None = None  # likewise; of networks that denoise


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``finished`` is False if it was stopped and can be resumed."""

    folder: Path
    step: int
    finished: bool


# -- the loss ------------------------------------------------------------------------------


def losses(model: Network, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Score matching and cross-entropy per picture; the latter 0 where unlabelled.

    (B,) each; the cross-entropy of the batch's lesson behind that of the batch, or alone.
    """
    mixture: Mixture = None
    if config.conditional:
        one_hot = F.one_hot(batch.labels.clamp_min(0), model.num_classes)

        def mixture(logits: Tensor) -> Tensor:
            p = logits.softmax(1)
            return torch.where(batch.condition[:, None], one_hot.to(p.dtype), p)

    told: Tensor | Told = batch.told
    if batch.spectrum is not None and batch.relief is not None:
        told = Told(batch.told, batch.spectrum, batch.relief)
    denoised, logits = model(_noisy(batch), told, mixture)
    # A noise level of zero has no score to match; 1/255 bounds the weight.
    # Told too much, it cannot come as near as the noise that is there would allow.
    sigma = torch.maximum(batch.sigma, batch.told).clamp_min(1 / 255)
    matching = score_matching(denoised, batch.clean, sigma, config.score_power)
    lesson = batch.lesson
    entropy = [] if batch.alone else [cross_entropy(logits, batch.labels, config.smoothing)]
    if lesson is not None:
        logits = model.logits(_noisy(lesson), lesson.told)
        entropy.append(cross_entropy(logits, lesson.labels, config.smoothing))
    return matching, torch.cat(entropy)


def _noisy(batch: Batch) -> Tensor:
    return batch.clean + batch.sigma.view(-1, 1, 1, 1) * batch.noise


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero, or constant and then linear to zero."""
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.schedule == "linear":
        fall = max(1, round(o.decay * o.steps))
        return o.lr * min(1.0, max(0, o.steps - step) / fall)
    phase = (step - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, phase)))


# -- the step -------------------------------------------------------------------------------


@contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[torch.dtype | None]:
    """The dtype of the trunk for a ``run.precision`` (None: the input's); what a GPU may do to
    float32 and to find fast convolutions is set for the time being."""
    if precision == "auto":
        # GPUs before Ampere only emulate bfloat16.
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float32"
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    if device.type != "cuda":
        yield dtype
        return
    cudnn, rounded = torch.backends.cudnn, precision == "tf32"
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        cudnn.benchmark, cudnn.allow_tf32 = True, rounded
        torch.set_float32_matmul_precision("high" if rounded else "highest")
        yield dtype
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul = before
        torch.set_float32_matmul_precision(matmul)


def make_objective(compiled: bool) -> Objective:
    """`losses`, compiled or not."""
    return torch.compile(losses, dynamic=False) if compiled else losses


def loss_and_gradients(
    objective: Objective, model: Network, batch: Batch, config: TrainConfig
) -> tuple[Tensor, list[Tensor]]:
    """(loss, score matching, cross-entropy), (3,), means over the batch of all processes, and
    the gradient for each parameter, laid out in memory like it.

    SetupError if the objective is to be compiled and cannot be.
    """
    parameters = list(model.parameters())
    rows = config.data.batch
    learners = 0 if batch.alone else rows
    learners += config.data.class_batch if batch.lesson is not None else 0
    try:
        matching, entropy = objective(model, batch, config.loss)
        parts = torch.stack([matching.sum() / rows, entropy.sum() / learners])
        loss = config.loss.score * parts[0] + config.loss.classes * parts[1]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise SetupError(
            f"torch.compile does not work here ({reason}): "
            "install a C++ compiler (g++) and, for a GPU, triton; or set compile = false under "
            "[run] in the config"
        ) from None
    parts = torch.cat([loss[None], parts]).detach()
    return parts, [_like(p, g) for p, g in zip(parameters, gradients, strict=True)]


def _like(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """The gradient with the strides of its parameter (zero where there is none).

    Convolutions give gradients in channels-last order. Fused AdamW goes through memory without
    a look at strides: they must be those of the weights.
    """
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def train_step(
    state: TrainState, objective: Objective, batch: Batch, config: TrainConfig, world: int = 1
) -> Tensor:
    """One step of training: loss parts as `loss_and_gradients`, of this process's rows."""
    parts, gradients = loss_and_gradients(objective, state.model, batch, config)
    if world > 1:
        for g in gradients:
            dist.all_reduce(g)
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    factor, undo = state.guard.judge(norm, config.optim)
    with torch.no_grad():
        state.update(gradients, factor, undo, learning_rate(state.step, config))
        state.step += 1
        state.average(config.optim.ema)
    return parts


# -- the run --------------------------------------------------------------------------------


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

    A function as ``run`` makes the folder, once all else is ready: what cannot begin leaves none.
    Picture files that cannot be read are passed over, and again when the run goes on; ``loaded``
    is told of them, or that there are none, when all others are in memory.
    Saves and returns when all steps are done, ``max_seconds`` have passed or
    ``should_stop`` says so; in a group of processes all of them stop together.
    A continued run ends at the same weights as one that was never stopped (on a CPU to
    the bit, with the same number of threads; a GPU adds up in no fixed order). It takes its
    datasets from where they were, or from ``datasets`` if these hold the same pictures.
    settings: single keys of the config to set anew, ``section.key=value``; of a continued
    run, only those of `CHANGEABLE`.
    TrainingError if the loss is not a number; the last saved state is kept.
    """
    deadline = time.monotonic() + max_seconds
    before: dict[str, Any] | None = None  # what a run that goes on said of itself
    passed_over: list[str] = []  # keys of files that it did not read
    if config is None:
        folder = _made(run)
        before = read_run(folder / STATE)
        passed_over = before.get("passed_over", [])
        config = parse(before["config"])
        _check_settings(folder, settings, config, before["state"]["step"])
        datasets = datasets or [Path(p) for p in before["datasets"]]
    config = override(config, settings)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for key in ("batch", "class_batch"):
        rows = getattr(config.data, key)
        if rows % world:
            raise UsageError(f"data.{key} {rows} is no multiple of {world} processes")

    pictures, held = load_datasets(datasets, config.data, device, passed_over)
    unread = (*pictures.unread, *held.unread)
    loaded(unread)
    header = make_header(config, pictures, datasets)
    extra: dict[str, Any] = {
        "config": config.to_dict(),
        "datasets": [str(Path(p).resolve()) for p in datasets],
        "classes": list(header.classes),
        "fingerprint": fingerprint(pictures, held),
        "passed_over": [*passed_over, *(u.key for u in unread)],
    }
    if world > 1:
        _check_processes(extra["fingerprint"], world)
    if before is not None:
        _check_pictures(folder, before, extra)
    model = make_model(header, config, device)
    if init_from is not None:
        extra["started_from"] = _start_from(init_from, model)
    elif before is not None and "started_from" in before:
        extra["started_from"] = before["started_from"]
    state = TrainState(model, config)
    if before is None:
        folder = _made(run)
    place = folder / STATE
    if before is not None:
        state.load(place)
        if rank == 0:
            _forget(folder / RESULTS, state.step)
    batches = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)
    objective = make_objective(config.run.compile)
    saved = None if before is None else state.step

    def export(name: str) -> None:
        training = {
            "config": config.to_dict(),
            "steps": state.step,
            "pictures": state.step * config.data.batch,
            "seconds": round(state.seconds),
        }
        if "started_from" in extra:
            training["started_from"] = extra["started_from"]
        save_model(folder / name / MODEL, state.ema, replace(header, training=training))

    def checkpoint() -> None:
        nonlocal saved
        state.look(folder, config.optim)
        if rank == 0:
            if state.step != saved:  # its files would be written over, one after the other
                state.save(place, extra)
                saved = state.step
            export("last")

    if rank == 0:
        write_atomically(folder / CONFIG, json.dumps(extra, indent=2).encode())
        if unread:
            lines = [f"{u.reason}\n" for u in unread]
            write_atomically(folder / PASSED_OVER, "".join(lines).encode(errors="backslashreplace"))
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
                    _append(folder / RESULTS, progress, config)
                    watch(progress)
            if _agree(should_stop() or time.monotonic() > deadline, world):
                break
            if state.step % config.run.checkpoint_every == 0:
                checkpoint()
        checkpoint()
    return Outcome(folder, state.step, state.step >= config.optim.steps)


def _made(run: Path | Callable[[], Path]) -> Path:
    return run if isinstance(run, Path) else run()


def _check_processes(mine: dict[str, Any], world: int) -> None:
    """TrainingError if the processes of the group have not read the same pictures."""
    all_of_them: list[Any] = [None] * world
    dist.all_gather_object(all_of_them, mine)
    if any(other != all_of_them[0] for other in all_of_them):
        counts = ", ".join(str(other["pictures"]) for other in all_of_them)
        raise TrainingError(
            f"the {world} processes read different pictures ({counts} of them): give all the same "
            "files, readable to all"
        )


def _check_settings(folder: Path, settings: Sequence[str], config: TrainConfig, step: int) -> None:
    """UsageError if a setting would make another run of one that goes on."""
    changeable = list(CHANGEABLE)
    full = learning_rate(config.optim.warmup, config)
    if config.optim.schedule == "linear" and learning_rate(step, config) == full:
        changeable += EXTENDABLE
    for setting in settings:
        if setting.partition("=")[0].strip() not in changeable:
            raise UsageError(
                f"{setting!r} would make another run of {str(folder)!r}: a run that goes on "
                f"takes {', '.join(changeable)}"
            )


def _check_pictures(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """UsageError if a run would go on with other pictures than it began with."""
    if now["classes"] != before["classes"]:
        raise UsageError(
            f"{now['datasets']} are not the datasets that {str(folder)!r} began with: classes "
            f"{now['classes']}, but there were {before['classes']}. Give the same pictures"
        )
    known = before.get("fingerprint")  # runs of an earlier version have none
    if known is not None and known != now["fingerprint"]:
        was, found = (
            f"{f['pictures']} pictures, {f['pixels']} pixels, SHA-256 {f['sha256'][:12]}"
            for f in (known, now["fingerprint"])
        )
        raise UsageError(
            f"{now['datasets']} are not the datasets that {str(folder)!r} began with: {found}, "
            f"but there were {was}. Give the same pictures, in the same order of datasets"
        )


def make_header(config: TrainConfig, pictures: Pictures, datasets: Sequence[Path]) -> Header:
    """What the weights of the run will say of themselves."""
    classes = pictures.classes or ("picture",)
    shape = {k: v for k, v in config.model.items() if k != "arch"} | {"num_classes": len(classes)}
    return Header(
        name=config.name,
        arch=config.model["arch"],
        model=shape,
        classes=classes,
        sigma_range=(config.noise.low / 255, config.noise.highest / 255),
        patch=config.data.class_patch if config.data.class_batch else config.data.patch,
        data=", ".join(Path(p).resolve().name for p in datasets),
        version=VERSION,
    )


def make_model(header: Header, config: TrainConfig, device: torch.device) -> Network:
    """The untrained network of a run, on its device and in the config's memory order."""
    torch.manual_seed(config.run.seed)
    model = build_module(header)
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


def _start_from(path: Path, model: Network) -> dict[str, Any]:
    """Give the model the weights of a file; what these say of their own training.

    A model with a channel of ones in its stem may start from one without, and one that hears
    spectra from one that does not: what is new has no weight at first. UsageError if they are
    those of another network.
    """
    found, header = load_model(path)
    state = found.state_dict()
    if model.config.constant and not found.config.constant:
        stem = state["trunk.stem.weight"]  # (widths[0], channels and noise level, 3, 3)
        state["trunk.stem.weight"] = torch.cat([stem, torch.zeros_like(stem[:, :1])], 1)
    if model.config.coloured and not found.config.coloured:
        state |= {k: v for k, v in model.state_dict().items() if ".ears." in k}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(
            f"cannot start from {str(path)!r}, whose network or number of classes "
            f"is not that of this run: {error}"
        ) from None
    return {"weights": weights_hash(path), "data": header.data, "training": dict(header.training)}


def _agree(stop: bool, world: int) -> bool:
    """Whether any process of the group wants to stop. The hosts talk, and no device is waited
    for."""
    if world == 1:
        return stop
    flag = torch.tensor(float(stop))
    dist.all_reduce(flag)
    return flag.item() > 0


# -- validation ----------------------------------------------------------------------------


@torch.no_grad()
def validate(state: TrainState, held: Pictures, config: TrainConfig) -> dict[str, float]:
    """Averaged weights on held-out pictures: the training loss, and PSNR and accuracy per sigma.

    Centre crops, the same noise each time, outputs clipped; PSNR in dB without
    classes, accuracy in [0, 1] over the labelled pictures.
    """
    model, trained = state.model, {k: p.detach().clone() for k, p in state.model.named_parameters()}
    _copy_into(model, state.ema)
    try:
        result: dict[str, float] = {}
        size = config.data.batch
        count = max(1, len(held) // size)
        draw = Batches(held, config.data, config.noise, config.loss, seed=1)
        parts = [losses(model, draw(i), config.loss) for i in range(count)]
        matching, entropy = (torch.cat(p).mean().item() for p in zip(*parts, strict=True))
        result["loss"] = config.loss.score * matching + config.loss.classes * entropy

        # Thumbnails tell classes and nothing of denoising, large pictures the reverse.
        labelled, small = held.labels >= 0, held.sizes.amin(1) < config.data.thumbnail
        pupils = (labelled & small if config.data.thumbnail else labelled).nonzero().flatten()
        targets, patch = _targets(held, config)
        lesson = config.data.class_patch if config.data.class_batch else config.data.patch
        for level in config.run.validate_sigmas:
            if model.denoises:
                scores = [
                    # On the host: MPS knows no float64.
                    psnr(denoised.clamp(0, 1).cpu(), clean.cpu())
                    for clean, denoised, _ in _looked_at(model, held, targets, patch, level, size)
                ]
                result[f"psnr_{level:g}"] = torch.cat(scores).mean().item()
            if model.classifies and len(pupils):
                logits = torch.cat(
                    [c.cpu() for _, _, c in _looked_at(model, held, pupils, lesson, level, size)]
                )
                result[f"accuracy_{level:g}"] = accuracy(logits, held.labels[pupils].cpu())
        return result
    finally:
        _copy_into(model, trained)


def _targets(held: Pictures, config: TrainConfig) -> tuple[Tensor, int]:
    """Indices of the held-out pictures that are clean enough to denoise, and the side of their
    crops."""
    if not config.data.thumbnail:
        return torch.arange(len(held), device=held.buffer.device), config.data.patch
    large = held.sizes.amin(1) >= config.data.thumbnail
    return large.nonzero().flatten(), VALIDATION_PATCH


def _looked_at(
    model: Network, held: Pictures, which: Tensor, patch: int, level: float, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Centre crops of pictures, denoised, and their class scores, in batches; the noise is the
    same each time."""
    generator = torch.Generator(held.buffer.device).manual_seed(0)
    if held.buffer.device.type != "cpu":
        size = max(size, VALIDATION_PIXELS // patch**2)
    for part in which.split(size):
        sizes = held.sizes[part]
        corner = (sizes - patch) // 2
        clean = held.crops(part, corner[:, 0], corner[:, 1], torch.zeros_like(part), patch)
        denoised, logits = model(add_noise(clean, level / 255, generator), level / 255)
        yield clean, denoised, logits


@torch.no_grad()
def take_samples(state: TrainState, held: Pictures, config: TrainConfig) -> Samples | None:
    """A few held-out pictures, evenly spaced, at the noise levels of validation, denoised by the
    averaged weights. The same ones with the same noise each time. None if there is nothing to
    denoise, or no network that does."""
    model, levels = state.model, config.run.validate_sigmas
    targets, patch = _targets(held, config)
    if not model.denoises or not levels or not len(targets):
        return None
    device, count = held.buffer.device, min(SHOWN, len(targets))
    which = targets[torch.arange(count, device=device) * len(targets) // count]
    corner = (held.sizes[which] - patch) // 2
    clean = held.crops(which, corner[:, 0], corner[:, 1], torch.zeros_like(which), patch)
    trained = {k: p.detach().clone() for k, p in model.named_parameters()}
    _copy_into(model, state.ema)
    try:
        noisy, denoised = [], []
        for level in levels:
            generator = torch.Generator(device).manual_seed(0)
            noisy.append(add_noise(clean, level / 255, generator))
            denoised.append(model(noisy[-1], level / 255)[0])
    finally:
        _copy_into(model, trained)
    return Samples(clean.cpu(), torch.stack(noisy).cpu(), torch.stack(denoised).cpu(), levels)


def _copy_into(model: Network, values: dict[str, Tensor]) -> None:
    for key, parameter in model.named_parameters():
        parameter.copy_(values[key])


# -- the run folder ------------------------------------------------------------------------


def new_run_folder(parent: Path) -> Path:
    """parent/N for the first free number N from 1 on."""
    number = 1
    while True:
        folder = parent / str(number)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def discard(folder: Path) -> None:
    """Remove the folder of a run that ended before there was anything to keep of it."""
    if any((folder / name).exists() for name in (RESULTS, STATE, "best")):
        return
    with suppress(OSError):  # whatever else is there is not ours
        for name in (CONFIG, PASSED_OVER):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def shared_path(make: Callable[[], Path]) -> Path:
    """A path that the first process of the group makes and all others are told."""
    if not dist.is_initialized():
        return make()
    box: list[str | None] = [str(make()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return Path(str(box[0]))


def _forget(path: Path, step: int) -> None:
    """Drop the rows of results.csv beyond a step: a run that broke off will write them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        head, *rows = [line for line in lines if line.endswith("\n")] or [""]
        kept = [r for r in rows if int(r.split(",")[0]) <= step]
        write_atomically(path, "".join([head, *kept]).encode())


def _append(path: Path, progress: Progress, config: TrainConfig) -> None:
    """One row of results.csv; its columns are the same all through a run."""
    row = {k: v for k, v in vars(progress).items() if k not in ("validation", "samples", "steps")}
    names = ["loss"]
    for level in config.run.validate_sigmas:
        names += [f"psnr_{level:g}", f"accuracy_{level:g}"]
    row |= {f"val_{n}": progress.validation.get(n, "") for n in names}
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
