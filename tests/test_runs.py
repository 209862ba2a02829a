"""Runs that go on: with the same pictures, or other settings, or from other weights."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from runs import CPU, TINY, after, rows_of, run, same_to_the_bit, state_of
from safetensors.torch import load_file
from sets import BROKEN, pack, picture

from cdnctl.cards import card
from cdnctl.checkpoints import (
    MODEL,
    Header,
    build_module,
    load_model,
    read_header,
    save_model,
    weights_hash,
)
from cdnctl.errors import UsageError
from cdnctl.training import objectives
from cdnctl.training.config import parse
from cdnctl.training.loop import train
from cdnctl.training.report import describe
from cdnctl.training.runs import PASSED_OVER, new_run_folder, start_from
from cdnctl.training.state import STATE, read_run

pytestmark = pytest.mark.slow  # they train


def test_a_run_sees_the_same_pictures_when_it_goes_on(
    datasets: list[Path], whole: Path, tmp_path: Path
) -> None:
    """Whatever becomes of those that it passed over: they may be mended, or removed."""
    told: list[int] = []
    for name in ("mended", "removed", "packed"):
        roots = [tmp_path / name / p.name for p in datasets]
        for source, target in zip(datasets, roots, strict=True):
            shutil.copytree(source, target)
        bad = roots[0] / "brick" / "x.png"
        bad.write_bytes(BROKEN)
        folder = tmp_path / f"run {name}"
        run(folder, roots, should_stop=after(3), loaded=lambda u: told.append(len(u)))
        assert (folder / PASSED_OVER).read_text().count("\n") == 1
        assert "brick/x.png" in (folder / PASSED_OVER).read_text()
        assert "1 passed over" in dict(describe(folder))["data"]
        if name == "removed":
            bad.unlink()
        else:
            shutil.copy(roots[0] / "grass" / "00.png", bad)
        if name == "packed":
            roots[0] = pack(tmp_path / "moved.zip", roots[0])
        again = {"datasets": roots, "loaded": lambda u: told.append(len(u))}
        train(folder, device=CPU, should_stop=after(2), **again)
        assert train(folder, device=CPU, **again).finished
        same_to_the_bit(folder, whole)
    assert told == [1, 0, 0] * 3
    # One that could be read when the run began is another matter.
    folder = tmp_path / "run"
    run(folder, datasets, should_stop=after(3))
    (tmp_path / "removed" / "photos" / "03.png").write_bytes(BROKEN)
    with pytest.raises(UsageError, match=r"59 pictures.*60 pictures"):
        train(folder, datasets=[tmp_path / "removed" / p.name for p in datasets], device=CPU)


def test_the_datasets_have_moved(whole: Path, datasets: list[Path], tmp_path: Path) -> None:
    old, new = ([tmp_path / place / p.name for p in datasets] for place in ("old", "new"))
    for source, target in zip(datasets, old, strict=True):
        shutil.copytree(source, target)
    folder = tmp_path / "run"
    run(folder, old, should_stop=after(3))
    shutil.move(tmp_path / "old", tmp_path / "new")
    with pytest.raises(UsageError, match=str(old[0])):
        train(folder, device=CPU)
    assert train(folder, datasets=new, device=CPU, should_stop=after(1)).step == 4
    assert read_run(folder / STATE)["datasets"] == [str(p) for p in new]
    zips = [pack(tmp_path / f"{i}.zip", p) for i, p in enumerate(new)]
    shutil.rmtree(tmp_path / "new")
    assert train(folder, datasets=zips, device=CPU).finished
    same_to_the_bit(folder, whole)


def test_other_pictures_are_no_moved_datasets(datasets: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, datasets, should_stop=after(3))
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = [tmp_path / p.name for p in datasets]
    for source, target in zip(datasets, other, strict=True):
        shutil.copytree(source, target)
    path = sorted(other[0].rglob("*.png"))[3]
    pixels = np.array(PIL.Image.open(path))
    pixels[0, 0] ^= 1
    PIL.Image.fromarray(pixels).save(path)
    for given in (other, datasets[::-1]):  # one pixel, another order
        with pytest.raises(UsageError, match=r"not the datasets that .* began with") as caught:
            train(folder, datasets=given, device=CPU)
        assert str(folder) in str(caught.value)
    path.unlink()
    with pytest.raises(UsageError, match=r"59 pictures.*60 pictures"):
        train(folder, datasets=other, device=CPU)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_resuming_with_other_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "data" / name / "1.png", (16, 16))
    folder = tmp_path / "run"
    run(folder, [tmp_path / "data"], should_stop=after(1))
    picture(tmp_path / "data" / "c" / "1.png", (16, 16))
    with pytest.raises(UsageError, match="'c'"):
        train(folder, device=CPU)


def test_resuming_what_is_no_run(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        train(tmp_path / "absent", device=CPU)
    shutil.copytree(whole, tmp_path / "bad")
    (file,) = (tmp_path / "bad" / STATE).glob("state-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="bad"):
        train(tmp_path / "bad", device=CPU)


# -- settings and weights -------------------------------------------------------------------


def test_memory_order_compiling_and_precision_may_change_on_the_way(
    whole: Path, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []

    def fake(function: Any, **options: object) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", fake)
    folder = tmp_path / "run"
    sections = {"run": {"channels_last": True}}
    assert run(folder, datasets, sections=sections, should_stop=after(3)).step == 3
    one = train(folder, settings=["run.channels_last=false"], device=CPU, should_stop=after(2))
    assert one.step == 5 and not compiled
    two = train(folder, settings=["run.compile=true"], device=CPU, should_stop=after(2))
    assert two.step == 7 and compiled == [objectives.joint]
    settings = ["run.channels_last=true", "run.compile=false", "run.precision=tf32"]
    assert train(folder, settings=settings, device=CPU).finished
    assert parse(read_run(folder / STATE)["config"]).run.precision == "tf32"
    x, y = state_of(folder), state_of(whole)
    for key, value in y.items():
        torch.testing.assert_close(x[key], value, rtol=1e-3, atol=1e-4)
    for setting in ("optim.steps=20", "run.seed=3", "data.batch=8"):
        with pytest.raises(UsageError, match=setting):
            train(folder, settings=[setting], device=CPU)


def test_a_run_that_has_not_begun_to_fall_may_be_given_other_steps(
    datasets: list[Path], tmp_path: Path
) -> None:
    linear = {"optim": {"schedule": "linear", "decay": 0.5, "steps": 12, "warmup": 1}}
    run(tmp_path / "short", datasets, sections=linear)
    longer = {"optim": linear["optim"] | {"steps": 30}}
    run(tmp_path / "cut", datasets, sections=longer, should_stop=after(4))
    assert train(tmp_path / "cut", settings=["optim.steps=12"], device=CPU, should_stop=after(5))
    with pytest.raises(UsageError, match=r"optim\.steps=30"):  # it falls since step 6
        train(tmp_path / "cut", settings=["optim.steps=30"], device=CPU)
    assert train(tmp_path / "cut", device=CPU).step == 12
    same_to_the_bit(tmp_path / "cut", tmp_path / "short")


def test_a_channel_of_ones_grows_onto_trained_weights(datasets: list[Path], tmp_path: Path) -> None:
    """The network with the new channel begins as the same function."""
    run(tmp_path / "old", datasets)
    source = tmp_path / "old" / "last" / MODEL
    old, header = load_model(source)
    grown = build_module(replace(header, model=dict(header.model) | {"constant": True}))
    start_from(source, grown)
    y = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for a, b in zip(grown.correction(y, 0.1), old.correction(y, 0.1), strict=True):
        torch.testing.assert_close(a, b)


def test_training_goes_on_from_other_weights(
    whole: Path, datasets: list[Path], tmp_path: Path
) -> None:
    start, end = whole / "last" / MODEL, tmp_path / "run" / "last" / MODEL
    sections = {"optim": {"steps": 2, "lr": 0.0}}
    run(tmp_path / "run", datasets, init_from=start, sections=sections, should_stop=after(1))
    train(tmp_path / "run", device=CPU)
    for key, value in load_file(end).items():
        torch.testing.assert_close(value, load_file(start)[key])
    origin, budget = read_header(end).training["started_from"], read_header(start).training
    assert origin["weights"] == weights_hash(start) and origin["training"] == budget
    for fact in (weights_hash(start), f"{budget['steps']} steps", "2 steps"):
        assert fact in card(end)
    other = tmp_path / "other.safetensors"
    shape = {k: v for k, v in TINY.items() if k != "arch"} | {"num_classes": 5}
    header = Header("x", "gradresnet", shape, tuple("abcde"), (0.0, 0.2), 16)
    save_model(other, build_module(header).state_dict(), header)
    with pytest.raises(UsageError, match="other"):
        run(tmp_path / "misfit", datasets, init_from=other)


# -- folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 7, -3])
def test_results_that_broke_off(
    kept: int, whole: Path, datasets: list[Path], tmp_path: Path
) -> None:
    """A crash before the first row, or in the middle of it: what was lost of it stays lost."""
    folder = tmp_path / "run"
    run(folder, datasets, should_stop=after(3))
    path = folder / "results.csv"
    path.write_bytes(path.read_bytes()[:kept])
    assert train(folder, device=CPU).finished
    assert [r["step"] for r in rows_of(folder)] == ["4", "6", "8", "10"]
    assert list(rows_of(folder)[0]) == list(rows_of(whole)[0])
    assert b"\r" not in path.read_bytes(), "lines written before and after end alike"


def test_run_folders_never_collide(tmp_path: Path) -> None:
    parent = tmp_path / "runs"
    assert new_run_folder(parent).name == "1"
    (parent / "3").write_text("a file")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_run_folder(parent), range(40)))
    assert sorted(int(p.name) for p in made) == [2, *range(4, 43)]
    assert all(p.is_dir() for p in made)
