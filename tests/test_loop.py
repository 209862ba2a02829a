"""The training loop: it can be stopped, resumed and shared out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from runs import CPU, after, break_losses, rows_of, run, same_to_the_bit, state_of, tiny_config
from safetensors.torch import load_file

from cdnctl.checkpoints import MODEL, load_model
from cdnctl.errors import TrainingError, UsageError
from cdnctl.training.config import parse
from cdnctl.training.loop import train
from cdnctl.training.runs import Outcome, Progress, new_run_folder, shared_path
from cdnctl.training.state import STATE, read_run
from cdnctl.training.step import learning_rate

pytestmark = pytest.mark.slow  # they train


def test_a_finished_run(whole: Path, datasets: list[Path]) -> None:
    module, header = load_model(whole / "last" / MODEL)
    assert header.classes == ("brick", "grass") and header.patch == 16
    assert header.sigma_range == pytest.approx((20 / 255, 40 / 255))
    assert header.training["steps"] == 10 and header.training["pictures"] == 40
    assert parse(header.training["config"]) == tiny_config()
    assert "textures" in header.data and str(datasets[0]) not in json.dumps(vars(header))
    assert module.num_classes == 2
    assert load_model(whole / "best" / MODEL)[1].training["steps"] in (4, 8, 10)
    state = state_of(whole)
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[f"ema.{key}"]), "what is exported is the average"
    assert any(not torch.equal(state[f"ema.{k}"], state[f"model.{k}"]) for k in module.state_dict())
    config = json.loads((whole / "config.json").read_text())
    assert parse(config["config"]) == tiny_config()


def test_results(whole: Path, datasets: list[Path], tmp_path: Path) -> None:
    rows = rows_of(whole)
    assert list(rows[0]) == [
        "step",
        "seconds",
        "pictures",
        "loss",
        "score_loss",
        "class_loss",
        "grad_norm",
        "lr",
        "val_loss",
        "val_psnr_25",
        "val_accuracy_25",
    ]
    assert [int(r["step"]) for r in rows] == [2, 4, 6, 8, 10]
    config = tiny_config()
    for row in rows:
        step = int(row["step"])
        assert int(row["pictures"]) == 4 * step
        assert float(row["lr"]) == pytest.approx(learning_rate(step - 1, config))
        parts = float(row["score_loss"]) + config.loss.classes * float(row["class_loss"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-5)
        validated = step in (4, 8, 10)
        for name in ("val_loss", "val_psnr_25", "val_accuracy_25"):
            assert bool(row[name]) is validated
        if validated:
            assert 5 < float(row["val_psnr_25"]) < 50
            assert 0 <= float(row["val_accuracy_25"]) <= 1
    # A row is the mean over the steps since the one before.
    progress: list[Progress] = []
    run(tmp_path / "run", datasets, sections={"run": {"log_every": 1}}, watch=progress.append)
    assert [p.step for p in progress] == list(range(1, 11))
    for k, row in enumerate(rows):
        pair = progress[2 * k : 2 * k + 2]
        assert float(row["loss"]) == pytest.approx(sum(p.loss for p in pair) / 2, rel=1e-5)
        assert float(row["grad_norm"]) == pytest.approx(pair[1].grad_norm)


def test_stopped_and_resumed_twice_to_the_bit(
    whole: Path, datasets: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert run(folder, datasets, should_stop=after(3)) == Outcome(folder, 3, False)
    assert train(folder, device=CPU, should_stop=after(2)) == Outcome(folder, 5, False)
    assert train(folder, device=CPU) == Outcome(folder, 10, True)
    same_to_the_bit(folder, whole)
    assert [r["step"] for r in rows_of(folder)] == [r["step"] for r in rows_of(whole)]
    again = train(folder, device=CPU)  # nothing left to do
    assert again == Outcome(folder, 10, True)
    same_to_the_bit(folder, whole)


def test_out_of_time(whole: Path, datasets: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = run(folder, datasets, max_seconds=0)
    steps = [outcome.step]
    while not outcome.finished:
        outcome = train(folder, device=CPU, max_seconds=0)
        steps.append(outcome.step)
    assert steps == list(range(1, 11))
    same_to_the_bit(folder, whole)


def test_resuming_counts_the_seconds_on(datasets: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, datasets, should_stop=after(3))
    first = read_run(folder / STATE)["state"]["seconds"]
    seen: list[float] = []
    train(folder, device=CPU, watch=lambda p: seen.append(p.seconds))
    assert 0 < first < seen[0] and seen == sorted(seen)


def test_muon_goes_on_where_it_stopped(datasets: list[Path], tmp_path: Path) -> None:
    sections = {"optim": {"kind": "muon"}}
    run(tmp_path / "whole", datasets, sections=sections)
    stops = iter([False, False, False, True])
    run(tmp_path / "parts", datasets, sections=sections, should_stop=lambda: next(stops))
    train(tmp_path / "parts", device=CPU)
    same_to_the_bit(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_channels_last_to_the_bit(kind: str, datasets: list[Path], tmp_path: Path) -> None:
    sections = {"run": {"channels_last": True}, "optim": {"kind": kind}}
    run(tmp_path / "whole", datasets, sections=sections)
    run(tmp_path / "parts", datasets, sections=sections, should_stop=after(4))
    train(tmp_path / "parts", device=CPU)
    same_to_the_bit(tmp_path / "parts", tmp_path / "whole")


def test_another_seed_is_another_run(whole: Path, datasets: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "run", datasets, sections={"run": {"seed": 1}})
    x, y = state_of(whole), state_of(tmp_path / "run")
    assert not torch.equal(x["model.trunk.stem.weight"], y["model.trunk.stem.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number(
    value: float, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"run": {"validate_every": 100, "log_every": 1}}
    run(tmp_path / "whole", datasets, sections=quiet)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        break_losses(patch, {8}, value)
        with pytest.raises(TrainingError, match="step 7") as caught:
            run(folder, datasets, sections=quiet)
    assert repr(str(folder)) in str(caught.value)
    assert read_run(folder / STATE)["state"]["step"] == 6, "the last good state"
    assert all(v.isfinite().all() for v in state_of(folder).values())
    load_model(folder / "last" / MODEL)
    assert [int(r["step"]) for r in rows_of(folder)] == [1, 2, 3, 4, 5, 6, 7]
    train(folder, device=CPU)  # once the cause is gone, the run goes on as if nothing had been
    same_to_the_bit(folder, tmp_path / "whole")
    assert [int(r["step"]) for r in rows_of(folder)] == list(range(1, 11))


@pytest.mark.parametrize("steps", [9, 100])
def test_it_is_noticed_late_but_before_anything_is_saved(
    steps: int, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: None
) -> None:
    """At a checkpoint, or at the end."""
    quiet = {
        "run": {"validate_every": 100, "log_every": 100, "checkpoint_every": 6},
        "optim": {"steps": 100},
    }
    folder = tmp_path / "run"
    break_losses(monkeypatch, {8}, math.nan)
    with pytest.raises(TrainingError, match="step 7"):
        run(folder, datasets, sections=quiet, should_stop=after(steps))
    assert read_run(folder / STATE)["state"]["step"] == 6
    assert all(v.isfinite().all() for v in state_of(folder).values())


@pytest.mark.parametrize("arch,psnr,accuracy", [("unet", True, False), ("classifier", False, True)])
def test_baselines_train_too(
    arch: str, psnr: bool, accuracy: bool, datasets: list[Path], tmp_path: Path
) -> None:
    sections = {"model": {"arch": arch}, "optim": {"steps": 4}}
    assert run(tmp_path / "run", datasets, sections=sections).finished
    row = rows_of(tmp_path / "run")[-1]
    assert bool(row["val_psnr_25"]) is psnr and bool(row["val_accuracy_25"]) is accuracy
    assert load_model(tmp_path / "run" / "last" / MODEL)[1].arch == arch


def test_one_flat_folder_is_one_class(datasets: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "run", datasets[1:], sections={"optim": {"steps": 2}})
    module, header = load_model(tmp_path / "run" / "last" / MODEL)
    assert module.num_classes == len(header.classes) == 1
    assert rows_of(tmp_path / "run")[-1]["val_accuracy_25"] == ""


@pytest.mark.parametrize("arch", ["gradresnet", "unet"])
def test_the_loss_goes_down(arch: str, datasets: list[Path], tmp_path: Path) -> None:
    progress: list[Progress] = []
    sections = {
        "model": {"arch": arch, "widths": [8, 16], "down": 2},
        "data": {"batch": 8},
        "optim": {"steps": 60, "lr": 5e-3, "warmup": 5},
        "run": {"log_every": 10, "validate_every": 10},
        "noise": {"low": 25, "high": 25},
        "loss": {"classes": 0.1},
    }
    assert run(tmp_path / "run", datasets, sections=sections, watch=progress.append).finished
    first, last = progress[0], progress[-1]
    assert last.score_loss < 0.8 * first.score_loss
    assert last.validation["loss"] < 0.8 * first.validation["loss"]
    noisy_psnr = -20 * math.log10(25 / 255)
    assert last.validation["psnr_25"] > noisy_psnr + 2
    if arch == "gradresnet":
        assert last.class_loss < 0.8 * first.class_loss
        assert last.validation["accuracy_25"] > 0.9


# -- two processes --------------------------------------------------------------------------


def worker(rank: int, folder: Path, datasets: list[Path]) -> None:
    """One of two processes on the CPU; spawned below."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    shared = shared_path(lambda: new_run_folder(folder / "runs"))
    assert shared == folder / "runs" / "1"
    assert run(shared, datasets).finished
    assert frames_run(folder / "frames", datasets).finished
    # Only the second process wants to stop; both must.
    outcome = run(folder / "stopped", datasets, should_stop=after(3 if rank else 100))
    assert (outcome.step, outcome.finished) == (3, False)
    with pytest.raises(UsageError, match="batch 5"):
        run(folder / "odd", datasets, sections={"data": {"batch": 5}})
    # One has a file that the other cannot read: their batches would be of different pictures.
    with pytest.raises(TrainingError, match="different pictures"):
        run(folder / "mixed", datasets[rank:])
    assert not (folder / "mixed").exists()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_on_the_joined_batch(
    whole: Path, datasets: list[Path], tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(worker, (tmp_path, datasets), nprocs=2)
    both = tmp_path / "runs" / "1"
    assert (tmp_path / "stopped" / STATE).exists() and not (tmp_path / "runs" / "2").exists()
    for one, two in zip(rows_of(whole), rows_of(both), strict=True):
        assert one["step"] == two["step"] and one["pictures"] == two["pictures"]
        for name in ("loss", "score_loss", "class_loss", "grad_norm", "val_loss"):
            if one[name]:
                assert float(two[name]) == pytest.approx(float(one[name]), rel=1e-4), name
    x, y = load_file(whole / "last" / MODEL), load_file(both / "last" / MODEL)
    for key, value in x.items():
        torch.testing.assert_close(y[key], value, rtol=1e-3, atol=1e-4)
    # What a network remembers of its features is of the pictures of both. The first layer's filters
    # are fixed, so their mean does not hang on how the rest was standardised.
    frames_run(tmp_path / "alone", datasets)
    x, y = state_of(tmp_path / "alone"), state_of(tmp_path / "frames")
    key = "trunk.layers.0.standard.mean"
    assert x[f"model.{key}"].abs().max() > 0.01
    for part in ("model", "ema"):
        torch.testing.assert_close(y[f"{part}.{key}"], x[f"{part}.{key}"], rtol=1e-4, atol=1e-5)


FRAMES: dict[str, dict[str, Any]] = {
    "model": {
        "arch": "scattering",
        "widths": [4, 6],
        "rho": "phases",
        "maps": "real",
        "frames": 2,
        "angles": 3,
    },
    "optim": {"kind": "sgd", "lr": 0.05, "weight_decay": 0.3},
    "loss": {"score": 0.0, "classes": 1.0},
}


def frames_run(folder: Path, datasets: list[Path], **options: Any) -> Outcome:
    raw = tiny_config().to_dict() | {"model": FRAMES["model"]}
    raw = raw | {key: raw[key] | FRAMES[key] for key in ("optim", "loss")}
    return train(folder, config=parse(raw), datasets=datasets, device=CPU, **options)


def test_a_network_that_remembers_its_features_goes_on_where_it_stopped(
    datasets: list[Path], tmp_path: Path
) -> None:
    """By plain gradient descent; its statistics belong to its weights and to their average."""
    frames_run(tmp_path / "whole", datasets)
    stops = iter([False, False, True])
    frames_run(tmp_path / "parts", datasets, should_stop=lambda: next(stops))
    train(tmp_path / "parts", device=CPU)
    same_to_the_bit(tmp_path / "whole", tmp_path / "parts")
    saved = state_of(tmp_path / "whole")
    statistics = [k for k in saved if k.startswith("model.") and k.endswith(".variance")]
    assert len(statistics) >= 3
    for key in statistics:
        average = saved[key.replace("model.", "ema.", 1)]
        assert not torch.allclose(saved[key], torch.ones_like(saved[key]), atol=0.01)
        assert not torch.equal(saved[key], average)
    weights = load_file(tmp_path / "whole" / "last" / MODEL)
    assert {k for k in weights if k.endswith(".variance")} == {
        k.removeprefix("model.") for k in statistics
    }


def test_frames_stay_tight_and_keep_their_size(datasets: list[Path], tmp_path: Path) -> None:
    """Steps without a gradient leave them where the Parseval steps put them; all else decays."""
    raw = tiny_config().to_dict() | {"model": FRAMES["model"]}
    raw = raw | {"optim": raw["optim"] | FRAMES["optim"]}
    raw["loss"] = raw["loss"] | {"score": 0.0, "classes": 0.0}
    train(tmp_path / "run", config=parse(raw), datasets=datasets, device=CPU)
    saved = state_of(tmp_path / "run")
    torch.manual_seed(0)
    for key, value in saved.items():
        if key.startswith("model.") and key.endswith("frame.atoms"):
            values = torch.linalg.svdvals(value)
            assert torch.allclose(values, torch.ones_like(values), atol=1e-3)
        if key.startswith("model.") and key.endswith("map.weight"):
            small = torch.linalg.svdvals(value).min()
            assert small > 0.9  # 10 steps of weight decay alone would leave 0.87
    head = saved["model.head.linear.weight"]
    assert head.std() < 0.93 * head.shape[1] ** -0.5
