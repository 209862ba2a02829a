"""The state of a run: the guard, files in pieces, and what is loaded from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import (
    CPU,
    after,
    break_losses,
    rows_of,
    run,
    same_to_the_bit,
    state_of,
    tiny_config,
    tiny_net,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdnctl.checkpoints import MODEL, write_atomically
from cdnctl.errors import TrainingError, UsageError
from cdnctl.training import state as states
from cdnctl.training.loop import train
from cdnctl.training.state import SHARD, SINGLE, STATE, TrainState, read_run, read_tensors


@pytest.mark.parametrize("guard", [10.0, 1e9])
def test_one_bad_step_does_no_harm(
    guard: float, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is undone by the guard or, below that, clipped."""
    quiet = {"run": {"validate_every": 100}, "optim": {"steps": 12, "guard": guard}}
    break_losses(monkeypatch, {9}, 1e6)
    assert run(tmp_path / "run", datasets, sections=quiet).finished
    guarded = read_run(tmp_path / "run" / STATE)["state"]
    monkeypatch.undo()
    run(tmp_path / "calm", datasets, sections=quiet)
    calm = read_run(tmp_path / "calm" / STATE)["state"]
    assert guarded["norm"] < 2 * calm["norm"]
    x, y = state_of(tmp_path / "run"), state_of(tmp_path / "calm")
    for key in (k for k in x if k.startswith("optimizer.exp_avg.")):
        assert x[key].abs().max() < 10 * y[key].abs().max() + 1e-3, key


def test_a_gradient_that_stays_huge(
    datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_losses(monkeypatch, set(range(9, 10**4)), 1e6)
    quiet = {"run": {"validate_every": 10**4}, "optim": {"steps": 5000}}
    with pytest.raises(TrainingError, match="gradient"):
        run(tmp_path / "run", datasets, sections=quiet)
    saved = state_of(tmp_path / "run")  # what is kept is the averaged weights
    for key in (k for k in saved if k.startswith("model.")):
        assert torch.equal(saved[key], saved[key.replace("model.", "ema.", 1)]), key


def test_an_undone_step_ends_at_the_average_without_momentum(
    datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: None
) -> None:
    for name, bad, steps in (("run", {6}, 6), ("calm", set(), 6), ("before", set(), 5)):
        with monkeypatch.context() as patch:
            break_losses(patch, bad, 1e6)
            quiet = {"run": {"validate_every": 100}}
            run(tmp_path / name, datasets, sections=quiet, should_stop=after(steps))
    undone, calm, before = (state_of(tmp_path / name) for name in ("run", "calm", "before"))
    for key, value in undone.items():
        part, _, name = key.partition(".")
        if part == "model":
            assert torch.equal(value, undone[f"ema.{name}"]), key
        if ".exp_avg." in key:
            assert not value.any(), key
        if ".exp_avg_sq." in key:  # as by a gradient of zero
            torch.testing.assert_close(value, 0.99 * before[key])
    assert any(
        not torch.equal(calm[k], calm[k.replace("model", "ema", 1)]) for k in calm if k[0] == "m"
    )
    assert any(v.any() for k, v in calm.items() if ".exp_avg." in k)


# -- files ----------------------------------------------------------------------------------


def pieces(folder: Path) -> list[Path]:
    return sorted((folder / STATE).glob("state*"))


def test_a_state_in_many_files(
    whole: Path, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "SHARD", 1000)
    folder = tmp_path / "run"
    assert run(folder, datasets, should_stop=after(3)).step == 3
    files = pieces(folder)
    assert len(files) > 10 and {p.name[:15] for p in files} == {"state-000000003"}
    for path in files:
        assert sum(t.nbytes for t in load_file(path).values()) <= 1000
    assert any("#" in key for path in files for key in load_file(path)), "one had to be cut"
    assert train(folder, device=CPU).finished
    same_to_the_bit(folder, whole)
    assert not set(files) & set(pieces(folder)), "the old ones are gone"


def test_files_stay_below_16_mib(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 10**6), "b": torch.zeros(()), "c": torch.zeros(10**7, 2)}
    tensors |= {f"d{i}": torch.zeros(10**4) for i in range(1000)}
    shards = states._shards(tensors)
    names = [name for shard in shards for name in shard]
    assert len(names) == len(set(names)) and {n.partition("#")[0] for n in names} == {*tensors}
    for shard in shards:
        save_file(shard, tmp_path / "shard", metadata={"run": "x" * 10_000})
        assert (tmp_path / "shard").stat().st_size <= 2**24
    total = sum(t.nbytes for t in tensors.values())
    assert len(shards) <= total / SHARD + 1, "no more than are needed"
    whole: dict[str, list[Tensor]] = {}
    for shard in shards:
        for name, value in shard.items():
            whole.setdefault(name.partition("#")[0], []).append(value)
    for name, value in tensors.items():
        assert sum(v.numel() for v in whole[name]) == value.numel()


@pytest.mark.parametrize("written", [0, 1, 5])
def test_a_crash_between_the_files_of_a_state(
    written: int, whole: Path, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "SHARD", 1000)
    folder = tmp_path / "run"
    run(folder, datasets, should_stop=after(3))
    before = pieces(folder)
    with monkeypatch.context() as patch:
        left = iter(range(written))

        def write(path: Path, data: bytes) -> None:
            if path.parent.name == STATE and path.name.startswith("state"):
                next(left)
            write_atomically(path, data)

        patch.setattr(states, "write_atomically", write)
        with pytest.raises(StopIteration):
            train(folder, device=CPU, should_stop=after(2))
    assert set(before) <= set(pieces(folder)) and len(pieces(folder)) == len(before) + written
    assert read_run(folder / STATE)["state"]["step"] == 3
    assert train(folder, device=CPU).finished
    same_to_the_bit(folder, whole)
    assert [r["step"] for r in rows_of(folder)] == [r["step"] for r in rows_of(whole)]


def test_files_of_a_state_are_never_written_over(
    datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a checkpoint falls on the last step, nor by a run with nothing left to do: a
    crash between two files would leave no whole state."""
    written: list[str] = []

    def write(path: Path, data: bytes) -> None:
        assert not path.exists()
        written.append(path.name)
        write_atomically(path, data)

    monkeypatch.setattr(states, "write_atomically", write)
    sections = {"optim": {"steps": 6}, "run": {"checkpoint_every": 3}}
    assert run(tmp_path / "run", datasets, sections=sections).finished
    exported = tmp_path / "run" / "last" / MODEL
    exported.unlink()
    assert train(tmp_path / "run", device=CPU).finished and exported.exists()
    assert [name[:15] for name in written] == ["state-000000003", "state-000000006"]


def test_files_that_do_not_belong_together(
    datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "SHARD", 1000)
    for name in ("a", "b"):
        run(tmp_path / name, datasets, should_stop=after(3))
    one, other = pieces(tmp_path / "a")[2], pieces(tmp_path / "b")[2]
    kept = one.read_bytes()
    one.unlink()
    with pytest.raises(UsageError, match=r"step 3: of .*, number 3 is missing"):
        train(tmp_path / "a", device=CPU)
    shutil.copy(other, one)
    with pytest.raises(UsageError, match="saved at different times") as caught:
        train(tmp_path / "a", device=CPU)
    assert str(one) in str(caught.value)
    one.write_bytes(kept)
    assert train(tmp_path / "a", device=CPU).finished


def test_a_state_of_an_earlier_version(whole: Path, datasets: list[Path], tmp_path: Path) -> None:
    """In one file, without a fingerprint and the newer keys of the config."""
    folder = tmp_path / "run"
    run(folder, datasets, should_stop=after(3))
    meta = read_run(folder / STATE)
    del meta["fingerprint"], meta["config"]["run"]["channels_last"]
    tensors = state_of(folder)
    for path in pieces(folder):
        path.unlink()
    save_file(tensors, folder / STATE / SINGLE, metadata={"run": json.dumps(meta)})
    assert read_run(folder / STATE)["state"]["step"] == 3
    assert train(folder, device=CPU).finished
    same_to_the_bit(folder, whole)
    assert not (folder / STATE / SINGLE).exists()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_loaded_lies_in_memory_like_the_weights(
    kind: str, datasets: list[Path], tmp_path: Path
) -> None:
    """The fused optimizer goes through memory without a look at strides, Muon is given matrices
    of it: what was saved in one memory order must be right in the other, and the way back."""
    config = tiny_config(optim={"kind": kind})
    run(tmp_path / "run", datasets, sections={"optim": {"kind": kind}})
    saved = state_of(tmp_path / "run")
    net = tiny_net().to(memory_format=torch.channels_last)
    state = TrainState(net, config)
    state.load(tmp_path / "run" / STATE)
    mixed = [p for p in net.parameters() if not p.is_contiguous()]
    assert mixed, "the test is about these"
    for key, parameter in net.named_parameters():
        assert state.ema[key].stride() == parameter.stride()
        for name, slot in state._slots(key).items():
            if name == "step":
                continue
            # Where the weight is one thing, its momentum must be the one of that weight.
            seen = state.leaves[key].detach()
            weight, value = (saved[f"{part}.{key}"] for part in ("model", f"optimizer.{name}"))
            assert seen.stride() == slot.stride()
            order = weight.flatten().argsort(), seen.flatten().argsort()
            got, want = slot.flatten()[order[1]], value.flatten()[order[0]]
            distinct = len(weight.unique()) == weight.numel()
            assert torch.equal(got, want) or not distinct, key
            assert distinct or parameter.ndim < 4
    state.save(tmp_path / "again", read_run(tmp_path / "run" / STATE))
    again = read_tensors(tmp_path / "again")
    assert again.keys() == saved.keys()
    for key, value in saved.items():
        assert torch.equal(again[key], value) and again[key].shape == value.shape, key
