"""Training: configs, data, and a loop that can be stopped, resumed and shared out."""

from __future__ import annotations

import csv
import json
import math
import shutil
import zipfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import skimage.data
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import TritonMissing

from cdnctl.checkpoints import (
    Header,
    build_module,
    card,
    load_model,
    read_header,
    save_model,
    weights_hash,
    write_atomically,
)
from cdnctl.core.joint import denoise
from cdnctl.core.losses import score_matching
from cdnctl.core.noise import sample_sigma
from cdnctl.errors import ConfigError, ImageError, SetupError, TrainingError, UsageError
from cdnctl.training import loop
from cdnctl.training import state as states
from cdnctl.training.batches import Batch, Batches
from cdnctl.training.config import (
    DataConfig,
    LossConfig,
    NoiseConfig,
    OptimConfig,
    TrainConfig,
    load,
    override,
    parse,
)
from cdnctl.training.datasets import (
    Pictures,
    find_pictures,
    fingerprint,
    load_datasets,
    split_holdout,
)
from cdnctl.training.loop import (
    MODEL,
    Outcome,
    learning_rate,
    new_run_folder,
    numerics,
    shared_path,
    take_samples,
    train,
    validate,
)
from cdnctl.training.probe import Trial, best_trial, probe
from cdnctl.training.report import (
    CELL,
    CONFIG,
    GAP,
    PASSED_OVER,
    RESULTS,
    Samples,
    describe,
    read_results,
    sheet,
)
from cdnctl.training.state import SHARD, SINGLE, STATE, TrainState, read_run, read_tensors

CPU = torch.device("cpu")

# -- configs --------------------------------------------------------------------------------


def test_defaults_are_a_sound_config() -> None:
    assert parse({}) == TrainConfig()


def test_config_survives_json() -> None:
    """As it does in a run folder."""
    config = parse(
        {
            "name": "x",
            "model": {"widths": [4, 8], "blocks": [1, 1], "norm": "none"},
            "optim": {"betas": [0.8, 0.9], "lr": 1},
            "run": {"validate_sigmas": []},
        }
    )
    again = parse(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.model["arch"] == "gradresnet"
    assert again.optim.betas == (0.8, 0.9) and again.run.validate_sigmas == ()


BAD_CONFIGS = {
    # text: what the error must quote
    "[data]\npatsh = 32": ("patsh", "data", "patch"),
    "[dta]\npatch = 32": ("dta", "data"),
    "patch = 32": ("patch", "data"),
    "[model]\ndepth = 3": ("depth", "model", "widths"),
    "[data]\npatch = 'big'": ("data.patch", "'big'", "a whole number"),
    "[data]\npatch = 1.5": ("data.patch", "1.5", "a whole number"),
    "[data]\npatch = true": ("data.patch", "True", "a whole number"),
    "[data]\nrotate = 1": ("data.rotate", "1", "true or false"),
    "[optim]\nlr = '1e-3'": ("optim.lr", "'1e-3'", "a number"),
    "[optim]\nbetas = [0.9]": ("optim.betas", "[0.9]"),
    "[optim]\nbetas = [0.9, 'x']": ("optim.betas", "'x'"),
    "[model]\nwidths = 64": ("model.widths", "64", "a list of whole numbers"),
    "[model]\nwidths = [4.5]": ("model.widths", "4.5"),
    "[model]\nwidths = [[4]]": ("model.widths", "[[4]]"),
    "[run]\nvalidate_sigmas = [25, 'x']": ("run.validate_sigmas", "'x'"),
    "data = 3": ("data", "3", "[data]"),
    "model = 'unet'": ("model", "'unet'"),
    "name = 3": ("name", "3"),
    "[name]\nx = 1": ("name", "'x'"),
    "[model]\narch = 'resnet'": ("'resnet'", "gradresnet", "unet"),
    "[model]\narch = ['unet']": ("['unet']", "gradresnet"),
    "[model]\nwidths = [64]": ("widths", "(64,)", "blocks"),
    "[model]\nnorm = 'batch'": ("norm", "'batch'", "pixel"),
    "[model]\nchannels = 1": ("channels", "1", "3"),
    "[data]\npatch = 0": ("data.patch", "0", "between 1"),
    "[data]\nbatch = 0": ("data.batch", "0"),
    "[data]\nlabelled_share = 1.5": ("data.labelled_share", "1.5"),
    "[data]\nshift = -1": ("data.shift", "-1"),
    "[data]\nholdout = -1": ("data.holdout", "-1"),
    "[noise]\nlow = 30\nhigh = 20": ("noise.low", "30", "20"),
    "[noise]\nlow = -1": ("noise.low", "-1"),
    "[noise]\nhigh = 300": ("noise.high", "300", "255"),
    "[noise]\nhigh = nan": ("noise", "nan"),
    "[noise]\npower = -1": ("noise.power", "-1"),
    "[loss]\nsmoothing = 2.0": ("loss.smoothing", "2.0"),
    "[loss]\nconditional = -0.5": ("loss.conditional", "-0.5"),
    "[loss]\nscore = inf": ("loss.score", "inf"),
    "[optim]\nsteps = 0": ("optim.steps", "0"),
    "[optim]\nlr = -0.1": ("optim.lr", "-0.1"),
    "[optim]\nlr = nan": ("optim.lr", "nan"),
    "[optim]\nbetas = [0.9, 1.0]": ("optim.betas", "1.0"),
    "[optim]\nema = 1.5": ("optim.ema", "1.5"),
    "[optim]\nclip = 0": ("optim.clip", "0"),
    "[optim]\nguard = 0.5": ("optim.guard", "0.5"),
    "[run]\nseed = -1": ("run.seed", "-1"),
    "[run]\nlog_every = 0": ("run.log_every", "0"),
    "[run]\nvalidate_every = 0": ("run.validate_every", "0"),
    "[run]\ncheckpoint_every = -5": ("run.checkpoint_every", "-5"),
    "[run]\nvalidate_sigmas = [-3]": ("run.validate_sigmas", "-3"),
    "[run]\nprecision = 'half'": ("run.precision", "'half'", "bfloat16"),
    "[data": ("not valid TOML",),
    "a = 1\na = 2": ("not valid TOML",),
    "x = " + "9" * 5000: ("not valid TOML",),
    "x = " + "[" * 5000: ("not valid TOML",),
}


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=lambda t: t[:40])
def test_config_errors_quote_key_and_value(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for word in BAD_CONFIGS[text]:
        assert word in str(caught.value)


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "latin.toml")


def test_a_good_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("name = 'x'\n[model]\narch = 'unet'\n[optim]\nlr = 1\n", encoding="utf-8")
    config = load(path)
    assert (config.name, config.model["arch"], config.optim.lr) == ("x", "unet", 1)
    assert config.data == DataConfig()


def test_keys_set_anew() -> None:
    settings = ["optim.steps=7", "run.precision=bfloat16", 'model.norm="none"', "run.compile=true"]
    changed = override(parse({}), [*settings, "model.widths=[4, 8]", "model.blocks=[1,1]"])
    assert changed == parse(
        {
            "optim": {"steps": 7},
            "run": {"precision": "bfloat16", "compile": True},
            "model": {"norm": "none", "widths": [4, 8], "blocks": [1, 1]},
        }
    )
    assert override(changed, ["optim.steps=8", "optim.steps=9"]).optim.steps == 9
    assert override(changed, []) == changed


@pytest.mark.parametrize(
    "setting,word",
    [
        ("steps=3", "steps=3"),
        ("optim.steps", "optim.steps"),
        ("optim=3", "optim=3"),
        ("name.x=3", "name.x=3"),
        ("optim.stps=3", "stps"),
        ("optim.steps=many", "'many', but must be a whole number"),
        ("optim.lr=fast", "'fast', but must be a number"),
        ("optim.kind=3", "3, but must be text"),
        ("optim.betas=0.9", "0.9, but must be a list of 2 numbers"),
        ("run.validate_sigmas=3", "3, but must be a list of numbers"),
        ("model.widths=[4.5]", "but must be a list of whole numbers"),
        ("optim.steps=0", "optim.steps"),
        ("run.compile=yes", "'yes', but must be true or false"),
    ],
)
def test_settings_that_are_none(setting: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(parse({}), [setting])
    assert word in str(caught.value)


# -- finding pictures -----------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = (4, 4), level: int | Any = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)
    return path


def found(root: Path, split: str = "train") -> list[tuple[str, str | None]]:
    return [(s.path.relative_to(root).as_posix(), s.label) for s in find_pictures(root, split)]


@pytest.mark.parametrize("base", ["", "train/"])
def test_layouts(tmp_path: Path, base: str) -> None:
    folders, flat = tmp_path / "folders", tmp_path / "flat"
    for name in ("dog/2.png", "dog/1.png", "cat/deep/x.jpg", "cat/notes.txt"):
        if name.endswith("txt"):
            (folders / base / name).write_text("no picture")
        else:
            picture(folders / base / name)
    for name in ("b.png", "a.png"):
        picture(flat / base / name)
    assert found(folders) == [
        (f"{base}cat/deep/x.jpg", "cat"),
        (f"{base}dog/1.png", "dog"),
        (f"{base}dog/2.png", "dog"),
    ]
    assert found(flat) == [(f"{base}a.png", None), (f"{base}b.png", None)]
    assert found(folders, "val") == found(flat, "val") == []


def test_val_beside_train(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "1.png")
    picture(tmp_path / "val" / "cat" / "2.png")
    assert found(tmp_path) == [("train/cat/1.png", "cat")]
    assert found(tmp_path, "val") == [("val/cat/2.png", "cat")]


@pytest.mark.parametrize(
    "names", [["val/cat/1.png"], ["val/1.png"], ["val/cat/1.png", "cat/2.png"]]
)
def test_val_without_train(tmp_path: Path, names: list[str]) -> None:
    """Neither is it trained on, nor is it taken for a class of that name."""
    for name in names:
        picture(tmp_path / "data" / name)
    for root in (tmp_path / "data", pack(tmp_path / "data.zip", tmp_path / "data")):
        with pytest.raises(UsageError, match=r"no training pictures.*cdnctl evaluate") as caught:
            load_datasets([root], DataConfig(), CPU)
        assert repr(str(root)) in str(caught.value)
        assert ("unpacked" in str(caught.value)) is (root.suffix == ".zip")
        assert len(find_pictures(root, "val")) == 1


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        find_pictures(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"a\.png"):
        find_pictures(picture(tmp_path / "file" / "a.png"))
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(UsageError, match="no pictures"):
        find_pictures(tmp_path / "empty")


def test_loading(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (5, 7, 3), np.uint8)
    gray = rng.integers(0, 256, (4, 6), np.uint8)
    for name, pixels in (("b/colour.png", colour), ("a/gray.png", gray)):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        PIL.Image.fromarray(pixels).save(tmp_path / "set" / name)
    picture(tmp_path / "loose" / "0.png", (3, 3), 7)
    pictures, held = load_datasets([tmp_path / "set", tmp_path / "loose"], DataConfig(), CPU)
    assert pictures.classes == ("a", "b") and len(held) == 0
    assert pictures.labels.tolist() == [0, 1, -1]
    assert pictures.sizes.tolist() == [[4, 6], [5, 7], [3, 3]]
    want = [np.repeat(gray[None], 3, 0), colour.transpose(2, 0, 1), np.full((3, 3, 3), 7)]
    for i, pixels in enumerate(want):
        at = int(pictures.offsets[i])
        got = pictures.buffer[at : at + pixels.size].reshape(pixels.shape)
        assert np.array_equal(got, pixels)


BROKEN = b"\x89PNG\r\n\x1a\n nothing more"


def labelled(root: Path, count: int, broken: Collection[str] = ()) -> Path:
    """Pictures of two classes, told apart by their levels; some of them broken."""
    for i in range(count):
        path = picture(root / "ab"[i % 2] / f"{i}.png", level=i)
        if path.relative_to(root).as_posix() in broken:
            path.write_bytes(BROKEN)
    return root


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("holdout", [0, 3])
def test_a_set_with_broken_pictures_is_the_set_without_them(
    packed: bool, holdout: int, tmp_path: Path
) -> None:
    bad = {"a/0.png", "b/7.png", "b/39.png"}
    broken, good = labelled(tmp_path / "set", 40, bad), labelled(tmp_path / "good", 40)
    for name in bad:
        (good / name).unlink()
    first = []  # a set with pictures of its own for validation, where none are held out
    if not holdout:
        first = [tmp_path / "more"]
        for split in ("train", "val"):
            picture(first[0] / split / "a" / "x.png", level=99)
    data = DataConfig(holdout=holdout)
    given = pack(tmp_path / "set.zip", broken) if packed else broken
    got, want = (load_datasets([*first, r], data, CPU) for r in (given, good))
    assert all(map(same_pictures, got, want)) and fingerprint(*got) == fingerprint(*want)
    assert len(got[1]) == (holdout or 1)
    assert {u.key for u in got[0].unread} == {f"{len(first)}:{name}" for name in bad}
    for unread in got[0].unread:
        assert unread.key.partition(":")[2] in unread.reason and "damaged" in unread.reason
    # What was passed over stays out when it is mended, and when it is gone.
    keys = [u.key for u in got[0].unread]
    for last in (labelled(broken, 40), good):
        again = load_datasets([*first, last], data, CPU, without=keys)
        assert all(map(same_pictures, again, got)) and not again[0].unread


@pytest.mark.parametrize("count,most", [(3, 1), (19, 1), (20, 2), (39, 3), (250, 25)])
def test_too_many_broken_pictures(count: int, most: int, tmp_path: Path) -> None:
    names = [f"{'ab'[i % 2]}/{i}.png" for i in range(count)]
    bad = names[-most:]
    root = labelled(tmp_path, count, bad)
    assert len(load_datasets([root], DataConfig(holdout=0), CPU)[0]) == count - most
    extra = names[-most - 1]
    (root / extra).write_bytes(BROKEN)
    with pytest.raises(ImageError, match=f"{most + 1} of {count} pictures") as caught:
        load_datasets([root], DataConfig(), CPU)
    message = str(caught.value)
    named = [name for name in (*bad, extra) if name in message]
    assert len(named) == min(most + 1, 20), "the first twenty by name"
    assert (f"and {most + 1 - 20} more" in message) is (most + 1 > 20)


def test_a_class_without_pictures(tmp_path: Path) -> None:
    root = labelled(tmp_path, 40)
    picture(root / "c" / "1.png").write_bytes(BROKEN)
    with pytest.raises(ImageError, match=r"no picture of 'c'[\s\S]*c/1\.png"):
        load_datasets([root], DataConfig(), CPU)


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


def pack(target: Path, folder: Path) -> Path:
    """A zip file of all files in a folder, in no good order."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True):
            archive.write(path, path.relative_to(folder))
    return target


def same_pictures(a: Pictures, b: Pictures) -> bool:
    tensors = ("buffer", "offsets", "sizes", "labels")
    return a.classes == b.classes and all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in tensors
    )


@pytest.mark.parametrize("base", ["", "train/"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_zip_file_is_the_folder_it_was_made_of(tmp_path: Path, base: str, flat: bool) -> None:
    """Also where names sort otherwise as strings than as paths."""
    names = ["b.png", "a b.jpg", "a.png", "ä.png"]
    if not flat:
        names = [f"{label}/{n}" for label in ("a", "a b", "a.b") for n in ("1.png", "x/1.png")]
    for i, name in enumerate(names):
        picture(tmp_path / "data" / base / name, (3 + i, 4), level=i)
        if base:
            picture(tmp_path / "data" / "val" / name, (2, 2), level=99 + i)
    (tmp_path / "data" / base / names[0]).with_suffix(".txt").write_text("no picture")
    made = pack(tmp_path / "data.zip", tmp_path / "data")
    for split in ("train", "val"):
        one, other = (find_pictures(root, split) for root in (tmp_path / "data", made))
        assert len(one) == len(other) == (len(names) if base or split == "train" else 0)
        assert [s.label for s in one] == [s.label for s in other]
        for a, b in zip(one, other, strict=True):
            assert b.archive == made and a.path.relative_to(tmp_path / "data") == b.path
    one, other = (load_datasets([r], DataConfig(), CPU) for r in (tmp_path / "data", made))
    assert same_pictures(one[0], other[0]) and same_pictures(one[1], other[1])
    assert fingerprint(*one) == fingerprint(*other)


def test_zip_files_and_folders_together(tmp_path: Path) -> None:
    for i, name in enumerate(("one/a/1.png", "two/b/1.png", "three/c.png")):
        picture(tmp_path / name, level=i)
    roots = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    mixed = [pack(tmp_path / "one.zip", roots[0]), roots[1], pack(tmp_path / "3.zip", roots[2])]
    want, got = (load_datasets(r, DataConfig(), CPU)[0] for r in (roots, mixed))
    assert same_pictures(want, got) and got.classes == ("a", "b")


@pytest.mark.parametrize(
    "name",
    ["../../escaped.png", "/tmp/escaped.png", "cat/../../escaped.png", "cat\\1.png", "./cat/1.png"],
)
def test_zip_files_with_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(picture(tmp_path / "a.png"), "cat/0.png")
        archive.writestr(zipfile.ZipInfo(name), (tmp_path / "a.png").read_bytes())
    with pytest.raises(UsageError) as caught:
        find_pictures(tmp_path / "data.zip")
    assert repr(name) in str(caught.value) and "data.zip" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "data.zip"]


def test_zip_files_that_are_none_or_hold_none(tmp_path: Path) -> None:
    good = pack(tmp_path / "good.zip", picture(tmp_path / "in" / "cat" / "1.png").parents[1])
    data = good.read_bytes()
    inner = pack(tmp_path / "inner.zip", good.parent / "in")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(inner, "deep/inner.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    (tmp_path / "text.zip").write_text("this is no zip file")
    (tmp_path / "nothing.zip").touch()
    (tmp_path / "cut.zip").write_bytes(data[:-30])
    locked = bytearray(data)
    locked[data.index(b"PK\x01\x02") + 8] |= 1  # the flag of an encrypted member
    (tmp_path / "locked.zip").write_bytes(locked)
    large = bytearray(data)
    at = data.index(b"PK\x01\x02") + 24  # its size
    large[at : at + 4] = (2**31).to_bytes(4, "little")
    (tmp_path / "large.zip").write_bytes(large)
    words = {
        "outer": "'deep/inner.zip'",
        "empty": "no pictures",
        "text": "not a folder or zip file",
        "nothing": "not a folder or zip file",
        "cut": "not a folder or zip file",
        "locked": "encrypted",
        "large": "2147483648 bytes",
        "absent": "not there",
    }
    for name, word in words.items():
        with pytest.raises(UsageError, match=word) as caught:
            find_pictures(tmp_path / f"{name}.zip")
        assert f"{name}.zip" in str(caught.value)


def test_a_broken_picture_in_a_zip_file_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3), np.uint8)
    good = pack(
        tmp_path / "a.zip", picture(tmp_path / "in" / "cat" / "1.png", (16, 16), noise).parents[1]
    )
    data = good.read_bytes()
    (tmp_path / "b.zip").write_bytes(data[:200] + bytes(50) + data[250:])  # packed data overwritten
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("cat/1.png", b"\x89PNG\r\n\x1a\n nothing more")
    load_datasets([good], DataConfig(), CPU)
    for name in ("b.zip", "c.zip"):
        with pytest.raises(ImageError, match=rf"{name}:cat/1\.png") as caught:
            load_datasets([tmp_path / name], DataConfig(), CPU)
        assert "standard input" not in str(caught.value)


def test_validation_folder_or_holdout(tmp_path: Path) -> None:
    for i in range(40):
        picture(tmp_path / "one" / "train" / "ab"[i % 2] / f"{i}.png", level=i)
    pictures, held = load_datasets([tmp_path / "one"], DataConfig(holdout=500), CPU)
    assert (len(pictures), len(held)) == (36, 4), "at most a tenth is held out"
    picture(tmp_path / "one" / "val" / "b" / "x.png", level=250)
    pictures, held = load_datasets([tmp_path / "one"], DataConfig(), CPU)
    assert (len(pictures), len(held)) == (40, 1)
    assert held.labels.tolist() == [1]
    picture(tmp_path / "one" / "val" / "c" / "x.png")
    with pytest.raises(UsageError, match="'c'"):
        load_datasets([tmp_path / "one"], DataConfig(), CPU)


# -- crops and batches ------------------------------------------------------------------------


def collection(
    sizes: list[tuple[int, int]], labels: list[int], classes: tuple[str, ...] = ("a", "b", "c")
) -> tuple[Pictures, list[np.ndarray]]:
    """Random pictures, as ``Pictures`` and as arrays (H, W, 3) in [0, 1]."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    flat = [torch.from_numpy(a.transpose(2, 0, 1).copy()).flatten() for a in arrays]
    lengths = torch.tensor([len(f) for f in flat])
    pictures = Pictures(
        torch.cat(flat),
        lengths.cumsum(0) - lengths,
        torch.tensor(sizes),
        torch.tensor(labels),
        classes,
    )
    return pictures, [np.float32(a) / 255 for a in arrays]


def flat_pictures(labels: list[int]) -> Pictures:
    """Pictures of one level each, which tell which one a crop came from."""
    n = len(labels)
    buffer = torch.arange(n, dtype=torch.uint8).repeat_interleave(3 * 4 * 4)
    size = torch.full((n, 2), 4)
    return Pictures(buffer, torch.arange(n) * 48, size, torch.tensor(labels), ("a", "b"))


def who(batch: Batch) -> list[int]:
    """Indices of the pictures of ``flat_pictures`` in a batch."""
    return (batch.clean[:, 0, 0, 0] * 255).round().long().tolist()


def cut(array: np.ndarray, top: int, left: int, side: int, turn: int) -> np.ndarray:
    """A crop in plain numpy: mirror at the edges, slice, transpose, flip. (3, side, side)."""
    pad = side + 12
    padded = np.pad(array, ((pad, pad), (pad, pad), (0, 0)), "reflect")
    crop = padded[top + pad : top + pad + side, left + pad : left + pad + side]
    if turn & 1:
        crop = crop[:, ::-1]
    if turn & 2:
        crop = crop[::-1]
    if turn & 4:
        crop = crop.transpose(1, 0, 2)
    return crop.transpose(2, 0, 1)


def test_crops_are_numpy_crops() -> None:
    """All eight turns; inside, over every edge, and of pictures smaller than the crop."""
    pictures, arrays = collection([(9, 14), (6, 6), (3, 5), (1, 4), (1, 1), (2, 2)], [0] * 6)
    rng = np.random.default_rng(1)
    for side in (1, 4, 7):
        which = torch.arange(6).repeat_interleave(16)
        turn = torch.arange(8).repeat(12)
        top, left = torch.from_numpy(rng.integers(-6, 12, (2, len(which))))
        got = pictures.crops(which, top, left, turn, side)
        assert got.dtype is torch.float32
        for k, i in enumerate(which.tolist()):
            want = cut(arrays[i], int(top[k]), int(left[k]), side, int(turn[k]))
            np.testing.assert_allclose(got[k], want, atol=1e-7)


def test_the_eight_turns_are_the_symmetries_of_the_square() -> None:
    pictures, arrays = collection([(5, 5)], [0])
    zero = torch.zeros(8, dtype=torch.int64)
    got = pictures.crops(zero, zero, zero, torch.arange(8), 5).numpy()
    square = arrays[0].transpose(2, 0, 1)
    turned = [np.rot90(square, k, (1, 2)) for k in range(4)]
    symmetries = {np.ascontiguousarray(t).tobytes() for s in turned for t in (s, s[:, :, ::-1])}
    assert len(symmetries) == 8
    assert {np.ascontiguousarray(c).tobytes() for c in got} == symmetries


def make_batches(pictures: Pictures, seed: int = 0, **data: Any) -> Batches:
    return Batches(pictures, DataConfig(**data), NoiseConfig(), LossConfig(), seed)


@pytest.mark.parametrize(
    "labels,shift,rotate", [([-1], 3, True), ([-1], 0, False), ([0], 0, True), ([0], 2, True)]
)
def test_crops_of_a_batch_are_all_those_allowed(
    labels: list[int], shift: int, rotate: bool
) -> None:
    """Labelled: shifted over the edge and mirrored. Unlabelled: inside, and turned."""
    pictures, arrays = collection([(5, 6)], labels)
    draw = make_batches(pictures, patch=4, batch=256, shift=shift, rotate=rotate)
    reach = shift if labels == [0] else 0
    allowed = {
        np.rint(cut(arrays[0], top, left, 4, turn) * 255).astype(np.uint8).tobytes()
        for top in range(-reach, 2 + reach)
        for left in range(-reach, 3 + reach)
        for turn in range(8 if labels == [-1] and rotate else 2)
    }
    seen = {
        np.rint(crop.numpy() * 255).astype(np.uint8).tobytes()
        for step in range(6)
        for crop in draw(step).clean
    }
    assert seen == allowed


@pytest.mark.parametrize("batch", [1, 4, 5, 7, 30])
def test_an_epoch_shows_every_picture_once(batch: int) -> None:
    labels = [0] * 7 + [-1] * 11 + [1] * 6
    draw = make_batches(flat_pictures(labels), patch=2, batch=batch, labelled_share=0.4)
    order = [i for step in range(60) for i in who(draw(step))]
    for pool in ({i for i, c in enumerate(labels) if c >= 0}, {7 + i for i in range(11)}):
        mine = [i for i in order if i in pool]
        epochs = [mine[k : k + len(pool)] for k in range(0, len(mine) - len(pool), len(pool))]
        assert all(sorted(epoch) == sorted(pool) for epoch in epochs)
        assert len(epochs) < 3 or len({tuple(epoch) for epoch in epochs}) > 1


def equal(a: Batch, b: Batch) -> bool:
    if (a.lesson is None) != (b.lesson is None):
        return False
    same = a.lesson is None or b.lesson is None or equal(a.lesson, b.lesson)
    return same and all(torch.equal(x, tensors(b)[name]) for name, x in tensors(a).items())


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if name != "lesson"}


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    pictures, _ = collection([(8, 9)] * 5 + [(7, 7)] * 5, [0, 1] * 3 + [-1] * 4)
    config = {"patch": 4, "batch": 6}
    in_order = make_batches(pictures, **config)
    forward = [in_order(t) for t in range(8)]
    draw = make_batches(pictures, **config)
    for t in (5, 0, 7, 7, 2, 6, 5):
        assert equal(draw(t), forward[t])
        assert equal(make_batches(pictures, **config)(t), forward[t])
    torch.manual_seed(123)
    torch.rand(7)
    assert equal(draw(3), forward[3])
    for other in (forward[4], make_batches(pictures, seed=1, **config)(3)):
        for name, value in tensors(forward[3]).items():
            if name in ("clean", "noise", "sigma"):
                assert not torch.equal(getattr(other, name), value), name


LESSON = {"patch": 4, "batch": 6, "class_batch": 4, "class_patch": 3, "thumbnail": 6}


def test_thumbnails_teach_classes_and_nothing_else() -> None:
    """Small labelled pictures in the lesson, large ones of both kinds outside of it."""
    sizes = [(5, 9)] * 5 + [(8, 9)] * 5 + [(7, 7)] * 5 + [(5, 5)] * 2
    labels = [0, 1, 2, 3, 0] + [1] * 5 + [-1] * 7
    pictures, _ = collection(sizes, labels)
    lessons, rest = set(), set()
    for step in range(20):
        batch = make_batches(pictures, **LESSON)(step)
        lesson = batch.lesson
        assert lesson is not None and lesson.lesson is None
        assert batch.clean.shape == (6, 3, 4, 4) and lesson.clean.shape == (4, 3, 3, 3)
        assert (lesson.labels >= 0).all()
        lessons |= set(lesson.labels.tolist())
        rest |= set(batch.labels.tolist())
    assert lessons == {0, 1, 2, 3} and rest == {-1, 1}
    shares = [make_batches(pictures, **LESSON)(3, rank, 2).lesson for rank in range(2)]
    whole = make_batches(pictures, **LESSON)(3).lesson
    assert whole is not None and all(share is not None for share in shares)
    assert torch.equal(torch.cat([s.sigma for s in shares if s])[[0, 2, 1, 3]], whole.sigma)
    with pytest.raises(UsageError, match=r"data\.thumbnail = 20"):
        make_batches(pictures, **LESSON | {"thumbnail": 20})


def test_flats_are_linear_in_place_and_as_many_as_asked_for() -> None:
    pictures, _ = collection([(9, 9)] * 4, [0] * 4)
    flat = 0
    for step in range(20):
        plain = make_batches(pictures, patch=5, batch=64)(step).clean
        batch = make_batches(pictures, patch=5, batch=64, flats=0.25)(step)
        mixed = batch.clean
        changed = (plain != mixed).flatten(1).any(1)
        assert torch.equal(batch.labels == -1, changed) and not batch.condition[changed].any()
        flat += int(changed.sum())
        for crop in mixed[changed]:
            assert crop.min() >= 0 and crop.max() <= 1
            inside = ((crop > 0) & (crop < 1)).flatten(1).all(1)
            bend = crop.diff(n=2, dim=1).abs().amax((1, 2)) + crop.diff(n=2, dim=2).abs().amax(
                (1, 2)
            )
            assert (bend[inside] < 1e-5).all()
    assert 0.2 < flat / (20 * 64) < 0.3


def test_noise_levels_are_one_of_each_stratum() -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        u = sample_sigma(16, 0, 1, 1.0, g)
        assert sorted((u * 16).long().tolist()) == list(range(16))
        assert u.tolist() != sorted(u.tolist())


def test_a_linear_schedule_is_constant_and_then_falls_to_nothing() -> None:
    config = parse(
        {"optim": {"steps": 100, "warmup": 10, "schedule": "linear", "decay": 0.25, "lr": 0.5}}
    )
    rates = [loop.learning_rate(step, config) for step in range(101)]
    assert rates[9:76] == [0.5] * 67 and rates[100] == 0
    falls = -np.diff(rates[75:])
    np.testing.assert_allclose(falls, 0.5 / 25)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_shares_of_the_processes_make_up_the_batch(world: int) -> None:
    pictures, _ = collection([(8, 9)] * 10, [0, 1] * 3 + [-1] * 4)
    draw = make_batches(pictures, patch=4, batch=6)
    for step in (0, 5):
        whole = draw(step)
        shares = [draw(step, rank, world) for rank in range(world)]
        assert {len(share.sigma) for share in shares} == {6 // world}
        joined = torch.cat([share.sigma for share in shares])
        place = [joined.tolist().index(v) for v in whole.sigma.tolist()]
        assert sorted(place) == list(range(6))
        for name, value in tensors(whole).items():
            parts = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(parts[place], value), name


@pytest.mark.parametrize(
    "labels,share,count",
    [
        ([0] * 9 + [-1] * 5, 0.5, 5),
        ([0] * 9 + [-1] * 5, 0.25, 2),  # 2.5 rounds to even
        ([0] * 9 + [-1] * 5, 0.0, 0),
        ([0] * 9 + [-1] * 5, 1.0, 10),
        ([0] * 9, 0.5, 10),
        ([-1] * 5, 0.5, 0),
    ],
)
def test_mixing_of_labelled_and_unlabelled(labels: list[int], share: float, count: int) -> None:
    pictures = flat_pictures(labels)
    draw = make_batches(pictures, patch=2, batch=10, labelled_share=share)
    for step in range(5):
        batch = draw(step)
        assert len(batch.labels) == 10
        assert int((batch.labels >= 0).sum()) == count
        assert batch.labels.tolist() == [labels[i] for i in who(batch)]
        assert not batch.condition[batch.labels < 0].any()


def test_noise_of_a_batch() -> None:
    pictures = flat_pictures([0] * 8)
    config = NoiseConfig(low=51, high=102)
    for share in (0.0, 0.3, 1.0):
        draw = Batches(
            pictures, DataConfig(patch=4, batch=200), config, LossConfig(conditional=share), 0
        )
        batches = [draw(t) for t in range(5)]
        sigma = torch.cat([b.sigma for b in batches])
        assert sigma.min() >= 0.2 and sigma.max() <= 0.4 and sigma.std() > 0.04
        noise = torch.cat([b.noise for b in batches])
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        condition = torch.cat([b.condition for b in batches]).float().mean().item()
        assert abs(condition - share) < 0.05
        assert share not in (0.0, 1.0) or condition == share


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_are_told_less_noise_than_there_is(share: float) -> None:
    pictures, data = flat_pictures([0] * 8), DataConfig(patch=4, batch=200)
    plain = NoiseConfig(low=51, high=102)
    batch = Batches(pictures, data, replace(plain, mismatch=share), LossConfig(), 0)(3)
    ratio = batch.told / batch.sigma
    assert ratio.min() >= 0.25 and ratio.max() <= 1
    assert abs((ratio < 1).float().mean() - share) < 0.1
    assert share or torch.equal(batch.told, batch.sigma)
    assert share < 1 or (ratio.min() < 0.3 and abs(ratio.mean() - 0.625) < 0.05)
    same = Batches(pictures, data, plain, LossConfig(), 0)(3)
    assert torch.equal(same.noise, batch.noise) and torch.equal(same.sigma, batch.sigma)


@pytest.mark.parametrize("n,count", [(100, 7), (100, 500), (95, 9), (19, 5), (9, 5), (50, 0)])
def test_holdout_is_disjoint_from_training(n: int, count: int) -> None:
    pictures = flat_pictures([0] * n)
    training, held = split_holdout(pictures, count)
    a, b = (set((p.offsets // 48).tolist()) for p in (training, held))
    assert len(held) == len(b) == min(count, n // 10)
    assert not a & b and a | b == set(range(n))
    if len(b) > 1:  # evenly spaced: the files are sorted by class
        gaps = np.diff(sorted(b))
        assert gaps.max() - gaps.min() <= 1


# -- the loss -----------------------------------------------------------------------------------

TINY = {"arch": "gradresnet", "widths": [4, 8], "blocks": [1, 1], "norm": "pixel", "head": 8}


def tiny_net(classes: int = 2, **changes: Any) -> Any:
    torch.manual_seed(0)
    shape = {k: v for k, v in TINY.items() if k != "arch"} | {"num_classes": classes} | changes
    names = tuple(map(str, range(classes)))
    return build_module(Header("x", "gradresnet", shape, names, (0.0, 0.2), 16))


def test_losses_of_a_batch() -> None:
    """Unlabelled: the unconditional score. Labelled: some given the class; and the class."""
    net = tiny_net()
    clean, noise = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    sigma = torch.tensor([0.1, 0.2, 0.3, 0.0])
    told = torch.tensor([0.1, 0.1, 0.3, 0.0])
    labels, condition = torch.tensor([1, 0, -1, 1]), torch.tensor([True, False, False, True])
    config = LossConfig(score_power=0.5)
    got = loop.losses(net, Batch(clean, noise, sigma, told, labels, condition), config)
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    logits = net(noisy, told)[1]
    for i in range(3):
        w = torch.eye(2)[labels[i]] if condition[i] else None
        d = denoise(net, noisy[i : i + 1], told[i : i + 1], w)
        want = score_matching(d, clean[i : i + 1], sigma[i : i + 1], 0.5)
        torch.testing.assert_close(got[0][i : i + 1], want, rtol=1e-4, atol=1e-5)
        entropy = -logits[i].log_softmax(0)[labels[i]] if labels[i] >= 0 else torch.zeros(())
        torch.testing.assert_close(got[1][i], entropy, rtol=1e-4, atol=1e-5)
    assert got[0].isfinite().all(), "no noise at all must not divide by zero"


def test_learning_rate() -> None:
    config = TrainConfig(optim=OptimConfig(steps=100, lr=0.5, warmup=10))
    rates = [learning_rate(t, config) for t in range(101)]
    assert rates[:10] == pytest.approx([0.05 * k for k in range(1, 11)])
    assert max(rates) == rates[10] == 0.5
    assert all(a > b > 0 or b == pytest.approx(0) for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.25) and rates[100] == pytest.approx(0)
    assert learning_rate(0, TrainConfig(optim=OptimConfig(warmup=0, lr=0.5))) == 0.5


# -- the loop -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two classes of textures, and a flat folder of photographs: crops of skimage.data."""
    root = tmp_path_factory.mktemp("data")
    sources = {"textures/brick": "brick", "textures/grass": "grass", "photos": "coffee"}
    rng = np.random.default_rng(0)
    for folder, name in sources.items():
        pixels = getattr(skimage.data, name)()
        (root / folder).mkdir(parents=True)
        for i in range(20):
            top, left = (int(rng.integers(0, s - 24)) for s in pixels.shape[:2])
            crop = pixels[top : top + 24, left : left + 20]
            PIL.Image.fromarray(crop).save(root / folder / f"{i:02}.png")
    return [root / "textures", root / "photos"]


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


@pytest.fixture(scope="module")
def whole(datasets: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(folder, datasets) == Outcome(folder, 10, True)
    return folder


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


def test_another_seed_is_another_run(whole: Path, datasets: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "run", datasets, sections={"run": {"seed": 1}})
    x, y = state_of(whole), state_of(tmp_path / "run")
    assert not torch.equal(x["model.trunk.stem.weight"], y["model.trunk.stem.weight"])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("arch", ["gradresnet", "unet", "classifier"])
def test_the_first_step_is_one_of_adamw(
    arch: str, channels_last: bool, datasets: list[Path], tmp_path: Path
) -> None:
    """Against plain AdamW: the fused kernel is easily fed gradients in another memory order."""
    sections = {
        "model": {"arch": arch},
        "optim": {"steps": 1, "warmup": 0, "lr": 0.1},
        "run": {"channels_last": channels_last},
    }
    config = tiny_config(**sections)
    run(tmp_path / "run", datasets, sections=sections)
    pictures, _ = load_datasets(datasets, config.data, CPU)
    header = load_model(tmp_path / "run" / "last" / MODEL)[1]
    torch.manual_seed(config.run.seed)
    net = build_module(header)
    batch = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)(0)
    matching, entropy = loop.losses(net, batch, config.loss)
    (matching + config.loss.classes * entropy).mean().backward()
    norms = [p for p in net.parameters() if p.ndim == 1]
    weights = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": weights}, {"params": norms, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, 0.1, config.optim.betas, weight_decay=0.01, fused=False).step()
    got = state_of(tmp_path / "run")
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            clear = parameter.grad.abs() > 1e-6  # Adam's first step is the sign of the gradient
            off = (got[f"model.{name}"] - parameter.detach()).abs()
            assert clear.any() and off[clear].max() < 1e-4, name


def test_the_first_step_of_muon(datasets: list[Path], tmp_path: Path) -> None:
    """Convolutions move by an almost orthogonal matrix of AdamW's size; all else as with AdamW."""
    sections = {"optim": {"steps": 1, "warmup": 0, "lr": 0.1, "weight_decay": 0.0}}
    run(tmp_path / "adamw", datasets, sections=sections)
    sections["optim"]["kind"] = "muon"
    run(tmp_path / "muon", datasets, sections=sections)
    header = load_model(tmp_path / "muon" / "last" / MODEL)[1]
    torch.manual_seed(tiny_config().run.seed)
    before = dict(build_module(header).named_parameters())
    adamw, muon = state_of(tmp_path / "adamw"), state_of(tmp_path / "muon")
    for name, start in before.items():
        if start.ndim != 4:
            assert torch.equal(muon[f"model.{name}"], adamw[f"model.{name}"]), name
            continue
        step = (start.detach() - muon[f"model.{name}"]).flatten(1)
        size = 0.1 * 0.2 * max(step.shape) ** 0.5
        values = torch.linalg.svdvals(step) / size
        # The iteration brings singular values near 1 but for the smallest, which stay below.
        assert 0.5 < values.max() < 1.35 and values.mean() > 0.3, name


def test_muon_goes_on_where_it_stopped(datasets: list[Path], tmp_path: Path) -> None:
    sections = {"optim": {"kind": "muon"}}
    run(tmp_path / "whole", datasets, sections=sections)
    stops = iter([False, False, False, True])
    run(tmp_path / "parts", datasets, sections=sections, should_stop=lambda: next(stops))
    train(tmp_path / "parts", device=CPU)
    same_to_the_bit(tmp_path / "whole", tmp_path / "parts")


def broken_losses(at: set[int], factor: float) -> Callable[..., tuple[Tensor, Tensor]]:
    """The losses, times a factor at some calls (counted from 1, validation included)."""
    calls = iter(range(1, 10**9))
    original = loop.losses

    def losses(*args: Any) -> tuple[Tensor, Tensor]:
        matching, entropy = original(*args)
        return (matching * factor if next(calls) in at else matching), entropy

    return losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number(
    value: float, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = {"run": {"validate_every": 100, "log_every": 1}}
    run(tmp_path / "whole", datasets, sections=quiet)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "losses", broken_losses({8}, value))
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
    monkeypatch.setattr(loop, "losses", broken_losses({8}, math.nan))
    with pytest.raises(TrainingError, match="step 7"):
        run(folder, datasets, sections=quiet, should_stop=after(steps))
    assert read_run(folder / STATE)["state"]["step"] == 6
    assert all(v.isfinite().all() for v in state_of(folder).values())


@pytest.mark.parametrize("guard", [10.0, 1e9])
def test_one_bad_step_does_no_harm(
    guard: float, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is undone by the guard or, below that, clipped."""
    quiet = {"run": {"validate_every": 100}, "optim": {"steps": 12, "guard": guard}}
    monkeypatch.setattr(loop, "losses", broken_losses({9}, 1e6))
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
    monkeypatch.setattr(loop, "losses", broken_losses(set(range(9, 10**4)), 1e6))
    quiet = {"run": {"validate_every": 10**4}, "optim": {"steps": 5000}}
    with pytest.raises(TrainingError, match="gradient"):
        run(tmp_path / "run", datasets, sections=quiet)
    saved = state_of(tmp_path / "run")  # what is kept is the averaged weights
    for key in (k for k in saved if k.startswith("model.")):
        assert torch.equal(saved[key], saved[key.replace("model.", "ema.", 1)]), key


# -- nothing waits for the device ------------------------------------------------------------------

LOOKS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at numbers costs, as on a GPU."""
    monkeypatch.setattr(states, "_looks_are_free", lambda device: False)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_looks_at_no_number(
    kind: str, datasets: list[Path], tmp_path: Path, strict: None
) -> None:
    """Between reports. What torch's own code looks at is seen by the test below, on a GPU."""
    seen: list[str] = []
    patch = pytest.MonkeyPatch()

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)
        return lambda self, *args: (seen.append(name), original(self, *args))[1]

    calls = iter(range(1, 10**9))

    def should_stop() -> bool:
        step = next(calls)
        if step == 2:
            for name in LOOKS:
                patch.setattr(Tensor, name, watched(name))
            assert torch.ones(()).item() and torch.ones(()) and seen == ["item", "__bool__"]
            seen.clear()
        if step == 12:
            patch.undo()
        return step == 13

    sections = {
        "run": {"log_every": 100, "validate_every": 100, "checkpoint_every": 100},
        "optim": {"kind": kind, "steps": 50},
    }
    try:
        assert (
            run(tmp_path / "run", datasets, sections=sections, should_stop=should_stop).step == 13
        )
    finally:
        patch.undo()
    assert not seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_step_never_waits_for_the_gpu(
    precision: str, datasets: list[Path], tmp_path: Path
) -> None:
    calls = iter(range(1, 10**9))

    def should_stop() -> bool:
        step = next(calls)
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 12 else "default")
        return step == 13

    sections = {
        "run": {"log_every": 100, "validate_every": 100, "precision": precision},
        "optim": {"steps": 50},
        "data": {"batch": 8},
    }
    config = tiny_config(**sections)
    config = replace(config, run=replace(config.run, checkpoint_every=100, channels_last=True))
    device = torch.device("cuda")
    folder = tmp_path / "run"
    try:
        train(folder, config=config, datasets=datasets, device=device, should_stop=should_stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # It goes on from here on the CPU, and from there on the GPU again.
    assert train(folder, device=CPU, should_stop=after(2)).step == 15
    assert train(folder, device=device).finished


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [(), (6,), (6, 7, 8)])
def test_looking_or_not_makes_no_difference(
    kind: str,
    bad: tuple[int, ...],
    datasets: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections = {"run": {"validate_every": 100}, "optim": {"kind": kind, "steps": 9}}
    for name in ("free", "strict"):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "losses", broken_losses(set(bad), 1e6))
            patch.setattr(states, "_looks_are_free", lambda device, name=name: name == "free")
            run(tmp_path / name, datasets, sections=sections)
    same_to_the_bit(tmp_path / "free", tmp_path / "strict")


def test_an_undone_step_ends_at_the_average_without_momentum(
    datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: None
) -> None:
    for name, bad, steps in (("run", {6}, 6), ("calm", set(), 6), ("before", set(), 5)):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "losses", broken_losses(bad, 1e6))
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


@pytest.mark.parametrize("ampere", [True, False])
def test_numerics_are_put_back(ampere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere)

    def flags() -> tuple[bool, bool, str]:
        return cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = flags()
    wanted = {
        "float32": (None, (True, False, "highest")),
        "tf32": (None, (True, True, "high")),
        "bfloat16": (torch.bfloat16, (True, False, "highest")),
        "auto": (torch.bfloat16 if ampere else None, (True, False, "highest")),
    }
    for precision, (dtype, inside) in wanted.items():
        with numerics(precision, torch.device("cuda")) as got:
            assert got is dtype and flags() == inside
        assert flags() == before
        with numerics(precision, CPU) as got:
            assert got is (None if precision == "auto" else dtype) and flags() == before


# -- saved in pieces, resumed anywhere -------------------------------------------------------------


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
    assert two.step == 7 and compiled == [loop.losses]
    settings = ["run.channels_last=true", "run.compile=false", "run.precision=tf32"]
    assert train(folder, settings=settings, device=CPU).finished
    assert parse(read_run(folder / STATE)["config"]).run.precision == "tf32"
    x, y = state_of(folder), state_of(whole)
    for key, value in y.items():
        torch.testing.assert_close(x[key], value, rtol=1e-3, atol=1e-4)
    for setting in ("optim.steps=20", "run.seed=3", "data.batch=8"):
        with pytest.raises(UsageError, match=setting):
            train(folder, settings=[setting], device=CPU)


def test_a_channel_of_ones_grows_onto_trained_weights(datasets: list[Path], tmp_path: Path) -> None:
    """The network with the new channel begins as the same function."""
    run(tmp_path / "old", datasets)
    source = tmp_path / "old" / "last" / loop.MODEL
    old, header = load_model(source)
    grown = build_module(replace(header, model=dict(header.model) | {"constant": True}))
    loop._start_from(source, grown)
    y = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for a, b in zip(grown(y, 0.1), old(y, 0.1), strict=True):
        torch.testing.assert_close(a, b)


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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_channels_last_to_the_bit(kind: str, datasets: list[Path], tmp_path: Path) -> None:
    sections = {"run": {"channels_last": True}, "optim": {"kind": kind}}
    run(tmp_path / "whole", datasets, sections=sections)
    run(tmp_path / "parts", datasets, sections=sections, should_stop=after(4))
    train(tmp_path / "parts", device=CPU)
    same_to_the_bit(tmp_path / "parts", tmp_path / "whole")


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


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_memory_order_is_a_matter_of_rounding(
    kind: str, datasets: list[Path], tmp_path: Path
) -> None:
    quiet = {"optim": {"kind": kind, "steps": 4, "warmup": 0, "lr": 1e-3}}
    for name in ("plain", "turned"):
        sections = quiet | {"run": {"channels_last": name == "turned", "validate_every": 100}}
        run(tmp_path / name, datasets, sections=sections)
    plain, turned = state_of(tmp_path / "plain"), state_of(tmp_path / "turned")
    for key, value in plain.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(turned[key], value, rtol=0.02, atol=0.02 * scale + 1e-6)


# -- the probe ------------------------------------------------------------------------------------


def probed(datasets: list[Path], **options: Any) -> dict[tuple[str, bool, bool], Trial]:
    config = tiny_config(**options.pop("sections", {}))
    trials = probe(config, datasets, device=CPU, each=0.0, **options)
    return {(t.precision, t.channels_last, t.compile): t for t in trials}


def test_probe(datasets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shown: list[Trial] = []
    trials = probed(datasets, watch=shown.append)
    ways = {(p, c, j) for p in ("float32", "bfloat16") for c in (0, 1) for j in (0, 1)}
    assert set(trials) == ways and shown == list(trials.values())
    assert [t.compile for t in shown] == [False] * 4 + [True] * 4, "the slow ones last"
    reference = trials["float32", False, False]
    assert reference.loss_error == reference.gradient_error == 0
    for (precision, _, _), trial in trials.items():
        assert trial.sound and trial.rate > 0 and trial.error is None
        assert trial.first >= 0 and math.isnan(trial.memory)
        assert (trial.gradient_error > 1e-4) is (precision == "bfloat16")
    assert best_trial(shown).rate == max(t.rate for t in shown)
    assert len(probed(datasets, max_seconds=0.0)) == 4, "no time to compile"
    muon = probed(datasets, sections={"optim": {"kind": "muon"}}, max_seconds=0.0)
    assert len(muon) == 4 and all(t.sound for t in muon.values())


def test_probe_trusts_no_way_that_computes_something_else(
    datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, like = loop.losses, loop._like

    def off(model: Any, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
        matching, entropy = original(model, batch, config)
        return (matching * 1.02 if model.compute_dtype else matching), entropy

    monkeypatch.setattr(loop, "losses", off)
    trials = probed(datasets, max_seconds=0.0)
    assert {k[0] for k, t in trials.items() if t.sound} == {"float32"}
    fastest = replace(trials["bfloat16", False, False], rate=1e9)
    assert best_trial([*trials.values(), fastest]).precision == "float32"
    monkeypatch.undo()

    def scrambled(parameter: Tensor, gradient: Tensor | None) -> Tensor:
        good = like(parameter, gradient)
        return good if parameter.is_contiguous() else good.flatten().roll(1).view(good.shape)

    monkeypatch.setattr(loop, "_like", scrambled)
    trials = probed(datasets, max_seconds=0.0)
    assert {k[1] for k, t in trials.items() if t.sound} == {False}


def test_probe_goes_on_where_a_way_does_not_work(
    datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise BackendCompilerFailed(fail, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    trials = probed(datasets)
    assert len(trials) == 8
    for (_, _, compiled), trial in trials.items():
        assert trial.sound is not compiled and bool(trial.error) is compiled
        assert not compiled or "no C++ compiler" in str(trial.error)
    assert not best_trial(list(trials.values())).compile
    with pytest.raises(SetupError, match="no C"):
        best_trial([t for t in trials.values() if t.compile])


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
    progress: list[loop.Progress] = []
    run(tmp_path / "run", datasets, sections={"run": {"log_every": 1}}, watch=progress.append)
    assert [p.step for p in progress] == list(range(1, 11))
    for k, row in enumerate(rows):
        pair = progress[2 * k : 2 * k + 2]
        assert float(row["loss"]) == pytest.approx(sum(p.loss for p in pair) / 2, rel=1e-5)
        assert float(row["grad_norm"]) == pytest.approx(pair[1].grad_norm)


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


@pytest.mark.parametrize("arch,psnr,accuracy", [("unet", True, False), ("classifier", False, True)])
def test_baselines_train_too(
    arch: str, psnr: bool, accuracy: bool, datasets: list[Path], tmp_path: Path
) -> None:
    sections = {"model": {"arch": arch}, "optim": {"steps": 4}}
    assert run(tmp_path / "run", datasets, sections=sections).finished
    row = rows_of(tmp_path / "run")[-1]
    assert bool(row["val_psnr_25"]) is psnr and bool(row["val_accuracy_25"]) is accuracy
    assert load_model(tmp_path / "run" / "last" / MODEL)[1].arch == arch


def test_validation_is_of_the_average_and_leaves_no_trace(datasets: list[Path]) -> None:
    net = tiny_net()
    config = tiny_config()
    held = load_datasets(datasets, config.data, CPU)[0]
    state = TrainState(net, config)
    first = validate(state, held, config)
    assert first == validate(state, held, config), "the same noise each time"
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    assert validate(state, held, config) == first
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    for value in state.ema.values():
        value.mul_(1.5)
    assert validate(state, held, config) != first


# -- what a run shows -----------------------------------------------------------------------------


def test_samples_are_of_the_average_and_leave_no_trace(datasets: list[Path]) -> None:
    net, config = tiny_net(), tiny_config(run={"validate_sigmas": [0, 25, 50]})
    held = load_datasets(datasets, config.data, CPU)[0]
    state = TrainState(net, config)
    average = build_module(Header("x", "gradresnet", vars(net.config), ("a", "b"), (0, 1), 16))
    average.load_state_dict(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    before = torch.get_rng_state()
    samples = take_samples(state, held, config)
    assert samples is not None and samples.sigmas == (0, 25, 50)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert samples.clean.shape == (4, 3, 16, 16)
    assert samples.noisy.shape == samples.denoised.shape == (3, 4, 3, 16, 16)
    for sigma, noisy, denoised in zip((0, 25, 50), samples.noisy, samples.denoised, strict=True):
        assert (noisy - samples.clean).std() == pytest.approx(sigma / 255, rel=0.1)
        with torch.no_grad():
            torch.testing.assert_close(denoised, average(noisy, sigma / 255)[0])
    again = take_samples(state, held, config)
    assert again is not None and torch.equal(again.noisy, samples.noisy), "the same each time"
    for one in (held.subset(torch.arange(0)), held.subset(torch.tensor([3]))):
        few = take_samples(state, one, config)
        assert (few is None) if not len(one) else (few is not None and len(few.clean) == 1)
    assert take_samples(state, held, tiny_config(run={"validate_sigmas": []})) is None


def test_samples_are_of_pictures_that_are_no_thumbnails(tmp_path: Path) -> None:
    """Evenly spaced, at the side of the crops that validation denoises."""
    for i, side in enumerate((8, 40, 8, 40, 8)):
        picture(tmp_path / f"{i}.png", (side, side), level=10 * i)
    data = {"thumbnail": 20, "class_batch": 2, "class_patch": 8, "patch": 16}
    config = tiny_config(data=data, run={"validate_sigmas": [25]})
    held = load_datasets([tmp_path], DataConfig(holdout=0), CPU)[0]
    samples = take_samples(TrainState(tiny_net(), config), held, config)
    assert samples is not None
    assert samples.clean.shape == (2, 3, loop.VALIDATION_PATCH, loop.VALIDATION_PATCH)
    for clean, level in zip(samples.clean, (10, 30), strict=True):
        assert torch.equal(clean, torch.full_like(clean, level).div(255))
    small = held.subset(torch.tensor([0, 2]))
    assert take_samples(TrainState(tiny_net(), config), small, config) is None


@pytest.mark.parametrize("side,factor", [(16, 6), (96, 1), (100, 1)])
def test_a_sheet_of_samples(side: int, factor: int, tmp_path: Path) -> None:
    """Every picture has its place on it, clipped, and larger by a whole factor."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, side, side, generator=generator)
    many = torch.randn(2, 3, 2, 3, side, side, generator=generator)  # far beyond [0, 1]
    (tmp_path / "sheet.png").write_bytes(sheet(Samples(clean, *many, (15.0, 25.0, 50.0))))
    pixels = np.array(PIL.Image.open(tmp_path / "sheet.png"))
    step, noisy, denoised = side * factor + GAP, *many
    assert side * factor >= CELL and pixels.shape[1] == 7 * step - GAP
    order = [clean, noisy[0], denoised[0], noisy[1], denoised[1], noisy[2], denoised[2]]
    top = pixels.shape[0] - 2 * step + GAP
    for x, column in enumerate(order):
        for y, wanted in enumerate(column):
            at = pixels[top + y * step :, x * step :][: side * factor, : side * factor]
            small = at[::factor, ::factor]
            assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), at)
            levels = wanted.clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
            assert np.array_equal(small, levels)


def test_samples_come_with_a_validation(datasets: list[Path], tmp_path: Path) -> None:
    for arch in ("gradresnet", "classifier"):
        progress: list[loop.Progress] = []
        run(tmp_path / arch, datasets, sections={"model": {"arch": arch}}, watch=progress.append)
        shown = [p.step for p in progress if p.samples is not None]
        assert shown == ([4, 8, 10] if arch == "gradresnet" else [])


def test_an_account_of_a_run(whole: Path, tmp_path: Path) -> None:
    rows = rows_of(whole)
    results = read_results(whole)
    for name in rows[0]:
        want = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        assert list(zip(*results[name], strict=True)) == want
    about = dict(describe(whole))
    best = min((r for r in rows if r["val_loss"]), key=lambda r: float(r["val_loss"]))
    assert f"step {best['step']}" in about["best"]
    assert f"{float(best['val_psnr_25']):.2f} dB" in about["best"]
    assert f"{float(best['val_accuracy_25']):.1%}" in about["best"]
    assert "10 of 10" in about["step"] and "finished" in about["step"]
    assert f"{float(rows[-1]['loss']):.5f}" in about["loss"]
    assert "60 pictures" in about["data"] and "brick, grass" in about["data"]
    assert "steps = 10" in about["config"] and "lr =" not in about["config"]
    steps = [read_header(whole / n / MODEL).training["steps"] for n in ("best", "last")]
    for step, line in zip(steps, about["weights"].splitlines(), strict=True):
        assert line.endswith(f"step {step}")
    assert {line.partition(":")[0] for line in about["files"].splitlines()} == {
        p.name for p in whole.iterdir()
    }
    # Of one that has only begun; and half a row is none.
    (tmp_path / CONFIG).write_bytes((whole / CONFIG).read_bytes())
    early = dict(describe(tmp_path))
    assert early["step"].startswith("0 of 10") and early["weights"] == "none yet"
    text = (whole / RESULTS).read_text()
    (tmp_path / RESULTS).write_text(text[: text.index("\n") + 3])
    assert "0 of 10" in dict(describe(tmp_path))["step"]
    for text in ("", "{", "[]", "{}", '{"config": {"data": {"patsh": 1}}}'):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(UsageError, match=str(tmp_path)):
            describe(tmp_path)


@pytest.mark.parametrize("arch", ["gradresnet", "unet"])
def test_the_loss_goes_down(arch: str, datasets: list[Path], tmp_path: Path) -> None:
    progress: list[loop.Progress] = []
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


def test_one_flat_folder_is_one_class(datasets: list[Path], tmp_path: Path) -> None:
    run(tmp_path / "run", datasets[1:], sections={"optim": {"steps": 2}})
    module, header = load_model(tmp_path / "run" / "last" / MODEL)
    assert module.num_classes == len(header.classes) == 1
    assert rows_of(tmp_path / "run")[-1]["val_accuracy_25"] == ""


def test_resuming_what_is_no_run(tmp_path: Path, whole: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        train(tmp_path / "absent", device=CPU)
    shutil.copytree(whole, tmp_path / "bad")
    (file,) = (tmp_path / "bad" / STATE).glob("state-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="bad"):
        train(tmp_path / "bad", device=CPU)


def test_resuming_with_other_classes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "data" / name / "1.png", (16, 16))
    folder = tmp_path / "run"
    run(folder, [tmp_path / "data"], should_stop=after(1))
    picture(tmp_path / "data" / "c" / "1.png", (16, 16))
    with pytest.raises(UsageError, match="'c'"):
        train(folder, device=CPU)


def test_run_folders_never_collide(tmp_path: Path) -> None:
    parent = tmp_path / "runs"
    assert new_run_folder(parent).name == "1"
    (parent / "3").write_text("a file")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_run_folder(parent), range(40)))
    assert sorted(int(p.name) for p in made) == [2, *range(4, 43)]
    assert all(p.is_dir() for p in made)


# -- two processes --------------------------------------------------------------------------------


def worker(rank: int, folder: Path, datasets: list[Path]) -> None:
    """One of two processes on the CPU; spawned below."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    shared = shared_path(lambda: new_run_folder(folder / "runs"))
    assert shared == folder / "runs" / "1"
    assert run(shared, datasets).finished
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


def test_pictures_beside_class_folders_are_a_question_not_a_guess(tmp_path):
    for name in ("cover.png", "cat/1.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(path)
    with pytest.raises(UsageError, match="both pictures"):
        find_pictures(tmp_path)


@pytest.mark.parametrize(
    "error",
    [BackendCompilerFailed(print, RuntimeError("no C++ compiler"), None), TritonMissing(None)],
    ids=["C++", "triton"],
)
def test_without_a_compiler_the_error_says_what_to_do(
    error: Exception, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    with pytest.raises(SetupError, match="compile = false"):
        run(tmp_path / "run", datasets, sections={"run": {"compile": True}})
