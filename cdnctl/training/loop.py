"""The training loop: one function, a run folder, and a callback for whoever watches."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from cdnctl.checkpoints import Header, build_module, load_model, save_model, write_atomically
from cdnctl.core.losses import cross_entropy, score_matching
from cdnctl.core.metrics import accuracy, psnr
from cdnctl.core.noise import add_noise
from cdnctl.errors import SetupError, TrainingError, UsageError
from cdnctl.models import Network
from cdnctl.training.config import LossConfig, TrainConfig, parse
from cdnctl.training.data import Batch, Batches, Pictures, load_datasets
from cdnctl.version import VERSION

STATE = "last/state.safetensors"
MODEL = "model.safetensors"
MAX_REVERTS = 20  # in a row, before a run is given up


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


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``finished`` is False if it was stopped and can be resumed."""

    folder: Path
    step: int
    finished: bool


def losses(model: Network, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Score matching and cross-entropy per picture, (B,) each; the latter 0 where unlabelled."""
    one_hot = F.one_hot(batch.labels.clamp_min(0), model.num_classes)

    def weights(logits: Tensor) -> Tensor:
        p = logits.softmax(1)
        return torch.where(batch.condition[:, None], one_hot.to(p.dtype), p)

    noisy = batch.clean + batch.sigma.view(-1, 1, 1, 1) * batch.noise
    denoised, logits = model(noisy, batch.told, weights)
    # A noise level of zero has no score to match; 1/255 bounds the weight.
    sigma = batch.sigma.clamp_min(1 / 255)
    matching = score_matching(denoised, batch.clean, sigma, config.score_power)
    return matching, cross_entropy(logits, batch.labels, config.smoothing)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero."""
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    phase = (step - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, phase)))


class TrainState:
    """Everything that a resumed run needs: weights, their average, optimizers, guard, step."""

    def __init__(self, model: Network, config: TrainConfig):
        self.model = model
        self.ema = {k: v.detach().clone() for k, v in model.named_parameters()}
        # What the optimizers see of each parameter: itself, or for Muon its memory as a matrix.
        self.leaves: dict[str, Tensor] = {}
        decay: list[Tensor] = []
        plain: list[Tensor] = []
        matrices: list[Tensor] = []
        for key, parameter in model.named_parameters():
            leaf: Tensor = parameter
            if config.optim.kind == "muon" and parameter.ndim == 4:
                leaf = parameter.detach().view(parameter.shape[0], -1)
                matrices.append(leaf)
            else:
                (decay if parameter.ndim > 1 else plain).append(leaf)
            self.leaves[key] = leaf
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [
                    {"params": decay, "weight_decay": config.optim.weight_decay},
                    {"params": plain, "weight_decay": 0.0},
                ],
                lr=config.optim.lr,
                betas=config.optim.betas,
                fused=True,
            )
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=config.optim.lr,
                    weight_decay=config.optim.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self.step = 0
        self.seconds = 0.0
        self.norm = 0.0  # running mean of the gradient norm
        self.best = -math.inf

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        """Write to a safetensors file, atomically."""
        tensors = {f"model.{k}": v.detach() for k, v in self.model.named_parameters()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for k, slots in self._slots():
            tensors |= {f"optimizer.{name}.{k}": value for name, value in slots.items()}
        scalars = {"step": self.step, "seconds": self.seconds, "norm": self.norm, "best": self.best}
        metadata = {"run": json.dumps(extra | {"state": scalars})}
        cpu = {k: v.cpu().contiguous() for k, v in tensors.items()}
        write_atomically(path, save(cpu, metadata=metadata))

    def load(self, path: Path) -> None:
        """Continue from a saved state."""
        tensors = load(path.read_bytes())
        for k, p in self.model.named_parameters():
            with torch.no_grad():
                p.copy_(tensors[f"model.{k}"])
                self.ema[k].copy_(tensors[f"ema.{k}"])
        for key, value in tensors.items():
            part, _, rest = key.partition(".")
            if part == "optimizer":
                name, _, k = rest.partition(".")
                self._state_of(k)[name] = value.to(self.leaves[k].device)
        scalars = read_run(path)["state"]
        self.step, self.seconds = scalars["step"], scalars["seconds"]
        self.norm, self.best = scalars["norm"], scalars["best"]

    def revert(self) -> None:
        """Go back to the averaged weights and forget the momentum."""
        _copy_into(self.model, self.ema)
        for _, slots in self._slots():
            slots["exp_avg" if "exp_avg" in slots else "momentum_buffer"].zero_()

    def update(self, gradients: Sequence[Tensor], lr: float) -> None:
        """One step of the optimizers; a gradient, contiguous, for each parameter in order."""
        for leaf, g in zip(self.leaves.values(), gradients, strict=True):
            leaf.grad = g.view(leaf.shape)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def _state_of(self, key: str) -> dict[str, Tensor]:
        """What an optimizer remembers of a parameter."""
        leaf = self.leaves[key]
        owner = self.optimizers[0 if isinstance(leaf, nn.Parameter) else 1]
        slots: dict[str, Tensor] = owner.state[leaf]
        return slots

    def _slots(self) -> list[tuple[str, dict[str, Tensor]]]:
        return [(key, self._state_of(key)) for key in self.leaves]

    def average(self, decay: float) -> None:
        """Fold the current weights into their exponential moving average."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.ema.values()), [p.detach() for p in self.model.parameters()], 1 - decay
        )


def read_run(state: Path) -> dict[str, Any]:
    """The JSON part of a saved training state: config, dataset folders, classes, counters."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(state, framework="pt") as file:
            run: dict[str, Any] = json.loads(file.metadata()["run"])
            return run
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{str(state)!r} is no saved training state ({error}): "
            "--resume takes a run folder such as runs/3"
        ) from None


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


def shared_path(make: Callable[[], Path]) -> Path:
    """A path that the first process of the group makes and all others are told."""
    if not dist.is_initialized():
        return make()
    box: list[str | None] = [str(make()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return Path(str(box[0]))


def train(
    folder: Path,
    *,
    config: TrainConfig | None = None,
    datasets: Sequence[Path] = (),
    init_from: Path | None = None,
    device: torch.device,
    max_seconds: float = math.inf,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Start the run in ``folder`` with a config, or continue the one that is there without.

    Saves and returns when all steps are done, ``max_seconds`` have passed or
    ``should_stop`` says so; in a group of processes all of them stop together.
    A continued run ends at the same weights as one that was never stopped.
    TrainingError if the loss is not a number; the last saved state is kept.
    """
    state_file = folder / STATE
    resuming = config is None
    if resuming:
        run = read_run(state_file)
        config = parse(run["config"])
        datasets = [Path(p) for p in run["datasets"]]
    assert config is not None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if config.data.batch % world:
        raise UsageError(f"data.batch {config.data.batch} is no multiple of {world} processes")

    pictures, held = load_datasets(datasets, config.data, device)
    classes = pictures.classes or ("picture",)
    if resuming and list(classes) != run["classes"]:
        raise UsageError(f"the datasets of {str(folder)!r} have changed: classes {list(classes)}")
    shape = {k: v for k, v in config.model.items() if k != "arch"} | {"num_classes": len(classes)}
    header = Header(
        name=config.name,
        arch=config.model["arch"],
        model=shape,
        classes=classes,
        sigma_range=(config.noise.low / 255, config.noise.high / 255),
        patch=config.data.patch,
        data=", ".join(Path(p).resolve().name for p in datasets),
        version=VERSION,
    )
    torch.manual_seed(config.run.seed)
    model = build_module(header)
    if init_from is not None:
        try:
            model.load_state_dict(load_model(init_from)[0].state_dict())
        except RuntimeError as error:
            raise UsageError(
                f"cannot start from {str(init_from)!r}, whose network or number of classes "
                f"is not that of this run: {error}"
            ) from None
    model.to(device)
    bf16 = config.run.precision == "bfloat16" or (
        config.run.precision == "auto" and device.type == "cuda"
    )
    model.compute_dtype = torch.bfloat16 if bf16 else None
    state = TrainState(model, config)
    if resuming:
        state.load(state_file)
        if rank == 0:
            _forget(folder / "results.csv", state.step)
    extra = {
        "config": config.to_dict(),
        "datasets": [str(Path(p).resolve()) for p in datasets],
        "classes": list(classes),
    }
    batches = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)
    objective = torch.compile(losses, dynamic=False) if config.run.compile else losses
    parameters = list(model.parameters())

    def checkpoint() -> None:
        if rank == 0:
            state.save(state_file, extra)

    def export(name: str) -> None:
        if rank == 0:
            training = {
                "config": config.to_dict(),
                "steps": state.step,
                "pictures": state.step * config.data.batch,
                "seconds": round(state.seconds),
            }
            save_model(folder / name / MODEL, state.ema, replace(header, training=training))

    if rank == 0 and not resuming:
        write_atomically(folder / "config.json", json.dumps(extra, indent=2).encode())
    started = time.monotonic() - state.seconds
    deadline = time.monotonic() + max_seconds
    totals = torch.zeros(3, device=device)  # loss parts since the last report
    logged = state.step
    reverts = 0
    while state.step < config.optim.steps:
        batch = batches(state.step, rank, world)
        try:
            matching, entropy = objective(model, batch, config.loss)
        except BackendCompilerFailed as error:
            raise SetupError(
                f"torch.compile does not work here ({str(error).strip().splitlines()[0]}): "
                "install a C++ compiler (g++), or set compile = false under [run] in the config"
            ) from None
        rows = config.data.batch
        loss = (config.loss.score * matching + config.loss.classes * entropy).sum() / rows
        gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        # Convolutions give gradients in channels-last order. Fused AdamW goes through memory
        # without a look at strides: they must be those of the weights.
        gradients = [
            torch.zeros_like(p) if g is None else g.contiguous()
            for g, p in zip(gradients, parameters, strict=True)
        ]
        if world > 1:
            for g in gradients:
                dist.all_reduce(g)
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
        if not math.isfinite(norm):
            raise TrainingError(
                f"the loss became {loss.item()} at step {state.step} of {str(folder)!r}: "
                "the last saved state is kept; lower optim.lr and start again, or resume"
            )
        if state.norm and norm > config.optim.guard * state.norm:
            # A step into a bad region: gradient networks have them now and then. Adam
            # would follow for long, so go back to the averaged weights, without momentum.
            reverts += 1
            if reverts > MAX_REVERTS:
                raise TrainingError(
                    f"the gradient stays {norm / state.norm:.0f} times its usual size at step "
                    f"{state.step} of {str(folder)!r}: lower optim.lr and start again"
                )
            state.revert()
        else:
            reverts = 0
            limit = config.optim.clip * (state.norm or norm)
            if norm > limit:
                torch._foreach_mul_(gradients, limit / norm)
            state.norm = 0.99 * state.norm + 0.01 * min(norm, limit) if state.norm else norm
            state.update(gradients, learning_rate(state.step, config))
        state.step += 1
        state.average(config.optim.ema)
        state.seconds = time.monotonic() - started
        totals += torch.stack([loss, matching.sum() / rows, entropy.sum() / rows]).detach()

        done = state.step == config.optim.steps
        validate_now = done or state.step % config.run.validate_every == 0
        if validate_now or state.step % config.run.log_every == 0:
            if world > 1:
                dist.all_reduce(totals)
            mean = (totals / (state.step - logged)).tolist()
            totals.zero_()
            logged = state.step
            validation = {}
            if validate_now and rank == 0 and len(held):
                validation = validate(state, held, config)
                if -validation["loss"] > state.best:
                    state.best = -validation["loss"]
                    export("best")
            if rank == 0:
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
                )
                _append(folder / "results.csv", progress, config)
                watch(progress)
        if _agree(should_stop() or time.monotonic() > deadline, device, world):
            break
        if state.step % config.run.checkpoint_every == 0:
            checkpoint()
            export("last")
    checkpoint()
    export("last")
    return Outcome(folder, state.step, state.step >= config.optim.steps)


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

        patch, device = config.data.patch, held.buffer.device
        everyone = torch.arange(len(held), device=device)
        corner = (held.sizes - patch) // 2
        for level in config.run.validate_sigmas:
            generator = torch.Generator().manual_seed(0)
            scores, outputs = [], []
            for which in everyone.split(size):
                clean = held.crops(
                    which, corner[which, 0], corner[which, 1], torch.zeros_like(which), patch
                )
                noisy = add_noise(clean.cpu(), level / 255, generator).to(device)
                denoised, logits = model(noisy, level / 255)
                scores.append(psnr(denoised.clamp(0, 1), clean))
                outputs.append(logits)
            if model.denoises:
                result[f"psnr_{level:g}"] = torch.cat(scores).mean().item()
            labelled = held.labels >= 0
            if model.classifies and labelled.any():
                logits = torch.cat(outputs)[labelled]
                result[f"accuracy_{level:g}"] = accuracy(logits, held.labels[labelled])
        return result
    finally:
        _copy_into(model, trained)


def _copy_into(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(values[key])


def _agree(stop: bool, device: torch.device, world: int) -> bool:
    """Whether any process of the group wants to stop."""
    if world == 1:
        return stop
    flag = torch.tensor(float(stop), device=device)
    dist.all_reduce(flag)
    return bool(flag > 0)


def _forget(path: Path, step: int) -> None:
    """Drop the rows of results.csv beyond a step: a run that broke off will write them again."""
    if path.exists():
        head, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [r for r in rows if r.endswith("\n") and int(r.split(",")[0]) <= step]
        write_atomically(path, "".join([head, *kept]).encode())


def _append(path: Path, progress: Progress, config: TrainConfig) -> None:
    """One row of results.csv; its columns are the same all through a run."""
    row = {k: v for k, v in vars(progress).items() if k not in ("validation", "steps")}
    names = ["loss"]
    for level in config.run.validate_sigmas:
        names += [f"psnr_{level:g}", f"accuracy_{level:g}"]
    row |= {f"val_{n}": progress.validation.get(n, "") for n in names}
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)
