"""Files of field models: what is written comes back, and nothing damaged is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cdnctl.errors import UsageError, WeightsError
from cdnctl.fields.model import Effort, FieldModel, fit, sample
from cdnctl.fields.simulate import phi4
from cdnctl.fields.store import KEY, load, save


@pytest.fixture(scope="module")
def model() -> FieldModel:
    return fit(phi4(256, 8, 0.6, seed=1, burn=20), 1, "db2", halves=True, sigmoids=6)


@pytest.fixture
def path(model: FieldModel, tmp_path: Path) -> Path:
    save(tmp_path / "phi.safetensors", model)
    return tmp_path / "phi.safetensors"


def test_a_loaded_model_is_the_saved_one(model: FieldModel, path: Path) -> None:
    again = load(path)
    assert again.wavelet == model.wavelet and again.side == model.side == 8
    for a, b in zip(again.stages, model.stages, strict=True):
        assert (a.side, a.bands, a.low, a.high, a.condition) == (
            (b.side, b.bands, b.low, b.high, b.condition)
        )
        assert a.energy.features == b.energy.features
        assert torch.equal(a.energy.theta, b.energy.theta) and torch.equal(a.errors, b.errors)
    draws = [
        sample(m, 3, torch.Generator().manual_seed(2), Effort(5, 5))[0] for m in (model, again)
    ]
    assert torch.equal(*draws)


def test_a_file_is_kept_unless_it_may_be_replaced(model: FieldModel, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(UsageError, match="exists"):
        save(path, model, overwrite=False)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(UsageError, match="must end in"):
        save(path.with_suffix(".npy"), model)


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[KEY])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(header, tensors)
    save_file(tensors, path, metadata={KEY: json.dumps(header)})


def stage(number: int, **values: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda header, tensors: header["stages"][number].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, t: h.update(format_version=9), "format 9"),
        (lambda h, t: h.update(wavelet="bior2.2"), "bior2.2"),
        (lambda h, t: h.update(stages=[]), "tensors"),
        (lambda h, t: h.pop("stages"), "stages"),
        (lambda h, t: h["stages"].pop(), "tensors"),
        (lambda h, t: t.pop("1.theta"), "tensors"),
        (lambda h, t: t.update({"1.theta": t["1.theta"][1:].clone()}), "shape"),
        (lambda h, t: t.update({"1.theta": t["1.theta"].float()}), "float32"),
        (lambda h, t: t["1.theta"].fill_(torch.nan), "not finite"),
        (stage(0, depth=1), "whole picture"),
        (stage(1, side=16), "side 16 do not complete those of 4"),
        (stage(1, cells=[[3, 3]]), "side 8 do not complete"),
        (stage(1, cells=[[4, 0]]), "'4' is not a whole number"),
        (stage(1, side=2**40), "not a whole number"),
        (stage(1, width=0), "width is 0"),
        (stage(1, width="wide"), "'wide' is not a finite number"),
        (stage(1, window=[2, 1]), "window is 2.0 to 1.0"),
        (stage(1, shifts=[[[0, 0.5]]]), "'0.5' is not a whole number"),
        (stage(1, powers=[True]), "'True' is not a whole number"),
    ],
)
def test_damaged_headers_are_refused(path: Path, change: Any, words: str) -> None:
    edit(path, change)
    with pytest.raises(WeightsError, match="damaged header") as error:
        load(path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_foreign_files_are_refused(path: Path, weights: Path) -> None:
    with pytest.raises(WeightsError, match="no field model"):
        load(path.with_name("other.safetensors"))
    with pytest.raises(WeightsError, match="lacks the key"):
        load(weights)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        load(path)
