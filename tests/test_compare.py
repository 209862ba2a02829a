"""The command compare: what it says of two models, and when it says nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from processes import Run
from tiny import picture, save_tiny, write

from cdnctl.analysis.agreement import accord, pairs
from cdnctl.api import load
from cdnctl.checkpoints import read_weights, save_model
from cdnctl.images import read
from cdnctl.training.config import TrainConfig, override

HIGH = 6.0
SIDE = 16


def told(path: Path, *settings: str, data: str = "set") -> Path:
    """Weights whose file says how they were trained."""
    header, state = read_weights(path)
    config = override(TrainConfig(), settings).to_dict()
    save_model(path, state, replace(header, training={"config": config}, data=data))
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two denoisers, which differ a little, and three pictures."""
    for i, name in enumerate("ab"):
        save_tiny(tmp_path / f"{name}.safetensors", seed=i, patch=SIDE, high=HIGH)
    for i in range(3):
        write(tmp_path / f"set/{i}.png", picture(20, 24 - i, top=40 + 20 * i))
    return tmp_path


def halves(place: Path, *more: str) -> None:
    for name, half in (("a", "first"), ("b", "second")):
        told(place / f"{name}.safetensors", f"data.half={half}", *more)


def models(place: Path) -> tuple[Any, Any]:
    return load(place / "a.safetensors"), load(place / "b.safetensors")


PAIR = ("compare", "a.safetensors", "b.safetensors", "--on", "set")


def test_it_measures_what_the_functions_do(cdnctl: Run, place: Path) -> None:
    halves(place)
    done = cdnctl(*PAIR, "--sigma", "25.5,51", "--seed", 3, "--json")
    assert done.code == 0, done.err
    (record,) = done.records
    assert record["doubt"] is None and record["protocol"]["pictures"] == 3
    a, b = models(place)
    named = []
    for i in range(3):
        pixels = read(place / f"set/{i}.png").pixels
        top, left = 2, (24 - i - SIDE) // 2
        named.append((f"/{i}.png", pixels[top : top + SIDE, left : left + SIDE]))
    for row, sigma in zip(record["agreement"], (0.1, 0.2), strict=True):
        want = accord(a, b, pairs(named, sigma, 3, torch.device("cpu")), sigma)
        assert row["sigma"] == pytest.approx(sigma * 255)
        assert row["share"] == pytest.approx(want.share, rel=1e-4)
        assert row["cosine"] == pytest.approx(want.cosine, rel=1e-4)
        assert (row["psnr_a"], row["psnr_b"]) == pytest.approx(want.psnrs, rel=1e-4)
    assert cdnctl(*PAIR, "--sigma", "25.5,51", "--seed", 3, "--json").records == [record]


def test_a_verdict_in_words_needs_disjoint_halves(cdnctl: Run, place: Path) -> None:
    for name in "ab":
        told(place / f"{name}.safetensors")
    done = cdnctl(*PAIR, "--sigma", "25")
    assert done.code == 0 and "do not say that they were trained on disjoint halves" in done.text
    assert "Verdict:" not in done.text
    halves(place)
    assert "Verdict: " in cdnctl(*PAIR, "--sigma", "25").text
    told(place / "a.safetensors", "data.half=first", "data.limit=7")
    assert "different numbers of pictures" in cdnctl(*PAIR, "--sigma", "25").text
    told(place / "a.safetensors", "data.half=first", data="other")
    assert "not of one dataset" in cdnctl(*PAIR, "--sigma", "25").text


def test_networks_that_do_the_same_have_seen_enough(cdnctl: Run, place: Path) -> None:
    """Weights of which one tensor is moved by next to nothing."""
    header, state = read_weights(place / "a.safetensors")
    moved = {k: v * (1 + 1e-4 * (v.ndim > 1)) for k, v in state.items()}
    save_model(place / "b.safetensors", moved, header)
    halves(place)
    done = cdnctl(*PAIR, "--sigma", "25", "--json")
    assert (
        done.records[0]["verdict"] == "enough" and done.records[0]["agreement"][0]["share"] < 0.01
    )
    assert "seen enough pictures" in cdnctl(*PAIR, "--sigma", "25").text


def test_a_broken_file_is_passed_over_and_said(cdnctl: Run, place: Path) -> None:
    (place / "set/9.png").write_bytes(b"no picture")
    done = cdnctl(*PAIR, "--sigma", "25", "--json")
    assert done.code == 1 and "9.png" in done.err
    assert done.records[0]["protocol"]["pictures"] == 3 and done.records[0]["verdict"] is None


def test_samples_beside_what_they_were_made_of(cdnctl: Run, place: Path) -> None:
    halves(place, "data.holdout=0")
    for i in range(12):
        pixels = np.random.default_rng(i).random((SIDE, SIDE, 3), np.float32)
        write(place / f"own/{i:02}.png", pixels)
    common = (*PAIR, "--sigma", "25", "--samples", 3, "--steps", 4, "--trained-on", "own")
    done = cdnctl(*common, "-o", "sheet.png", "--json")
    assert done.code == 0, done.err
    (record,) = done.records
    assert len(record["samples"]) == 3
    for row in record["samples"]:
        assert all(-1 <= row[key] <= 1 for key in ("likeness", "nearest_a", "nearest_b"))
    assert {"own_a", "own_b"} <= record["agreement"][0].keys()
    height, width = iio.imread(place / "sheet.png").shape[:2]
    assert height > width, "four rows of three"
    assert cdnctl(*common, "-o", "sheet.png").code == 2, "it is there"


@pytest.mark.parametrize(
    "command,fault",
    [
        (("compare", "a.safetensors", "a.safetensors", "--on", "set"), "are the same weights"),
        ((*PAIR, "--sigma", "0"), "sigma 0 cannot be compared"),
        ((*PAIR, "-o", "x.png"), "say how many"),
        ((*PAIR, "--samples", "2", "-o", "x.txt"), "'x.txt' must be a picture file"),
        ((*PAIR, "--weights", "--samples", "2"), "leave out --samples"),
        ((*PAIR, "--weights"), "do not say how they were trained"),
        ((*PAIR, "--trained-on", "set"), "do not say how they were trained"),
        (("compare", "a.safetensors", "photo", "--on", "set"), "crops of side 16"),
        (("compare", "a.safetensors", "b.safetensors", "--on", "none"), "'none' is not a folder"),
    ],
)
def test_refusals(cdnctl: Run, place: Path, command: tuple[str, ...], fault: str) -> None:
    before = {p.name for p in place.iterdir()}
    done = cdnctl(*command)
    assert done.code == 2 and fault in done.err and done.err.count("\n") == 1
    assert {p.name for p in place.iterdir()} == before


def test_levels_beyond_what_was_learnt(cdnctl: Run, place: Path) -> None:
    save_tiny(place / "b.safetensors", seed=1, patch=SIDE, high=0.1)
    done = cdnctl(*PAIR, "--sigma", "50")
    assert done.code == 2 and "model 'b' has learnt noise from 0 to 25.5" in done.err


# -- weights --------------------------------------------------------------------------------


def chain(path: Path, spike: float, seed: int, *settings: str) -> Path:
    """A scattering network whose maps have learnt four common directions, by so much."""
    shape: dict[str, Any] = {
        "widths": [24, 24], "angles": 4, "bank": "spatial", "rho": "phases", "maps": "real",
        "after": "relu",
    }  # fmt: skip
    for name in ("blocks", "unshuffle", "norm", "head"):
        shape[name] = None
    from cdnctl.checkpoints import Header, build_module

    model = {k: v for k, v in shape.items() if v is not None} | {"num_classes": 3}
    header = Header(path.stem, "scattering", model, ("a", "b", "c"), (0.0, 0.0), SIDE)
    torch.manual_seed(seed)
    net = build_module(header)
    for layer in net.trunk.stack():
        weight = layer.map.weight
        n, d = weight.shape[0], weight[0].numel()
        generator = torch.Generator().manual_seed(5)
        common = torch.linalg.qr(torch.randn(d, 4, generator=generator))[0]
        own = torch.randn(n, 4) * layer.map.initial_variance**0.5
        weight.data += spike * (own @ common.T).view_as(weight)
    save_model(path, net.state_dict(), header)
    return told(path, *settings)


SGD = ("optim.kind=sgd", "optim.weight_decay=0")


@pytest.mark.parametrize(
    "settings,spike,fault",
    [
        (("optim.kind=muon", "optim.weight_decay=0"), 6.0, "Muon makes all directions"),
        (("optim.kind=sgd", "optim.weight_decay=0.1"), 6.0, "weight decay (0.1)"),
        (SGD, 0.0, "is above their noise"),
    ],
)
def test_weights_that_say_nothing(
    cdnctl: Run, place: Path, settings: tuple[str, ...], spike: float, fault: str
) -> None:
    for i, name in enumerate("ab"):
        chain(place / f"{name}.safetensors", spike, i, *settings)
    done = cdnctl(*PAIR, "--weights")
    assert done.code == 2 and fault in done.err and done.err.count("\n") == 1


def test_denoisers_are_no_chain_of_maps(cdnctl: Run, place: Path) -> None:
    halves(place, *SGD)
    done = cdnctl(*PAIR, "--weights")
    assert done.code == 2 and "no chain of linear maps" in done.err


def test_directions_that_two_have_in_common(cdnctl: Run, place: Path) -> None:
    for i, name in enumerate("ab"):
        chain(place / f"{name}.safetensors", 6.0, i, *SGD)
    done = cdnctl(*PAIR, "--weights", "--json")
    assert done.code == 0, done.err
    first = done.records[0]["layers"][0]
    # The inputs of the first map are the same coefficients: its frame is known.
    assert first["reason"] is None and first["similarity"] > 0.8
    assert first["explained"] == pytest.approx(1)
    shown = cdnctl(*PAIR, "--weights")
    assert shown.code == 0 and "layers of which something can be said" in shown.text
    assert json.loads(done.text) == done.records[0]
