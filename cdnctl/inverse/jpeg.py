"""What a JPEG file says about the picture that it was made of (ITU-T T.81; JFIF).

An encoder rounds the discrete cosine transform of 8 x 8 blocks of Y, Cb and Cr to multiples of
the steps in the file's tables. So every coefficient of the original lies within half a step of
the file's: a box, in which the decoded picture is the middle. `Box.project` moves a picture, such
as a denoised one, to the nearest that the file could have been made of.

The file's coefficients are found from its decoded planes, which are rounded to whole levels, as
are the encoder's; that leaves `SLACK`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdnctl.errors import UsageError

BLOCK = 8
BITS = 8  # of a sample, the only precision that is in use
PEAK = 2**BITS - 1
MIDDLE = 2 ** (BITS - 1)  # that is taken off before the transform

# In levels: by how much more than half a step a coefficient of the original may lie off, as its
# planes were rounded to whole levels, and so were those that the file's coefficients are found
# from. Each leaves an error of 0.29 in a coefficient (a uniform error, and the transform is
# orthonormal): this is 4 standard deviations of both. Of the coefficients of six photographs at
# qualities up to 80, 3 in 100,000 lay farther off, by 0.8 at most (in flat blocks, where the errors
# of all samples are the same); at 90 and 95, where steps of 1 may be missed by one, 2 in 10,000, by
# 3.2 at most.
SLACK = 1.6

# RGB to Y, Cb, Cr, the last two around 0.
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YCC = np.stack(
    [_LUMA, (np.array([0, 0, 1]) - _LUMA) / 1.772, (np.array([1, 0, 0]) - _LUMA) / 1.402]
)

_K = np.arange(BLOCK)
_DCT = np.sqrt(2 / BLOCK) * np.cos(np.pi * _K[:, None] * (2 * _K + 1) / (2 * BLOCK))
_DCT[0] /= np.sqrt(2)
_IS_MEAN = np.zeros((BLOCK, BLOCK))
_IS_MEAN[0, 0] = 1


@dataclass(frozen=True)
class Plane:
    """The coefficients of one component of a file, in levels."""

    middle: np.ndarray  # (rows, columns, 8, 8) of the blocks that lie in the picture as a whole
    # (rows, columns, 8, 8): how far the original may be from the middle; infinite in blocks of
    # which the file's coefficients could not be found.
    half: np.ndarray
    factor: int  # pixels per sample, on both sides
    steps: np.ndarray  # (8, 8), of the quantisation

    def lost(self) -> float:
        """The mean square of what rounding took from a coefficient, in squared levels.

        Those of a frequency are taken for Laplace distributed. Their width b follows from the
        share of those that are not rounded to zero, exp(-step / 2b); where all are, it is no
        more than that of other frequencies, as widths fall like 1 over the frequency.
        """
        cut = self.steps / 2
        count = max(1, self.middle[..., 0, 0].size)
        share = (np.abs(self.middle) > cut).sum((0, 1)) / count
        b = cut / -np.log(np.clip(share, 0.5 / count, 1 - 1e-6))
        frequency = np.hypot(_K[:, None], _K).clip(1)
        seen = (share > 0) & (_IS_MEAN == 0)
        if seen.any():
            b = np.where(share > 0, b, np.minimum(b, np.median((b * frequency)[seen]) / frequency))
        over = np.exp(-cut / b)
        small = (2 * b**2 - over * (cut**2 + 2 * cut * b + 2 * b**2)) / (1 - over)
        inside = np.minimum(small, cut**2 / 3)
        return float(((1 - share) * inside + share * cut**2 / 3).mean())

    @staticmethod
    def of(
        decoded: np.ndarray, table: Sequence[int], factor: int = 1, slack: float = SLACK
    ) -> Plane:
        """From decoded samples, (h, w) of whole levels, and the quantisation table, 64 steps
        row by row."""
        steps = np.array(table, np.float64).reshape(BLOCK, BLOCK)
        samples = _blocks(decoded.astype(np.float64)) - MIDDLE
        low, high = samples <= -MIDDLE, samples >= PEAK - MIDDLE
        middle = steps * np.rint(_transformed(samples) / steps)
        # Samples that were cut off at black or white say no more than that. What they were is
        # what the coefficients say that they give, as long as that is beyond the end.
        cut = (low | high).any((-2, -1))
        if cut.any():
            s, lo, hi = samples[cut], low[cut], high[cut]
            for _ in range(8):
                back = _inverse(middle[cut])
                whole = np.where(lo, np.minimum(back, s), np.where(hi, np.maximum(back, s), s))
                middle[cut] = steps * np.rint(_transformed(whole) / steps)
        shown = np.clip(np.rint(_inverse(middle)), -MIDDLE, PEAK - MIDDLE)
        found = (np.abs(shown - samples) <= 1).all((-2, -1))
        half = np.where(found[..., None, None], steps / 2 + slack, np.inf)
        # In a flat block all samples are rounded alike, and the mean may be that of two steps.
        for sign in (-1, 1):
            other = _inverse(middle + sign * steps * _IS_MEAN)
            near = np.abs(other - samples) <= 0.6  # 0.5, and what decoders compute less exactly
            near |= (low & (other < samples)) | (high & (other > samples))
            either = near.all((-2, -1)) & found
            middle[either, 0, 0] += sign * steps[0, 0] / 2
            half[either, 0, 0] += steps[0, 0] / 2
        return Plane(middle.astype(np.float32), half.astype(np.float32), factor, steps)


class Box:
    """The pictures, (B, C, H, W) in [0, 1], of which a file can have been made: gray (C = 1) or
    RGB. Blocks at the right and at the bottom that are not whole are not in it, nor is colour
    with a subsampling other than 1 x 1 and 2 x 2: there every picture is accepted."""

    def __init__(self, planes: Sequence[Plane], height: int, width: int):
        """planes: of Y alone, or of Y, Cb and Cr; the latter two may be left out."""
        self.planes = planes
        self.size = height, width

    def error(self) -> float:
        """About the root mean square of what rounding took from Y, in [0, 1] pixel units."""
        return float(self.planes[0].lost() ** 0.5 / PEAK)

    def project(self, x: Tensor) -> Tensor:
        """The nearest picture in the box, like x; not clipped. Nearest in Y, Cb and Cr."""
        self._check(x)
        moves = torch.zeros_like(x)
        for i, (plane, samples) in enumerate(zip(self.planes, self._samples(x), strict=False)):
            moves[:, i] = self._move(plane, samples)[0]
        if x.shape[1] == 3:
            moves = _mixed(np.linalg.inv(_TO_YCC), moves)
        return x + moves / PEAK

    def outside(self, x: Tensor) -> Tensor:
        """How far the farthest coefficient is outside of the box, in levels, (B,)."""
        self._check(x)
        far = [
            self._move(plane, samples)[1]
            for plane, samples in zip(self.planes, self._samples(x), strict=False)
        ]
        return torch.stack(far).amax(0)

    def _check(self, x: Tensor) -> None:
        if x.shape[-2:] != self.size or x.shape[1] not in (1, 3) or x.shape[1] < len(self.planes):
            raise UsageError(
                f"a picture of shape {tuple(x.shape[1:])} is not one of the file, which has "
                f"{len(self.planes)} components of {self.size[1]} x {self.size[0]} pixels"
            )

    def _samples(self, x: Tensor) -> Tensor:
        """Y, Cb and Cr in levels, (3, B, H, W), or gray, (1, B, H, W), around 0."""
        samples = PEAK * (_mixed(_TO_YCC, x) if x.shape[1] == 3 else x)
        samples = samples.movedim(1, 0).clone()
        samples[0] -= MIDDLE
        return samples

    @staticmethod
    def _move(plane: Plane, samples: Tensor) -> tuple[Tensor, Tensor]:
        """What has to be added to samples (B, H, W), and the largest change of a coefficient."""
        f = plane.factor
        rows, columns = plane.middle.shape[:2]
        height, width = rows * BLOCK * f, columns * BLOCK * f
        move = torch.zeros_like(samples)
        if not rows * columns:
            return move, samples.new_zeros(len(samples))
        inside = samples[:, :height, :width]
        small = inside.unflatten(2, (-1, f)).unflatten(1, (-1, f)).mean((2, 4))
        blocks = small.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).transpose(2, 3)
        dct, middle, half = (
            torch.from_numpy(a).to(samples) for a in (_DCT, plane.middle, plane.half)
        )
        found = dct @ blocks @ dct.mT - middle  # (B, rows, columns, 8, 8)
        change = found.clamp(-half, half) - found
        back = (dct.mT @ change @ dct).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        # Samples are means of pixels: the nearest change of those is the same for all.
        move[:, :height, :width] = back.repeat_interleave(f, 1).repeat_interleave(f, 2)
        return move, change.abs().flatten(1).amax(1)


def box_of(data: bytes, slack: float = SLACK) -> Box:
    """The `Box` of a JPEG file, as it is stored (not turned by its EXIF orientation).

    slack: by how many levels coefficients may be farther from the file's than half a step.
    UsageError for colours other than gray and YCbCr.
    """
    from PIL import Image, JpegImagePlugin

    def opened(scale: int) -> JpegImagePlugin.JpegImageFile:
        """The file, to be decoded at that part of its size to components as they are stored."""
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        assert isinstance(image, JpegImagePlugin.JpegImageFile)
        image.draft("YCbCr", (max(1, image.width // scale), max(1, image.height // scale)))
        return image

    def plane(samples: np.ndarray, layer: tuple[int, int, int, int], factor: int = 1) -> Plane:
        return Plane.of(samples, image.quantization[layer[3]], factor, slack)

    image = opened(1)
    (width, height), layers = image.size, image.layer
    if image.mode not in ("L", "YCbCr") or image.info.get("adobe_transform") == 0:
        raise UsageError(f"a JPEG file of {image.mode} colours: only gray and YCbCr are understood")
    samples = np.asarray(image)
    if image.mode == "L":
        return Box([plane(samples, layers[0])], height, width)
    planes = [plane(samples[..., 0], layers[0])]
    sampling = [tuple(layer[1:3]) for layer in layers]
    if sampling == [(1, 1)] * 3:
        planes += [plane(samples[..., i], layers[i]) for i in (1, 2)]
    elif sampling == [(2, 2), (1, 1), (1, 1)] and min(width, height) > 1:
        # At half the size, a decoder gives the colours as they are stored, not interpolated.
        half = np.asarray(opened(2))[: height // 16 * 8, : width // 16 * 8]
        planes += [plane(half[..., i], layers[i], factor=2) for i in (1, 2)]
    return Box(planes, height, width)


def _mixed(matrix: np.ndarray, x: Tensor) -> Tensor:
    """Channels (B, 3, H, W) times a matrix."""
    return torch.einsum("ij,bjhw->bihw", torch.from_numpy(matrix).to(x), x)


def _blocks(plane: np.ndarray) -> np.ndarray:
    """Whole blocks, (rows, columns, 8, 8), of samples (h, w)."""
    rows, columns = (n // BLOCK for n in plane.shape)
    inside = plane[: rows * BLOCK, : columns * BLOCK]
    return inside.reshape(rows, BLOCK, columns, BLOCK).swapaxes(1, 2)


def _transformed(blocks: np.ndarray) -> np.ndarray:
    return _DCT @ blocks @ _DCT.T


def _inverse(coefficients: np.ndarray) -> np.ndarray:
    return _DCT.T @ coefficients @ _DCT
