"""A simulated camera: what a scene becomes on its way into a photograph, noise included.

::

    display picture ─▶ linear light ─▶ lens ─▶ colours of the sensor, white balance undone
      ─▶ mosaic ─▶ photons and read noise ─▶ white balance ─▶ demosaicing ─▶ colours of the display
      ─▶ tone curve ─▶ JPEG

Noise is white and independent of its neighbours on the sensor alone. Demosaicing makes it wide
and mixes the channels, the tone curve makes it strong in the shadows, and JPEG takes its finest
part. All pictures are float64 (H, W, 3) in [0, 1].
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from scipy.ndimage import convolve, gaussian_filter

Array = NDArray[np.floating[Any]]

_DISPLAY_GAMMA = 2.4  # of sRGB's curve beside its straight foot
_OVERLAP = np.array([[0.62, 0.31, 0.07], [0.14, 0.71, 0.15], [0.04, 0.29, 0.67]])
"""Linear display colours to those of a sensor whose filters overlap. Rows sum to 1."""

_LUMA = np.array([0.299, 0.587, 0.114])  # as in JPEG

# Malvar, He and Cutler 2004: bilinear interpolation corrected by the Laplacian of the channel
# that was measured at the pixel. Eighths. The names say what is filled in, and where.
_GREEN = (
    np.array(
        [[0, 0, -1, 0, 0], [0, 0, 2, 0, 0], [-1, 2, 4, 2, -1], [0, 0, 2, 0, 0], [0, 0, -1, 0, 0]]
    )
    / 8
)
_IN_ROW = (
    np.array(
        [
            [0, 0, 0.5, 0, 0],
            [0, -1, 0, -1, 0],
            [-1, 4, 5, 4, -1],
            [0, -1, 0, -1, 0],
            [0, 0, 0.5, 0, 0],
        ]
    )
    / 8
)
_ACROSS = (
    np.array(
        [
            [0, 0, -1.5, 0, 0],
            [0, 2, 0, 2, 0],
            [-1.5, 0, 6, 0, -1.5],
            [0, 2, 0, 2, 0],
            [0, 0, -1.5, 0, 0],
        ]
    )
    / 8
)


@dataclass(frozen=True)
class Camera:
    """How a photograph is made. The defaults are a camera in fair light.

    lens: standard deviation of its blur in pixels. Without any, demosaicing invents colours.
    gain: variance of a pixel of the sensor per unit of light, so 1 / full well in electrons.
    read: standard deviation of what is added in the dark, in units of white.
    red, blue: factors of the white balance; green has 1.
    overlap: of the filters on its pixels, whose undoing makes colour noise stronger; 0 to 1.
    demosaic: "malvar" or "bilinear".
    contrast: of the tone curve around its middle, on top of sRGB's; 0 is none.
    smooth: standard deviation in pixels of the blur by which cameras hide colour noise.
    quality, subsampling: of the JPEG (0: 4:4:4, 2: 4:2:0); quality None: no JPEG and no rounding.
    resaved: quality of a second JPEG, of 4:2:0, as programs and web sites make it.
    """

    lens: float = 0.7
    gain: float = 5e-4
    read: float = 1e-3
    red: float = 2.0
    blue: float = 1.6
    overlap: float = 0.7
    demosaic: str = "malvar"
    contrast: float = 0.0
    smooth: float = 0.0
    quality: int | None = 95
    subsampling: int = 0
    resaved: int | None = None

    @staticmethod
    def random(rng: np.random.Generator) -> Camera:
        """A camera between base sensitivity and the highest that people use."""
        gain = float(10 ** rng.uniform(-4.6, -2.8))
        return Camera(
            lens=float(rng.uniform(0.4, 1.2)),
            gain=gain,
            read=float(gain * 10 ** rng.uniform(0.3, 0.9)),  # 2 to 8 electrons
            red=float(rng.uniform(1.4, 2.4)),
            blue=float(rng.uniform(1.3, 2.2)),
            overlap=float(rng.uniform(0, 1)),
            demosaic=str(rng.choice(["malvar", "bilinear"])),
            contrast=float(rng.uniform(0, 0.6)),
            smooth=float(max(0, rng.uniform(-2, 2))),
            quality=int(rng.integers(85, 99)),
            subsampling=int(rng.choice([0, 2])),
            resaved=int(rng.integers(70, 96)) if rng.random() < 0.5 else None,
        )


def to_linear(display: Array) -> Array:
    """Light of sRGB values."""
    foot = display <= 0.04045
    return np.where(foot, display / 12.92, ((display + 0.055) / 1.055) ** _DISPLAY_GAMMA)


def to_display(linear: Array) -> Array:
    """sRGB values of light, which is clipped to what can be shown."""
    linear = np.clip(linear, 0, 1)
    foot = linear <= 0.0031308
    curve = 1.055 * np.maximum(linear, 0.0031308) ** (1 / _DISPLAY_GAMMA) - 0.055
    return np.where(foot, linear * 12.92, curve)


def mosaic(picture: Array) -> Array:
    """What a Bayer sensor (red first) sees of (H, W, 3): (H, W)."""
    raw = picture[:, :, 1].copy()
    raw[::2, ::2] = picture[::2, ::2, 0]
    raw[1::2, 1::2] = picture[1::2, 1::2, 2]
    return raw


def demosaic(raw: Array, how: str = "malvar") -> Array:
    """(H, W, 3) of a Bayer sensor's (H, W), linear in it. What was measured stays as it is."""
    height, width = raw.shape
    row, column = np.ogrid[:height, :width]
    red = (row % 2 == 0) & (column % 2 == 0)
    blue = (row % 2 == 1) & (column % 2 == 1)
    if how == "bilinear":
        cross = np.array([[0, 1, 0], [1, 4, 1], [0, 1, 0]]) / 4
        box = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 4
        planes = (red, box), (~(red | blue), cross), (blue, box)
        # Mirrored without the border repeated, pixels keep their filter.
        return np.stack([convolve(raw * m, k, mode="mirror") for m, k in planes], 2)
    if how != "malvar":
        raise ValueError(f"demosaic is {how!r}, but must be 'malvar' or 'bilinear'")
    green, across = (convolve(raw, kernel, mode="mirror") for kernel in (_GREEN, _ACROSS))
    in_row, in_column = (convolve(raw, kernel, mode="mirror") for kernel in (_IN_ROW, _IN_ROW.T))
    on_red_rows = row % 2 == 0
    r = np.where(red, raw, np.where(blue, across, np.where(on_red_rows, in_row, in_column)))
    g = np.where(red | blue, green, raw)
    b = np.where(blue, raw, np.where(red, across, np.where(on_red_rows, in_column, in_row)))
    return np.stack([r, g, b], 2)


def _contrast(display: Array, amount: float) -> Array:
    """Blend with a curve of S shape that keeps black, middle and white."""
    return (1 - amount) * display + amount * display**2 * (3 - 2 * display)


def _jpeg(display: Array, quality: int, subsampling: int) -> Array:
    file = io.BytesIO()
    pixels = np.rint(np.clip(display, 0, 1) * 255).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(PIL.Image.open(file), np.float64) / 255


def photograph(scene: Array, camera: Camera, rng: np.random.Generator | None = None) -> Array:
    """A picture (H, W, 3) of sRGB values as the camera takes it; without rng, without noise."""
    balance = np.array([camera.red, 1.0, camera.blue])
    linear = gaussian_filter(to_linear(scene), (camera.lens, camera.lens, 0), mode="mirror")
    colours = (1 - camera.overlap) * np.eye(3) + camera.overlap * _OVERLAP
    sensor = linear @ colours.T / balance
    raw = mosaic(sensor)
    if rng is not None:
        raw = camera.gain * rng.poisson(raw / camera.gain) + camera.read * rng.standard_normal(
            raw.shape
        )
    # Demosaicing works on balanced values, where gray surfaces have no mosaic.
    raw = raw * mosaic(np.broadcast_to(balance, scene.shape))
    linear = np.clip(demosaic(raw, camera.demosaic), 0, 1) @ np.linalg.inv(colours).T
    display = _contrast(to_display(linear), camera.contrast)
    if camera.smooth:
        luma = display @ _LUMA
        colour = display - luma[:, :, None]
        blurred = gaussian_filter(colour, (camera.smooth, camera.smooth, 0), mode="mirror")
        display = np.clip(blurred + luma[:, :, None], 0, 1)
    if camera.quality is not None:
        display = _jpeg(display, camera.quality, camera.subsampling)
    return display if camera.resaved is None else _jpeg(display, camera.resaved, 2)


def pair(scene: Array, camera: Camera, rng: np.random.Generator) -> tuple[Array, Array]:
    """A photograph without noise and without JPEG, and the same as the camera gives it."""
    return photograph(scene, replace(camera, quality=None, resaved=None)), photograph(
        scene, camera, rng
    )
