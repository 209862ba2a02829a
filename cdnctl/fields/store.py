"""Files of fitted field models: safetensors with one JSON header, as weights of networks are.

Nothing in a file is executed or unpickled, and it is checked whole before it is used.
"""

from __future__ import annotations

import json
import math
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from cdnctl.errors import UsageError, WeightsError
from cdnctl.fields.bands import Bands
from cdnctl.fields.energy import Energy, Features
from cdnctl.fields.model import FieldModel, Stage
from cdnctl.files import write_atomically
from cdnctl.headers import SUFFIX
from cdnctl.transforms.wavelet import quarters
from cdnctl.version import VERSION

FORMAT_VERSION = 1
KEY = "cdnctl_field"  # of the header in the metadata: other than that of networks
LARGEST = 2**14  # side that a file may claim


def check_suffix(path: Path) -> None:
    """UsageError unless it is the name of a file of a model."""
    if path.suffix != SUFFIX:
        raise UsageError(f"{str(path)!r} must end in {SUFFIX}")


def save(path: Path, model: FieldModel, overwrite: bool = True) -> None:
    """Write a model; UsageError if the name has another suffix or the place does not take it."""
    check_suffix(path)
    tensors: dict[str, Tensor] = {}
    stages = []
    for number, stage in enumerate(model.stages):
        features = stage.energy.features
        tensors[f"{number}.theta"] = stage.energy.theta.double().contiguous()
        tensors[f"{number}.errors"] = stage.errors.double().contiguous()
        stages.append(
            {
                "side": stage.side,
                "depth": stage.bands.depth,
                "cells": stage.bands.cells,
                "powers": features.powers,
                "centres": features.centres,
                "width": features.width,
                "shifts": features.shifts,
                "window": [stage.low, stage.high],
                "condition": stage.condition,
            }
        )
    header = {
        "format_version": FORMAT_VERSION,
        "version": VERSION,
        "wavelet": model.wavelet,
        "stages": stages,
    }
    data = to_bytes(tensors, metadata={KEY: json.dumps(header)})
    try:
        write_atomically(path, data, overwrite)
    except FileExistsError:
        raise UsageError(f"{str(path)!r} exists: give --overwrite to replace it") from None
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None


def load(path: Path) -> FieldModel:
    """A model from its file; WeightsError if there is none, or it is damaged or foreign."""
    if not path.is_file():
        raise WeightsError(f"no field model {str(path)!r}: 'cdnctl field fit' writes one")
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get(KEY)
            if raw is None:
                raise WeightsError(
                    f"{str(path)!r} holds no field model: its metadata lacks the key {KEY!r}"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise WeightsError(
            f"{str(path)!r} is not a readable safetensors file ({_brief(error)}); "
            "it may be damaged or of another format: fit the model again"
        ) from None
    try:
        return _build(json.loads(raw), tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UsageError) as error:
        raise WeightsError(
            f"{str(path)!r} has a damaged header of a field model: {_brief(error)}"
        ) from None


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _build(header: dict[str, Any], tensors: dict[str, Tensor]) -> FieldModel:
    if header["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format {header['format_version']!r}, this cdnctl reads {FORMAT_VERSION}")
    wavelet = header["wavelet"]
    quarters(torch.zeros(2, 2), wavelet)  # UsageError if it is no wavelet
    records = header["stages"]
    wanted = {f"{i}.{name}" for i in range(len(records)) for name in ("theta", "errors")}
    if not records or wanted != tensors.keys():
        raise ValueError(f"the tensors are {sorted(tensors)}, but must be {sorted(wanted)}")
    stages = []
    for number, record in enumerate(records):
        theta, errors = (tensors[f"{number}.{name}"] for name in ("theta", "errors"))
        stages.append(_stage(wavelet, record, theta, errors))
    _check_chain(stages)
    return FieldModel(wavelet, tuple(stages))


def _stage(wavelet: str, record: dict[str, Any], theta: Tensor, errors: Tensor) -> Stage:
    features = Features(
        powers=tuple(_whole(p, 1, 16) for p in record["powers"]),
        centres=tuple(_number(c) for c in record["centres"]),
        width=_number(record["width"]),
        shifts=tuple(
            tuple((_whole(a, -LARGEST, LARGEST), _whole(b, -LARGEST, LARGEST)) for a, b in group)
            for group in record["shifts"]
        ),
    )
    for tensor in (theta, errors):
        if tensor.shape != (len(features),) or tensor.dtype != torch.float64:
            raise ValueError(
                f"{len(features)} features have parameters of the shape {tuple(tensor.shape)}, "
                f"{tensor.dtype}"
            )
        if not tensor.isfinite().all():
            raise ValueError("parameters that are not finite numbers")
    if features.centres and not features.width > 0:
        raise ValueError(f"the width is {features.width}")
    depth, side = _whole(record["depth"], 0, 2), _whole(record["side"], 1, LARGEST)
    cells = tuple((_whole(r, 0, 3), _whole(c, 0, 3)) for r, c in record["cells"])
    if side % 2**depth:
        raise ValueError(f"a side of {side} cannot be halved {depth} times")
    low, high = (_number(v) for v in record["window"])
    if not low < high:
        raise ValueError(f"the window is {low} to {high}")
    bands, energy = Bands(wavelet, depth, cells), Energy(features, theta)
    return Stage(side, bands, energy, errors, _number(record["condition"]), low, high)


def _check_chain(stages: list[Stage]) -> None:
    """ValueError unless the stages make up the field: the coarsest picture, and at each further
    side all that the picture of half that side lacks."""
    first, *rest = stages
    if first.bands.cells != ((0, 0),) or first.bands.depth:
        raise ValueError("the first stage is not a whole picture")
    side = first.side
    for next_side, group in groupby(rest, key=lambda stage: stage.side):
        parts = [stage.bands for stage in group]
        half = 1 << parts[0].depth >> 1
        needed = [(r, c) for r in range(2 * half) for c in range(2 * half) if max(r, c) >= half]
        found = sorted(cell for part in parts for cell in part.cells)
        if next_side != 2 * side or found != needed or len({part.depth for part in parts}) > 1:
            raise ValueError(f"the stages of side {next_side} do not complete those of {side}")
        side = next_side


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:80]!r} is not a finite number")
    return float(value)


def _whole(value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{str(value)[:80]!r} is not a whole number from {low} to {high}")
    return value
