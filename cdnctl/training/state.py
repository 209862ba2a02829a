"""What a run has to remember to go on: in memory, and in the files of its state.

A state lies in a folder, in files that each stay below 16 MiB and can be carried to another
machine. A new state gets new file names and is complete before the old one is removed, so a
complete state is there however a run ends.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from cdnctl.errors import TrainingError, UsageError
from cdnctl.files import write_atomically
from cdnctl.models import Network
from cdnctl.training.config import OptimConfig, TrainConfig

STATE = "last"  # folder of the newest state in a run folder
SINGLE = "state.safetensors"  # in it: a state of an earlier version, all in one file
SHARD = 15 * 2**20  # bytes of tensors in a file of the state, which stays below 16 MiB
MAX_REVERTS = 20  # in a row, before a run is given up


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
        optim = config.optim
        self.model = model
        # Statistics that a network keeps of its features are averaged as its weights are.
        self.ema = {k: v.clone() for k, v in tensors_of(model).items()}
        # What the optimizers see of each parameter: itself, or for Muon its memory as a matrix.
        self.leaves: dict[str, Tensor] = {
            k: _matrix(p.detach()) if optim.kind == "muon" and p.ndim == 4 else p
            for k, p in model.named_parameters()
        }
        own = [leaf for leaf in self.leaves.values() if isinstance(leaf, nn.Parameter)]
        matrices = [leaf for leaf in self.leaves.values() if not isinstance(leaf, nn.Parameter)]
        spared = {id(self.leaves[k]) for k in model.undecayed}
        decayed = [p for p in own if p.ndim > 1 and id(p) not in spared]
        others = [p for p in own if p.ndim <= 1 or id(p) in spared]
        groups = [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.SGD(groups, lr=optim.lr, momentum=optim.betas[0], fused=True)
            if optim.kind == "sgd"
            else torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=optim.lr,
                    weight_decay=optim.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        self.step = 0
        self.seconds = 0.0
        self.best = -math.inf  # of minus the validation loss
        self.device = next(model.parameters()).device
        self.guard = Guard(self.device)
        self._looked = 0  # step of the last look at the guard

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
            weights = list(tensors_of(self.model).values())
            momenta = [
                slots["exp_avg" if "exp_avg" in slots else "momentum_buffer"]
                for slots in map(self._slots, self.leaves)
            ]
            torch._foreach_mul_(weights + momenta, 1 - undo)
            torch._foreach_add_(weights, torch._foreach_mul(list(self.ema.values()), undo))

    def average(self, decay: float) -> None:
        """Fold the current weights into their exponential moving average."""
        decay = min(decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.ema.values()), list(tensors_of(self.model).values()), 1 - decay
        )

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

    def save(self, folder: Path, about: Mapping[str, Any]) -> None:
        """Write to files of at most 16 MiB in a folder, then remove the earlier state.

        The names hold the step, so until the last file is there the earlier state is whole.
        about: what else `read_run` shall give.
        """
        parameters = dict(self.model.named_parameters())
        tensors = {f"model.{k}": v for k, v in tensors_of(self.model).items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for k, leaf in self.leaves.items():
            for name, value in self._slots(k).items():
                if value.shape == leaf.shape:  # no mere counter
                    value = _like_memory_of(parameters[k], value).contiguous().view(value.shape)
                tensors[f"optimizer.{name}.{k}"] = value
        scalars = {
            "step": self.step,
            "seconds": self.seconds,
            "norm": float(self.guard.mean),
            "best": self.best,
        }
        # The number of the set tells two states of the same step apart.
        metadata = {"run": json.dumps({**about, "state": scalars}), "set": secrets.token_hex(8)}
        shards = _shards({k: v.cpu().contiguous() for k, v in tensors.items()})
        old = set(folder.glob("state*.safetensors"))
        for i, shard in enumerate(shards, 1):
            path = folder / f"state-{self.step:09}-{i:05}-of-{len(shards):05}.safetensors"
            write_atomically(path, save(shard, metadata=metadata))
            old.discard(path)
        for path in old:
            path.unlink()

    def load(self, folder: Path) -> None:
        """Continue from the state saved in a folder."""
        tensors = read_tensors(folder)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for k, own in tensors_of(self.model).items():
                own.copy_(tensors[f"model.{k}"])
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
                self._slots(k)[name] = slot
        scalars = read_run(folder)["state"]
        self.step, self.seconds = scalars["step"], scalars["seconds"]
        self.best = scalars["best"]
        self.guard.mean.fill_(scalars["norm"])
        self._looked = self.step

    def _slots(self, key: str) -> dict[str, Tensor]:
        """What an optimizer remembers of a parameter."""
        leaf = self.leaves[key]
        owner = self.optimizers[0 if isinstance(leaf, nn.Parameter) else 1]
        slots: dict[str, Tensor] = owner.state[leaf]
        return slots


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """What a model has learnt, by name: its parameters in their order, then what it remembers of
    its features. Changing them changes the model."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    return parameters | {k: b for k, b in model.state_dict().items() if k not in parameters}


def copy_into(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set what `tensors_of` gives to other values."""
    for key, tensor in tensors_of(model).items():
        tensor.copy_(values[key])


def _looks_are_free(device: torch.device) -> bool:
    """Whether the host may read a number of the device without anybody waiting."""
    return device.type == "cpu"


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


# -- files ----------------------------------------------------------------------------------


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in groups of at most ``SHARD`` bytes. A tensor that does not fit into the rest of a
    group is cut by rows into NAME#0, NAME#1, ...; the first piece fills that rest."""
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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the state in a folder, by name, whole again."""
    tensors: dict[str, Tensor] = {}
    for path in _state_files(folder):
        tensors |= load(path.read_bytes())
    pieces = Counter(key.partition("#")[0] for key in tensors if "#" in key)
    for key, count in pieces.items():
        tensors[key] = torch.cat([tensors.pop(f"{key}#{i}") for i in range(count)])
    return tensors


def read_run(folder: Path) -> dict[str, Any]:
    """The JSON part of the state in a folder: config, dataset folders, classes, counters.

    folder: ``run / STATE``. UsageError if it holds no state, or files of more than one.
    """
    files = _state_files(folder)
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


def _state_files(folder: Path) -> list[Path]:
    """Files of the newest whole state in a folder, in order."""
    sets: dict[tuple[int, int], dict[int, Path]] = {}
    for path in folder.glob("state-*.safetensors"):
        if match := re.fullmatch(r"state-(\d+)-(\d+)-of-(\d+)", path.stem):
            step, index, count = map(int, match.groups())
            sets.setdefault((step, count), {})[index] = path
    whole = [key for key, found in sets.items() if found.keys() == set(range(1, key[1] + 1))]
    if whole:
        return [path for _, path in sorted(sets[max(whole)].items())]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if sets:
        step, count = max(sets)
        missing = sorted(set(range(1, count + 1)) - sets[step, count].keys())
        raise UsageError(
            f"{str(folder)!r} has only some files of the state of step {step}: of {count}, number "
            f"{', '.join(map(str, missing))} is missing; bring them all"
        )
    raise UsageError(
        f"{str(folder)!r} holds no saved training state: --resume takes a run folder such as runs/3"
    )
