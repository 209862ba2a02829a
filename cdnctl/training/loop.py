"""The training loop: one function, a run folder, and a callback for whoever watches.

**A step never waits for the GPU.** The host asks for steps well ahead of the device, which is
only idle if the host stops to look at a number. So what depends on numbers in a normal step
(clipping, undoing a bad step) is arithmetic on the device, see `Guard`; the host looks when it
has to anyway, at a report, a validation or a checkpoint.
"""

from __future__ import annotations

import csv
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from cdnctl.checkpoints import Header, build_module, load_model, save_model, write_atomically
from cdnctl.core.losses import cross_entropy, score_matching
from cdnctl.core.metrics import accuracy, psnr
from cdnctl.core.noise import add_noise
from cdnctl.errors import SetupError, TrainingError, UsageError
from cdnctl.models import Network
from cdnctl.training.config import LossConfig, OptimConfig, TrainConfig, override, parse
from cdnctl.training.data import Batch, Batches, Pictures, fingerprint, load_datasets
from cdnctl.version import VERSION

STATE = "last"  # folder of the newest state in a run folder
SINGLE = "state.safetensors"  # in it: a state of an earlier version, all in one file
MODEL = "model.safetensors"
SHARD = 15 * 2**20  # bytes of tensors in a file of the state, which stays below 16 MiB
CHANGEABLE = tuple(
    f"run.{key}"
    for key in (
        "precision",
        "compile",
        "channels_last",
        "log_every",
        "validate_every",
        "checkpoint_every",
    )
)  # keys of the config that may be set anew when a run goes on
MAX_REVERTS = 20  # in a row, before a run is given up
VALIDATION_PIXELS = 2**22  # that a GPU works on at once
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.01, 0.05  # of `probe`, relative to float32

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


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``finished`` is False if it was stopped and can be resumed."""

    folder: Path
    step: int
    finished: bool


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


def _looks_are_free(device: torch.device) -> bool:
    """Whether the host may read a number of the device without anybody waiting."""
    return device.type == "cpu"


class Guard:
    """Watches the norm of the gradient, in numbers that stay on the device.

    A norm far above its running mean is a step into a bad region: gradient networks have
    them now and then, and Adam would follow for long. Such a step is undone: back to the
    averaged weights, without momentum. A norm somewhat above the mean is clipped.
    """

    def __init__(self, device: torch.device):
        self.mean = torch.zeros((), device=device)  # running mean of the norm; 0: none yet
        self.norm = torch.zeros((), device=device)  # of the latest step
        self.undone = torch.zeros((), device=device)  # steps in a row until now
        self.clear()

    def clear(self) -> None:
        """Begin a new stretch of steps between two looks."""
        self.longest = self.undone.clone()  # row of undone steps in this stretch
        self.sound = torch.zeros_like(self.mean)  # its steps before the first without a number
        self._whole = torch.ones_like(self.mean)  # 0 from that step on

    def judge(self, norm: Tensor, optim: OptimConfig) -> tuple[Tensor, Tensor]:
        """What to multiply the gradient by, and whether to undo the step (1.0, else 0.0)."""
        known = self.mean > 0
        undo = known & (norm > optim.guard * self.mean)
        limit = optim.clip * torch.where(known, self.mean, norm)
        mean = torch.where(known, 0.99 * self.mean + 0.01 * torch.minimum(norm, limit), norm)
        self.mean = torch.where(undo, self.mean, mean)
        self.norm = norm
        self.undone = torch.where(undo, self.undone + 1, 0.0)
        self.longest = torch.maximum(self.longest, self.undone)
        self._whole = self._whole * norm.isfinite()
        self.sound = self.sound + self._whole
        factor = torch.where(norm > limit, limit / norm, 1.0)
        return torch.where(undo, 0.0, factor), undo.to(norm.dtype)


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
                leaf = _matrix(parameter.detach())
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
        self.best = -math.inf
        self.device = next(model.parameters()).device
        self.guard = Guard(self.device)
        self._looked = 0  # step of the last look at the guard

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write to files of at most 16 MiB in a folder; what was there before is then removed.

        The names hold the step, so until the last file is there the earlier state is whole.
        """
        tensors = {f"model.{k}": v.detach() for k, v in self.model.named_parameters()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        parameters = dict(self.model.named_parameters())
        for k, slots in self._slots():
            for name, value in slots.items():
                if value.shape != self.leaves[k].shape:  # a counter
                    tensors[f"optimizer.{name}.{k}"] = value
                else:
                    whole = _like_memory_of(parameters[k], value).contiguous()
                    tensors[f"optimizer.{name}.{k}"] = whole.view(value.shape)
        scalars = {
            "step": self.step,
            "seconds": self.seconds,
            "norm": float(self.guard.mean),
            "best": self.best,
        }
        metadata = {"run": json.dumps(extra | {"state": scalars}), "set": secrets.token_hex(8)}
        shards = _shards({k: v.cpu().contiguous() for k, v in tensors.items()})
        old = set(folder.glob("state*.safetensors"))
        for i, shard in enumerate(shards, 1):
            path = folder / f"state-{self.step:09}-{i:05}-of-{len(shards):05}.safetensors"
            write_atomically(path, save(shard, metadata=metadata))
            old.discard(path)
        for path in old:
            path.unlink()

    def load(self, place: Path) -> None:
        """Continue from a saved state: a folder, or the one file of an earlier version."""
        tensors = read_tensors(place)
        parameters = dict(self.model.named_parameters())
        for k, p in parameters.items():
            with torch.no_grad():
                p.copy_(tensors[f"model.{k}"])
                self.ema[k].copy_(tensors[f"ema.{k}"])
        for key, value in tensors.items():
            part, _, rest = key.partition(".")
            if part == "optimizer":
                name, _, k = rest.partition(".")
                slot = value.to(self.device)
                if value.shape == self.leaves[k].shape:
                    # In memory like the weights: the fused kernels do not look at strides.
                    slot = torch.empty_like(self.leaves[k].detach())
                    _like_memory_of(parameters[k], slot).copy_(value.view(parameters[k].shape))
                self._state_of(k)[name] = slot
        scalars = read_run(place)["state"]
        self.step, self.seconds = scalars["step"], scalars["seconds"]
        self.best = scalars["best"]
        self.guard.mean.fill_(scalars["norm"])
        self._looked = self.step

    def update(self, gradients: Sequence[Tensor], factor: Tensor, undo: Tensor, lr: float) -> None:
        """One step of the optimizers; a gradient, laid out like it, for each parameter in order.

        factor: of the gradients. undo: if it is 1, end at the averaged weights instead.
        """
        free = _looks_are_free(self.device)
        if not (free and factor == 1):
            torch._foreach_mul_(list(gradients), factor)
        for leaf, g in zip(self.leaves.values(), gradients, strict=True):
            leaf.grad = g if leaf.shape == g.shape else _matrix(g)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        if not (free and undo == 0):
            # 0 and 1 as factors give exactly one of the two. Three passes over the weights:
            # less than a hundredth of a step on a GPU, and nothing has to be known for them.
            weights = [p.detach() for p in self.model.parameters()]
            momenta = [
                slots["exp_avg" if "exp_avg" in slots else "momentum_buffer"]
                for _, slots in self._slots()
            ]
            torch._foreach_mul_(weights + momenta, 1 - undo)
            torch._foreach_add_(weights, torch._foreach_mul(list(self.ema.values()), undo))

    def look(self, folder: Path, optim: OptimConfig) -> float:
        """The gradient norm of the latest step; the host waits for the device.

        TrainingError if there was a step without a number since the last look, or too many
        in a row were undone. Nothing may be saved or reported before a look.
        """
        g = self.guard
        norm, sound, longest = torch.stack([g.norm, g.sound, g.longest]).tolist()
        if sound < self.step - self._looked:
            raise TrainingError(
                f"the loss or its gradient is not a number at step {self._looked + int(sound)} of "
                f"{str(folder)!r}: the last saved state is kept; lower optim.lr and start again, "
                "or resume"
            )
        if longest > MAX_REVERTS:
            raise TrainingError(
                f"the gradient stayed more than {optim.guard:g} times its usual size for "
                f"{longest:.0f} steps before step {self.step} of {str(folder)!r}: lower optim.lr "
                "and start again"
            )
        g.clear()
        self._looked = self.step
        return float(norm)

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


def _matrix(tensor: Tensor) -> Tensor:
    """Convolution weights (O, I, H, W) as a matrix (O, all else), columns as they lie in memory.

    In which order does not matter to Muon: it makes rows orthogonal.
    """
    rows = tensor if tensor.is_contiguous() else tensor.permute(0, 2, 3, 1)
    return rows.view(len(tensor), -1)


def _like_memory_of(parameter: Tensor, slot: Tensor) -> Tensor:
    """What an optimizer sees of a parameter, in the parameter's shape: undoes `_matrix`."""
    if slot.shape == parameter.shape or parameter.is_contiguous():
        return slot.view(parameter.shape)
    o, i, h, w = parameter.shape
    return slot.view(o, h, w, i).permute(0, 3, 1, 2)


# -- files of a run -------------------------------------------------------------------------


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in groups of at most ``SHARD`` bytes. One that does not fit into what is left of a
    group fills it with its first rows: it is cut into NAME#0, NAME#1, ..."""
    shards: list[dict[str, Tensor]] = [{}]
    room = SHARD
    for key, tensor in tensors.items():
        cuts = 0
        while tensor.nbytes > room:
            rows = room * len(tensor) // tensor.nbytes if tensor.ndim else 0
            if rows:
                shards[-1][f"{key}#{cuts}"] = tensor[:rows].contiguous()
                tensor, cuts = tensor[rows:], cuts + 1
            elif not shards[-1]:
                break  # a single row is larger than a group: so be it
            shards.append({})
            room = SHARD
        shards[-1][f"{key}#{cuts}" if cuts else key] = tensor.contiguous()
        room = max(0, room - tensor.nbytes)
    return shards


def _state_files(place: Path) -> list[Path]:
    """Files of the newest whole state in a folder, in order; or the file itself."""
    if place.is_file():
        return [place]
    sets: dict[tuple[int, int], dict[int, Path]] = {}
    for path in place.glob("state-*.safetensors"):
        if match := re.fullmatch(r"state-(\d+)-(\d+)-of-(\d+)", path.stem):
            step, index, count = (int(n) for n in match.groups())
            sets.setdefault((step, count), {})[index] = path
    whole = [key for key, found in sets.items() if found.keys() == set(range(1, key[1] + 1))]
    if whole:
        return [path for _, path in sorted(sets[max(whole)].items())]
    if (place / SINGLE).is_file():
        return [place / SINGLE]
    if sets:
        step, count = max(sets)
        missing = sorted(set(range(1, count + 1)) - sets[step, count].keys())
        raise UsageError(
            f"{str(place)!r} has only some files of the state of step {step}: of {count}, number "
            f"{', '.join(map(str, missing))} is missing; bring them all"
        )
    raise UsageError(
        f"{str(place)!r} holds no saved training state: --resume takes a run folder such as runs/3"
    )


def read_tensors(place: Path) -> dict[str, Tensor]:
    """All tensors of a saved state, by name, whole again."""
    tensors: dict[str, Tensor] = {}
    cut: dict[str, list[Tensor]] = {}
    for path in _state_files(place):
        for key, value in load(path.read_bytes()).items():
            tensors[key] = value
    for key in [k for k in tensors if "#" in k]:
        cut.setdefault(key.partition("#")[0], []).append(tensors[key])
    for key, pieces in cut.items():
        tensors[key] = torch.cat([tensors.pop(f"{key}#{i}") for i in range(len(pieces))])
    return tensors


def read_run(place: Path) -> dict[str, Any]:
    """The JSON part of a saved training state: config, dataset folders, classes, counters.

    place: folder of the state, ``run / STATE``, or the one file of an earlier version.
    UsageError if there is none, or its files are not of one and the same state.
    """
    files = _state_files(place)
    try:
        metadata = []
        for path in files:
            with safe_open(path, framework="pt") as file:
                metadata.append(file.metadata())
        run: dict[str, Any] = json.loads(metadata[0]["run"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{str(path)!r} is no saved training state ({error}): "
            "--resume takes a run folder such as runs/3"
        ) from None
    for path, entry in zip(files, metadata, strict=True):
        if entry != metadata[0]:
            raise UsageError(
                f"{str(path)!r} and {files[0].name!r} were saved at different times: "
                "bring all files of one state, and none of another"
            )
    return run


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


# -- the step -------------------------------------------------------------------------------


@contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[torch.dtype | None]:
    """The dtype of the trunk for a ``run.precision`` (None: the input's); what a GPU may do to
    float32 and to find fast convolutions is set for the time being."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    cudnn, rounded = torch.backends.cudnn, precision == "tf32"
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            cudnn.benchmark, cudnn.allow_tf32 = True, rounded
            torch.set_float32_matmul_precision("high" if rounded else "highest")
        yield torch.bfloat16 if precision == "bfloat16" else None
    finally:
        if device.type == "cuda":
            cudnn.benchmark, cudnn.allow_tf32 = before[:2]
            torch.set_float32_matmul_precision(before[2])


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
    try:
        matching, entropy = objective(model, batch, config.loss)
        loss = (config.loss.score * matching + config.loss.classes * entropy).sum() / rows
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except BackendCompilerFailed as error:
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise SetupError(
            f"torch.compile does not work here ({reason}): "
            "install a C++ compiler (g++), or set compile = false under [run] in the config"
        ) from None
    parts = torch.stack([loss, matching.sum() / rows, entropy.sum() / rows]).detach()
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
    folder: Path,
    *,
    config: TrainConfig | None = None,
    datasets: Sequence[Path] = (),
    settings: Sequence[str] = (),
    init_from: Path | None = None,
    device: torch.device,
    max_seconds: float = math.inf,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Start the run in ``folder`` with a config, or continue the one that is there without.

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
    place = folder / STATE
    resuming = config is None
    if resuming:
        run = read_run(place)
        for setting in settings:
            if setting.partition("=")[0].strip() not in CHANGEABLE:
                raise UsageError(
                    f"{setting!r} would make another run of {str(folder)!r}: a run that goes on "
                    f"takes {', '.join(CHANGEABLE)}"
                )
        config = parse(run["config"])
        datasets = datasets or [Path(p) for p in run["datasets"]]
    assert config is not None
    config = override(config, settings) if settings else config
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if config.data.batch % world:
        raise UsageError(f"data.batch {config.data.batch} is no multiple of {world} processes")

    pictures, held = load_datasets(datasets, config.data, device)
    header = _header(config, pictures, datasets)
    extra = {
        "config": config.to_dict(),
        "datasets": [str(Path(p).resolve()) for p in datasets],
        "classes": list(header.classes),
        "fingerprint": fingerprint(pictures, held),
    }
    if resuming:
        _check_pictures(folder, run, extra)
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
    state = TrainState(_placed(model, device, config), config)
    if resuming:
        state.load(place)
        if rank == 0:
            _forget(folder / "results.csv", state.step)
    batches = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)
    objective = make_objective(config.run.compile)

    def checkpoint() -> None:
        if rank == 0:
            state.save(place, extra)

    def export(name: str) -> None:
        if rank == 0:
            training = {
                "config": config.to_dict(),
                "steps": state.step,
                "pictures": state.step * config.data.batch,
                "seconds": round(state.seconds),
            }
            save_model(folder / name / MODEL, state.ema, replace(header, training=training))

    if rank == 0:
        write_atomically(folder / "config.json", json.dumps(extra, indent=2).encode())
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
                state.look(folder, config.optim)
                checkpoint()
                export("last")
        state.look(folder, config.optim)
    checkpoint()
    export("last")
    return Outcome(folder, state.step, state.step >= config.optim.steps)


def _header(config: TrainConfig, pictures: Pictures, datasets: Sequence[Path]) -> Header:
    """What the weights of the run will say of themselves."""
    classes = pictures.classes or ("picture",)
    shape = {k: v for k, v in config.model.items() if k != "arch"} | {"num_classes": len(classes)}
    return Header(
        name=config.name,
        arch=config.model["arch"],
        model=shape,
        classes=classes,
        sigma_range=(config.noise.low / 255, config.noise.high / 255),
        patch=config.data.patch,
        data=", ".join(Path(p).resolve().name for p in datasets),
        version=VERSION,
    )


def _check_pictures(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """UsageError if a run would go on with other pictures than it began with."""
    if now["classes"] != before["classes"]:
        raise UsageError(f"the datasets of {str(folder)!r} have changed: classes {now['classes']}")
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


def _placed(model: Network, device: torch.device, config: TrainConfig) -> Network:
    """The model on its device, in the config's memory order."""
    if config.run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.to(device)


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
        patch, size, device = config.data.patch, config.data.batch, held.buffer.device
        count = max(1, len(held) // size)
        draw = Batches(held, config.data, config.noise, config.loss, seed=1)
        parts = [losses(model, draw(i), config.loss) for i in range(count)]
        matching, entropy = (torch.cat(p).mean().item() for p in zip(*parts, strict=True))
        result["loss"] = config.loss.score * matching + config.loss.classes * entropy

        if device.type != "cpu":
            size = max(size, VALIDATION_PIXELS // patch**2)
        everyone = torch.arange(len(held), device=device)
        corner = (held.sizes - patch) // 2
        labelled = held.labels >= 0
        known = bool(labelled.any())
        for level in config.run.validate_sigmas:
            generator = torch.Generator(device).manual_seed(0)
            scores, outputs = [], []
            for which in everyone.split(size):
                clean = held.crops(
                    which, corner[which, 0], corner[which, 1], torch.zeros_like(which), patch
                )
                denoised, logits = model(add_noise(clean, level / 255, generator), level / 255)
                scores.append(psnr(denoised.clamp(0, 1), clean))
                outputs.append(logits)
            if model.denoises:
                result[f"psnr_{level:g}"] = torch.cat(scores).mean().item()
            if model.classifies and known:
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


# -- the probe ------------------------------------------------------------------------------


def probe(
    config: TrainConfig,
    datasets: Sequence[Path],
    *,
    device: torch.device,
    max_seconds: float = 90.0,
    each: float = 2.0,
    watch: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Measure the training step in every precision, memory order, and compiled or not.

    Each trial is compared with float32 on the same batch and weights, then timed for at least
    ``each`` seconds, data included. Compiling takes a minute or so on a GPU, therefore compiled
    ways come last, the most promising first, and none is begun after ``max_seconds``.
    """
    deadline = time.monotonic() + max_seconds
    pictures, _ = load_datasets(datasets, config.data, device)
    batches = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)
    header = _header(config, pictures, datasets)
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
    torch.manual_seed(config.run.seed)
    model = _placed(build_module(header), device, config)
    if trial.compile:
        torch.compiler.reset()  # forget the one before: its guards would be tried in vain
    objective = make_objective(trial.compile)
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
        step = 0
        for _ in range(2):  # lets buffers be made and, on a GPU, convolutions be chosen
            train_step(state, objective, batches(step := step + 1), config)
        _finish(device)
        count, began, seconds = 0, time.monotonic(), 0.0
        while not count or seconds < each:
            for _ in range(max(1, count)):
                train_step(state, objective, batches(step := step + 1), config)
                count += 1
            _finish(device)
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
