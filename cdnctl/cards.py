"""Model cards: what a weights file says of itself, for people, and the scores in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cdnctl.checkpoints import Header, brief, read_weights, save_model, weights_hash
from cdnctl.errors import WeightsError
from cdnctl.files import write_atomically
from cdnctl.models import architecture

_TAGS = {
    "joint": ["image-denoising", "image-classification", "score-based-model"],
    "denoising": ["image-denoising"],
    "classifying": ["image-classification"],
}
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
    header, state = read_weights(source)
    header = replace(header, scores={**header.scores, **scores})
    save_model(target, state, header, torch.float16 if half else None)
    write_atomically(target.with_suffix(".md"), card(target).encode())


def _budgets(training: Mapping[str, Any]) -> Iterator[str]:
    """What a training took, and those that it started from."""
    yield (
        f"- budget: {training.get('steps', 0)} steps, {training.get('pictures', 0)} pictures, "
        f"{training.get('seconds', 0) / 60:.0f} minutes"
    )
    if drawn := training.get("drawn"):
        yield (
            f"- not trained so itself, but drawn anew from the covariances of weights "
            f"{drawn['weights']}, which were: seed {drawn['seed']}, control {drawn['control']}, "
            f"{drawn['pictures']} pictures looked at"
        )
    if before := training.get("started_from"):
        yield f"- started from weights {before['weights']}, of training data {before['data']}"
        yield from _budgets(before["training"])


def _kind(header: Header) -> str:
    """What sort of model it is."""
    objective = architecture(header.arch).objective
    if objective == "joint":
        paper = "Classification-Denoising Networks, Thiry and Guth 2024"
        return f"Joint model of noisy pictures and classes ({paper})"
    if objective == "classifying":
        return "Classifier"
    if header.training.get("config", {}).get("noise", {}).get("camera"):
        return (
            "Denoiser of photographs: regression on simulated cameras, with their demosaicing, "
            "tone curves and JPEG, so that it is no score of a density"
        )
    return "Denoiser"


def card(path: Path) -> str:
    """Model card in the form of the Hugging Face hub, made of the header alone."""
    header, state = read_weights(path)
    for data, report in header.scores.items():
        try:
            check_scores(report)
        except ValueError as error:
            raise WeightsError(f"{str(path)!r} has damaged scores of {data!r}: {error}") from None
    try:
        seed = header.training.get("config", {}).get("run", {}).get("seed", 0)
        budgets = list(_budgets(header.training))
        kind = _kind(header)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{str(path)!r} has a damaged account of its training: {brief(error)}"
        ) from None
    maker = "models resample" if "drawn" in header.training else "train"
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
        "tags": _TAGS[architecture(header.arch).objective],
        "model-index": [{"name": header.name, "results": results}],
    }
    # JSON is YAML, so no YAML writer is needed for a block that only programs read.
    lines = ["---", *(f"{k}: {json.dumps(v)}" for k, v in front.items()), "---", ""]
    lines += [
        f"# {header.name}",
        "",
        f"{kind}, made by `cdnctl {maker}`.",
        "",
        f"- architecture: `{header.arch}`, {count / 1e6:.2f} million parameters, "
        f"`{json.dumps(dict(header.model))}`",
        f"- classes: {', '.join(header.told_apart) or 'it knows none'}",
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
