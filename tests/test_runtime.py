"""Devices and groups of processes, as far as they can be tested where there is no GPU."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from cdnctl import runtime
from cdnctl.cli.common import start_torch
from cdnctl.errors import DeviceError
from cdnctl.runtime import available_memory, choose_device, process_group


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_torchrun_has_a_gpu_of_its_own(
    name: str, four_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_device(name) == torch.device("cuda", 0)
    found = set()
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.add(choose_device(name))
        assert choose_device("cuda:1") == torch.device("cuda", 1), "what is named is taken"
        assert choose_device("cpu") == torch.device("cpu")
    assert found == {torch.device("cuda", i) for i in range(4)}
    with pytest.raises(DeviceError, match="'cuda:4'"):
        choose_device("cuda:4")


def test_no_gpu_but_the_chosen_one_is_touched(
    four_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch allocates without being told where goes to the current one."""
    current = Mock()
    monkeypatch.setattr(torch.cuda, "set_device", current)
    assert start_torch("cpu", None) == torch.device("cpu") and not current.called
    assert start_torch("cuda:2", None) == torch.device("cuda", 2)
    current.assert_called_once_with(torch.device("cuda", 2))


def test_hosts_talk_without_their_gpus(four_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what is told on the host, such as the name of a run folder, no GPU is needed."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    join = Mock()
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "destroy_process_group", Mock())
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    for device in ("cuda:2", "cpu"):
        with process_group(torch.device(device)) as group:
            assert group == (2, 4)
        backends = BackendConfig(dist.Backend(join.call_args.args[0])).get_device_backend_map()
        assert backends["cpu"] == "gloo"
        assert device == "cpu" or backends["cuda"] == "nccl"


def test_memory_that_torch_keeps_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (700, 1000)), ("memory_reserved", 200),
                        ("memory_allocated", 50)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_memory(torch.device("cuda", 0)) == 850


@pytest.mark.parametrize("version", [1, 2])
def test_memory_within_groups_within_groups(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tightest of them counts; pages that give way are free; "max" is no limit."""
    root = tmp_path if version == 2 else tmp_path / "memory"
    limit, use, cache = runtime._FILES[version]

    def group(folder: Path, most: str, used: int, file: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(most + "\n")
        (folder / use).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\n{cache} {file}\n")

    group(root / "batch" / "job", "max" if version == 2 else str(2**62), 10, 0)
    group(root / "batch", "5000", 4000, 300)
    own = "0::" if version == 2 else "9:cpu:/\n4:hugetlb,memory:"
    (tmp_path / "own").write_text(own + "/batch/job\n")
    monkeypatch.setattr(runtime, "GROUPS", tmp_path)
    monkeypatch.setattr(runtime, "OWN_GROUPS", tmp_path / "own")
    assert available_memory(torch.device("cpu")) == 1300
    group(root / "batch" / "job", "900", 1000, 0)
    assert available_memory(torch.device("cpu")) == 0, "beyond the limit nothing is left"
    # A container may see its group as the root of all.
    group(root, "7000", 6500, 0)
    (tmp_path / "own").write_text(own + "/not/shown\n")
    assert available_memory(torch.device("cpu")) == 500
    (tmp_path / "own").unlink()
    assert available_memory(torch.device("cpu")) > 5000
