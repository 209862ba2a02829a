"""cdnctl models and cdnctl doctor."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated

import typer

from cdnctl.cli.common import PEAK, Device, Json, Threads, print_table, report_error, start_torch
from cdnctl.errors import CdnctlError, SetupError, UsageError
from cdnctl.version import VERSION

app = typer.Typer(help="List the bundled models, show one, or export trained weights.")


def register(parent: typer.Typer) -> None:
    """Add the commands to the app."""
    parent.add_typer(app, name="models")
    parent.command()(doctor)


@app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: Json = False) -> None:
    """List the bundled models, show one, or export trained weights."""
    if context.invoked_subcommand is not None:
        return
    from rich.table import Table

    from cdnctl.checkpoints import bundled, read_header

    headers = {name: read_header(path) for name, path in bundled().items()}
    if as_json:
        for name, header in headers.items():
            record = {"name": name, "classes": header.classes, "arch": header.arch}
            print(json.dumps(record))
        return
    table = Table("model", "architecture", "noise levels", "classes")
    for name, header in headers.items():
        low, high = (PEAK * s for s in header.sigma_range)
        table.add_row(name, header.arch, f"{low:g}..{high:g}", ", ".join(header.classes))
    print_table(table)


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(help="A bundled model, a run folder such as runs/1, or a weights file.")
    ],
) -> None:
    """Print a model's card: what it is, how it was made, how it scores. Of a run folder: how far
    training is, its scores and config, and what is in it."""
    from cdnctl.cards import card
    from cdnctl.checkpoints import bundled, find_weights
    from cdnctl.training.report import describe, is_run

    if name not in bundled() and is_run(Path(name)):
        for subject, account in describe(Path(name)):
            print(f"{subject:8} {account}".replace("\n", f"\n{'':9}"))
        return
    print(card(find_weights(name)), end="")


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="A run folder such as runs/1 (its best weights), or a file.")
    ],
    target: Annotated[Path, typer.Argument(help="File to write; its card goes beside it.")],
    scores: Annotated[
        list[str] | None,
        typer.Option("--scores", help="NAME=FILE with what 'evaluate --json' printed; repeatable."),
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store float16.")] = False,
) -> None:
    """Copy trained weights with scores in their header, and write their card."""
    from cdnctl.cards import check_scores
    from cdnctl.cards import export as export_weights
    from cdnctl.checkpoints import SUFFIX, find_weights

    if target.suffix != SUFFIX:
        raise UsageError(f"{str(target)!r} must end in {SUFFIX}")
    reports = {}
    for item in scores or []:
        name, equals, file = item.partition("=")
        if not equals:
            raise UsageError(f"--scores {item!r} is not NAME=FILE")
        try:
            reports[name] = json.loads(Path(file).read_text(encoding="utf-8"))
            check_scores(reports[name])
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{file!r} does not hold what 'cdnctl evaluate --json' prints ({error})"
            ) from None
    export_weights(find_weights(source), target, reports, half)
    print(target)


def doctor(device: Device = "auto", threads: Threads = None) -> None:
    """Check the installation: versions, devices, weights, and a denoise that works."""
    torch_device = start_torch(device, threads)
    import torch

    from cdnctl.api import load
    from cdnctl.checkpoints import bundled, weights_folder
    from cdnctl.core.metrics import psnr
    from cdnctl.core.noise import add_noise
    from cdnctl.runtime import available_devices
    from cdnctl.selection import AUTO, SMALL, Models

    print(f"cdnctl {VERSION}, Python {platform.python_version()}, {platform.platform()}")
    for package in (
        "torch",
        "imagecodecs",
        "PIL",
        "tifffile",
        "skimage",
        "safetensors",
        "typer",
        "matplotlib",
    ):
        module = __import__(package)
        print(f"  {package} {getattr(module, '__version__', '?')}")
    print(f"devices: {', '.join(available_devices())}; using {torch_device}, "
          f"{torch.get_num_threads()} CPU threads")  # fmt: skip
    found = bundled()
    print(f"weights: {len(found)} in {weights_folder()}")
    sound = bool(found)
    for name in found:
        try:
            model = load(name, torch_device)
            # A smooth picture that every denoiser must improve.
            ramp = torch.linspace(0.2, 0.8, 64)
            clean = (ramp[:, None] * ramp[None]).expand(1, 3, 64, 64).contiguous()
            noisy = add_noise(clean, 25 / PEAK, torch.Generator().manual_seed(0)).to(torch_device)
            restored = model.denoise(noisy, 25 / PEAK).cpu()
            before, after = psnr(noisy.cpu(), clean).item(), psnr(restored, clean).item()
            good = after > before + 3
            verdict = "works" if good else "DOES NOT WORK"
            print(f"  {name}: weights {model.hash}, PSNR {before:.1f} -> {after:.1f} dB: {verdict}")
            sound &= good
        except CdnctlError as error:
            report_error(f"{name}: {error}")
            sound = False
    try:
        Models(AUTO, torch_device).pick(SMALL + 1, SMALL + 1)
    except CdnctlError as error:
        report_error(str(error))
        sound = False
    if not sound:
        raise SetupError("the installation does not work: install cdnctl again")
    print("all is well")
