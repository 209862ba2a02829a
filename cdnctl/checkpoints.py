"""Weights files: safetensors with one JSON header, and the lookup of bundled ones.

Nothing in a weights file is ever executed or unpickled. The header is checked
against the tensors before anything is allocated, so that a damaged or hostile
file costs one clear error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cdnctl import headers
from cdnctl.errors import ConfigError, WeightsError
from cdnctl.files import write_atomically
from cdnctl.models import Network, architecture
from cdnctl.schema import build

FORMAT_VERSION = 1
SUFFIX = headers.SUFFIX
MODEL = f"model{SUFFIX}"  # name of the weights of a run
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Header:
    """What a weights file says of itself. All plain JSON values."""

    name: str
    arch: str
    model: Mapping[str, Any]  # fields of the architecture's config
    classes: tuple[str, ...]
    sigma_range: tuple[float, float]  # noise levels seen in training, in [0, 1] pixel units
    patch: int  # side of the training crops, in pixels
    # config, steps, pictures, seconds, and those of the weights that it started_from, if any
    training: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    licence: str = "MIT"
    version: str = ""  # of cdnctl
    scores: Mapping[str, Any] = field(default_factory=dict)
    value_range: tuple[float, float] = (0.0, 1.0)
    format_version: int = FORMAT_VERSION

    @property
    def told_apart(self) -> tuple[str, ...]:
        """The classes that it tells apart: none for a denoiser, whatever its pictures were of."""
        return () if architecture(self.arch).objective == "denoising" else self.classes


_KINDS: Mapping[str, type] = {
    "name": str,
    "arch": str,
    "model": dict,
    "classes": list,
    "patch": int,
    "training": dict,
    "data": str,
    "licence": str,
    "version": str,
    "scores": dict,
}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_model(
    path: Path, state: Mapping[str, Tensor], header: Header, dtype: torch.dtype | None = None
) -> None:
    """Write weights, float tensors as ``dtype`` (None: as they are), with their header."""
    tensors = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        tensors[key] = value.to(dtype) if dtype and value.is_floating_point() else value
    write_atomically(path, save(tensors, metadata={"cdnctl": json.dumps(asdict(header))}))


def read_header(path: Path) -> Header:
    """The header of a weights file; WeightsError if it is missing, damaged or foreign."""
    return read_weights(path)[0]


def read_weights(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors of a weights file, not checked against each other; WeightsError as
    `read_header`."""
    if not path.is_file():
        raise WeightsError(f"no weights file {str(path)!r}; 'cdnctl models' lists the bundled ones")
    try:
        with safe_open(path, framework="pt") as file:
            raw = (file.metadata() or {}).get("cdnctl")
            if raw is None:
                raise WeightsError(
                    f"{str(path)!r} was not written by cdnctl: its metadata lacks the key 'cdnctl'"
                )
            header = _parse_header(path, raw)
            return header, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
        raise WeightsError(
            f"{str(path)!r} is not a readable safetensors file ({brief(error)}); "
            "it may be damaged or of another format: fetch or train it again"
        ) from None


def _parse_header(path: Path, raw: str) -> Header:
    try:
        values = json.loads(raw)
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise WeightsError(
                f"{str(path)!r} has weights format {version!r}, but this cdnctl reads "
                f"{FORMAT_VERSION}: install the version that wrote it ({values.get('version')!r})"
            )
        known = {f.name for f in fields(Header)}
        values = {k: v for k, v in values.items() if k in known}
        for key, value in values.items():
            if not isinstance(value, _KINDS.get(key, object)):
                raise TypeError(f"{key} is {str(value)[:80]!r}")
        classes = tuple(str(c) for c in values.pop("classes"))
        low, high = (float(v) for v in values.pop("sigma_range"))
        black, white = (float(v) for v in values.pop("value_range", (0.0, 1.0)))
        if not 0 <= low <= high < inf or values["patch"] < 1:
            raise ValueError(f"sigma_range is {[low, high]}, patch is {values['patch']}")
        return Header(
            classes=classes, sigma_range=(low, high), value_range=(black, white), **values
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{str(path)!r} has a damaged cdnctl header: {brief(error)}") from None


def brief(error: Exception) -> str:
    """The start of an error's first line: torch appends stack traces, headers can be huge."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def build_module(header: Header) -> Network:
    """An untrained module of the header's architecture, on whatever device is current."""
    arch = architecture(header.arch)
    module = arch.module(build(arch.config, header.model, "model"))
    module.needs = replace(
        module.needs, sigma_range=header.sigma_range, value_range=header.value_range
    )
    return module


def load_model(path: Path) -> tuple[Network, Header]:
    """Module with its weights in float32 on the CPU, in eval mode, and the header.

    WeightsError if tensors are missing, surplus, of another shape, or not finite.
    """
    header, state = read_weights(path)
    try:
        with torch.device("meta"):  # compare shapes before any memory is taken
            module = build_module(header)
    except (ConfigError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(f"{str(path)!r} describes an impossible model: {brief(error)}") from None
    if len(header.classes) != module.num_classes:
        raise WeightsError(
            f"{str(path)!r} names {len(header.classes)} classes, "
            f"but its model has {module.num_classes}"
        )
    expected = {k: v.shape for k, v in module.state_dict().items()}
    for key in sorted(expected.keys() ^ state.keys()):
        kind = "lacks the tensor" if key in expected else "has the unknown tensor"
        raise WeightsError(f"{str(path)!r} {kind} {key!r}")
    for key, value in state.items():
        if value.shape != expected[key]:
            raise WeightsError(
                f"{str(path)!r}: {key!r} has shape {tuple(value.shape)}, "
                f"but its config needs {tuple(expected[key])}"
            )
        if value.dtype not in _DTYPES:
            raise WeightsError(f"{str(path)!r}: {key!r} is {value.dtype}, not floating point")
        state[key] = value.float()
        if not state[key].isfinite().all():
            raise WeightsError(f"{str(path)!r}: {key!r} holds values that are not finite numbers")
    module = build_module(header)
    module.load_state_dict(state)
    return module.eval().requires_grad_(False), header


def weights_hash(path: Path) -> str:
    """First 16 hex digits of a SHA-256 over names and values of the tensors.

    It names weights in reports: scores may be added to the header without changing it.
    """
    digest = hashlib.sha256()
    for key, value in sorted(read_weights(path)[1].items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_folder() -> Path:
    """Folder of the bundled weights: inside the installed package, or beside it in a checkout."""
    return headers.weights_folder(PACKAGE)


def bundled() -> dict[str, Path]:
    """Bundled weights by name."""
    return headers.bundled(PACKAGE)


def find_weights(name: str | Path) -> Path:
    """The weights file that is meant: a bundled model by name, the best weights of a run folder
    (the last ones where none were best), or a file.

    WeightsError if there is none; a file of that name is not looked into.
    """
    known, path = bundled(), Path(name)
    if str(name) in known:
        return known[str(name)]
    if path.is_dir():
        for folder in (path / "best", path / "last", path):
            if (folder / MODEL).is_file():
                return folder / MODEL
        raise WeightsError(
            f"the folder {str(name)!r} holds no weights, neither best/{MODEL} nor last/{MODEL}: "
            "give the folder of a run that has saved some, such as runs/1"
        )
    if path.suffix != SUFFIX and not path.exists():
        raise WeightsError(
            f"no bundled model {str(name)!r} (there are: {', '.join(known) or 'none'}) "
            "and no weights file or run folder of that name"
        )
    return path
