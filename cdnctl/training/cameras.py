"""Simulated cameras: crops of pictures as scenes, and the photographs that are taken of them.

::

    scene ─▶ light ─▶ lens ─▶ colours of the sensor, white balance undone ─▶ mosaic
      ─▶ photons and read noise ─▶ white balance ─▶ demosaicing ─▶ colours of the display
      ─▶ tone curve ─▶ smoothing of colour, sharpening ─▶ JPEG, once or twice

Noise is white and independent of its neighbours on the sensor alone: demosaicing makes it wide and
mixes the channels, the tone curve makes it strong in the shadows, and JPEG takes its finest part.
Without the chance of photons and without JPEG the same camera gives the clean picture. All pictures
are float32 (B, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from cdnctl.core.coloured import AXES, OCTAVES, curve, local_tone, octave_of, said
from cdnctl.core.tone import to_display, to_light
from cdnctl.images import PEAK

MARGIN = 8  # pixels at the borders of a scene that lens, demosaicing and sharpening may spoil

_OVERLAP = torch.tensor([[0.62, 0.31, 0.07], [0.14, 0.71, 0.15], [0.04, 0.29, 0.67]])
"""Linear display colours to those of a sensor whose filters overlap. Rows sum to 1."""
_LUMA = torch.tensor([0.299, 0.587, 0.114])  # as in JPEG


class Cameras(NamedTuple):
    """How each of B photographs is taken: tensors (B,).

    exposure: factor of the light. lens: standard deviation of its blur in pixels. gain: variance
    of a pixel of the sensor per unit of light, so 1 / full well in electrons. read: standard
    deviation of what is added in the dark, in units of white. red, blue: factors of the white
    balance; green has 1. overlap: of the colour filters, whose undoing makes colour noise stronger,
    0 to 1. demosaic: which of `DEMOSAICERS`. contrast: of the tone curve around its middle, on top
    of sRGB's; 0 is none. smooth, blur: standard deviations in pixels of the blurs of colour and of
    all by which cameras hide noise. sharp, radius: of the unsharp mask after them. quality,
    subsampled: of the JPEG, and whether its colour is at half size. resaved: quality of a second
    JPEG, as programs and web sites make it; 0: none.
    """

    exposure: Tensor
    lens: Tensor
    gain: Tensor
    read: Tensor
    red: Tensor
    blue: Tensor
    overlap: Tensor
    demosaic: Tensor
    contrast: Tensor
    smooth: Tensor
    blur: Tensor
    sharp: Tensor
    radius: Tensor
    quality: Tensor
    subsampled: Tensor
    resaved: Tensor

    @staticmethod
    def random(count: int, generator: torch.Generator | None = None) -> Cameras:
        """Cameras between base sensitivity and the highest that people use."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        def whole(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=generator)

        gain = 10 ** uniform(-4.6, -2.6)
        return Cameras(
            exposure=2 ** uniform(-1.5, 1.5).clamp_max(0),
            lens=uniform(0.3, 1.2),
            gain=gain,
            read=gain * 10 ** uniform(0.3, 0.9),  # 2 to 8 electrons
            red=uniform(1.3, 2.4),
            blue=uniform(1.2, 2.2),
            overlap=uniform(0, 1),
            demosaic=whole(0, len(DEMOSAICERS)),
            contrast=uniform(0, 0.7),
            smooth=uniform(-2, 2.5).clamp_min(0),
            blur=uniform(-0.8, 0.8).clamp_min(0),
            sharp=uniform(-1, 1.2).clamp_min(0),
            radius=uniform(0.7, 1.6),
            quality=whole(80, 100),
            subsampled=whole(0, 2),
            resaved=torch.where(uniform(0, 1) < 0.35, whole(70, 97), 0),
        )


def photographs(
    scenes: Tensor, cameras: Cameras, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """What cameras make of scenes (B, 3, H, W) of even sides in [0, 1]: clean pictures, and the
    same with noise and JPEG, both (B, 3, H - 2 MARGIN, W - 2 MARGIN)."""
    c = cameras
    ones = torch.ones_like(c.red)
    balance = torch.stack([c.red, ones, c.blue], 1)[:, :, None, None]
    colours = torch.lerp(torch.eye(3), _OVERLAP, c.overlap[:, None, None])
    light = _blurred(to_light(scenes) * c.exposure.view(-1, 1, 1, 1), c.lens)
    raw = mosaic(torch.einsum("bij,bjhw->bihw", colours, light) / balance)
    gain, read = c.gain.view(-1, 1, 1, 1), c.read.view(-1, 1, 1, 1)
    counted = torch.poisson(raw.clamp_min(0) / gain, generator=generator) * gain
    counted += read * torch.randn(raw.shape, generator=generator)
    # Demosaicing works on balanced values, in which gray surfaces have no mosaic.
    both = torch.stack([raw, counted]) * mosaic(balance.expand_as(scenes))
    back = torch.linalg.inv(colours)
    clean, noisy = (_developed(one, back, c) for one in both)
    inner = slice(MARGIN, -MARGIN)
    clean, noisy = clean[..., inner, inner], noisy[..., inner, inner]
    return clean, _compressed(noisy, c)


def _developed(raw: Tensor, back: Tensor, c: Cameras) -> Tensor:
    """(B, 3, H, W) of the display from the balanced mosaic (B, 1, H, W) of a sensor."""
    full = raw.new_empty(len(raw), 3, *raw.shape[-2:])
    for kind, demosaiced in enumerate(DEMOSAICERS):
        rows = c.demosaic == kind
        if rows.any():
            full[rows] = demosaiced(raw[rows])
    light = torch.einsum("bij,bjhw->bihw", back, full.clamp(0, 1))
    shown = to_display(light)
    shown = torch.lerp(shown, shown**2 * (3 - 2 * shown), c.contrast.view(-1, 1, 1, 1))
    luma = torch.einsum("c,bchw->bhw", _LUMA, shown)[:, None]
    shown = _blurred(luma + _blurred(shown - luma, c.smooth), c.blur)
    return (shown + c.sharp.view(-1, 1, 1, 1) * (shown - _blurred(shown, c.radius))).clamp(0, 1)


def _blurred(x: Tensor, widths: Tensor) -> Tensor:
    """x (B, C, H, W) blurred by Gaussians of standard deviations (B,) in pixels, of at most 2.5."""
    reach = 6
    place = torch.arange(-reach, reach + 1.0)
    kernel = torch.exp(-0.5 * (place / widths.clamp_min(1e-3)[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(x.shape[1], 0)
    flat = x.flatten(0, 1)[None]
    for padding, shape in (((reach, reach, 0, 0), (1, -1)), ((0, 0, reach, reach), (-1, 1))):
        padded = F.pad(flat, padding, mode="reflect")
        flat = F.conv2d(padded, kernel.view(len(kernel), 1, *shape), groups=len(kernel))
    return flat.view_as(x)


# -- the sensor ----------------------------------------------------------------------------


def _filters(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where a Bayer sensor (red first) has red pixels, and where blue ones, (H, W) each."""
    row, column = torch.arange(height)[:, None] % 2, torch.arange(width) % 2
    return (row == 0) & (column == 0), (row == 1) & (column == 1)


def mosaic(colours: Tensor) -> Tensor:
    """What a Bayer sensor (red first) sees of (B, 3, H, W): (B, 1, H, W)."""
    red, blue = _filters(*colours.shape[-2:])
    r, g, b = colours.split(1, 1)
    return torch.where(red, r, torch.where(blue, b, g))


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """x (B, C, H, W) correlated with one kernel, mirrored at the borders as a mosaic goes on."""
    reach = [n // 2 for n in kernel.shape]
    padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    weight = kernel.expand(x.shape[1], 1, *kernel.shape)
    return F.conv2d(padded, weight, groups=x.shape[1])


_CROSS = torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
_BOX = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4


def bilinear(raw: Tensor) -> Tensor:
    """(B, 3, H, W) of a mosaic (B, 1, H, W), each colour from its own pixels alone."""
    red, blue = _filters(*raw.shape[-2:])
    planes = (red, _BOX), (~(red | blue), _CROSS), (blue, _BOX)
    return torch.cat([_convolved(raw * where, kernel) for where, kernel in planes], 1)


# Malvar, He and Cutler 2004: bilinear interpolation corrected by the Laplacian of the colour that
# was measured at the pixel. The names say what is filled in, and where.
_GREEN = torch.tensor(
    [[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]]
)
_IN_ROW = torch.tensor(
    [[0, 0, 0.5, 0, 0], [0, -1, 0, -1, 0], [-1, 4, 5, 4, -1], [0, -1, 0, -1, 0], [0, 0, 0.5, 0, 0]]
)
_ACROSS = torch.tensor(
    [[0, 0, -3, 0, 0], [0, 4, 0, 4, 0], [-3, 0, 12, 0, -3], [0, 4, 0, 4, 0], [0, 0, -3, 0, 0]]
)
_FILTERS = (_GREEN / 8, _ACROSS / 16, _IN_ROW / 8, _IN_ROW.T / 8)


def malvar(raw: Tensor) -> Tensor:
    """(B, 3, H, W) of a mosaic (B, 1, H, W), linear in it (Malvar, He and Cutler 2004)."""
    red, blue = _filters(*raw.shape[-2:])
    green, across, in_row, in_column = (_convolved(raw, kernel) for kernel in _FILTERS)
    red_rows = (torch.arange(raw.shape[-2]) % 2 == 0)[:, None]
    r = torch.where(blue, across, torch.where(red_rows, in_row, in_column))
    b = torch.where(red, across, torch.where(red_rows, in_column, in_row))
    g = torch.where(red | blue, green, raw)
    return torch.cat([torch.where(red, raw, r), g, torch.where(blue, raw, b)], 1)


def directed(raw: Tensor) -> Tensor:
    """(B, 3, H, W) of a mosaic (B, 1, H, W), green along edges, the others by their differences
    from it (Hamilton and Adams 1997)."""
    red, blue = _filters(*raw.shape[-2:])
    along, steps = [], []
    for turn in (lambda k: k, lambda k: k.T):
        mean = _convolved(raw, turn(torch.tensor([[0.5, 0, 0.5]])))
        second = _convolved(raw, turn(torch.tensor([[-1.0, 0, 2, 0, -1]])))
        slope = _convolved(raw, turn(torch.tensor([[1.0, 0, -1]]))).abs()
        along.append(mean + second / 4)
        steps.append(slope + second.abs())
    green = torch.where(steps[0] < steps[1], along[0], along[1])
    green = torch.where(steps[0] == steps[1], (along[0] + along[1]) / 2, green)
    green = torch.where(red | blue, green, raw)
    r, b = (_convolved((raw - green) * where, _BOX) + green for where in (red, blue))
    return torch.cat([r, green, b], 1)


DEMOSAICERS = (bilinear, malvar, directed)


def _compressed(shown: Tensor, c: Cameras) -> Tensor:
    """(B, 3, H, W) after the camera's JPEG and perhaps another one of half-size colour."""
    pixels = (PEAK * shown.clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    first = zip(pixels, c.quality.tolist(), c.subsampled.tolist(), c.resaved.tolist(), strict=True)
    out = []
    for picture, quality, subsampled, resaved in first:
        picture = _jpeg(picture, quality, 2 * subsampled)
        out.append(_jpeg(picture, resaved, 2) if resaved else picture)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / PEAK


def _jpeg(pixels: np.ndarray, quality: int, subsampling: int) -> np.ndarray:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(PIL.Image.open(file))


# -- what is told of it --------------------------------------------------------------------


def described(clean: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of noise in pictures (B, 3, H, W): its level (B,), its spectrum (B, 2, OCTAVES) as in
    `core.coloured.Told`, and the knots (B, K) of its curve over tones, whose mean square over the
    picture is 1."""
    noise = noisy - clean
    sigma = noise.square().mean((1, 2, 3)).sqrt()
    axes = torch.einsum("ac,bchw->bahw", AXES, noise)
    height, width = noise.shape[-2:]
    power = torch.fft.fft2(axes).abs().square() / (height * width)
    band = (octave_of(height, width) + 0.5).floor().clamp(0, OCTAVES - 1)
    band[0, 0] = OCTAVES  # the mean is no noise of any octave
    bands = torch.stack([(band == j).float() for j in range(OCTAVES)])
    means = torch.einsum("bahw,jhw->baj", power, bands / bands.sum((1, 2), keepdim=True))
    levels = torch.stack([means[:, 0], means[:, 1:].mean(1)], 1).sqrt()
    return sigma, said(levels / sigma.clamp_min(1e-6)[:, None, None]), _tone_curve(noisy, noise)


def _tone_curve(noisy: Tensor, noise: Tensor, knots: int = 5) -> Tensor:
    """Least squares of the noise's power by hat functions of the tone, drawn towards evenness
    where a tone has few pixels."""
    tone = local_tone(noisy).flatten(1).clamp(0, 1) * (knots - 1)  # (B, N)
    hats = (1 - (tone[..., None] - torch.arange(knots)).abs()).clamp_min(0)  # (B, N, K)
    power = noise.square().mean(1).flatten(1)
    mean = power.mean(1, keepdim=True).clamp_min(1e-12)
    few = 100.0  # pixels
    inner = hats.mT @ hats + few * torch.eye(knots)
    wanted = (hats.mT @ (power / mean)[..., None])[..., 0] + few
    variance = torch.linalg.solve(inner, wanted).clamp(0.05, 20)
    spread = variance.sqrt()
    here = curve(local_tone(noisy), spread).square().mean((1, 2, 3))
    return spread / here.sqrt()[:, None]
