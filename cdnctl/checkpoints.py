"""Weights files: safetensors with one JSON header, and the lookup of bundled ones.

Nothing in a weights file is ever executed or unpickled. The header is checked
against the tensors before anything is allocated, so that a damaged or hostile
file costs one clear error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
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
    return _open(path)[0]


def _open(path: Path) -> tuple[Header, dict[str, Tensor]]:
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
            f"{str(path)!r} is not a readable safetensors file ({_brief(error)}); "
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
        raise WeightsError(f"{str(path)!r} has a damaged cdnctl header: {_brief(error)}") from None


def _brief(error: Exception) -> str:
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
    header, state = _open(path)
    try:
        with torch.device("meta"):  # compare shapes before any memory is taken
            module = build_module(header)
    except (ConfigError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise WeightsError(
            f"{str(path)!r} describes an impossible model: {_brief(error)}"
        ) from None
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
    for key, value in sorted(_open(path)[1].items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


_SCORES = ("psnr_noisy", "psnr", "ssim", "psnr_class", "accuracy")


def check_scores(report: Any) -> None:
    """ValueError unless a report is what ``cdnctl evaluate --json`` prints."""
    try:
        report["protocol"]["seed"]
        values = [
            row.get(key) for row in report["scores"] for key in ("sigma", "pictures", *_SCORES)
        ]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError("no protocol or no scores") from None
    if not values:
        raise ValueError("no scores")
    if not all(v is None or isinstance(v, int | float) for v in values):
        raise ValueError("scores that are no numbers")


def export(source: Path, target: Path, scores: Mapping[str, Any], half: bool = False) -> None:
    """Copy a weights file with scores in its header, and write its card beside it (.md).

    half: store float16.
    """
    header, state = _open(source)
    header = replace(header, scores={**header.scores, **scores})
    save_model(target, state, header, torch.float16 if half else None)
    write_atomically(target.with_suffix(".md"), card(target).encode())


def _budgets(training: Mapping[str, Any]) -> Iterator[str]:
    """What a training took, and those that it started from."""
    yield (
        f"- budget: {training.get('steps', 0)} steps, {training.get('pictures', 0)} pictures, "
        f"{training.get('seconds', 0) / 60:.0f} minutes"
    )
    if before := training.get("started_from"):
        yield f"- started from weights {before['weights']}, of training data {before['data']}"
        yield from _budgets(before["training"])


def card(path: Path) -> str:
    """Model card in the form of the Hugging Face hub, made of the header alone."""
    header, state = _open(path)
    for data, report in header.scores.items():
        try:
            check_scores(report)
        except ValueError as error:
            raise WeightsError(f"{str(path)!r} has damaged scores of {data!r}: {error}") from None
    try:
        seed = header.training.get("config", {}).get("run", {}).get("seed", 0)
        budgets = list(_budgets(header.training))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{str(path)!r} has a damaged account of its training: {_brief(error)}"
        ) from None
    low, high = header.sigma_range
    count = sum(v.numel() for v in state.values())
    results = [
        {
            "task": {"type": "image-to-image", "name": "Gaussian denoising"},
            "dataset": {"name": data, "type": "image-folder"},
            "metrics": [
                {"type": kind, "name": f"{kind}, sigma {_level(row)}", "value": round(row[kind], 4)}
                for row in report["scores"]
                for kind in _SCORES
                if row.get(kind) is not None
            ],
        }
        for data, report in header.scores.items()
    ]
    front = {
        "license": header.licence.lower(),
        "library_name": "cdnctl",
        "tags": ["image-denoising", "image-classification", "score-based-model"],
        "model-index": [{"name": header.name, "results": results}],
    }
    # JSON is YAML, so no YAML writer is needed for a block that only programs read.
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", ""]
    lines += [
        f"# {header.name}",
        "",
        "Joint model of noisy pictures and classes "
        "(Classification-Denoising Networks, Thiry and Guth 2024), made by `cdnctl train`.",
        "",
        f"- architecture: `{header.arch}`, {count / 1e6:.2f} million parameters, "
        f"`{json.dumps(dict(header.model))}`",
        f"- classes: {', '.join(header.classes)}",
        f"- noise levels seen: {low:.3g} to {high:.3g}, for pixels in [0, 1]; "
        f"crops of {header.patch} pixels",
        f"- training data: {header.data}",
        *budgets,
        f"- seed {seed}, cdnctl {header.version}, "
        f"weights {weights_hash(path)}, licence {header.licence}",
        "",
        "## Scores",
        "",
        "PSNR in dB and SSIM: mean over pictures; output clipped. sigma: on the 0..255 scale. "
        "'class told': denoised given the true class.",
    ]
    for data, report in header.scores.items():
        lines += [
            "",
            f"{data} ({report['scores'][0].get('pictures')} pictures, seed "
            f"{report['protocol']['seed']}, noise {report['protocol'].get('noise', 'gaussian')}):",
            "",
            "| sigma | PSNR | SSIM | PSNR, class told | accuracy |",
            "|---|---|---|---|---|",
        ]
        for row in report["scores"]:
            cells = [_level(row)]
            for kind, form in (
                ("psnr", ".2f"),
                ("ssim", ".4f"),
                ("psnr_class", ".2f"),
                ("accuracy", ".1%"),
            ):
                cells.append("-" if row.get(kind) is None else format(row[kind], form))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _level(row: Mapping[str, Any]) -> str:
    return "as given" if row.get("sigma") is None else f"{row['sigma']:g}"


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
