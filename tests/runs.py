"""Short runs of tiny models, and what is left of them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cdnctl.checkpoints import MODEL, Header, build_module
from cdnctl.training.config import TrainConfig, parse
from cdnctl.training.loop import train
from cdnctl.training.objectives import OBJECTIVES
from cdnctl.training.runs import Outcome
from cdnctl.training.state import STATE, read_run, read_tensors

CPU = torch.device("cpu")


TINY = {"arch": "gradresnet", "widths": [4, 8], "blocks": [1, 1], "norm": "pixel", "head": 8}


def tiny_net(classes: int = 2, **changes: Any) -> Any:
    torch.manual_seed(0)
    shape = {k: v for k, v in TINY.items() if k != "arch"} | {"num_classes": classes} | changes
    names = tuple(map(str, range(classes)))
    return build_module(Header("x", "gradresnet", shape, names, (0.0, 0.2), 16))


def tiny_config(**sections: dict[str, Any]) -> TrainConfig:
    raw: dict[str, dict[str, Any]] = {
        "model": dict(TINY),
        "data": {"patch": 16, "batch": 4, "shift": 2},
        "noise": {"low": 20, "high": 40},
        "optim": {"steps": 10, "warmup": 2, "ema": 0.9},
        "run": {
            "log_every": 2,
            "validate_every": 4,
            "checkpoint_every": 3,
            "validate_sigmas": [25],
            "precision": "float32",
        },
    }
    return parse({k: v | sections.get(k, {}) for k, v in raw.items()} | sections.get("top", {}))


def run(folder: Path, datasets: list[Path], **options: Any) -> Outcome:
    sections = options.pop("sections", {})
    return train(folder, config=tiny_config(**sections), datasets=datasets, device=CPU, **options)


def after(calls: int) -> Callable[[], bool]:
    """A ``should_stop`` that says so at its n-th call."""
    count = iter(range(1, 10**9))
    return lambda: next(count) >= calls


def state_of(folder: Path) -> dict[str, Tensor]:
    return read_tensors(folder / STATE)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_to_the_bit(a: Path, b: Path) -> None:
    x, y = state_of(a), state_of(b)
    assert x.keys() == y.keys() and len(x) > 10
    for key, value in x.items():
        assert torch.equal(value, y[key]), key
    for name in ("last", "best"):
        x, y = (load_file(folder / name / MODEL) for folder in (a, b))
        assert all(torch.equal(value, y[key]) for key, value in x.items()), name
    for key in ("step", "norm", "best"):
        assert read_run(a / STATE)["state"][key] == read_run(b / STATE)["state"][key]


def break_losses(patch: pytest.MonkeyPatch, at: set[int], factor: float) -> None:
    """The losses of training, times a factor at some steps (counted from 1)."""
    calls = iter(range(1, 10**9))
    original = OBJECTIVES["joint"]

    def losses(*args: Any) -> tuple[Tensor, Tensor]:
        matching, entropy = original(*args)
        return (matching * factor if next(calls) in at else matching), entropy

    patch.setitem(OBJECTIVES, "joint", losses)  # type: ignore[arg-type]
