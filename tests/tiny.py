"""Small untrained models and made-up pictures for the tests of what is built on a model."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from skimage import data

from cdnctl import images
from cdnctl.api import Model, load
from cdnctl.checkpoints import Header, build_module, save_model
from cdnctl.images import Image
from cdnctl.models import NetConfig, architecture

CLASSES = ("cat", "dog", "café crème")


def save_tiny(
    path: Path,
    arch: str = "gradresnet",
    *,
    seed: int = 0,
    classes: tuple[str, ...] = CLASSES,
    gaussian: bool = False,
    patch: int = 64,
    high: float = 0.4,
    **shape: Any,
) -> Path:
    """Random weights; classes weigh enough to be seen in a correction.

    gaussian: no energy and no class scores but a bias, which leaves the exact denoiser
    of pixels that are Gaussian with mean 1/2 and standard deviation 1/4. An architecture that is
    not on the trunk is its example.
    """
    line = architecture(arch)
    model = asdict(line.example)
    if line.config is NetConfig:
        model = {"widths": [8, 16], "blocks": [1, 1], "unshuffle": 2, "norm": "pixel", "head": 8}
    classes = classes if line.knows_classes else ()
    model |= ({"num_classes": len(classes)} if classes else {}) | shape
    header = Header(
        name=path.stem,
        arch=arch,
        model=model,
        classes=classes,
        sigma_range=(0.0, high),
        patch=patch,
        data="nothing",
        version="0",
    )
    torch.manual_seed(seed)
    state = build_module(header).state_dict()
    if "head.linear.weight" in state:
        # Class scores are means over a picture: large weights make up for that.
        state["head.linear.weight"] *= 0.0 if gaussian else 30.0
        state["head.linear.bias"] = torch.linspace(0, 0.5, len(classes))
    if gaussian:
        state = {k: v * (not k.startswith("sides")) for k, v in state.items()}
    save_model(path, state, header)
    return path


def tiny(folder: Path, arch: str = "gradresnet", **options: Any) -> Model:
    """``save_tiny`` and load."""
    return load(save_tiny(folder / "tiny.safetensors", arch, **options))


def picture(height: int = 48, width: int = 64, channels: int = 3, top: int = 60) -> np.ndarray:
    """Part of scikit-image's cat as float32 (H, W, C) in [0, 1]."""
    pixels = data.chelsea()[top : top + height, 120 : 120 + width, :channels]
    return pixels.astype(np.float32) / 255


def noisy_picture(
    height: int = 48, width: int = 64, channels: int = 3, sigma: float = 0.2, seed: int = 0
) -> np.ndarray:
    """``picture`` plus Gaussian noise, not clipped."""
    clean = picture(height, width, channels)
    noise = np.random.default_rng(seed).standard_normal(clean.shape, np.float32)
    return clean + np.float32(sigma) * noise


def write(
    path: Path, pixels: np.ndarray | None = None, dtype: Any = np.uint8, **options: Any
) -> Path:
    """A picture file. options: other fields of the `Image`, such as its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.of(noisy_picture(20, 24) if pixels is None else pixels, dtype)
    images.write(replace(image, **options), path)
    return path


def files(folder: Path) -> dict[str, str]:
    """Hash of every file, hidden ones too, but for manifests: they tell times."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith("cdnctl-manifest")
    }


def names(folder: Path) -> set[str]:
    """Of `files` those that have their final name; safe while a command writes them."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*.*") if p.suffix != ".tmp"}
    return {name for name in found if not Path(name).name.startswith("cdnctl-manifest")}
