"""Devices, threads, and what to do before torch starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from cdnctl.errors import DeviceError, SetupError, UsageError


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` as a torch device.

    ``auto`` takes the first that is there of cuda, mps, cpu, and ``cuda`` the first of its
    devices, or under torchrun that of the process. A device that is named but not there is a
    DeviceError, never another device in silence.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdigit())):
        raise UsageError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # Of the processes that torchrun starts on a machine, each has a device of its own.
        index = int(number) if number else int(os.environ.get("LOCAL_RANK", "0")) % max(count, 1)
        if index >= count:
            raise DeviceError(
                f"device {name!r} is not there: torch {torch.__version__} sees {count} CUDA "
                "device(s); use --device cpu, or install a CUDA build of torch and a driver"
            )
        return torch.device(kind, index)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device 'mps' is not there (it needs macOS on Apple silicon)")
    return torch.device(name)


def available_devices() -> list[str]:
    """Names of all usable devices, best first."""
    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device; for the CPU, within the limit of its control group."""
    if device.type == "cuda":
        # What torch keeps for reuse is free for it, but not for the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:  # containers and batch systems allow less than the machine has
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def world_from_env() -> tuple[int, int]:
    """(rank, world size) that torchrun set, or (0, 1)."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the group that torchrun set up, if any: (rank, world size), else (0, 1).

    Whatever ``device`` is, tensors on the host are exchanged by the host alone.
    """
    if world_from_env() == (0, 1):
        yield 0, 1
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def patient_barrier() -> Callable[[], None]:
    """A function that waits until all processes of the group have called it.

    It waits for any length of time and still reacts to signals. All processes must ask for it
    together.
    SetupError if another process ends instead. Without a group it does nothing.
    """
    if world_from_env() == (0, 1):
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def wait() -> None:
        try:
            work = dist.barrier(group, async_op=True)
            while not work.is_completed():
                time.sleep(0.02)
            work.wait()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise SetupError(f"another process of the group has ended early ({reason})") from None

    return wait
