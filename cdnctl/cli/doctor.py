"""cdnctl doctor: whether the installation works."""

from __future__ import annotations

import platform

import typer

from cdnctl.cli.common import report_error, start_torch
from cdnctl.cli.options import Device, Threads
from cdnctl.errors import CdnctlError, SetupError
from cdnctl.units import PEAK
from cdnctl.version import VERSION


def register(app: typer.Typer, panel: str) -> None:
    """Add the command to the app."""
    app.command(rich_help_panel=panel)(doctor)


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
