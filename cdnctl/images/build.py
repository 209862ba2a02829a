"""What all formats share: the checks before a picture is decoded, and its making afterwards."""

from __future__ import annotations

import io
import math
import struct
from contextlib import suppress
from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageCms

from cdnctl.errors import ImageError
from cdnctl.images.image import Image, Metadata
from cdnctl.images.metadata import turned_exif, turned_xmp, upright_xmp

MEGAPIXEL = 1_000_000

MAX_PIXELS = 250 * MEGAPIXEL
"""Pictures with more pixels than this are refused before they are decoded, if nothing else is
said: they are hours of work for a CPU, which a file of a few kilobytes may ask for."""

# Deflate packs 1032 bytes, so 8256 pixels of one bit, into one byte; LZW and zstd some more.
_MAX_PIXELS_PER_BYTE = 20_000

PIL.Image.MAX_IMAGE_PIXELS = None  # sizes are checked here, by what the caller allows


def check_size(width: int, height: int, max_pixels: int, data: bytes | None = None) -> None:
    """Refuse a size that a header claims, before memory is set aside for it.

    Args:
        width: Pixels.
        height: Pixels.
        max_pixels: Of the whole picture.
        data: The file, where its coding cannot pack any number of pixels into a few bytes.
    """
    if width < 1 or height < 1:
        raise ImageError("it has no pixels")
    if data is not None and width * height > _MAX_PIXELS_PER_BYTE * len(data):
        raise ImageError(
            f"it claims {width} x {height} pixels, which {len(data)} bytes cannot hold; "
            "the file is damaged"
        )
    if width * height > max_pixels:
        raise ImageError(
            f"it has {width} x {height} pixels, more than the limit of "
            f"{max_pixels / MEGAPIXEL:g} megapixels; cut it into tiles, or raise the limit: "
            f"denoise, classify and explain take --max-megapixels "
            f"{math.ceil(width * height / MEGAPIXEL)}"
        )


def check_frames(frames: int) -> None:
    if frames != 1:
        raise ImageError(
            f"it holds {frames} frames or pages, not one picture; denoise takes stacks (TIFF, "
            f".npy) and animations with --pages all (or some, such as 1:{frames}); for all else "
            "save each one as a file of its own"
        )


def make_image(
    samples: np.ndarray,
    *,
    orientation: int = 1,
    metadata: Metadata,
    notes: list[str],
    lossless: bool = True,
    suffix: str = ".png",
) -> Image:
    """Make an `Image` of samples (H, W) or (H, W, 1 to 4) in the file's dtype."""
    samples = samples[:, :, None] if samples.ndim == 2 else samples
    samples = upright(samples, orientation)
    if orientation != 1 and metadata.xmp:  # some programs look there
        metadata = replace(metadata, xmp=upright_xmp(metadata.xmp))
    if orientation >= 5:
        metadata = _turned(metadata)
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        raise ImageError("it has samples that are not finite numbers (NaN or infinity); mend it")
    channels = samples.shape[2]
    alpha = np.ascontiguousarray(samples[:, :, -1]) if channels in (2, 4) else None
    colour = samples if alpha is None else samples[:, :, :-1]
    hidden = None
    if alpha is not None:
        invisible = alpha == 0
        if invisible.any() and not invisible.all():
            hidden = colour[invisible]
            colour = colour.copy()
            colour[invisible] = colour[_nearest(invisible)]
    colour = np.ascontiguousarray(colour)
    return Image(colour, alpha, metadata, tuple(notes), hidden, lossless, suffix)


def _nearest(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each True pixel of the (H, W) mask, row and column of the nearest False one."""
    # Slow to import and seldom needed.
    from scipy.ndimage import distance_transform_edt

    rows, columns = distance_transform_edt(mask, return_distances=False, return_indices=True)
    return rows[mask], columns[mask]


def as_stored(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Undo `upright`."""
    return upright(samples, {6: 8, 8: 6}.get(orientation, orientation))


def _turned(metadata: Metadata) -> Metadata:
    """Return what a file says of its picture when width and height have been exchanged."""
    exif, xmp, dpi = metadata.exif, metadata.xmp, metadata.dpi
    if exif:
        with suppress(KeyError, struct.error):  # damaged directories that Pillow lets pass
            exif = turned_exif(exif)
    return replace(metadata, exif=exif, xmp=turned_xmp(xmp) if xmp else None, dpi=dpi and dpi[::-1])


def upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation, 1 to 8, to samples (H, W, C)."""
    if orientation >= 5:
        samples = samples.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        samples = samples[::-1]
    if orientation in (2, 3, 6, 7):
        samples = samples[:, ::-1]
    return np.ascontiguousarray(samples)


def cmyk_to_rgb(picture: PIL.Image.Image, icc: bytes | None) -> PIL.Image.Image:
    """Convert to sRGB by the picture's own ICC profile, plainly where it has no usable one."""
    try:
        profile = PIL.ImageCms.ImageCmsProfile(io.BytesIO(icc or b""))
        srgb = PIL.ImageCms.createProfile("sRGB")
        converted = PIL.ImageCms.profileToProfile(picture, profile, srgb, outputMode="RGB")
        if converted is not None:
            return converted
    except (OSError, PIL.ImageCms.PyCMSError):
        pass
    return picture.convert("RGB")


def brief(error: Exception) -> str:
    """Return what an error says on one line of bearable length; decoders quote what they like."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"
