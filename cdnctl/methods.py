"""Denoising methods by name: the bundled models, classical ones, and a yardstick of time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from cdnctl import images, tiles
from cdnctl.api import Model, load
from cdnctl.checkpoints import bundled
from cdnctl.restore import Settings, restore

Method = Callable[[np.ndarray, float], np.ndarray]

REFERENCE = "CDnCNN-B (shape)"


def _nlm(noisy: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.restoration import denoise_nl_means

    return np.asarray(
        denoise_nl_means(
            noisy, patch_size=5, patch_distance=6, h=0.6 * sigma, sigma=sigma, channel_axis=-1
        )
    )


def _wavelet(noisy: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.restoration import denoise_wavelet

    color = noisy.shape[2] == 3
    return np.asarray(
        denoise_wavelet(
            noisy, sigma=sigma, channel_axis=-1, convert2ycbcr=color, rescale_sigma=True
        )
    )


def _tv(noisy: np.ndarray, sigma: float) -> np.ndarray:
    from skimage.restoration import denoise_tv_chambolle

    return np.asarray(denoise_tv_chambolle(noisy, weight=1.2 * sigma, channel_axis=-1))


def _bm3d(noisy: np.ndarray, sigma: float) -> np.ndarray:
    import bm3d

    return np.asarray(bm3d.bm3d_rgb(noisy, sigma))


class PlainStack(nn.Module):
    """The shape of CDnCNN-B (Zhang et al. 2017): 20 convolutions of 64 channels, 0.67 million
    multiply-adds per pixel. Weights are random: it is a yardstick of time, not of quality."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
        for _ in range(18):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1))

    def run(self, noisy: np.ndarray, sigma: float) -> np.ndarray:
        """A pass over tiles of 256 pixels with a margin of 20."""
        y = torch.from_numpy(noisy.transpose(2, 0, 1).copy())
        plan = tiles.plan(y.shape[1], y.shape[2], 296, 20, 1)
        with torch.no_grad():
            parts = tiles.run(self.layers, lambda box: y[(..., *box)], plan, torch.device("cpu"))
            out = torch.empty_like(y)
            for place, part in parts:
                out[(..., *place)] = part
        return out.permute(1, 2, 0).numpy()


def _with_model(model: Model) -> Method:
    def run(noisy: np.ndarray, sigma: float) -> np.ndarray:
        return restore(images.Image(noisy), model, Settings(sigma)).image.pixels

    return run


CLASSICAL: Mapping[str, Method] = {
    "non-local means": _nlm,
    "wavelet": _wavelet,
    "total variation": _tv,
    "BM3D": _bm3d,
}


def available() -> list[str]:
    """Names of all methods: bundled models, classical methods, the yardstick of time.

    BM3D takes part if the package bm3d is there (its licence is for research only,
    so it is not a dependency).
    """
    classical = [name for name in CLASSICAL if name != "BM3D" or importlib.util.find_spec("bm3d")]
    return [*bundled(), *classical, REFERENCE]


def method(name: str) -> Method:
    """A method by name."""
    if name == REFERENCE:
        torch.manual_seed(0)
        return PlainStack().run
    return CLASSICAL[name] if name in CLASSICAL else _with_model(load(name))
