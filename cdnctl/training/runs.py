"""What a run is, and what lies in its folder.

runs/3 holds config.json, results.csv, best/ and last/ with the weights, and in last/ the state
from which the run goes on, see `state`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cdnctl.checkpoints import Header, build_module, load_model, weights_hash
from cdnctl.errors import UsageError
from cdnctl.files import write_atomically
from cdnctl.images import PEAK
from cdnctl.models import Network, architecture
from cdnctl.training.config import TrainConfig, override, parse
from cdnctl.training.datasets import Pictures, Unread, fingerprint
from cdnctl.training.state import STATE, read_run
from cdnctl.training.step import learning_rate
from cdnctl.training.validation import Samples
from cdnctl.version import VERSION

CONFIG = "config.json"  # what the run was started with
RESULTS = "results.csv"  # a row a report
PASSED_OVER = "passed_over.txt"  # picture files that cannot be read, and why

CHANGEABLE = (  # keys of the config that may be set anew when a run goes on
    "run.precision",
    "run.compile",
    "run.channels_last",
    "run.log_every",
    "run.validate_every",
    "run.checkpoint_every",
)
EXTENDABLE = ("optim.steps", "optim.decay")  # too, while a linear schedule is still constant


@dataclass(frozen=True)
class Progress:
    """A report during training, and a row of results.csv."""

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


@dataclass(frozen=True)
class Run:
    """What makes a run the one that it is: saved with its state, and checked when it goes on."""

    config: TrainConfig
    datasets: tuple[Path, ...]
    classes: tuple[str, ...] = ()  # empty: the pictures have not been read yet
    # See `datasets.fingerprint`. None: not read yet, or a run of an early version.
    fingerprint: Mapping[str, Any] | None = None
    passed_over: tuple[str, ...] = ()  # keys of the picture files that it does not read
    started_from: Mapping[str, Any] | None = None  # of other weights, see `start_from`

    @classmethod
    def begin(cls, config: TrainConfig, datasets: Sequence[Path], settings: Sequence[str]) -> Run:
        """A new one. settings: keys of the config to set anew, ``section.key=value``."""
        return cls(override(config, settings), tuple(datasets))

    @classmethod
    def resume(cls, folder: Path, datasets: Sequence[Path], settings: Sequence[str]) -> Run:
        """The one in a folder as it goes on. datasets: where they are now, if they have moved.

        UsageError if it has no state, or a setting would make it another run.
        """
        saved = read_run(folder / STATE)
        config = parse(saved["config"])
        _check_settings(folder, settings, config, saved["state"]["step"])
        return cls(
            override(config, settings),
            tuple(datasets) or tuple(map(Path, saved["datasets"])),
            tuple(saved["classes"]),
            saved.get("fingerprint"),
            tuple(saved.get("passed_over", ())),
            saved.get("started_from"),
        )

    def with_pictures(self, pictures: Pictures, held: Pictures) -> Run:
        """This run, with the facts about the pictures read for training and validation."""
        unread = (u.key for u in (*pictures.unread, *held.unread))
        return replace(
            self,
            datasets=tuple(path.resolve() for path in self.datasets),
            classes=class_names(pictures),
            fingerprint=fingerprint(pictures, held),
            passed_over=(*self.passed_over, *unread),
        )

    def check_pictures(self, folder: Path, now: Run) -> None:
        """UsageError if this run of a folder would go on with other pictures than it began with."""
        places = [str(path) for path in now.datasets]
        if now.classes != self.classes:
            raise UsageError(
                f"{places} are not the datasets that {str(folder)!r} began with: classes "
                f"{list(now.classes)}, but there were {list(self.classes)}. Give the same pictures"
            )
        if self.fingerprint is not None and self.fingerprint != now.fingerprint:
            was, found = (
                f"{f['pictures']} pictures, {f['pixels']} pixels, SHA-256 {f['sha256'][:12]}"
                for f in (self.fingerprint, now.fingerprint)
                if f is not None
            )
            raise UsageError(
                f"{places} are not the datasets that {str(folder)!r} began with: {found}, "
                f"but there were {was}. Give the same pictures, in the same order of datasets"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: what config.json and the saved state hold."""
        values: dict[str, Any] = {
            "config": self.config.to_dict(),
            "datasets": [str(path) for path in self.datasets],
            "classes": list(self.classes),
            "fingerprint": self.fingerprint,
            "passed_over": list(self.passed_over),
        }
        if self.started_from is not None:
            values["started_from"] = self.started_from
        return values

    def header(self, step: int, seconds: float) -> Header:
        """What its weights say of themselves after so many steps and seconds."""
        training: dict[str, Any] = {
            "config": self.config.to_dict(),
            "steps": step,
            "pictures": step * self.config.data.batch,
            "seconds": round(seconds),
        }
        if self.started_from is not None:
            training["started_from"] = self.started_from
        return replace(make_header(self.config, self.classes, self.datasets), training=training)


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


# -- its network ----------------------------------------------------------------------------


def class_names(pictures: Pictures) -> tuple[str, ...]:
    """Classes that a network tells: those of the pictures, or one of all that have none."""
    return pictures.classes or ("picture",)


def make_header(config: TrainConfig, classes: Sequence[str], datasets: Sequence[Path]) -> Header:
    """What the untrained weights of a run say of themselves."""
    shape = {k: v for k, v in config.model.items() if k != "arch"}
    knows = architecture(config.model["arch"]).knows_classes
    return Header(
        name=config.name,
        arch=config.model["arch"],
        model=shape | {"num_classes": len(classes)} if knows else shape,
        classes=tuple(classes) if knows else (),
        sigma_range=(config.noise.low / PEAK, config.noise.highest / PEAK),
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


def start_from(path: Path, model: Network) -> dict[str, Any]:
    """Load the weights of a file into the model, and return the file's account of its training.

    UsageError unless the weights fit the model or can be adopted by it, see `Network.adopted`.
    """
    found, header = load_model(path)
    try:
        model.load_state_dict(model.adopted(found.state_dict()))
    except RuntimeError as error:
        raise UsageError(
            f"cannot start from {str(path)!r}, whose network or number of classes "
            f"is not that of this run: {error}"
        ) from None
    return {"weights": weights_hash(path), "data": header.data, "training": dict(header.training)}


# -- its folder -----------------------------------------------------------------------------


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
    """A path that the first process of the group makes and passes on to all others."""
    if not dist.is_initialized():
        return make()
    box: list[str | None] = [str(make()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return Path(str(box[0]))


def write_beginnings(folder: Path, run: Run, unread: Sequence[Unread]) -> None:
    """What the run is, and the picture files that it passes over."""
    write_atomically(folder / CONFIG, json.dumps(run.to_dict(), indent=2).encode())
    if unread:
        lines = [f"{u.reason}\n" for u in unread]
        write_atomically(folder / PASSED_OVER, "".join(lines).encode(errors="backslashreplace"))


def forget_rows(path: Path, step: int) -> None:
    """Drop the rows of results.csv beyond a step: a run that broke off will write them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        head, *rows = [line for line in lines if line.endswith("\n")] or [""]
        kept = [r for r in rows if int(r.split(",")[0]) <= step]
        write_atomically(path, "".join([head, *kept]).encode())


def append_row(path: Path, progress: Progress, config: TrainConfig) -> None:
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
