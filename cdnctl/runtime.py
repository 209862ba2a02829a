"""Devices, threads, and what to do before torch starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cdnctl.errors import DeviceError, UsageError


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` as a torch device.

    ``auto`` takes the first that is there of cuda, mps, cpu. A device that is
    named but not there is a DeviceError, never another device in silence.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdigit())):
        raise UsageError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            raise DeviceError(
                f"device {name!r} is not there: torch {torch.__version__} sees {count} CUDA "
                "device(s); use --device cpu, or install a CUDA build of torch and a driver"
            )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' is not there (it needs macOS on Apple silicon)")
    return torch.device(name)


def available_devices() -> list[str]:
    """Names of all usable devices, best first."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the group that torchrun set up, if any: (rank, world size), else (0, 1)."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()
