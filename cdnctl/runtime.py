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
    """Bytes that are free on a device; for the CPU, within the limits of its control groups."""
    if device.type == "cuda":
        # What torch keeps for reuse is free for it, but not for the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *_room_in_groups()]))


GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# By version of control groups: limit, use, and what of the use gives way when memory is needed.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def _room_in_groups() -> list[int]:
    """Bytes that are left within each control group that this process is in: its own, and those
    around it. Containers and batch systems allow less than the machine has."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            version, root = (1, GROUPS / "memory") if controllers else (2, GROUPS)
            group = root / path.lstrip("/")
            # A container may show its own group as the root, whatever its path outside.
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    rooms += _room_in(folder, *_FILES[version])
    return rooms


def _room_in(group: Path, limit: str, use: str, cache: str) -> list[int]:
    """Bytes left in one group; nothing if it has no limit or tells none."""
    try:
        most = int((group / limit).read_text())
        used = int((group / use).read_text())
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return [most - used + int(stats.get(cache, 0))]
    except (OSError, ValueError):
        return []


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
