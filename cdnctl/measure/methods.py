"""Denoising methods by name: the bundled models, classical ones, and yardsticks of time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from cdnctl import images
from cdnctl.api import Model, load
from cdnctl.checkpoints import bundled
from cdnctl.restore import Settings, restore, tiles

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
    """A stack of 3x3 convolutions with ReLU, on a picture whose squares of fold x fold pixels
    are channels. Weights are random: it is a yardstick of time, not of quality."""

    def __init__(self, depth: int, width: int, fold: int):
        super().__init__()
        torch.manual_seed(0)
        self.fold, ends = fold, 3 * fold**2
        layers: list[nn.Module] = [nn.Conv2d(ends, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(fold),
            *layers,
            nn.Conv2d(width, ends, 3, padding=1),
            nn.PixelShuffle(fold),
        )
        self.margin = depth * fold

    def run(self, noisy: np.ndarray, sigma: float) -> np.ndarray:
        """A pass over tiles of 256 pixels with a margin of the receptive radius."""
        y = torch.from_numpy(noisy.transpose(2, 0, 1).copy())
        height, width = y.shape[1:]
        y = nn.functional.pad(y, (0, -width % self.fold, 0, -height % self.fold))
        plan = tiles.plan(y.shape[1], y.shape[2], 256 + 2 * self.margin, self.margin, self.fold)
        with torch.no_grad():
            parts = tiles.run(self.layers, lambda box: y[(..., *box)], plan, torch.device("cpu"))
            out = torch.empty_like(y)
            for place, part in parts:
                out[(..., *place)] = part
        return out[:, :height, :width].permute(1, 2, 0).numpy()


def _with_model(model: Model) -> Method:
    def run(noisy: np.ndarray, sigma: float) -> np.ndarray:
        return restore(images.Image(noisy), model, Settings(sigma)).image.samples

    return run


CLASSICAL: Mapping[str, Method] = {
    "non-local means": _nlm,
    "wavelet": _wavelet,
    "total variation": _tv,
    "BM3D": _bm3d,
}

# Depth, width and fold: 0.67 and 0.21 million multiply-adds a pixel.
YARDSTICKS = {
    REFERENCE: (20, 64, 1),  # Zhang et al. 2017, arXiv 1608.03981
    "FFDNet (shape)": (12, 96, 2),  # Zhang et al. 2018, arXiv 1710.04026
}


def available() -> list[str]:
    """Names of all methods: bundled models, classical methods, the yardsticks of time.

    BM3D takes part if the package bm3d is there (its licence is for research only,
    so it is not a dependency).
    """
    classical = [name for name in CLASSICAL if name != "BM3D" or importlib.util.find_spec("bm3d")]
    return [*bundled(), *classical, *YARDSTICKS]


def is_model(name: str) -> bool:
    """Whether a method is a trained model: a bundled one, a run folder or a weights file."""
    return name not in CLASSICAL and name not in YARDSTICKS


def method(name: str) -> Method:
    """A method by name; what is neither classical nor a yardstick is a model, see `api.load`."""
    if name in YARDSTICKS:
        return PlainStack(*YARDSTICKS[name]).run
    return CLASSICAL[name] if name in CLASSICAL else _with_model(load(name))
