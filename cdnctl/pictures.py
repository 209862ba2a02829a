"""Pictures of any kind, as people hold them in Python, for the network and back.

::

    tensor, array or PIL picture ──▶ Given: what the network sees ──run──▶ out
    out ──picture──▶ the kind that came in; ──samples, numbers──▶ tensor or array
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from cdnctl import images
from cdnctl.core.mirror import mirrored
from cdnctl.errors import UsageError

Sigma = Tensor | np.ndarray | list[float] | float

MODES = ("L", "RGB", "I;16")  # of PIL pictures: one sample a channel, and nothing beside colour

# Pixels beyond HEADROOM * (1 + sigma) are taken for ones on the scale of 0..255. Gaussian noise
# on [0, 1] never gets there, nor do the iterates of a solver that converges.
HEADROOM = 10


class Given:
    """A picture as the network sees it, and the way back.

    Tensors are (B, C, H, W) or (C, H, W); arrays (H, W) or (H, W, C), of floats, uint8 or
    uint16; PIL pictures have one of MODES. C is the network's number of channels, or 1: gray
    is repeated over them, and as its noise is then the same in all, the network is told
    sqrt(C) sigma (see `restore.View`).

    y: (B, C, H', W') in [0, 1], sides mirrored up to multiples of ``multiple``, in float32 or
    the better of the precisions of the picture and of ``weight``. sigma: (1,) or (B,), what
    the network is told. Both are differentiable functions of what is given.

    UsageError if it is not a picture, sigma not a noise level, or either not on the scale of
    [0, 1]. Checking the values waits for the device once.
    """

    def __init__(self, y: Any, sigma: Sigma, channels: int, multiple: int, weight: Tensor):
        self._given = y
        if isinstance(y, Tensor):
            batch = _from_tensor(y, channels, weight.device)
        elif isinstance(y, PIL.Image.Image):
            if y.mode not in MODES:
                raise UsageError(
                    f"PIL pictures must have mode {', '.join(MODES)}, not {y.mode!r}: "
                    "convert it, for instance by .convert('RGB')"
                )
            batch = _from_array(np.asarray(y), channels)
        elif isinstance(y, np.ndarray):
            batch = _from_array(y, channels)
        else:
            raise UsageError(
                f"expected a tensor, an array or a PIL picture, got {type(y).__name__}"
            )
        if not batch.numel():
            raise UsageError(f"a picture of shape {tuple(batch.shape)} has no pixels")
        self.dtype = torch.promote_types(batch.dtype, torch.float32)
        batch = batch.to(weight.device, torch.promote_types(self.dtype, weight.dtype))
        self.count, own, self.height, self.width = batch.shape
        level = _levels(sigma, batch)
        _check_scale(batch, level)
        self.gray = own < channels
        self.y = mirrored(batch.expand(-1, channels, -1, -1), multiple)
        self.sigma = level * (channels / own) ** 0.5

    def picture(self, out: Tensor) -> Any:
        """A picture like y, (B, C, H', W'), as the kind, shape and dtype that was given.

        Whole numbers are rounded and clipped.
        """
        out = self._cropped(out)
        out = out.mean(1, keepdim=True) if self.gray else out
        if isinstance(self._given, Tensor):
            return self._shaped(out).to(self._given.dtype)
        samples = np.asarray(self._given)
        result = images.from_unit(self._shaped(out), samples.dtype)
        if isinstance(self._given, np.ndarray):
            return result
        made = PIL.Image.fromarray(result)
        made.info = self._given.info.copy()  # colour profile, resolution
        return made

    def samples(self, out: Tensor) -> Any:
        """Derivatives by y, (B, C, H', W'), turned into derivatives by the picture that was given:
        a tensor or an array of its shape, in its dtype, or float32 for integers."""
        out = self._cropped(out)
        out = out.sum(1, keepdim=True) if self.gray else out
        if isinstance(self._given, Tensor):
            return self._shaped(out).to(self._given.dtype)
        dtype = np.asarray(self._given).dtype
        return self._shaped(out).astype(dtype if dtype.kind == "f" else np.float32)

    def numbers(self, out: Tensor) -> Any:
        """(B, ...) that are no pixels: tensors for tensors, arrays else, without B for a single
        picture; in float32, or float64 if the picture has that."""
        out = out.to(self.dtype)
        if isinstance(self._given, Tensor):
            return out if self._given.ndim == 4 else out[0]
        return out[0].detach().cpu().numpy()

    def _cropped(self, out: Tensor) -> Tensor:
        return out[..., : self.height, : self.width].contiguous()

    def _shaped(self, out: Tensor) -> Any:
        """(B, C, H, W) in the layout that was given, in the precision that it has."""
        if isinstance(self._given, Tensor):
            return out if self._given.ndim == 4 else out[0]
        array = out[0].permute(1, 2, 0).detach().cpu().numpy()
        return array.reshape(np.asarray(self._given).shape)


def _from_tensor(y: Tensor, channels: int, device: torch.device) -> Tensor:
    if y.ndim not in (3, 4) or y.shape[-3] not in (1, channels):
        raise UsageError(
            f"expected float pictures (B, C, H, W) or (C, H, W) with C = "
            f"{' or '.join(map(str, sorted({1, channels})))}, got shape {tuple(y.shape)}"
        )
    if not y.is_floating_point():
        raise UsageError(
            f"expected float pictures in [0, 1], got {y.dtype}; did you mean y / {images.PEAK}?"
        )
    if y.device != device:
        raise UsageError(f"the picture is on {y.device}, but the model on {device}: move one")
    return y if y.ndim == 4 else y[None]


def _from_array(y: np.ndarray, channels: int) -> Tensor:
    """(H, W) or (H, W, C) as (1, C, H, W) on the host."""
    if y.ndim not in (2, 3) or (y.ndim == 3 and y.shape[2] not in (1, channels)):
        raise UsageError(
            f"expected an array (H, W), (H, W, 1) or (H, W, {channels}), got shape {y.shape} "
            "(batches are given as tensors)"
        )
    if y.dtype.name in ("uint8", "uint16"):
        y = images.to_unit(y)
    elif y.dtype.name not in ("float16", "float32", "float64"):
        raise UsageError(f"expected an array of floats in [0, 1], uint8 or uint16, got {y.dtype}")
    y = (y[:, :, None] if y.ndim == 2 else y).transpose(2, 0, 1)
    return torch.from_numpy(np.array(y, y.dtype.newbyteorder("="), order="C"))[None]


def _levels(sigma: Sigma, y: Tensor) -> Tensor:
    """Noise levels, (1,) or (B,), with the dtype and device of y, (B, C, H, W)."""
    try:
        level = torch.as_tensor(sigma, dtype=y.dtype, device=y.device)
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(
            f"sigma is {sigma!r}, but must be a number from 0 to 1, or one per picture"
        ) from None
    if level.numel() != 1 and not level.numel() == level.shape[0] == len(y):
        raise UsageError(
            f"sigma has shape {tuple(level.shape)}, but must be one number, or one per picture, "
            f"({len(y)},): a noise level per pixel is not supported"
        )
    return level.reshape(-1)


def _check_scale(y: Tensor, sigma: Tensor) -> None:
    """UsageError unless y (B, C, H, W) and sigma (n,) are finite and in the unit of [0, 1]."""
    extremes = torch.stack(y.detach().aminmax())
    low, high, *levels = torch.cat([extremes, sigma.detach()]).cpu().tolist()
    for level in levels:
        if 1 < level <= images.PEAK:
            raise UsageError(
                f"sigma is {level:g}, but must lie in [0, 1], as pixels do; "
                f"did you mean sigma={level:g}/{images.PEAK}?"
            )
        if not 0 <= level <= 1:
            raise UsageError(f"sigma is {level:g}, but must lie in [0, 1], as pixels do")
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UsageError("the picture holds values that are not finite numbers (NaN or infinity)")
    far = max(low, high, key=abs)
    if abs(far) > HEADROOM * (1 + max(levels)):
        raise UsageError(
            f"the picture holds the value {far:g}, but pixels lie in [0, 1] apart from noise; "
            f"did you mean y / {images.PEAK}?"
        )
